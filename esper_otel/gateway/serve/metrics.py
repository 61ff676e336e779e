"""Metrics: the gateway about itself, in Prometheus' text format."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.gateway.core import Core
from esper_otel.gateway.faults import DEFERRED, REFUSED
from esper_otel.gateway.receive.request import REASONS


class _Own(NamedTuple):
    name: str
    kind: str
    text: str


_COUNTERS = (
    _Own("requests", "counter", "OTLP requests taken."),
    _Own("points", "counter", "Points taken."),
    _Own("steps", "counter", "Steps released, corrections included."),
    _Own("incomplete_steps", "counter", "Steps released without some of their points."),
    _Own("corrections", "counter", "Steps released again, with points that came late."),
    _Own("pulled_steps", "counter", "Steps given to pullers."),
    _Own("gap_steps", "counter", "Steps that fell out of the store before a puller came for them."),
    _Own("dropped_steps", "counter", "Steps dropped from the store, for want of room or by age."),
    _Own("faults", "counter", "Faults of the gateway itself; its log has them."),
    _Own("store_failures", "counter", "Requests that could not be stored; their senders were asked to come again."),
)
_OONA = (
    _Own("published", "counter", "Messages published on Oona."),
    _Own("emergencies", "counter", "Messages among them on the emergency stream."),
    _Own("failures", "counter", "Failures of Redis; what could not be published is published later."),
    _Own("lost", "counter", "Steps that fell out of the store before they could be published."),
)
_GAUGES = (
    _Own("runs", "gauge", "Runs known."),
    _Own("writers", "gauge", "Processes known that send."),
    _Own("missing_steps", "gauge", "Steps that have not come though later ones have, of the runs known."),
    _Own("unseen_steps", "gauge", "Steps before the first that came: late, lost, or sent to another gateway."),
    _Own("too_late_steps", "gauge", "Steps that came again, or too late to be taken, of the runs known."),
    _Own("stored_bytes", "gauge", "Bytes that stored steps take."),
    _Own("waiting_pulls", "gauge", "Pullers that wait for the next step."),
    _Own("unsaved_steps", "gauge", "Steps that the store has not taken yet."),
)


def prometheus_text(core: Core) -> str:
    """Every metric, with its help and type; counters from 0 on."""
    values = {**core.gauges(), **core.counts}
    lines = []
    for own in (*_COUNTERS, *_GAUGES):
        name = f"esper_gateway_{own.name}" + ("_total" if own.kind == "counter" else "")
        value = values.get(own.name, 0)
        lines += [f"# HELP {name} {own.text}", f"# TYPE {name} {own.kind}", f"{name} {value:.17g}"]
    for name, text, place in (
        ("bound_used", "How much of a bound is used, of all senders together.", 0),
        ("bound_limit", "The bound.", 1),
    ):
        full = f"esper_gateway_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} gauge"]
        lines += [f'{full}{{bound="{bound}"}} {use[place]:.17g}' for bound, use in sorted(core.use().items())]
    lines += [
        "# HELP esper_gateway_damaged_total What was damaged in the store, by kind: it is kept aside, or made anew.",
        "# TYPE esper_gateway_damaged_total counter",
    ]
    for kind in ("body", "frame", "index", "place", "row", "store"):
        lines.append(f'esper_gateway_damaged_total{{kind="{kind}"}} {core.damaged.get(kind, 0)}')
    if core.publisher is not None:
        for own in _OONA:
            name = f"esper_gateway_oona_{own.name}_total"
            count = core.publisher.counts[own.name]
            lines += [f"# HELP {name} {own.text}", f"# TYPE {name} counter", f"{name} {count}"]
    for name, text, reasons, counted in (
        ("rejected_points", "Points refused for good, by reason.", REASONS, core.rejected),
        ("refused_requests", "Requests refused for good, by reason.", REFUSED, core.refused),
        ("deferred_requests", "Requests whose senders were asked to come again, by reason.", DEFERRED, core.deferred),
    ):
        full = f"esper_gateway_{name}_total"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} counter"]
        counts = {**dict.fromkeys(reasons, 0), **counted}  # a counter that began at 1 would be no increase
        lines += [f'{full}{{reason="{reason}"}} {count}' for reason, count in sorted(counts.items())]
    name = "esper_gateway_rejected_metric_points_total"
    lines += [
        f"# HELP {name} Points refused for good, by reason and metric, of the first metrics.",
        f"# TYPE {name} counter",
    ]
    for (reason, metric), count in sorted(core.rejected_metrics.items()):
        lines.append(f'{name}{{reason="{reason}",metric="{_escaped(metric)}"}} {count}')
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
