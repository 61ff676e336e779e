"""Which metrics a session has, and which processors: of the catalogue, the user and the probes."""

from __future__ import annotations

from collections.abc import Sequence

from esper_otel.derive.deriver import checked_processors
from esper_otel.derive.dynamics import Dynamics
from esper_otel.derive.processor import Processor
from esper_otel.probes.probe import Probe
from esper_otel.record.names import Names
from esper_otel.schema import TWINS, Metric


def instrument_entries(names: Names, *, has_twins: bool) -> list[Metric]:
    """Returns the metrics to register; a metric of the user's takes precedence over a twin of this name."""
    twins = [twin.metric for twin in TWINS if has_twins and twin.metric.name not in names.entries]
    return [*names.entries.values(), *twins]


def declared(
    metrics: Sequence[Metric], processors: Sequence[Processor], probes: Sequence[Probe], *, enriched: bool
) -> tuple[Names, tuple[Processor, ...]]:
    """Returns the session's names and the processors that give at least one recorded metric."""
    catalogue = Names(enriched=enriched).entries
    given = [entry for processor in processors for entry in getattr(processor, "gives", ())]
    measured = [entry for probe in probes for entry in probe.gives]
    brought = {
        entry.name: entry for entry in (*given, *measured) if isinstance(entry, Metric) and entry.name not in catalogue
    }
    names = Names((*metrics, *(entry for entry in brought.values() if entry not in metrics)), enriched=enriched)
    taken = {entry if isinstance(entry, str) else entry.name for entry in given}
    chosen = (Dynamics(without=taken | names.left_out), *processors)
    checked_processors(chosen, names.entries)
    return names, tuple(
        processor
        for processor in chosen
        if not names.left_out.issuperset(entry if isinstance(entry, str) else entry.name for entry in processor.gives)
    )
