"""What the frames' OTLP bytes hold, read back with the official messages and the official encoder."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from frame_examples import RUN, TIME_UNIX_NS, frames, histories, make_frame, seed_table
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from esper_otel import __version__
from esper_otel.export.encode import MAX_POINTS, Encoder, Request
from esper_otel.export.scopes import SCHEMA_URL
from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import blocks_of
from esper_otel.schema import METRICS, SEED_CELLS, Metric

CATALOGUE = {metric.name: metric for metric in METRICS}
FIELD = {metric.name: metric.field for metric in SEED_CELLS}
START_UNIX_NS = TIME_UNIX_NS - 10**9


def resource(run: Run) -> Resource:
    return Resource({"esper.run.id": run.run_id, "esper.rank": run.rank, "device": run.device_id})


def no_fault(where: str, error: Exception) -> None:
    raise AssertionError(where) from error


def encoder(catalogue: Mapping[str, Metric] = CATALOGUE, max_points: int = MAX_POINTS) -> Encoder:
    return Encoder(catalogue, resource, max_points=max_points)


def decoded(requests: Sequence[Request]) -> list[ExportMetricsServiceRequest]:
    return [ExportMetricsServiceRequest.FromString(request.body) for request in requests]


def read(
    requests: Sequence[ExportMetricsServiceRequest],
) -> Iterator[tuple[str, metrics_pb2.NumberDataPoint]]:
    for request in requests:
        for of_run in request.resource_metrics:
            for scoped in of_run.scope_metrics:
                for metric in scoped.metrics:
                    assert metric.gauge.data_points, metric.name
                    for point in metric.gauge.data_points:
                        yield metric.name, point


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def contents(frame: Frame) -> dict[tuple[str, str], bytes]:
    """What a frame should become: bits by (name, seed id), so that NaN equals NaN and -0.0 is not 0.0."""
    readings = {(name, ""): float(value) for name, value in frame.values().items()}
    for seed_id, cells in frame.seeds.rows():
        readings |= {(name, seed_id): cells[FIELD[name]] for name in FIELD if FIELD[name] in cells}
    readings["esper.seeds.digest", ""] = digest_of(frame.live.ids)
    readings |= {("esper.seed.retired", seed_id): 1.0 for seed_id in frame.retired}
    readings["esper.frame.sequence", ""] = frame.sequence
    readings["esper.frame.points", ""] = len(readings) + 1
    return {stream: bits(value) for stream, value in readings.items()}


@given(histories(), st.integers(len(SEED_CELLS), 60))
def test_every_value_of_every_frame_arrives_bit_for_bit_with_the_frames_own_time(
    history: list[Frame], max_points: int
) -> None:
    """NaN, infinities, -0.0 and absence must survive, however requests are cut."""
    requests = list(encoder(max_points=max_points).requests(blocks_of(history)))
    arrived: dict[int, dict[tuple[str, str], bytes]] = defaultdict(dict)
    for name, point in read(decoded(requests)):
        seed_id = "".join(attribute.value.string_value for attribute in point.attributes)
        assert [attribute.key for attribute in point.attributes] == (["seed_id"] if seed_id else [])
        assert point.WhichOneof("value") == "as_double"
        assert point.start_time_unix_nano == point.flags == 0
        assert (name, seed_id) not in arrived[point.time_unix_nano]
        arrived[point.time_unix_nano][name, seed_id] = bits(point.as_double)
    assert arrived == {frame.time_unix_ns: contents(frame) for frame in history}
    assert sum(request.frames for request in requests) == len(history)
    for request, message in zip(requests, decoded(requests), strict=True):
        assert request.points == len(list(read([message]))) <= max_points


def normal(request: ExportMetricsServiceRequest) -> dict[tuple[Any, ...], dict[str, tuple[Any, ...]]]:
    """A request without its order of metrics, points and attributes."""
    return {
        (of_run.SerializeToString(deterministic=True), scoped.scope.SerializeToString(deterministic=True)): {
            metric.name: (
                metric.unit,
                metric.description,
                metric.WhichOneof("data"),
                sorted(point.SerializeToString(deterministic=True) for point in metric.gauge.data_points),
            )
            for metric in scoped.metrics
        }
        for block in request.resource_metrics
        for of_run in [block.resource]
        for scoped in block.scope_metrics
    }


@given(st.lists(frames(), min_size=1, max_size=3, unique_by=lambda frame: frame.time_unix_ns))
def test_the_same_content_encoded_by_opentelemetry_is_the_same_message(history: list[Frame]) -> None:
    """Receivers are written against the official exporters; ours must be indistinguishable from them."""
    points: dict[str, list[sdk.NumberDataPoint]] = defaultdict(list)
    for frame in history:
        for (name, seed_id), value in contents(frame).items():
            attributes = {"seed_id": seed_id} if seed_id else {}
            number = struct.unpack("<d", value)[0]
            points[name].append(sdk.NumberDataPoint(attributes, 0, frame.time_unix_ns, number))
    metrics = [
        sdk.Metric(name, CATALOGUE[name].description, CATALOGUE[name].unit, sdk.Gauge(of_name))
        for name, of_name in points.items()
    ]
    scope = InstrumentationScope("esper_otel", __version__, attributes={"esper.schema.version": "1"})
    stock = encode_metrics(
        sdk.MetricsData([sdk.ResourceMetrics(resource(RUN), [sdk.ScopeMetrics(scope, metrics, "")], "")])
    )
    (ours,) = decoded(list(encoder().requests(blocks_of(history))))
    assert normal(ours) == normal(stock)


@given(histories())
def test_a_metric_stands_once_per_run_in_the_catalogues_order_with_points_in_time_order(
    history: list[Frame],
) -> None:
    """Prometheus rolls a request back for unsorted points; a device that becomes known starts a new block."""
    for request in decoded(list(encoder().requests(blocks_of(history)))):
        blocks = list(request.resource_metrics)
        assert [block.resource for block in blocks] == [
            encode_metrics(sdk.MetricsData([sdk.ResourceMetrics(resource(run), [], "")])).resource_metrics[0].resource
            for run in dict.fromkeys(frame.run for frame in history)
        ]
        for block in blocks:
            (scoped,) = block.scope_metrics
            names = [metric.name for metric in scoped.metrics]
            assert names == [name for name in CATALOGUE if name in names]
            for metric in scoped.metrics:
                of_stream = defaultdict(list)
                for point in metric.gauge.data_points:
                    of_stream[point.attributes[0].value.string_value if point.attributes else ""].append(point)
                for points in of_stream.values():
                    times = [point.time_unix_nano for point in points]
                    assert times == sorted(times)


def test_a_frame_that_fits_into_a_request_is_never_cut() -> None:
    """A half frame makes the gateway wait for the other half."""
    history = [make_frame(time_unix_ns=TIME_UNIX_NS + step) for step in range(7)]
    whole = len(contents(history[0]))
    requests = list(encoder(max_points=2 * whole + whole // 2).requests(blocks_of(history)))
    assert [(request.frames, request.points) for request in requests] == [
        (2, 2 * whole),
        (2, 2 * whole),
        (2, 2 * whole),
        (1, whole),
    ]


def test_a_frame_too_large_for_a_request_is_cut_and_ends_in_its_last_one() -> None:
    """The exporter may let go of a frame only when its last point has been taken."""
    large = make_frame(seeds=seed_table({f"seed-{row}": {"alpha": 0.5, "stage": 4.0} for row in range(50)}))
    small = make_frame(time_unix_ns=TIME_UNIX_NS + 1)
    total = len(contents(large))
    requests = list(encoder(max_points=40).requests(blocks_of([small, large, small])))
    assert [request.frames for request in requests] == [1, 0, 0, 2]
    counts = {
        point.as_double
        for name, point in read(decoded(requests))
        if name == "esper.frame.points" and point.time_unix_nano == large.time_unix_ns
    }
    assert counts == {float(total)}


def test_requests_are_encoded_only_when_they_are_asked_for() -> None:
    """A backlog of hours must not be turned into bytes at once."""
    taken = []

    def backlog() -> Iterator[Frame]:
        for step in range(3_000):
            taken.append(step)
            yield make_frame(time_unix_ns=TIME_UNIX_NS + step)

    next(encoder(max_points=len(contents(make_frame()))).requests(blocks_of(backlog())))
    assert len(taken) <= 1_001


def test_a_full_request_with_the_longest_seed_ids_stays_below_4_mib() -> None:
    """gRPC receivers refuse more, for good."""
    fields = {metric.field: math.pi for metric in SEED_CELLS}
    seeds = seed_table({f"{row:03d}" + "\N{SNOWMAN}" * 84 + "x": fields for row in range(700)})
    full, *_ = encoder().requests(blocks_of([make_frame(seeds=seeds)]))
    assert len(seeds.ids[0].encode()) == 256
    assert 10_000 < full.points < MAX_POINTS
    assert len(full.body) < 4 * 1024 * 1024 - 300_000


def test_no_frames_make_no_request() -> None:
    """An empty request would still be a request."""
    assert list(encoder().requests(blocks_of([]))) == []


def test_a_users_own_metric_travels_with_its_unit_and_description() -> None:
    """Declared metrics are metrics like any other."""
    own = Metric("tokens_per_s", unit="rate", description="Tokens per second.")
    frame = make_frame(recorded={"tokens_per_s": 1.5})
    (request,) = decoded(list(encoder({**CATALOGUE, own.name: own}).requests(blocks_of([frame]))))
    metrics = {metric.name: metric for metric in request.resource_metrics[0].scope_metrics[0].metrics}
    metric = metrics["tokens_per_s"]
    assert (metric.unit, metric.description) == ("rate", "Tokens per second.")
    assert [point.as_double for point in metric.gauge.data_points] == [1.5]


def test_a_name_the_catalogue_does_not_have_is_left_out_and_not_counted() -> None:
    """A count that includes points which are not there would keep the frame from ever being whole."""
    frame = make_frame(derived={"nobody.declared.this": 1.0, "loss_ewma": 2.0})
    requests = list(encoder().requests(blocks_of([frame])))
    points = dict(read(decoded(requests)))
    assert "nobody.declared.this" not in points
    assert points["loss_ewma"].as_double == 2.0
    assert points["esper.frame.points"].as_double == requests[0].points


def test_the_scope_carries_our_version_and_the_schemas() -> None:
    """Who reads stored telemetry years later must know what the names meant."""
    (request,) = decoded(list(encoder().requests(blocks_of([make_frame()]))))
    scope = request.resource_metrics[0].scope_metrics[0].scope
    assert (scope.name, scope.version) == ("esper_otel", __version__)
    assert [(item.key, item.value.string_value) for item in scope.attributes] == [("esper.schema.version", "1")]
    assert request.resource_metrics[0].scope_metrics[0].schema_url == SCHEMA_URL


def test_a_request_has_the_bytes_that_protobuf_writes() -> None:
    """What a file of JSON is turned into again is the same, bit for bit."""
    [request] = encoder().requests(blocks_of([make_frame()]))
    assert ExportMetricsServiceRequest.FromString(request.body).SerializeToString() == request.body


def test_the_resource_is_made_once_for_frames_of_one_run() -> None:
    """Resource detectors may be slow."""
    asked = []

    def counted(run: Run) -> Resource:
        asked.append(run)
        return resource(run)

    once = Encoder(CATALOGUE, counted)
    list(once.requests(blocks_of([make_frame(), make_frame()])))
    list(once.requests(blocks_of([make_frame(run=Run(RUN.run_id, RUN.attempt))])))
    once.health(RUN, {("esper.steps", ""): 1}, start_unix_ns=START_UNIX_NS, time_unix_ns=TIME_UNIX_NS)
    assert asked == [RUN]


def test_health_has_cumulative_counters_and_gauges_in_a_scope_of_their_own() -> None:
    """Counters that are no monotonic sums cannot be rated; in the frames' scope they would spoil a frame."""
    body = encoder().health(
        RUN,
        {
            ("esper.steps", ""): 7,
            ("esper.frames.dropped", "overflow"): 2,
            ("esper.frames.dropped", "refused"): 1,
            ("esper.export.queue", ""): 3,
        },
        start_unix_ns=START_UNIX_NS,
        time_unix_ns=TIME_UNIX_NS,
    )
    (block,) = ExportMetricsServiceRequest.FromString(body).resource_metrics
    (scoped,) = block.scope_metrics
    assert scoped.scope.name == "esper_otel.health"
    steps, dropped, queue = scoped.metrics
    assert [metric.name for metric in scoped.metrics] == [
        "esper.steps",
        "esper.frames.dropped",
        "esper.export.queue",
    ]
    for counter in (steps.sum, dropped.sum):
        assert counter.is_monotonic
        assert counter.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
        assert {point.start_time_unix_nano for point in counter.data_points} == {START_UNIX_NS}
    assert [point.as_double for point in steps.sum.data_points] == [7.0]
    assert not steps.sum.data_points[0].attributes
    assert {
        point.attributes[0].value.string_value: (point.attributes[0].key, point.as_double)
        for point in dropped.sum.data_points
    } == {"overflow": ("reason", 2.0), "refused": ("reason", 1.0)}
    (point,) = queue.gauge.data_points
    assert (point.as_double, point.start_time_unix_nano, point.time_unix_nano) == (3.0, 0, TIME_UNIX_NS)


def test_stale_markers_have_the_streams_identity_and_no_value() -> None:
    """A marker ends a series only if Resource, scope, name, unit, type and attributes are those of the series."""
    streams = [
        ("kasmina.seed.alpha", {"seed_id": "seed-1"}),
        ("kasmina.seed.alpha", {"seed_id": "seed-2"}),
        ("loss", {}),
    ]
    (body,) = encoder().stale(RUN, streams, time_unix_ns=TIME_UNIX_NS)
    (of_run,) = ExportMetricsServiceRequest.FromString(body).resource_metrics
    (scoped,) = of_run.scope_metrics
    (series,) = decoded(list(encoder().requests(blocks_of([make_frame()]))))[0].resource_metrics
    assert of_run.resource == series.resource
    assert scoped.scope == series.scope_metrics[0].scope
    [head] = [metric for metric in series.scope_metrics[0].metrics if metric.name == "loss"]
    assert (scoped.metrics[-1].unit, scoped.metrics[-1].description) == (head.unit, head.description)
    # One each: the collector's page takes only the first marker of a metric.
    assert [(metric.name, metric.unit, metric.WhichOneof("data")) for metric in scoped.metrics] == [
        ("kasmina.seed.alpha", "ratio", "gauge"),
        ("kasmina.seed.alpha", "ratio", "gauge"),
        ("loss", "loss", "gauge"),
    ]
    ended = [point for metric in scoped.metrics for point in metric.gauge.data_points]
    assert [{attribute.key: attribute.value.string_value for attribute in point.attributes} for point in ended] == [
        attributes for _, attributes in streams
    ]
    for point in ended:
        assert point.flags == metrics_pb2.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK
        assert point.WhichOneof("value") is None
        assert point.time_unix_nano == TIME_UNIX_NS


def test_stale_markers_of_many_streams_are_several_requests() -> None:
    """Retiring 10,000 seeds must not make a request that nobody accepts."""
    streams = [("kasmina.seed.alpha", {"seed_id": f"seed-{row}"}) for row in range(25)]
    bodies = list(encoder(max_points=10).stale(RUN, streams, time_unix_ns=TIME_UNIX_NS))
    ended = [
        point.attributes[0].value.string_value
        for _, point in read([ExportMetricsServiceRequest.FromString(body) for body in bodies])
    ]
    assert len(bodies) == 3
    assert ended == [attributes["seed_id"] for _, attributes in streams]


def test_stale_markers_of_seeds_with_long_names_fit_into_requests() -> None:
    """A seed's name may have 256 bytes."""
    streams = [("kasmina.seed.last_kernel_latency_ms", {"seed_id": f"{row:0256}"}) for row in range(20_000)]
    bodies = list(encoder().stale(RUN, streams, time_unix_ns=TIME_UNIX_NS))
    assert max(map(len, bodies)) < 4 * 2**20
    assert sum(1 for _ in read([ExportMetricsServiceRequest.FromString(body) for body in bodies])) == 20_000


def test_rows_that_end_series_are_encoded_with_those_around_them() -> None:
    """Seeds that come and go must not make a piece of each few rows: that took ten times as long."""
    seeds = [seed_table({f"s{number // 2}": {"alpha": 0.5}}) for number in range(40)]
    retired = [(f"s{number // 2 - 1}",) if number % 2 == 0 and number else () for number in range(40)]
    some = [
        make_frame(sequence=number + 1, time_unix_ns=TIME_UNIX_NS + number, seeds=rows, live=rows, retired=over)
        for number, (rows, over) in enumerate(zip(seeds, retired, strict=True))
    ]
    ended = {frame.sequence: [(SEED_CELLS[1].name, {"seed_id": frame.retired[0]})] for frame in some if frame.retired}
    of_some = encoder(max_points=250)
    pieces = list(of_some._parts(blocks_of(some), ended))
    assert len(pieces) == 2
    assert sum(piece.ends for piece in pieces) == len(some)
    assert sum(len(piece.markers) for piece in pieces) == len(ended) == 19
    assert all(piece.points <= 250 for piece in pieces)
