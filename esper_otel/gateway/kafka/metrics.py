"""The metrics of a member, in Prometheus' text format."""

from __future__ import annotations

from esper_otel.gateway.kafka.member import Member
from esper_otel.gateway.receive.request import REASONS

# Those of a gateway have the same names here.
_COUNTERS = {
    "requests": "OTLP requests accepted.",
    "points": "Points accepted.",
    "steps": "Steps released, including corrections.",
    "incomplete_steps": "Steps released without some of their points.",
    "corrections": "Steps released again with points that arrived late.",
    "kafka_transactions": "Transactions committed.",
    "kafka_aborts": "Transactions aborted; their requests are read again.",
    "kafka_restarts": "How often the member began anew from what is committed.",
    "kafka_lost_sessions": "How often the group took the member's partitions away because it did not answer.",
    "kafka_poisoned": "Records that could not be used; they are kept in the topic for such records.",
    "kafka_too_large": "Records that were too large for a topic and left out; for steps, pullers see a gap.",
    "kafka_expired_records": "Records that expired before a member read them.",
}
_GAUGES = {
    "writers": "Sending processes known.",
    "missing_steps": "Steps of known runs that have not arrived although later ones have.",
    "kafka_partitions": "Partitions that the member works on.",
    "kafka_unreadable_partitions": "Partitions that the member leaves alone: a newer version has written there.",
    "kafka_lag_records": "Records in these partitions that it has not read yet.",
}


def member_text(member: Member) -> str:
    """Returns every metric with its help and type; counters start at 0."""
    counts, gauges = member.counts, member.gauges()
    lines = []
    for name, text in _COUNTERS.items():
        full = f"esper_gateway_{name}_total"
        value = counts.get(name.removeprefix("kafka_"), 0)
        lines += [f"# HELP {full} {text}", f"# TYPE {full} counter", f"{full} {value}"]
    for name, text in _GAUGES.items():
        full = f"esper_gateway_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} gauge", f"{full} {gauges[name.removeprefix('kafka_')]:.17g}"]
    full = "esper_gateway_rejected_points_total"
    lines += [f"# HELP {full} Points refused permanently, by reason.", f"# TYPE {full} counter"]
    rejected = {**dict.fromkeys(REASONS, 0), **member.rejected}
    lines += [f'{full}{{reason="{reason}"}} {count}' for reason, count in sorted(rejected.items())]
    return "\n".join(lines) + "\n"
