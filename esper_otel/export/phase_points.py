"""Encodes phases as OTLP points, in a scope of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics

from esper_otel.export.scopes import attribute, set_scope, stream
from esper_otel.frames.phase_log import Phase
from esper_otel.schema import Metric

PHASE_SCOPE = "esper_otel.phases"
_MOST_PHASES = 1_000
_MOST_BYTES = 400_000  # of the 4 MiB of a request; see ``encode``
_POINT_BYTES, _POINTS = 64, 7
_MS = 1_000_000


def phase_scope(phases: Sequence[Phase], catalogue: Mapping[str, Metric], start_unix_ns: int) -> ScopeMetrics:
    """Returns the points of phases: for each, up to seven, at the time of its end.

    Args:
        phases: the phases, oldest first, at least one.
        catalogue: the metrics by name.
        start_unix_ns: when the totals were 0.
    """
    scope = ScopeMetrics()
    set_scope(scope, PHASE_SCOPE)
    for name, numbers in _numbers(phases).items():
        metric = catalogue[name]
        points = stream(scope, metric).data_points
        for phase, number in numbers:
            point = points.add(time_unix_nano=phase.end_unix_ns, as_double=number)
            if metric.kind == "counter":
                point.start_time_unix_nano = start_unix_ns
            point.attributes.append(attribute("phase", phase.name))
    return scope


def _numbers(phases: Iterable[Phase]) -> dict[str, list[tuple[Phase, float]]]:
    found: dict[str, list[tuple[Phase, float]]] = {}
    for phase in phases:
        numbers = {
            "esper.phase_ms": phase.total_ms,
            "esper.phase.inside_ms": phase.inside_ms,
            "esper.phase.length_ms": phase.length_ms,
            "esper.phase.own_ms": phase.own_ms,
            "esper.phase.step_ms": None if phase.step is None else phase.own_ms,
            "esper.phase.number": phase.number,
            "esper.phase.step": phase.step,
        }
        for name, number in numbers.items():
            if number is not None:
                found.setdefault(name, []).append((phase, float(number)))
    return found


def in_one_request(phases: Iterable[Phase], after_unix_ns: int) -> list[Phase]:
    """Returns the first phases, as many as one request may have in addition to steps.

    A phase that ended before what was sent last is moved to after it: no point may be older than one of an earlier
    request. That happens to phases on other threads, and to phases beyond this limit. Of two phases of one name, the
    later one still ends in a later millisecond: a database would keep one of the two.

    Args:
        phases: the phases, oldest first.
        after_unix_ns: the newest time that was sent.
    """
    found: list[Phase] = []
    size, ends = 0, dict[str, int]()
    for phase in phases:
        size += _POINTS * (_POINT_BYTES + len(phase.name.encode()))
        if found and (size > _MOST_BYTES or len(found) == _MOST_PHASES):
            break
        end_unix_ns = max(phase.end_unix_ns, after_unix_ns + 1)
        before_unix_ns = ends.get(phase.name)
        if before_unix_ns is not None:
            end_unix_ns = max(end_unix_ns, (before_unix_ns // _MS + 1) * _MS)
        ends[phase.name] = end_unix_ns
        late_ns = end_unix_ns - phase.end_unix_ns
        found.append(phase._replace(start_unix_ns=phase.start_unix_ns + late_ns, end_unix_ns=end_unix_ns))
    return found
