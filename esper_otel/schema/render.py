"""Renders METRICS.md, the tables of metrics in docs/ and the rows of ``esper-otel schema`` from the catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from esper_otel.schema.catalogue import METRICS
from esper_otel.schema.hardware import TWINS
from esper_otel.schema.metric import Metric
from esper_otel.schema.own_metrics import FRAME_POINTS, FRAME_SEQUENCE, OWN_SEED, OWN_STEP, SEED_RETIRED
from esper_otel.schema.requested_metrics import SEED_METRICS, STEP_METRICS
from esper_otel.schema.session_metrics import DEVICE_INFO, PHASES, SESSION

_FIELDS = (
    *("name", "unit", "gated", "needs", "kind", "level"),
    *("description", "source", "present", "misleads", "window", "error", "cost", "rise"),
)

_INTRODUCTION = """\
<!-- Rendered from the catalogue in esper_otel/schema/ by `make docs`. Edit that, not this file. -->

# Metrics

Every metric of esper_otel, in the catalogue's order. Names and units are the same in OpenTelemetry and in Leyline.

- A metric that was not provided is absent, never 0. NaN and infinity are values and are sent unchanged.
- A *gated* metric is left out when `EsperSettings.tolaria_step_enrichment_enabled` is `False`.
- *Needs* lists the conditions for a metric to have a value.
- Every point of a step has the step's own time. Points of a seed have the attribute `seed_id`.
"""

_SECTIONS: tuple[tuple[str, str, tuple[Metric, ...]], ...] = (
    (
        "Steps",
        "One value per step and rank. In a packet: `SystemStatePacket.training_metrics`, under the same name.",
        STEP_METRICS,
    ),
    (
        "Seeds",
        "One value per recorded row of a seed. In a packet: `TelemetryPacket.metrics`, with the attribute `seed_id`.",
        SEED_METRICS,
    ),
    (
        "Further metrics, per step",
        (
            "Further values, in a packet in separate fields or in `training_metrics` under the key given here. "
            "Packets have no place for the parts of a step, throughput, the optimizer's index and `esper.memory.*`."
        ),
        (*OWN_STEP, FRAME_SEQUENCE, FRAME_POINTS, SEED_RETIRED),
    ),
    (
        "Further metrics, per seed",
        "The seed fields of a packet that the metrics above do not cover; present when recorded.",
        OWN_SEED,
    ),
    (
        "The telemetry's own health",
        "One series per session. These metrics are not in frames or packets.",
        SESSION,
    ),
    (
        "Phases",
        "Points at the end of each phase, with the attribute `phase`. These metrics are not in frames or packets.",
        PHASES,
    ),
    (
        "The device",
        "One series per session, with attributes, to join the others to hardware. Not in frames or packets.",
        (DEVICE_INFO,),
    ),
    (
        "The GPU, under the names of the semantic conventions",
        (
            "Only with the setting `hw_metrics`: values of metrics above, in the conventions' units, with `hw.id` and "
            "other attributes of `esper.device.info`. Not in frames or packets."
        ),
        tuple(twin.metric for twin in TWINS),
    ),
)


def metrics_markdown() -> str:
    """Returns the text of METRICS.md."""
    parts = [_INTRODUCTION]
    for title, introduction, metrics in _SECTIONS:
        parts += [f"## {title}\n\n{introduction}\n", *(_entry(metric) for metric in metrics)]
    return "\n".join(parts)


def _entry(metric: Metric) -> str:
    facts = [
        f"unit `{metric.unit}`",
        metric.kind,
        "gated" if metric.gated else "not gated",
        "needs " + (", ".join(metric.needs) or "nothing"),
    ]
    if metric is SEED_RETIRED:
        facts.append("recorded by `retire_seed()`; its points have the attribute `seed_id`")
    elif metric.level == "seed":
        facts.append(f"recorded as `{metric.field}`")
    elif metric.key and metric.key != metric.name:
        facts.append(f"key `{metric.key}`")
    remarks = (
        *(("Clock or formula", metric.source), ("Window", metric.window), ("Present", metric.present)),
        *(("Maximum error", metric.error), ("Cost", metric.cost)),
        *(("Pitfalls", metric.misleads), ("If it rises", metric.rise)),
    )
    lines = [f"### `{metric.name}`", "", metric.description, "", f"- {', '.join(facts)}"]
    lines += [f"- {title}: {text}" for title, text in remarks if text]
    return "\n".join(lines) + "\n"


def request_tables() -> str:
    """Returns the two tables of the 31 metrics that were asked for first, as docs/reference/metrics.md shows them."""
    heads = ("metric", "unit", "gated", "needs", "meaning")
    return "\n".join(
        (
            "Per step, in `SystemStatePacket.training_metrics`:",
            "",
            markdown_table(heads, map(_row, STEP_METRICS)),
            "",
            "Per seed, in `TelemetryPacket.metrics`, with the attribute `seed_id`:",
            "",
            markdown_table(heads, map(_row, SEED_METRICS)),
        )
    )


def _row(metric: Metric) -> tuple[str, ...]:
    gated = "gated" if metric.gated else ""
    return f"`{metric.name}`", metric.unit, gated, ", ".join(metric.needs), metric.description


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; bars in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def schema_rows() -> list[dict[str, Any]]:
    """Returns the entries as plain values, in order."""
    return [
        {name: list(metric.needs) if name == "needs" else getattr(metric, name) for name in _FIELDS}
        for metric in METRICS
    ]


def schema_json() -> str:
    """Returns the entries as a JSON list of objects, in order."""
    return json.dumps(schema_rows(), indent=2, ensure_ascii=False)
