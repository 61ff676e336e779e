"""Renders a recording as one HTML file that works offline, with the charts of the live page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from esper_otel.charts.document import PageContent, document
from esper_otel.charts.event_list import event_marks, events_html
from esper_otel.charts.groups import described
from esper_otel.charts.hours_section import hours_html
from esper_otel.charts.thinned import ChartStep, ThinnedSteps
from esper_otel.frames.frame import GUESSED_STEP, LAST_LOSS
from esper_otel.report.findings import Finding, compared, findings, first_bad, stage_name
from esper_otel.report.recording import EarlierAttempt, Recording, names_of
from esper_otel.schema import Stage
from esper_otel.text import printable

_MOST_BUCKETS = 2_000  # of a curve
_MADE = '<meta name="esper-otel-report"'
_BEGINNING = 4096  # bytes of a file that are searched for the mark above
_MOST_SHOWN = 2_000
_MOST_CHANGES = 100
_MOST_BARS = 60
_LAST_STEPS = 12
_NOT_DRAWN = {LAST_LOSS, "esper.epoch", "esper.global_step"}  # they repeat the loss and the axis

_STAGES = {float(stage.value) for stage in Stage}

Lives = dict[str, list[tuple[int, float]]]  # of each seed, from which step on it has been in which stage


def page(recording: Recording, other: Recording | None = None) -> str:
    """Renders the whole file.

    Args:
        recording: the run.
        other: another run to compare with.

    Raises:
        ConfigurationError: Bokeh is not installed.
    """
    both = [recording] if other is None else [recording, other]
    names = [recording.title] if other is None else list(names_of(recording, other))
    above = [f"<h1>{_shown(' and '.join(names))}</h1>"]
    of_each: list[str] = []
    for each, name in zip(both, names, strict=True):
        head = f"<h2>{_shown(name)}</h2>" if other else ""
        of_each.append(
            f"<section>{head}{_about(each)}{_answers(findings(each))}{_hours(each)}{_events(each)}</section>"
        )
    if other is None:
        above += of_each
    else:  # the comparison comes first: with what is found in each run, the charts would be far below
        above.append(f"<section>{_answers(compared(recording, other))}</section>")
    below = [] if other is None else of_each
    lives = _lives(recording)
    for each, name in zip(both, names, strict=True):
        of_name = f" of {name}" if other else ""
        below += [_seeds(lives if each is recording else _lives(each), of_name), _last_steps(each, of_name)]
    return document(
        PageContent(
            printable(recording.title, _MOST_SHOWN),
            _made_of(recording),
            ("".join(above), "".join(below)),
            _data(both, names, lives),
        ),
        needed_by="the page of a report",
    )


def is_page(path: Path, recording: Recording | None = None) -> bool:
    """Whether a file is a page that this module wrote; if a recording is given, whether it is that recording's page."""
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    return (_MADE if recording is None else _made_of(recording)).encode() in beginning


def _made_of(recording: Recording) -> str:
    """Returns the mark that identifies the page of a recording."""
    return f'{_MADE} content="{_shown(recording.source)}">'


def _shown(text: object) -> str:
    """Escapes untrusted text for the page's text or an attribute's value."""
    return escape(printable(text, _MOST_SHOWN))


# -- what the charts draw ----------------------------------------------------------------------------------


def _data(both: Sequence[Recording], names: Sequence[str], lives: Lives) -> dict[str, Any]:
    runs = []
    metrics: dict[str, None] = {}
    units = {name: unit for each in both[::-1] for name, unit in each.units.items()}
    for place, each in enumerate(both):
        thinned = ThinnedSteps(_MOST_BUCKETS)
        for number, (_, rows) in enumerate((*each.earlier, EarlierAttempt(each.attempt, each.rows)), 1):
            thinned.add((ChartStep(row.step, row.epoch, row.unix_s, row.values) for row in rows), number)
        series = thinned.series()
        metrics |= dict.fromkeys(name for name in series["metrics"] if name not in _NOT_DRAWN)
        runs.append({"id": str(place), "name": printable(names[place], _MOST_SHOWN), "series": series})
    bad = first_bad(both[0])
    step = None if bad is None else both[0].rows[bad[0]].step
    of = f"{names[0]}: " if len(both) > 1 else ""
    bars = [{"id": printable(seed_id, 80), "bars": list(_bars(both[0], lives[seed_id]))} for seed_id in sorted(lives)]
    shown = bars[-_MOST_BARS:]
    return {
        "runs": runs,
        "base": "1" if len(both) > 1 else "",
        "metrics": [each._asdict() for each in described(metrics, units)],
        "marks": []
        if step is None or step >= GUESSED_STEP
        else [{"step": step, "text": f"{of}step {step} went wrong"}],
        "events": event_marks(both[0].events),
        "seeds": shown,
        "seedsSaid": f"{of}{len(shown)} of {len(bars)} seeds",
        "stages": [Stage(number).name for number in range(max(Stage) + 1)],
    }


def _bars(recording: Recording, changes: Sequence[tuple[int, float]]) -> Iterator[tuple[int, int, int]]:
    """Yields the first step, the last step and the stage of each stretch of a seed's life."""
    last = recording.rows[-1].step
    for place, (first, stage) in enumerate(changes[:_MOST_CHANGES]):
        end = changes[place + 1][0] - 1 if place + 1 < len(changes) else last
        if max(first, end) < GUESSED_STEP:
            yield first, end, int(stage) if stage in _STAGES else Stage.UNKNOWN.value


# -- what stands above and below ---------------------------------------------------------------------------


def _about(recording: Recording) -> str:
    parts = [_dates(recording), _which(recording)]
    parts += [f"{what} {text}" for what, text in recording.about]
    if recording.ended:
        parts.append(f"ended: {recording.ended}")
    return f'<p class="sub">{_shown("; ".join(filter(None, parts)))}</p>'


def _which(recording: Recording) -> str:
    """Returns which attempt and which rank it is."""
    known = len(recording.earlier) + 1
    attempt = f"attempt {recording.attempt}" + (f", the newest of {known}" if known > 1 else "")
    return f"{attempt}, rank {recording.rank}" + (f" of {recording.world_size}" if recording.world_size > 1 else "")


def _dates(recording: Recording) -> str:
    if not recording.rows:
        return ""
    try:
        first, last = (datetime.fromtimestamp(recording.rows[place].unix_s, UTC) for place in (0, -1))
    except (OverflowError, ValueError, OSError):  # a time that no calendar has
        return ""
    end = "%H:%M:%S" if first.date() == last.date() else "%Y-%m-%d %H:%M:%S"
    return f"{first:%Y-%m-%d %H:%M:%S} to {last:{end}} UTC"


def _hours(recording: Recording) -> str:
    """Returns where the hours of the run went, if that is known."""
    return "" if recording.hours is None else f"<section>{hours_html(recording.hours)}</section>"


def _events(recording: Recording) -> str:
    """Returns a list of what happened in the run, if that is known."""
    html = events_html(recording.events, recording.events_left_out)
    return f'<section class="events">{html}</section>' if html else ""


def _answers(found: Iterable[Finding]) -> str:
    rows = []
    for each in found:
        answer = "<br>".join(map(_shown, (each.answer, *each.lines)))
        rows.append(f"<dt>{_shown(each.question)}</dt><dd{' class=bad' if each.is_bad else ''}>{answer}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _lives(recording: Recording) -> Lives:
    lives: Lives = {}
    for row in recording.rows:
        for seed_id, cells in row.seeds.items():
            stage = cells.get("stage")
            of_seed = lives.setdefault(seed_id, [])
            if stage is not None and (not of_seed or _differ(of_seed[-1][1], stage)):
                of_seed.append((row.step, stage))
    return lives


def _seeds(lives: Lives, of_name: str) -> str:
    if not lives:
        return ""
    rows = [
        f'<tr><td>{_shown(seed_id)}</td><td class="text">'
        + ", ".join(_shown(f"{stage_name(stage)} from {step}") for step, stage in changes[:_MOST_CHANGES])
        + "</td></tr>"
        for seed_id, changes in sorted(lives.items())
    ]
    return _table(f"Seeds{of_name}", "<th>seed</th><th>stages, from step</th>", rows[:200])


def _differ(one: float, other: float) -> bool:
    return one != other and not (math.isnan(one) and math.isnan(other))


def _last_steps(recording: Recording, of_name: str) -> str:
    names = [
        name
        for name in ("loss", "gradient_norm", "accuracy", "step_latency_ms", "input_wait_ms", "samples_per_s")
        if any(name in row.values for row in recording.rows)
    ]
    head = "".join(f"<th>{_shown(name)}</th>" for name in names)
    rows = []
    for row in recording.rows[-_LAST_STEPS:]:
        cells = "".join(f"<td>{row.values[name]:.5g}</td>" if name in row.values else "<td></td>" for name in names)
        rows.append(f"<tr><td>{_shown(row.step)}</td>{cells}</tr>")
    return _table(f"The last steps{of_name}", f"<th>step</th>{head}", rows)


def _table(title: str, head: str, rows: Sequence[str]) -> str:
    return (
        f'<section><h2>{_shown(title)}</h2><div class="scroll"><table class="plain"><tr>{head}</tr>{"".join(rows)}'
        "</table></div></section>"
    )
