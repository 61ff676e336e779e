"""Waits for the marked run at the gateway, and compares it with what was sent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from esper_otel.check.differences import differences, of_end, of_times, steps_in_words
from esper_otel.check.marked_run import EPOCH, FIRST_STEP, OUTCOME, RANKS, RETIRED, MarkedRun
from esper_otel.check.stages import QUIET_S, CheckStage, Difference, ReadBack
from esper_otel.errors import GatewayError, UnknownRun
from esper_otel.frames.frame import GUESSED_STEP
from esper_otel.leyline.packets import Packets, packets
from esper_otel.pull.client import TamiyoClient
from esper_otel.schema import METRICS

_AGAIN_S = 0.2
_REQUEST_S = 5.0
_OF_RESOURCE = "a resource processor or a grouping on the way deletes or changes the attribute {} of the Resource"
_NAMES = {metric.key: metric.name for metric in METRICS if metric.level == "step" and metric.key}
# Events to compare. Risk signals and the health of seeds are left out, since they depend on the gateway's settings.
_EVENTS = frozenset({"loss_nonfinite", "value_nonfinite", "value_invalid"})
_NEWEST = "something on the way keeps the newest value of each series only: an interval processor, or an aggregation"


def at_gateway(back: ReadBack, marked: MarkedRun, sent_s: float) -> CheckStage:
    """Checks how the run arrived at the gateway."""
    where = f"gateway {back.gateway}"
    mine = [packets(frame) for frames in marked.frames for frame in frames]
    try:
        with TamiyoClient(
            back.gateway or "", token_file=back.token_file, ca_file=back.ca_file, timeout_s=_REQUEST_S
        ) as client:
            found = _found(client, marked.run_id, mine, sent_s + back.timeout_s)
            delay_s = time.monotonic() - sent_s
            fault = next(_faults(mine, found), None) if found else _of_nothing(client, marked.run_id, back.timeout_s)
    except GatewayError as error:
        fix = "see whether it runs, whether the port is that of its gRPC, and whether a token or TLS is wanted"
        fault = Difference(str(error).removeprefix(f"{where}: "), fix)
    if fault is not None:
        return CheckStage(where, False, *fault)
    return CheckStage(
        where,
        True,
        f"{len(mine)} steps of {RANKS} ranks arrived complete after {delay_s:.2f} s: numbers, ranks and seeds as sent, "
        "times to the nanosecond, values as precise as packets are (float32), NaN as NaN, missing values still missing",
    )


def end_at_gateway(back: ReadBack, marked: MarkedRun) -> Difference | str:
    """Checks that the run's end and its number of ranks arrived, which the packets of steps do not have.

    Returns:
        What is different, or a sentence about what arrived.
    """
    deadline_s = time.monotonic() + back.timeout_s
    with TamiyoClient(
        back.gateway or "", token_file=back.token_file, ca_file=back.ca_file, timeout_s=_REQUEST_S
    ) as client:
        while True:
            runs = client.runs(marked.run_id)
            if not runs:
                return "the gateway is too old to say whether the run's end and esper.world_size arrive"
            sizes = sorted({run.world_size for run in runs} - {RANKS})
            if sizes:
                what = f"esper.world_size was {RANKS} and arrived as {sizes[0]}, or did not arrive"
                return Difference(what, _OF_RESOURCE.format("esper.world_size"))
            ends = [run.ended for run in runs]
            if ends == [OUTCOME] * RANKS:
                return "the run's end and its number of ranks arrived"
            if time.monotonic() + _AGAIN_S > deadline_s:
                return of_end({end for end in ends if end is not None} - {OUTCOME})
            time.sleep(_AGAIN_S)


def _found(client: TamiyoClient, run_id: str, mine: Sequence[Packets], deadline_s: float) -> list[Packets]:
    """Returns the newest revision of each step, once all have arrived unchanged or no more arrive."""
    newest: dict[tuple[int, int, str, int], Packets] = {}
    cursor = None
    quiet_from_s = deadline_s
    while time.monotonic() < min(deadline_s, quiet_from_s + QUIET_S):
        try:
            page = client.pull(run_id, cursor, wait_s=min(1.0, max(deadline_s - time.monotonic(), 0.0)))
        except UnknownRun:
            if _other_name(client, run_id):
                break
            time.sleep(_AGAIN_S)
            continue
        cursor = page.cursor
        if page:
            quiet_from_s = time.monotonic()
        for each in page:
            newest[each.attempt, each.rank, each.writer, each.state.timestamp_ns] = each
        if len(newest) >= len(mine) and next(_faults(mine, list(newest.values())), None) is None:
            break
    return list(newest.values())


def _other_name(client: TamiyoClient, run_id: str) -> str:
    """Returns the gateway's name for the run if that is not its id; it is then made from other Resource attributes."""
    return next((run.run_id for run in client.runs() if run_id in run.run_id and run.run_id != run_id), "")


def _of_nothing(client: TamiyoClient, run_id: str, timeout_s: float) -> Difference:
    """Explains why the run was not found; the gateway may have it under another name."""
    other = _other_name(client, run_id)
    if other:
        return Difference(
            f"esper.run.id did not arrive: the gateway calls the run {other!r}", _OF_RESOURCE.format("esper.run.id")
        )
    return Difference(
        f"nothing of run {run_id} arrived within {timeout_s:g} s, though the endpoint took it",
        "see the log of what stands between, a collector's exporter otlp_grpc/esper for instance; a processor that "
        "drops metrics, holds them back (interval) or deletes esper.run.id does this, too",
    )


def _faults(mine: Sequence[Packets], found: Sequence[Packets]) -> Iterator[Difference]:
    """Yields differences from what was sent, with possible causes. Only the first is reliable.

    Later checks assume that the earlier ones found no difference.
    """
    yield from _of_run(mine, found)
    yield from of_times(
        {(each.rank, each.state.timestamp_ns) for each in mine},
        {(each.rank, each.state.timestamp_ns) for each in found},
    )
    numbered = [each for each in found if each.step < GUESSED_STEP]
    if len(numbered) < len(found):
        yield _of_points("esper.global_step", mine, found, numbered)
    at = {(each.rank, each.state.timestamp_ns): each for each in found}
    pairs = [(each, at[place]) for each in mine if (place := (each.rank, each.state.timestamp_ns)) in at]
    for sent, came in pairs:
        if sent.step != came.step:
            yield Difference(
                f"step {sent.step} arrived as step {came.step}",
                "a filter on the way drops esper.global_step, or a transform changes it",
            )
    lost = [each for each in mine if (each.rank, each.state.timestamp_ns) not in at]
    if lost:
        yield _of_lost([each.step for each in lost], len(mine))
    of_epoch = [came for _, came in pairs if came.state.current_epoch == EPOCH]
    if len(of_epoch) < len(pairs):
        others = sorted({came.state.current_epoch for _, came in pairs} - {EPOCH})
        if others == [0]:
            yield _of_points("esper.epoch", mine, found, of_epoch)
        yield Difference(
            f"esper.epoch was {EPOCH} and arrived as {others[-1]}", "a processor on the way changes values"
        )
    for sent, came in pairs:
        yield from differences(_facts(sent), _facts(came), f"step {sent.step}")
    yield from _of_incomplete(pairs)
    for sent, came in pairs:
        if came.state.seed_states != sent.state.seed_states or came.state.packet_id != sent.state.packet_id:
            yield Difference(f"step {sent.step} is not the one that was sent", "a processor on the way changes values")
    if any(each.writer for each in found):
        yield Difference(
            "steps of one process arrived as those of two", "something on the way sends steps twice, changed"
        )


def _of_points(name: str, mine: Sequence[Packets], found: Sequence[Packets], having: Sequence[Packets]) -> Difference:
    """Describes that a metric that was sent with every step arrived in some steps only, or in none."""
    if not having:
        return Difference(f"{name} did not arrive", "a filter on the way drops it")
    what = f"{name} did not arrive in {len(found) - len(having)} of {len(found)} steps"
    newest = {max(each.state.timestamp_ns for each in mine if each.rank == rank) for rank in range(RANKS)}
    # The run may have arrived in two intervals.
    if newest <= {each.state.timestamp_ns for each in having} and len(having) <= 2 * RANKS:
        return Difference(what, _NEWEST)
    return Difference(
        what, "something on the way drops single points: a sampler, a deduplication, or a limit of series"
    )


def _of_lost(steps: Sequence[int], count: int) -> Difference:
    what = f"{len(steps)} of {count} steps did not arrive: {steps_in_words(steps)}"
    if FIRST_STEP in steps and count - len(steps) <= RANKS:
        return Difference(what, _NEWEST)
    return Difference(what, "something on the way drops points: a sampler, a filter, a limit or a queue that is full")


def _of_incomplete(pairs: Sequence[tuple[Packets, Packets]]) -> Iterator[Difference]:
    """Yields a difference for steps whose values arrived without the metrics that prove them complete."""
    lacking = [sent.step for sent, came in pairs if not came.complete]
    if lacking:
        what = "esper.frame.points, esper.seeds or esper.seeds.digest"
        if {*lacking} == {FIRST_STEP + place for place in RETIRED}:
            what = "esper.seed.retired"
        yield Difference(
            f"{what} did not arrive: the values of steps {steps_in_words(lacking)} did, but the gateway cannot know it",
            "a filter on the way drops it",
        )


def _of_run(mine: Sequence[Packets], found: Sequence[Packets]) -> Iterator[Difference]:
    """Yields differences in the run, attempt, rank, experiment and device of the steps."""
    fix = _OF_RESOURCE
    attempt = mine[0].attempt
    for each in found:
        if each.attempt != attempt:
            how = f"was {attempt} and arrived as {each.attempt}" if each.attempt else "did not arrive"
            yield Difference(f"esper.run.attempt {how}", fix.format("esper.run.attempt"))
    ranks, came = {each.rank for each in mine}, {each.rank for each in found}
    times = {each.state.timestamp_ns: each.rank for each in mine}
    for each in found:
        rank = times.get(each.state.timestamp_ns, each.rank)
        if rank != each.rank:
            yield Difference(f"a step of rank {rank} arrived as one of rank {each.rank}", fix.format("esper.rank"))
    if came != ranks:
        said = ", ".join(map(str, sorted(came)))
        yield Difference(
            f"steps of ranks 0 and 1 were sent, but only those of rank {said} arrived",
            f"{fix.format('esper.rank')}, or one rank is dropped or sent elsewhere",
        )
    experiment = mine[0].state.experiment_name
    for each in found:
        if each.state.experiment_name != experiment:
            yield Difference("esper.experiment.name did not arrive as it was sent", fix.format("esper.experiment.name"))
        if each.state.hardware_context != mine[0].state.hardware_context:
            yield Difference("esper.device.* did not arrive as it was sent", fix.format("esper.device.type or .id"))


def _facts(step: Packets) -> Mapping[str, float | str]:
    """Returns the values and seeds of a step, by names for display."""
    facts: dict[str, float | str] = {}
    for packet in step.telemetry:
        for point in packet.metrics:
            facts[f"{point.name} of seed {point.attributes['seed_id']}"] = point.value
        for event in packet.events:
            if event.description in _EVENTS:
                metric, seed_id = event.attributes["metric"], event.attributes.get("seed_id")
                facts[f"{metric} of seed {seed_id}" if seed_id else metric] = float(event.attributes["value"])
    for key, value in step.state.training_metrics.items():
        facts[_NAMES.get(key, key)] = value
    seed_metrics = {name.split(" of seed ")[0] for name in facts}
    facts |= {name: "recorded" for name in step.names if name not in facts and name not in seed_metrics}
    return facts | {f"seed {state.seed_id}": "alive" for state in step.state.seed_states}
