"""The gateway's own metrics, in Prometheus' text format."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.gateway.faults import DEFERRED, REFUSED
from esper_otel.gateway.pull_core import PullCore
from esper_otel.gateway.receive.log_records import EVENT_REASONS
from esper_otel.gateway.receive.request import REASONS


class _OwnMetric(NamedTuple):
    name: str
    kind: str
    text: str


_COUNTERS = (
    _OwnMetric("requests", "counter", "OTLP requests accepted."),
    _OwnMetric("points", "counter", "Points accepted."),
    _OwnMetric("steps", "counter", "Steps released, including corrections."),
    _OwnMetric("incomplete_steps", "counter", "Steps released without some of their points."),
    _OwnMetric("corrections", "counter", "Steps released again with points that arrived late."),
    _OwnMetric("pulled_steps", "counter", "Steps sent to pullers."),
    _OwnMetric("gap_steps", "counter", "Steps that pullers did not get: dropped from the store, or not arrived."),
    _OwnMetric("dropped_steps", "counter", "Steps dropped from the store because of its limits or their age."),
    _OwnMetric("log_requests", "counter", "OTLP requests with log records accepted."),
    _OwnMetric("events", "counter", "Events of runs accepted, without repeated ones."),
    _OwnMetric("repeated_events", "counter", "Events that arrived again."),
    _OwnMetric("ignored_log_records", "counter", "Log records that are not events of runs."),
    _OwnMetric("faults", "counter", "Internal errors of the gateway; see its log."),
    _OwnMetric("store_failures", "counter", "Requests that could not be stored; their senders were asked to retry."),
)
_OONA = (
    _OwnMetric("published", "counter", "Messages published on Oona."),
    _OwnMetric("emergencies", "counter", "Messages published on Oona's emergency stream."),
    _OwnMetric("failures", "counter", "Failures of Redis; messages that could not be published are published later."),
    _OwnMetric("lost", "counter", "Steps that were dropped from the store before they could be published."),
)
_GAUGES = (
    _OwnMetric("runs", "gauge", "Runs known."),
    _OwnMetric("writers", "gauge", "Sending processes known."),
    _OwnMetric("missing_steps", "gauge", "Steps of known runs that have not arrived although later ones have."),
    _OwnMetric("unseen_steps", "gauge", "Steps before the first that arrived: late, lost, or sent to another gateway."),
    _OwnMetric("too_late_steps", "gauge", "Steps of known runs that arrived twice, or too late to be accepted."),
    _OwnMetric("missing_events", "gauge", "Events of known runs that have not arrived although later ones have."),
    _OwnMetric("stored_bytes", "gauge", "Size of the stored steps in bytes."),
    _OwnMetric("waiting_pulls", "gauge", "Pull requests waiting for the next step."),
    _OwnMetric("unsaved_steps", "gauge", "Steps that have not been stored yet."),
)

_NOTICES = (
    _OwnMetric("sent", "counter", "Notices that a webhook has taken."),
    _OwnMetric("dropped", "counter", "Notices that were dropped: refused for good, or too many waited."),
    _OwnMetric("failures", "counter", "Requests to a webhook that failed or were refused."),
)


def prometheus_text(core: PullCore) -> str:
    """Returns every metric with its help and type; counters start at 0."""
    values = {**core.gauges(), **core.counts}
    lines = []
    for own in (*_COUNTERS, *_GAUGES):
        name = f"esper_gateway_{own.name}" + ("_total" if own.kind == "counter" else "")
        value = values.get(own.name, 0)
        lines += [f"# HELP {name} {own.text}", f"# TYPE {name} {own.kind}", f"{name} {value:.17g}"]
    for name, text, place in (
        ("bound_used", "How much of a limit is used by all senders together.", 0),
        ("bound_limit", "The limit.", 1),
    ):
        full = f"esper_gateway_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} gauge"]
        lines += [f'{full}{{bound="{bound}"}} {use[place]:.17g}' for bound, use in sorted(core.use().items())]
    lines += [
        "# HELP esper_gateway_damaged_total Damage found in the store, by kind; it was put aside or rebuilt.",
        "# TYPE esper_gateway_damaged_total counter",
    ]
    for kind in ("body", "frame", "index", "place", "row", "store"):
        lines.append(f'esper_gateway_damaged_total{{kind="{kind}"}} {core.damaged.get(kind, 0)}')
    if core.publisher is not None:
        for own in _OONA:
            name = f"esper_gateway_oona_{own.name}_total"
            count = core.publisher.counts[own.name]
            lines += [f"# HELP {name} {own.text}", f"# TYPE {name} counter", f"{name} {count}"]
    for own in _NOTICES:
        name = f"esper_gateway_notices_{own.name}_total"
        lines += [f"# HELP {name} {own.text}", f"# TYPE {name} counter", f"{name} {core.notices[own.name]}"]
    for name, text, reasons, counted in (
        ("rejected_points", "Points refused permanently, by reason.", REASONS, core.rejected),
        ("refused_events", "Events refused permanently, by reason.", EVENT_REASONS, core.refused_events),
        ("refused_requests", "Requests refused permanently, by reason.", REFUSED, core.refused),
        ("deferred_requests", "Requests whose senders were asked to retry, by reason.", DEFERRED, core.deferred),
    ):
        full = f"esper_gateway_{name}_total"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} counter"]
        counts = {**dict.fromkeys(reasons, 0), **counted}  # from 0, since rate() misses a counter's first value
        lines += [f'{full}{{reason="{reason}"}} {count}' for reason, count in sorted(counts.items())]
    name = "esper_gateway_rejected_metric_points_total"
    lines += [
        f"# HELP {name} Points refused permanently, by reason and metric, for a limited number of metrics.",
        f"# TYPE {name} counter",
    ]
    for (reason, metric), count in sorted(core.rejected_metrics.items()):
        lines.append(f'{name}{{reason="{reason}",metric="{_escaped(metric)}"}} {count}')
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
