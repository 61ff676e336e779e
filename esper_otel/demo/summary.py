"""Prints a table of all requested metrics with their last values, and the destination of the frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper_otel import Stage
from esper_otel.demo.result import DemoResult
from esper_otel.schema import SEED_METRICS, STEP_METRICS

_SHOWN_SEEDS = 4
_CELL = 12
_QUIET = "bright_black"


def draw(console: Console, result: DemoResult) -> None:
    """Prints the table and the lines below it."""
    seeds = sorted({seed for name in result.metrics for seed in _by_seed(result, name)}, key=_order)
    table = _table(result, seeds[:_SHOWN_SEEDS])
    if console.is_terminal:
        console.print(table)
    else:  # in a file, lines must not end in spaces
        with console.capture() as capture:
            console.print(table)
        console.out("\n".join(line.rstrip() for line in capture.get().splitlines()))
    if len(seeds) > _SHOWN_SEEDS:
        console.print(f"{len(seeds) - _SHOWN_SEEDS} more seeds: --json has them all")
    console.print(Text("\n".join(_summary(result))))


def _table(result: DemoResult, seeds: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("last value, or why it is absent", overflow="fold")
    for metric in STEP_METRICS:
        value = result.metrics.get(metric.name)
        if value is None or isinstance(value, dict):
            table.add_row(metric.name, metric.unit, Text(result.absent.get(metric.name, ""), _QUIET))
        else:
            table.add_row(metric.name, metric.unit, _number(value))
    if seeds:
        table.add_row("", "", Text("".join(seed[:_CELL].ljust(_CELL) for seed in seeds), "bold"))
    for metric in SEED_METRICS:
        values = _by_seed(result, metric.name)
        if not values:
            table.add_row(metric.name, metric.unit, Text(result.absent.get(metric.name, ""), _QUIET))
            continue
        cells = [_cell(metric.field, values.get(seed)) for seed in seeds]
        table.add_row(metric.name, metric.unit, Text("".join(cell.ljust(_CELL) for cell in cells)))
    return table


def _by_seed(result: DemoResult, name: str) -> Mapping[str, float]:
    value = result.metrics.get(name)
    return value if isinstance(value, dict) else {}


def _order(seed_id: str) -> tuple[int, str]:
    return len(seed_id), seed_id


def _cell(field: str, value: float | None) -> str:
    if value is None:
        return "-"
    return Stage(int(value)).name[: _CELL - 1] if field == "stage" else _number(value)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _summary(result: DemoResult) -> list[str]:
    frames, packets = result.frames, result.packets
    received = "" if frames["received"] is None else f", received {frames['received']}"
    lines = [""]
    if result.is_interrupted:
        lines.append(f"interrupted after {result.steps} steps")
    if result.validation is not None:
        lines.append(f"validation: loss {result.validation[0]:.3f}, accuracy {result.validation[1]:.1%}")
    lines.append(
        f"frames: recorded {frames['recorded']}, exported {frames['exported']}{received}, "
        f"dropped {frames['dropped']}; packets pulled: {packets['states']} states, {packets['telemetry']} of seeds"
    )
    if result.export:
        latency_ms = result.export["latency_ms"]
        took = "none was answered" if latency_ms is None else f"the last took {latency_ms:.1f} ms"
        lines.append(
            f"requests: {result.export['retries']} retried, {took}, last error: {result.last_error or 'none'}; "
            f"buffer {int(result.export['buffer_bytes'] or 0) / 1e6:.1f} MB"
        )
    lines.append(f"run {result.run_id} went to {result.destination}")
    if frames["received"] is not None:
        lines.append("set OTEL_EXPORTER_OTLP_ENDPOINT to send it to your stack")
    return lines
