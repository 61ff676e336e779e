"""Decoding: the fast decoder says what the plain one says, of every request and of anything else."""

from __future__ import annotations

import contextlib
import math
import random
import struct
from pathlib import Path

import pytest
from frame_examples import RUN, TIME_UNIX_NS, frames, histories, make_frame, numbers
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Exemplar, Metric, NumberDataPoint
from properties import examples
from wire import as_collector, bodies, said

from esper_otel.frames.frame import ABSENT_BITS, Frame, Run, is_absent
from esper_otel.gateway.receive import template
from esper_otel.gateway.receive.decoder import Decoder, decode_plain
from esper_otel.gateway.receive.envelope import field
from esper_otel.gateway.receive.request import (
    NO_SEED,
    NO_TIME,
    NOT_A_NUMBER,
    UNKNOWN_METRIC,
    WRONG_TIME,
    Malformed,
)


def same(body: bytes) -> object:
    """What both decoders say; the fast one twice, since it remembers."""
    plain, decoder = said(decode_plain, body), Decoder()
    assert said(decoder.decode, body) == plain
    assert said(decoder.decode, body) == plain
    return plain


@examples(30)
@given(frames(), st.lists(st.lists(numbers(), min_size=1, max_size=12), min_size=3, max_size=6), st.integers(0, 2**32))
def test_steps_that_are_alike_are_read_alike(frame: Frame, steps: list[list[float]], seed: int) -> None:
    """By one decoder, which has learnt where the numbers stand; also what is almost like them, and what is broken."""
    luck, decoder = random.Random(seed), Decoder()
    for number, values in enumerate(steps):
        changed = tuple(values[place % len(values)] for place in range(len(frame.numbers)))
        cells = frame.seeds.cells.copy()
        cells[~is_absent(cells)] = values[0]
        of_step = frame._replace(
            run=RUN,
            numbers=changed,
            sequence=number + 1,
            time_unix_ns=TIME_UNIX_NS + number * 10**6,
            seeds=frame.seeds._replace(cells=cells),
        )
        for body in bodies([of_step]):
            assert said(decoder.decode, body) == said(decode_plain, body)
            broken = bytearray(body)
            broken[luck.randrange(len(broken))] ^= 1 << luck.randrange(8)
            assert said(decoder.decode, bytes(broken)) == said(decode_plain, bytes(broken))


def test_requests_of_one_step_are_learnt() -> None:
    """The second one of a kind; a number that looks like a time, a NaN and a value that is none are no trouble."""
    decoder = Decoder()
    absent = struct.unpack("<d", ABSENT_BITS.to_bytes(8, "little"))[0]
    time_like = struct.unpack("<d", TIME_UNIX_NS.to_bytes(8, "little"))[0]
    for number, loss in enumerate([1.0, 2.0, math.nan, time_like, absent, math.nan, -0.0, 3.0]):
        frame = make_frame(recorded={"loss": loss, "accuracy": time_like}, time_unix_ns=TIME_UNIX_NS + number * 10**6)
        [body] = bodies([frame])
        assert said(decoder.decode, body) == said(decode_plain, body)
    assert learnt(decoder) == 2  # with a finite loss, and with another


def learnt(decoder: Decoder) -> int:
    return sum(map(len, decoder._templates._known.values()))


def of_ranks(step: int, ranks: int, **changed: object) -> bytes:
    """A step of each of these ranks, as a collector sends them: appended, and with descending fields."""
    frames = [
        make_frame(
            run=Run("ranks", 1, rank=rank, world_size=ranks),
            sequence=step,
            global_step=step,
            time_unix_ns=TIME_UNIX_NS + step * 10**6,
            recorded={"loss": step + rank / ranks, "accuracy": 0.5},
            **changed,
        )
        for rank in range(ranks)
    ]
    return b"".join(as_collector(ExportMetricsServiceRequest.FromString(body)) for body in bodies(frames, "host"))


def test_the_ranks_of_a_run_share_a_template() -> None:
    """Any number of them: what differs is their Resource only."""
    decoder = Decoder()
    for step in range(1, 4):
        body = of_ranks(step, 300)
        assert said(decoder.decode, body) == said(decode_plain, body)
    assert learnt(decoder) == 1
    decoded = decoder.decode(of_ranks(4, 300))
    assert {id(block.kind) for block in decoded.blocks} == {id(decoded.blocks[0].kind)}
    assert decoded.blocks[0].kind is not None


def test_what_no_template_reads_is_read_in_between() -> None:
    """In the order of the request: markers of another sender, a metric that nobody knows, a part that was cut off."""
    decoder = Decoder()
    strange = request_of(gauge("what.nobody.knows", point()), gauge("loss", point(as_double=9.0)))
    end = point(seed="seed-1")
    end.ClearField("as_double")
    end.flags = 1
    ends = request_of(gauge("kasmina.seed.alpha", end))
    for step in range(1, 5):
        body = of_ranks(step, 5) + strange + of_ranks(step, 2) + ends + of_ranks(step + 10, 5) + strange
        assert said(decoder.decode, body) == said(decode_plain, body)
    decoded = decoder.decode(body)
    assert [block.kind is not None for block in decoded.blocks] == [*[True] * 5, False, True, True, *[True] * 5, False]
    assert (len(decoded.markers), dict(decoded.rejected)) == (1, {UNKNOWN_METRIC: 2})


@pytest.mark.parametrize("attribute", ["esper.rank", "esper.run.id"])
def test_points_that_name_their_sender_are_not_taken_for_those_of_another(attribute: str) -> None:
    """Their Resource alone does not say whose they are."""
    decoder = Decoder()
    for step in range(1, 5):
        parts = []
        for rank in range(4):
            request = ExportMetricsServiceRequest.FromString(of_ranks(step, rank + 1))
            of_resource = request.resource_metrics[-1]
            for metric in of_resource.scope_metrics[0].metrics:
                for each in metric.gauge.data_points:
                    each.attributes.append(KeyValue(key=attribute, value=AnyValue(string_value="3")))
            parts.append(ExportMetricsServiceRequest(resource_metrics=[of_resource]).SerializeToString())
        body = b"".join(parts)
        assert said(decoder.decode, body) == said(decode_plain, body)
    assert any(block.kind is not None for block in decoder.decode(body).blocks)


def test_points_of_one_sender_with_further_attributes_are_sorted_over_the_whole_request() -> None:
    """A total counts before its parts, also if a part comes first."""
    decoder = Decoder()
    for value in (1.0, 2.0, 3.0):
        of_a_part = point(as_double=value)
        of_a_part.attributes.append(KeyValue(key="layer", value=AnyValue(string_value="one")))
        body = request_of(gauge("loss", of_a_part)) * 2 + request_of(gauge("loss", point(as_double=value + 10)))
        assert said(decoder.decode, body) == said(decode_plain, body)


def test_what_is_never_repeated_is_soon_not_learnt_any_more() -> None:
    """Learning costs more than decoding: it is paid for by what templates read."""
    decoder = Decoder()
    for number in range(150):  # a stream that is new each time, twice in its request
        request = ExportMetricsServiceRequest.FromString(
            request_of(gauge("kasmina.seed.alpha", point(seed=f"seed-{number:03}")))
        )
        name = AnyValue(string_value="plain")
        request.resource_metrics[0].resource.attributes.append(KeyValue(key="service.name", value=name))
        body = request.SerializeToString() * 2
        assert said(decoder.decode, body) == said(decode_plain, body)
    assert decoder._templates._credit < 2
    for step in range(1, 14):
        body = of_ranks(step, 100)
        assert said(decoder.decode, body) == said(decode_plain, body)
    assert decoder._templates._credit == 64


def test_templates_are_bounded() -> None:
    """Streams that change with every step must not fill the memory."""
    decoder = Decoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_MOST_BYTES", 200_000)
        for number in range(200):
            body = request_of(gauge("loss", *[point(TIME_UNIX_NS + n) for n in range(1 + number % 50)])) * 2
            assert said(decoder.decode, body) == said(decode_plain, body)
        assert decoder._templates._bytes <= 200_000
        assert decoder._templates._bytes == sum(
            each.size for kept in decoder._templates._known.values() for each in kept
        )


@examples(30)
@given(histories(), st.integers(0, 2**32))
def test_our_requests_and_broken_ones_are_read_alike(history: list[Frame], seed: int) -> None:
    """A fast path that reads a request otherwise than protobuf would make values up."""
    luck = random.Random(seed)
    for body in bodies(history):
        same(body)
        for _ in range(5):
            broken = bytearray(body)
            for _ in range(luck.randint(1, 3)):
                broken[luck.randrange(len(broken))] = luck.randrange(256)
            same(bytes(broken))
            same(body[: luck.randrange(len(body))])


@examples(30)
@given(st.binary(max_size=200))
def test_anything_else_is_malformed_or_read_alike(body: bytes) -> None:
    """Bytes of strangers must not raise what no server expects."""
    same(body)


def request_of(*metrics: Metric) -> bytes:
    request = ExportMetricsServiceRequest()
    request.resource_metrics.add().scope_metrics.add().metrics.extend(metrics)
    return request.SerializeToString()


def gauge(name: str, *points: NumberDataPoint) -> Metric:
    metric = Metric(name=name)
    metric.gauge.data_points.extend(points)
    return metric


def point(time_unix_ns: int = TIME_UNIX_NS, seed: str = "", **fields: object) -> NumberDataPoint:
    made = NumberDataPoint(time_unix_nano=time_unix_ns, **(fields or {"as_double": 1.5}))  # type: ignore[arg-type]
    if seed:
        made.attributes.append(KeyValue(key="seed_id", value=AnyValue(string_value=seed)))
    return made


def reversed_fields(of: NumberDataPoint) -> bytes:
    """A point with its fields in descending order, as the Go collector writes them."""
    attributes = NumberDataPoint(attributes=of.attributes).SerializeToString()
    value = NumberDataPoint(as_double=of.as_double).SerializeToString()
    time = NumberDataPoint(time_unix_nano=of.time_unix_nano).SerializeToString()
    return attributes + value + time


def test_a_points_fields_may_stand_in_any_order() -> None:
    """Upb, Go and others order fields differently; all of them say the same."""
    points = [point(TIME_UNIX_NS + n, as_double=n + 0.5) for n in range(20)]
    forwards = request_of(gauge("loss", *points))
    content = b"".join(field(1, reversed_fields(of)) for of in points)
    metric = field(5, content) + Metric(name="loss").SerializeToString()
    backwards = field(1, field(2, field(2, metric)))
    assert same(backwards) == same(forwards)


def histogram() -> Metric:
    metric = Metric(name="loss")
    metric.histogram.data_points.add(count=1)
    return metric


def summed(temporality: int) -> Metric:
    metric = Metric(name="loss")
    metric.sum.aggregation_temporality = temporality  # type: ignore[assignment] # an enum is an int
    metric.sum.data_points.append(point())
    return metric


@pytest.mark.parametrize(
    ("metric", "rejected"),
    [
        (gauge("loss", point(0)), {NO_TIME: 1}),
        (gauge("loss", point(1)), {WRONG_TIME: 1}),
        (gauge("loss", point(7_258_118_400 * 10**9)), {WRONG_TIME: 1}),
        (gauge("what.nobody.knows", point(), point()), {UNKNOWN_METRIC: 2}),
        (gauge("", point()), {"no metric name": 1}),
        (gauge("loss", NumberDataPoint(time_unix_nano=TIME_UNIX_NS)), {"no value": 1}),
        (histogram(), {NOT_A_NUMBER: 1}),
        (summed(1), {"delta sum": 1}),
        (summed(2), {}),
        (gauge("loss", point(as_int=-7)), {}),
        (gauge("loss", point(as_double=1.0, exemplars=[Exemplar(as_double=2.0)])), {}),
        (gauge("kasmina.seed.alpha", point()), {NO_SEED: 1}),
        (gauge("kasmina.seed.alpha", point(seed="seed-1")), {}),
    ],
)
def test_what_is_not_taken_is_counted_by_reason(metric: Metric, rejected: dict[str, int]) -> None:
    """A sender must be told which of its points were dropped, and why."""
    body = request_of(metric)
    same(body)
    decoded = Decoder().decode(body)
    assert dict(decoded.rejected) == rejected
    assert decoded.points == sum(len(block.times) for block in decoded.blocks) + sum(rejected.values())


CORPUS = sorted(Path(__file__).with_name("corpus").glob("*.bin"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_read_alike(path: Path) -> None:
    """What once found something, or takes a way of its own through the decoders, must stay right."""
    body = path.read_bytes()
    same(body)
    with contextlib.suppress(Malformed):
        Decoder().decode_json(body)


@pytest.mark.parametrize("scope", ["esper_otel", "esper_otel.health", "somebody"])
def test_a_flagged_point_is_an_end_in_any_scope_and_no_point_of_a_frame(scope: str) -> None:
    """Next to the frame's own points, at its time: every decoder, JSON's too."""
    request = ExportMetricsServiceRequest.FromString(bodies([make_frame()])[0])
    (scoped,) = request.resource_metrics[0].scope_metrics
    ends = scoped if scope == scoped.scope.name else request.resource_metrics[0].scope_metrics.add()
    ends.scope.name = scope
    for name in ("kasmina.seed.alpha", "kasmina.seed.stage"):
        point = ends.metrics.add(name=name).gauge.data_points.add(time_unix_nano=TIME_UNIX_NS, flags=1)
        point.attributes.append(KeyValue(key="seed_id", value=AnyValue(string_value="gone")))
    assert same(request.SerializeToString())
    decoded = Decoder().decode(request.SerializeToString())
    assert sum(len(block.times) for block in decoded.blocks) == decoded.points - 2
    # A frame of ours says itself who lives: only another sender's markers end anything.
    names = ("kasmina.seed.alpha", "kasmina.seed.stage") if scope == "somebody" else ()
    assert [(m.name, m.seed, m.time_unix_ns) for m in decoded.markers] == [(n, "gone", TIME_UNIX_NS) for n in names]
    as_json = json_format.MessageToJson(request, preserving_proto_field_name=False, use_integers_for_enums=True)
    assert Decoder().decode_json(as_json.encode()).markers == decoded.markers


@pytest.mark.parametrize("name", ["esper.device.info", "hw.gpu.utilization", "hw.of.a.later.version"])
def test_a_description_of_the_device_makes_no_frame(name: str) -> None:
    """Next to the frame's own points, and alone."""
    body = bodies([make_frame()])[0]
    before = Decoder().decode(body)
    request = ExportMetricsServiceRequest.FromString(body)
    scoped = request.resource_metrics[0].scope_metrics.add()
    scoped.scope.name = "esper_otel.device"
    point = scoped.metrics.add(name=name).gauge.data_points.add(time_unix_nano=TIME_UNIX_NS, as_double=1.0)
    point.attributes.append(KeyValue(key="hw.id", value=AnyValue(string_value="GPU-aaaa-1111")))
    assert same(request.SerializeToString())
    decoded = Decoder().decode(request.SerializeToString())
    assert [len(block.times) for block in decoded.blocks] == [len(block.times) for block in before.blocks]
    del request.resource_metrics[0].scope_metrics[0]
    assert Decoder().decode(request.SerializeToString()).blocks == ()
