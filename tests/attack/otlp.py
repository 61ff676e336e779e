"""OTLP bodies, made to cost more than they should."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from esper_otel.varint import field_head

MIB = 1024 * 1024
MOST_REQUEST = 64 * MIB  # what a gateway takes, unpacked
_END = 1  # DataPointFlags.NO_RECORDED_VALUE


class Point(NamedTuple):
    """One point of a gauge."""

    metric: str
    value: float
    time_unix_ns: int
    seed: str = ""
    is_end: bool = False


def body(run: str, points: Iterable[Point], *, scope: str = "", **resource: str | int) -> bytes:
    """A request of one run; ``resource`` names further attributes with ``__`` for each dot."""
    return message(run, points, scope=scope, **resource).SerializeToString()


def message(
    run: str, points: Iterable[Point], *, scope: str = "", **resource: str | int
) -> ExportMetricsServiceRequest:
    """As ``body``, not serialized yet."""
    request = ExportMetricsServiceRequest()
    of_run = request.resource_metrics.add()
    for name, value in {
        "esper.run.id": run,
        **{key.replace("__", "."): each for key, each in resource.items()},
    }.items():
        attribute = of_run.resource.attributes.add(key=name)
        if isinstance(value, str):
            attribute.value.string_value = value
        else:
            attribute.value.int_value = value
    scoped = of_run.scope_metrics.add()
    scoped.scope.name = scope
    metrics: dict[str, Metric] = {}
    for point in points:
        if point.metric not in metrics:
            metrics[point.metric] = scoped.metrics.add(name=point.metric)
        made = metrics[point.metric].gauge.data_points.add(time_unix_nano=point.time_unix_ns)
        if point.is_end:
            made.flags = _END
        else:
            made.as_double = point.value
        if point.seed:
            made.attributes.add(key="seed_id").value.string_value = point.seed
    return request


def step(run: str, number: int, **resource: Any) -> bytes:
    """One step of a plain sender: its number and its loss."""
    now = time.time_ns()
    return body(run, [Point("loss", 1.0, now), Point("esper.global_step", float(number), now)], **resource)


def seeds_at_own_times(run: str, count: int) -> bytes:
    """Each point is of its own seed and of its own time: a frame each, and one more live seed in each."""
    now = time.time_ns()
    return body(run, [Point("kasmina.seed.alpha", 0.5, now + place * 1000, f"s{place}") for place in range(count)])


def ends(run: str, first: int, count: int, time_unix_ns: int) -> bytes:
    """Ends of seeds' streams at one time."""
    seeds = (f"seed-{place}" for place in range(first, first + count))
    return body(run, [Point("kasmina.seed.alpha", 0.0, time_unix_ns, seed, is_end=True) for seed in seeds])


def unfinished(run: str, count: int) -> bytes:
    """Frames of our own kind that say they have a point more than ever comes."""
    now = time.time_ns()
    points = []
    for place in range(count):
        at = now + place * 1_000_000
        points.append(Point("esper.frame.sequence", float(place + 1), at))
        points.append(Point("esper.frame.points", 9.0, at))
        points.append(Point("loss", 1.0, at))
    return body(run, points, scope="esper_otel", esper__run__attempt=1)


def many_runs(prefix: str, count: int) -> bytes:
    """A step of each of so many runs in one request."""
    return b"".join(step(f"{prefix}{number}", 1) for number in range(count))


def nested(path: Sequence[int], content: bytes) -> bytes:
    """The content as the message at the end of a path of field numbers."""
    for number in reversed(path):
        content = field_head(number, len(content)) + content
    return content


def empty_messages(path: Sequence[int], size: int = MOST_REQUEST - 64) -> bytes:
    """As many empty messages as fit, at the end of a path of field numbers: the last one is theirs."""
    *outer, last = path
    return nested(outer, field_head(last, 0) * (size // 2))


def empty_members(size: int) -> bytes:
    """A gzip body of nothing but empty members."""
    member = gzip.compress(b"", mtime=0)
    return member * (size // len(member))


def packed(content: bytes) -> bytes:
    """By gzip, quickly: content that repeats itself becomes a few hundred kilobytes at most."""
    return gzip.compress(content, 1, mtime=0)
