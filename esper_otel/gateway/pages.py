"""Pages: stored frames and what is known of runs, as the messages that pullers are given."""

from __future__ import annotations

from dataclasses import replace

from esper_otel.gateway.items import RunState
from esper_otel.gateway.pull_messages import Run, Step, step_message
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
    return step_message(replace(made, writer=item.origin.writer))


def run_message(state: RunState, stored: int) -> Run:
    """What is known of a writer, with the number of its steps that can be pulled."""
    return Run(
        run_id=state.origin.run_id,
        attempt=state.origin.attempt,
        rank=state.origin.rank,
        writer=state.origin.writer,
        world_size=state.world_size,
        experiment=state.experiment,
        first_step=state.first_step,
        last_step=state.last_step,
        last_time_unix_ns=state.last_time_unix_ns,
        last_received_unix_ns=state.last_received_unix_ns,
        ended=state.ended,
        resumed=state.resumed,
        writers=state.writers,
        missing=state.missing,
        incomplete=state.incomplete,
        stored=stored,
        differing=state.differing,
        too_late=state.too_late,
    )
