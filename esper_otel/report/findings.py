"""Answers the first questions about a run: how it ended, what went wrong, and where the time went."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from esper_otel.frames.frame import FINE, FLOAT32_BOUND
from esper_otel.frames.numbers import finite
from esper_otel.hours.output import bar_lines
from esper_otel.leyline import messages
from esper_otel.leyline.episodes import Episode, Episodes
from esper_otel.leyline.risk import LOSS_STEP, RULES, Rule, Signal, signals
from esper_otel.report.recording import Recording, StepRow, names_of
from esper_otel.schema import METRICS, Stage

_INSIDE = {"forward": "esper.forward_ms", "backward": "esper.backward_ms", "optimizer": "esper.optimizer_ms"}
_PHASES = {"input wait": "input_wait_ms", **_INSIDE, "hook": "hook_latency_ms", "finalize": "kasmina.finalize_ms"}
PHASES = (*_PHASES, "rest")
_BEFORE = 10
_FEWEST = 3
_SELDOM = 0.1
_MOST_NAMES = 12
_MOST_LINES = 20
_LEVELS = ("HIGH", "WARN", "NOTE")
_TIMES_THE_NOISE = 3
_LATENCY_BUDGET_MS = 10.0

# Signals that mean that something has gone wrong. A busy CPU is not one of them, since it is normal during training.
_ALARMS = {rule.name: rule for rule in RULES if (rule.level, rule.route) == ("HIGH", "PAUSE")}
# A black box uses the catalogue's names, packets use these keys.
_KEYS = {metric.name: metric.key for metric in METRICS if metric.level == "step" and metric.key}
_STAGES: dict[float, str] = {stage.value: stage.name for stage in Stage}


class Finding(NamedTuple):
    """A question about the run and its answer.

    Attributes:
        question: the question.
        answer: the answer, in a sentence or two.
        is_bad: whether the answer means that something is wrong.
        step: the step that it is about.
        lines: the rest of the answer, one line for each item.
    """

    question: str
    answer: str
    is_bad: bool = False
    step: int | None = None
    lines: tuple[str, ...] = ()


def findings(recording: Recording) -> list[Finding]:
    """Returns findings about the end, what went wrong, signals, the loss, the time, and the seeds, in this order.

    The hours are about the whole run, everything else about the recorded attempt. If the
    recording is of a file that could not be read in full, this comes first.
    """
    unread = [Finding("Was everything read?", recording.unread, True)] if recording.unread else []
    if not recording.rows:
        return [*unread, Finding("What was recorded?", "No step was recorded.", True)]
    bad = first_bad(recording)
    return [
        *unread,
        _end(recording),
        _first_bad(recording, bad),
        _raised(recording),
        _learning(recording),
        _slowest(recording),
        *_slow_rank(recording),
        *_hours(recording),
        _seed(recording, bad),
    ]


def _hours(recording: Recording) -> list[Finding]:
    """Returns which part of the run's wall time was what, over all its attempts, if that is known."""
    hours = recording.hours
    if hours is None or not hours.run.parts:
        return []
    answer, *lines = bar_lines(hours.run)
    return [Finding("Where did the hours go?", f"{answer}.", lines=tuple(lines))]


def episodes(recording: Recording) -> tuple[Episode, ...]:
    """Returns the episodes of the recording's risk signals: the most serious ones first, otherwise by their steps."""
    found = Episodes()
    for row, raised in zip(recording.rows, _signals(recording), strict=True):
        found.note(row.step, raised, time_s=row.unix_s)
    if recording.ended:
        found.end()
    return tuple(sorted(found.all(), key=lambda each: _LEVELS.index(each.level)))


@lru_cache(maxsize=1)  # several findings need them
def _signals(recording: Recording) -> tuple[tuple[Signal, ...], ...]:
    """Returns the risk signals of each row."""
    found = []
    loss_before: float | None = None
    for row in recording.rows:
        values = row.values
        found.append(signals(_packet(values, recording.device), loss_before=loss_before))
        loss_before = values.get("loss", loss_before)
    return tuple(found)


def first_bad(recording: Recording) -> tuple[int, str] | None:
    """Returns the index of the first step that went wrong, and the reason.

    A loss that is not finite takes precedence, then a step that raised an exception, then a signal that pauses the run
    and is unusual for it. Signals that occur all through a run, such as for steps of half a second, do not count.
    """
    failed: tuple[int, str] | None = None
    alarm: tuple[int, str] | None = None
    before: deque[Mapping[str, float]] = deque(maxlen=_BEFORE)
    seen: Counter[str] = Counter()
    for place, (row, raised) in enumerate(zip(recording.rows, _signals(recording), strict=True)):
        values = row.values
        loss = values.get("loss")
        if loss is not None and math.isfinite(loss) and abs(loss) >= FLOAT32_BOUND:
            return place, f"the loss is {loss:g}, which is too large for a packet"
        if loss is not None and not math.isfinite(loss):
            others = [name for name, value in values.items() if not math.isfinite(value) and name != "loss"]
            return place, f"the loss is {loss:g}" + (
                f"; not finite either: {_listed(sorted(others))}" if others else ""
            )
        if failed is None and values.get("esper.step.failed"):
            failed = place, "it raised an exception"
        found = [each for each in raised if each.name in _ALARMS]
        for signal in found:
            if alarm is None and _is_unusual(_ALARMS[signal.name], values, before, seen[signal.name] / (place or 1)):
                alarm = place, f"{signal.name}: {signal.reason}"
        seen.update(signal.name for signal in found)
        before.append(values)
    return failed or alarm


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _mean(values: Iterable[float]) -> float:
    """Returns the mean; unlike ``statistics.fmean`` it also works if the sum is too large for a double."""
    each = list(values)
    return math.fsum(value / len(each) for value in each)


def _is_unusual(
    rule: Rule, values: Mapping[str, float], before: Sequence[Mapping[str, float]], share_before: float
) -> bool:
    """Whether a signal is unusual for this run.

    Args:
        rule: the signal's rule.
        values: values of the step that has the signal.
        before: values of the steps just before it.
        share_before: the share of all earlier steps that had the signal.
    """
    if rule.name == "isolation_violations":
        return True
    metric = "loss" if rule.metric == LOSS_STEP else rule.metric
    known = [each[metric] for each in before if math.isfinite(each.get(metric, math.nan))]
    if len(known) < _FEWEST:  # the first steps load, compile and warm up
        return False
    if rule.metric == LOSS_STEP:
        largest = max(abs(later - earlier) for earlier, later in pairwise(known))
        return "loss" in values and values["loss"] - known[-1] > _TIMES_THE_NOISE * largest
    if rule.is_inclusive:  # a share of a device near its limit cannot double, so compare how often the signal occurs
        return share_before <= _SELDOM
    return values[metric] > 2 * median(known)


def _packet(values: Mapping[str, float], device: str) -> messages.SystemStatePacket:
    """Makes a packet with only the fields that the risk table reads."""
    known = {_KEYS.get(name, name): value for name, value in values.items() if finite(value) is not None}
    loss = known.get("loss", known.get("training_loss", 0.0))
    hardware = messages.HardwareContext(device_type=device)
    return messages.SystemStatePacket(training_metrics=known, validation_loss=loss, hardware_context=hardware)


def _end(recording: Recording) -> Finding:
    first, last = recording.rows[0], recording.rows[-1]
    of_rank = f" of rank {recording.rank} of {recording.world_size}" if recording.world_size > 1 else ""
    what = f"Steps {first.step} to {last.step}{of_rank} were recorded, over {last.unix_s - first.unix_s:.3g} s."
    if recording.earlier:
        what = f"It was resumed: this is attempt {len(recording.earlier) + 1}, and the charts have those before. {what}"
    if not recording.ended:
        return Finding("How did it end?", f"{what} It is not known whether the run has ended.")
    return Finding(
        "How did it end?", f"{what} The run ended: {recording.ended}.", recording.ended not in FINE, last.step
    )


def _first_bad(recording: Recording, bad: tuple[int, str] | None) -> Finding:
    question = "Which step went wrong first?"
    if bad is None:
        return Finding(
            question, "None: every loss is finite, no step raised an exception, and no alarm is unusual for this run."
        )
    place, why = bad
    row = recording.rows[place]
    answer = f"Step {row.step} (epoch {row.epoch}): {why}."
    before = [each.values for each in recording.rows[max(place - _BEFORE, 0) : place]]
    for name in ("gradient_norm", "optimizer_lr", "esper.optimizer.lr"):
        known = [values[name] for values in before if math.isfinite(values.get(name, math.nan))]
        if len(known) >= 3 and known[-1] > 2 * median(known[:-1]):
            usual = median(known[:-1])
            times = f"{known[-1] / usual:.3g} times its usual value" if usual > 0 else f"usually {usual:.4g}"
            answer += f" {name} was {known[-1]:.4g} in the step before, {times}."
    return Finding(question, answer, True, row.step)


def _raised(recording: Recording) -> Finding:
    question = "Which risk signals were raised?"
    found = episodes(recording)
    if not found:
        return Finding(question, "None.")
    counts = Counter(each.level.lower() for each in found)
    levels = ", ".join(f"{counts[level]} {level}" for level in map(str.lower, _LEVELS) if counts[level])
    lines = [f"{each.level.lower()}: {each}" for each in found[:_MOST_LINES]]
    if len(found) > _MOST_LINES:
        lines.append(f"and {len(found) - _MOST_LINES} more")
    return Finding(question, f"Episodes: {levels}.", step=found[0].first, lines=tuple(lines))


def _learning(recording: Recording) -> Finding:
    losses = [
        (row.step, row.values["loss"]) for row in recording.rows if math.isfinite(row.values.get("loss", math.nan))
    ]
    question = "Was it learning?"
    if len(losses) < 2:
        return Finding(question, "Too few losses were recorded to answer this.")
    size = max(len(losses) // 5, 1)
    early, late = _mean(loss for _, loss in losses[:size]), _mean(loss for _, loss in losses[-size:])
    best_step, best = min(losses, key=lambda pair: pair[1])
    trend = "fell" if late < early else "rose"
    return Finding(
        question,
        f"The loss {trend} from {early:.4g} to {late:.4g} (means of the first and last fifth); "
        f"the lowest was {best:.4g}, in step {best_step}.",
        late > early,
    )


def phases(row: StepRow) -> dict[str, float]:
    """Returns the time of a step in milliseconds, by phase; phases without a value are left out.

    Forward, backward and optimizer are left out, too, where they take longer than there is room for in the step: they
    are a GPU's own times then, which may go on after it.
    """
    values = row.values
    found = {phase: values[name] for phase, name in _PHASES.items() if math.isfinite(values.get(name, math.nan))}
    step_ms = values.get("step_latency_ms", math.nan)
    rest = max(step_ms - found.get("hook", 0.0) - found.get("finalize", 0.0), 0.0) if math.isfinite(step_ms) else 0.0
    inside = sum(found.get(phase, 0.0) for phase in _INSIDE)
    if inside > rest:
        found = {phase: ms for phase, ms in found.items() if phase not in _INSIDE}
        inside = 0.0
    if math.isfinite(step_ms):
        found["rest"] = rest - inside
    return found


def _slowest(recording: Recording) -> Finding:
    question = "Where does the time go?"
    timed = [(row, phases(row)) for row in recording.rows]
    timed = [(row, parts) for row, parts in timed if parts]
    if not timed:
        return Finding(question, "No durations were recorded.")
    means = {phase: _mean(parts.get(phase, 0.0) for _, parts in timed) for phase in PHASES}
    total = sum(means.values())
    phase = max(means, key=means.__getitem__)
    shares = ", ".join(f"{name} {means[name]:.3g} ms" for name in PHASES if means[name])
    row, parts = max(timed, key=lambda pair: sum(pair[1].values()))
    worst = max(parts, key=parts.__getitem__)
    share = means[phase] / total if total else 0.0
    return Finding(
        question,
        f"Mostly into {phase} ({share:.0%}). Means per step: {shares}. The slowest step is {row.step}, with "
        f"{sum(parts.values()):.4g} ms, mostly {worst}.",
        phase == "input wait" and share > 0.3,
        row.step,
    )


def _slow_rank(recording: Recording) -> Iterator[Finding]:
    ranks = recording.ranks
    if ranks is None or not ranks.steps:
        return
    question = "Which rank slows down the others?"
    over = f"over steps {ranks.first_step} to {ranks.last_step} of all ranks that are known ({len(ranks.ranks)})"
    slowest = next((each for each in ranks.ranks if each.rank == ranks.slowest_rank), None)
    others = [each.cycle_ms for each in ranks.ranks if each is not slowest and each.cycle_ms is not None]
    if slowest is None or slowest.cycle_ms is None or not others:
        yield Finding(question, f"None, {over}.")
        return
    yield Finding(
        question,
        f"Rank {slowest.rank}, most of all in {ranks.slowest_by}: a step and its wait take {slowest.cycle_ms:.4g} ms, "
        f"and {_mean(others):.4g} ms on the others, {over}.",
        is_bad=True,
    )


def _seed(recording: Recording, bad: tuple[int, str] | None) -> Finding:
    question = "Which seed is in trouble?"
    last: dict[str, dict[str, float]] = {}
    violations: dict[str, float] = {}
    slowest: dict[str, tuple[float, int]] = {}
    changes: list[tuple[int, int, str, float]] = []
    for place, row in enumerate(recording.rows):
        for seed_id, cells in row.seeds.items():
            before = last.setdefault(seed_id, {})
            if "stage" in cells and before.get("stage") not in {None, cells["stage"]}:
                changes.append((place, row.step, seed_id, cells["stage"]))
            violations[seed_id] = max(violations.get(seed_id, 0.0), cells.get("isolation_violations", 0.0))
            latency = cells.get("last_kernel_latency_ms", math.nan)
            if latency > slowest.get(seed_id, (0.0, 0))[0]:
                slowest[seed_id] = latency, row.step
            before.update(cells)
    if not last:
        return Finding(question, "No seed was recorded.")
    answers = []
    worst = max(violations, key=violations.__getitem__)
    if violations[worst] > 0:
        answers.append(f"{worst} violated gradient isolation {violations[worst]:g} times.")
    late = max(slowest, key=lambda seed_id: slowest[seed_id][0], default=None)
    if late is not None and slowest[late][0] > _LATENCY_BUDGET_MS:
        answers.append(f"{late}'s kernel took {slowest[late][0]:.4g} ms in step {slowest[late][1]}.")
    if bad is not None:
        near = [change for change in changes if bad[0] - _BEFORE <= change[0] <= bad[0]]
        answers += [
            f"{seed_id} changed to {stage_name(stage)} in step {step}, "
            f"{bad[0] - place} steps before the run went wrong."
            for place, step, seed_id, stage in near[-3:]
        ]
    return Finding(
        question, " ".join(answers) or f"None: none of the {len(last)} seeds shows a problem.", bool(answers)
    )


def stage_name(number: float) -> str:
    """Returns the stage's name, or "stage N" for an unknown number."""
    return _STAGES.get(number) or f"stage {number:g}"


def _typical(name: str, values: Sequence[float]) -> float:
    """Returns the mean; of a rate that of the times, since a few very quick steps would outweigh all others."""
    if name == "samples_per_s" and min(values) > 0:
        return 1 / _mean(1 / value for value in values)
    return _mean(values)


def compared(one: Recording, other: Recording) -> list[Finding]:
    """Compares two runs at the steps that both have, and names the values of the other that are not finite."""
    name_of_other = names_of(one, other)[1]
    odd = _not_finite(name_of_other, other)
    by_step = {row.step: row.values for row in other.rows}
    pairs = [(row.step, row.values, by_step[row.step]) for row in one.rows if row.step in by_step]
    question = f"How does it compare with {name_of_other}?"
    if not pairs:
        return [Finding(question, " ".join(["The two runs have no steps in common.", *odd]))]
    answers = [f"{len(pairs)} steps are in both runs, from {pairs[0][0]} to {pairs[-1][0]}."]
    for name, better in (
        ("loss", "lower"),
        ("esper.validation.loss", "lower"),
        ("accuracy", "higher"),
        ("esper.validation.accuracy", "higher"),
        ("samples_per_s", "higher"),
        ("step_latency_ms", "lower"),
    ):
        both = [(step, mine[name], theirs[name]) for step, mine, theirs in pairs if _finite(name, mine, theirs)]
        if len(both) >= 2:
            tail = both[-max(len(both) // 5, 1) :]
            mine, theirs = (_typical(name, [each[place] for each in tail]) for place in (1, 2))
            is_better = (mine < theirs) == (better == "lower")
            word = "the same" if mine == theirs else "better" if is_better else "worse"
            is_whole = both[-1][0] == max(step for step, *values in pairs if all(name in each for each in values))
            where = "at the end" if is_whole else f"up to step {both[-1][0]}, the last in which both are finite"
            answers.append(f"{name} {where}: {mine:.4g}, compared with {theirs:.4g} ({word}).")
    apart = next(_apart(pairs), None)
    if apart is not None:
        answers.append(f"The losses first differ {apart[1]}.")
    return [Finding(question, " ".join(answers + odd), False, None if apart is None else apart[0])]


def _not_finite(title: str, recording: Recording) -> list[str]:
    """Returns a sentence about the values that are not finite; none if all are."""
    steps: dict[str, list[int]] = {}
    for row in recording.rows:
        for name, value in row.values.items():
            if not math.isfinite(value):
                steps.setdefault(name, []).append(row.step)
    if not steps:
        return []
    found = [
        f"{name} in {f'{len(of_name)} steps, first in step {of_name[0]}' if len(of_name) > 1 else f'step {of_name[0]}'}"
        for name, of_name in sorted(steps.items(), key=lambda each: (each[0] != "loss", each))
    ]
    return [f"Values of {title} that are not finite: {_listed(found)}."]


def _finite(name: str, *values: Mapping[str, float]) -> bool:
    return all(math.isfinite(each.get(name, math.nan)) for each in values)


def _apart(pairs: Sequence[tuple[int, Mapping[str, float], Mapping[str, float]]]) -> Iterator[tuple[int, str]]:
    """Yields the steps in which the losses differ much, and in words how."""
    for step, mine, theirs in pairs:
        one, other = mine.get("loss"), theirs.get("loss")
        if one is None or other is None:
            continue
        if math.isfinite(one) != math.isfinite(other):
            yield step, f"in step {step}: {one:.4g}, compared with {other:.4g}"
        elif math.isfinite(one) and abs(one - other) > 0.1 * max(abs(one), abs(other)):
            yield step, f"by more than a tenth in step {step}"
