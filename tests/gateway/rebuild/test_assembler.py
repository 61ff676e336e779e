"""Assembling: every frame comes out once, in order and unchanged, whatever happened to its points on the way."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from frame_examples import RUN, TIME_UNIX_NS, histories, make_frame, seed_table
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from properties import examples
from wire import bodies, counts_of, encoder

from esper_otel.frames.frame import SAID_BESIDE, Frame, Run, is_absent
from esper_otel.gateway.items import Item
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.request import (
    TOO_MANY_RUNS,
    TOO_MANY_SEEDS,
    DecodedRequest,
    Marker,
    PointBlock,
    PointSender,
    RunEnd,
)
from esper_otel.leyline.packets import packets

pytestmark = pytest.mark.lengthy

HOLD_S, LINGER_S = 2.0, 0.05
MS = 1_000_000


class Gateway:
    """A decoder and an assembler, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.decoder = Decoder()
        self.assembler = Assembler(hold_s=HOLD_S, linger_s=LINGER_S)
        self.now_s = 100.0

    def take(self, *requests: bytes) -> list[Item]:
        for body in requests:
            taken = self.assembler.take(self.decoder.decode(body), now_s=self.now_s, received_unix_ns=1)
            assert not taken.rejected
        return self.assembler.release(self.now_s)

    def wait(self, seconds: float) -> list[Item]:
        self.now_s += seconds
        return self.assembler.release(self.now_s)


def scattered(frames: Sequence[Frame], luck: random.Random) -> list[bytes]:
    """The frames' points over requests at random: split, merged, repeated, reordered, interleaved."""
    singles: list[ExportMetricsServiceRequest] = []
    for body in bodies(frames):
        whole = ExportMetricsServiceRequest.FromString(body)
        for of_resource in whole.resource_metrics:
            for of_scope in of_resource.scope_metrics:
                for metric in of_scope.metrics:
                    for point in metric.gauge.data_points:
                        single = ExportMetricsServiceRequest()
                        new = single.resource_metrics.add(resource=of_resource.resource)
                        stream = new.scope_metrics.add(scope=of_scope.scope).metrics.add(name=metric.name)
                        stream.gauge.data_points.append(point)
                        singles.append(single)
    singles += luck.sample(singles, len(singles) // 3)
    luck.shuffle(singles)
    requests = []
    while singles:
        count = luck.randint(1, max(len(singles), 1))
        request = ExportMetricsServiceRequest()
        for single in singles[:count]:
            request.MergeFrom(single)
        requests.append(request.SerializeToString())
        del singles[:count]
    return requests


def newest(items: Iterable[Item]) -> list[Item]:
    """The last revision of each frame, in the order of the frames' release."""
    by_time: dict[int, Item] = {}
    for item in items:
        by_time[item.frame.time_unix_ns] = item
    return list(by_time.values())


def bits(number: float) -> bytes:
    return b"NaN" if number != number else np.float64(number).tobytes()


def rows(frame: Frame) -> dict[str, dict[str, bytes]]:
    return {seed: {name: bits(cell) for name, cell in cells.items()} for seed, cells in frame.seeds.rows() if cells}


@examples(30)
@given(histories(), st.integers(0, 2**32))
def test_scattered_frames_come_out_once_in_order_and_unchanged(history: list[Frame], seed: int) -> None:
    """What the network does to requests must not change what a controller sees of a step."""
    gateway = Gateway()
    items = [item for body in scattered(history, random.Random(seed)) for item in gateway.take(body)]
    items += gateway.wait(10 * HOLD_S)
    of_first = [item for item in items if item.revision == 1]
    assert [item.frame.sequence for item in of_first] == [frame.sequence for frame in history]
    for frame, item in zip(history, of_first, strict=True):
        values = {name: bits(number) for name, number in item.frame.values().items()}
        sent = {name: bits(number) for name, number in frame.values().items()}
        values = {name: value for name, value in values.items() if name not in SAID_BESIDE}
        assert values == sent
        assert rows(item.frame) == rows(frame)
        assert sorted(item.frame.retired) == sorted(frame.retired)
        assert item.frame.time_unix_ns == frame.time_unix_ns
    assert gateway.assembler.due() is None


def living(count: int, start: int = 1, run: Run = RUN) -> list[Frame]:
    """Frames with one seed that lives all the time."""
    seeds = seed_table({"seed-1": {"alpha": 0.5, "stage": 3.0}})
    return [
        make_frame(run=run, sequence=n, global_step=n, time_unix_ns=TIME_UNIX_NS + n * MS, seeds=seeds, live=seeds)
        for n in range(start, start + count)
    ]


@examples(30)
@given(st.integers(1, 6), st.integers(0, 2**32))
def test_scattered_frames_make_the_packets_of_the_process(count: int, seed: int) -> None:
    """A controller behind the gateway must see what one in the process sees, whole and without waiting."""
    history, gateway = living(count), Gateway()
    items = [item for body in scattered(history, random.Random(seed)) for item in gateway.take(body)]
    assert [item.complete for item in items] == [True] * count
    assert [packets(item.frame) for item in items] == [packets(frame) for frame in history]


def without_point(body: bytes, name: str) -> tuple[bytes, bytes]:
    """The request without a metric, and the metric alone."""
    rest, alone = ExportMetricsServiceRequest.FromString(body), ExportMetricsServiceRequest.FromString(body)
    for request, keep in ((rest, False), (alone, True)):
        metrics = request.resource_metrics[0].scope_metrics[0].metrics
        kept = [metric for metric in metrics if (metric.name == name) is keep]
        del metrics[:]
        metrics.extend(kept)
    return rest.SerializeToString(), alone.SerializeToString()


def test_an_incomplete_frame_goes_after_hold_and_a_late_point_corrects_it() -> None:
    """A lost request must not stop the stream; a late one must not be lost."""
    rest, late = without_point(bodies(living(1))[0], "loss")
    gateway = Gateway()
    assert gateway.take(rest) == []
    assert gateway.wait(HOLD_S - 0.01) == []
    (item,) = gateway.wait(0.02)
    assert (item.complete, item.revision, "loss" in item.frame.values()) == (False, 1, False)
    (item,) = gateway.take(late)
    assert (item.complete, item.revision, item.frame.values()["loss"]) == (True, 2, 2.5)


def test_a_plain_senders_step_goes_after_linger() -> None:
    """Any OpenTelemetry SDK may send: it says no number of points, so silence has to end its step."""
    rest, _ = without_point(bodies(living(1))[0], "esper.frame.points")
    rest, _ = without_point(rest, "esper.frame.sequence")
    gateway = Gateway()
    assert gateway.take(rest) == []
    (item,) = gateway.wait(LINGER_S + 0.001)
    assert (item.complete, item.frame.sequence, item.frame.values()["loss"]) == (True, 0, 2.5)


def test_a_hole_is_skipped_after_hold_counted_and_filled_by_a_latecomer() -> None:
    """A lost frame must be known as missing; when it comes after all it must be delivered."""
    first, second, third = bodies(living(3))
    gateway = Gateway()
    assert [item.frame.sequence for item in gateway.take(first, third)] == [1]
    assert [item.frame.sequence for item in gateway.wait(HOLD_S)] == [3]
    assert gateway.assembler.runs(gateway.now_s)[0].missing == 1
    assert 2 in [item.frame.sequence for item in gateway.take(second)]
    assert gateway.assembler.runs(gateway.now_s)[0].missing == 0


def test_a_seed_lives_until_the_frame_that_retires_it() -> None:
    """A seed that is silent in a step is still there; one that was retired must not haunt the controller."""
    first, quiet, gone = living(3)
    nothing = seed_table({})
    quiet = quiet._replace(seeds=nothing)
    gone = gone._replace(seeds=nothing, live=nothing, retired=("seed-1",))
    gateway = Gateway()
    items = gateway.take(*bodies([first, quiet]))
    assert [item.frame.live.ids for item in items] == [("seed-1",), ("seed-1",)]
    assert np.array_equal(items[1].frame.live.cells.view(np.uint64), first.live.cells.view(np.uint64))
    assert is_absent(items[1].frame.live.cells).sum() == is_absent(first.live.cells).sum()
    [item] = gateway.take(*bodies([gone]))
    assert (item.frame.live.ids, item.frame.retired, item.complete) == ((), ("seed-1",), True)


def theirs(step: int, scope: str, alphas: Mapping[str, float], *, ends: bool = False) -> bytes:
    """A request of a plain sender: a loss, and alphas by seed; or the ends of these."""
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add(scope={"name": scope}).metrics
    time_unix_ns = TIME_UNIX_NS + step * MS
    if not ends:
        metrics.add(name="loss").gauge.data_points.add(time_unix_nano=time_unix_ns, as_double=0.5)
    for seed, alpha in alphas.items():
        point = metrics.add(name="kasmina.seed.alpha").gauge.data_points.add(time_unix_nano=time_unix_ns)
        point.attributes.add(key="seed_id").value.string_value = seed
        if ends:
            point.flags = 1
        else:
            point.as_double = alpha
    return request.SerializeToString()


def test_a_plain_senders_seed_lives_until_its_series_end_or_are_silent_for_long() -> None:
    """Its frames do not say who lives; what our own exporter's markers end is said by its frames."""
    gateway = Gateway()

    def alive(step: int, **alphas: float) -> tuple[str, ...]:
        gateway.take(theirs(step, "a program", alphas))
        [item] = gateway.wait(HOLD_S + 0.001)
        assert item.complete
        return item.frame.live.ids

    assert alive(1, a=0.5, b=0.5, c=0.5) == ("a", "b", "c")
    gateway.take(theirs(2, "esper_otel", {"a": 0.0}, ends=True), theirs(2, "esper_otel.health", {"c": 0.0}, ends=True))
    gateway.take(theirs(2, "a program", {"b": 0.0}, ends=True))
    assert alive(3) == ("a", "c")
    assert alive(299_999, a=0.5) == ("a", "c")
    assert alive(300_002) == ("a",)
    [item] = gateway.take(theirs(300_000, "a program", {"a": 0.0}, ends=True))  # late
    assert (item.frame.live.ids, item.revision) == ((), 2)


def test_a_new_attempt_is_a_resumed_run() -> None:
    """Steps of a restart must not mix with those of the attempt before, whose numbers are the same."""
    gateway = Gateway()
    again = replace(RUN, attempt=RUN.attempt + 1)
    gateway.take(*bodies(living(2)))
    items = gateway.take(*bodies(living(1, run=again)))
    assert [item.origin.attempt for item in items] == [again.attempt]
    assert {state.origin.attempt: state.resumed for state in gateway.assembler.runs(gateway.now_s)} == {
        RUN.attempt: False,
        again.attempt: True,
    }


def test_two_live_writers_are_kept_apart() -> None:
    """Two processes that claim one rank must not be mixed into one curve."""
    gateway = Gateway()
    one = bodies(living(3), "one")
    two = bodies([frame._replace(time_unix_ns=frame.time_unix_ns + 1) for frame in living(3)], "two")
    items = [item for pair in zip(one, two, strict=True) for item in gateway.take(*pair)]
    by_writer: dict[str, list[int]] = {}
    for item in items:
        by_writer.setdefault(item.origin.writer, []).append(item.frame.sequence)
    assert list(by_writer.values()) == [[1, 2, 3], [1, 2, 3]]
    assert [state.writers for state in gateway.assembler.runs(gateway.now_s)] == [2, 2]


def test_a_run_says_how_it_ended() -> None:
    """An ended run must not look like one that hangs."""
    gateway = Gateway()
    gateway.take(*bodies(living(1)))
    assert gateway.assembler.runs(gateway.now_s)[0].ended is None
    health = encoder().health(
        RUN, {("esper.run.ended", "completed"): 1.0}, start_unix_ns=TIME_UNIX_NS, time_unix_ns=TIME_UNIX_NS + MS
    )
    gateway.take(health)
    assert gateway.assembler.runs(gateway.now_s)[0].ended == "completed"


def test_seed_ids_without_end_take_no_more_memory() -> None:
    """A sender that makes up ids must be told so, and must not be able to fill the gateway's memory."""
    limits = Limits(seeds=1_000, kept_bytes=1_000_000)
    assembler = Assembler(limits, hold_s=HOLD_S, linger_s=LINGER_S)
    names = ("kasmina.seed.alpha",)
    accepted = refused = 0
    peaks = []
    tracemalloc.start()
    try:
        for step in range(60):
            ids = tuple(f"{step:05}-{n:05}" for n in range(10_000))
            times = np.full(len(ids), TIME_UNIX_NS + step * MS, np.uint64)
            block = PointBlock(
                PointSender(Run("r", 0)), names, ids, np.arange(1, len(ids) + 1), times, np.zeros(len(ids))
            )
            taken = assembler.take(
                DecodedRequest((block,), (), (), len(ids), {}), now_s=float(step), received_unix_ns=TIME_UNIX_NS
            )
            accepted, refused = accepted + taken.accepted, refused + taken.rejected.get(TOO_MANY_SEEDS, 0)
            assembler.release(step + 0.5)
            if step in (53, 59):
                peaks.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert accepted + refused == 600_000
    assert 0 < accepted <= limits.seeds
    assert peaks[1] < peaks[0] + 120_000  # two bytes for each


def test_the_end_of_one_run_too_many_is_counted() -> None:
    """What is dropped is counted, ends of runs and of seeds too."""
    assembler = Assembler(Limits(runs=1))
    decoded = DecodedRequest(
        (),
        (),
        (RunEnd(PointSender(Run("one", 0)), "completed"), RunEnd(PointSender(Run("two", 0)), "completed")),
        2,
        {},
    )
    taken = assembler.take(decoded, now_s=1.0, received_unix_ns=1)
    assert (taken.accepted, dict(taken.rejected)) == (1, {TOO_MANY_RUNS: 1})
    marker = Marker(PointSender(Run("two", 0)), "kasmina.seed.alpha", "seed-1", TIME_UNIX_NS)
    taken = assembler.take(DecodedRequest((), (marker,), (), 1, {}), now_s=1.0, received_unix_ns=1)
    assert (taken.accepted, dict(taken.rejected)) == (0, {TOO_MANY_RUNS: 1})


def test_counts_are_a_sign_of_life_of_a_run_that_is_known() -> None:
    """An evaluation may take an hour: its run is not silent. Counts alone make no run, and no room for one."""
    gateway = Gateway()
    gateway.take(counts_of())
    assert not gateway.assembler.runs(gateway.now_s)
    gateway.take(*bodies([make_frame()]))
    for _ in range(3):
        gateway.now_s += 50.0
        decoded = gateway.decoder.decode(counts_of() * 4)  # often enough for a template
        taken = gateway.assembler.take(decoded, now_s=gateway.now_s, received_unix_ns=9)
        assert {origin[:3] for origin in taken.alive} == {(RUN.run_id, RUN.attempt, RUN.rank)}
    [state] = gateway.assembler.runs(gateway.now_s + 50.0)
    assert not state.is_silent
    assert (state.last_received_unix_ns, state.step_received_unix_ns) == (9, 1)
    assert state.is_without_steps(20, 10)
    [state] = gateway.assembler.runs(gateway.now_s + 61.0)
    assert state.is_silent
    assert not state.is_without_steps(20, 10)


def test_the_end_of_a_series_is_no_sign_of_life() -> None:
    """A collector that scrapes a trainer ends its series when the trainer is gone."""
    request = ExportMetricsServiceRequest.FromString(counts_of())
    for metric in request.resource_metrics[0].scope_metrics[0].metrics:
        for point in (*metric.sum.data_points, *metric.gauge.data_points):
            point.flags = 1
            point.ClearField("as_double")
    assert not Decoder().decode(request.SerializeToString()).alive
