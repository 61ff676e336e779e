"""Pages: stored frames as the steps that pullers are given."""

from __future__ import annotations

from esper_otel.gateway.pull_messages import Step
from esper_otel.gateway.stored import Entry
from esper_otel.leyline.packets import packets
from esper_otel.risk import Rule, signals, with_signals


def step_of(entry: Entry, rules: tuple[Rule, ...], latency_budget_ms: float, now_unix_ns: int) -> Step:
    """The entry as packets, with the signals of its risks."""
    item = entry.item
    made = packets(
        item.frame,
        revision=item.revision,
        complete=item.complete,
        latency_budget_ms=latency_budget_ms,
        now_unix_ns=now_unix_ns,
    )
    made = with_signals(made, signals(made.state, loss_before=entry.loss_before, rules=rules))
    return Step(
        state=made.state.SerializeToString(),
        telemetry=[packet.SerializeToString() for packet in made.telemetry],
        attempt=made.attempt,
        rank=made.rank,
        step=made.step,
        revision=made.revision,
        complete=made.complete,
        age_s=made.age_s,
        names=sorted(made.names),
        writer=item.origin.writer,
    )
