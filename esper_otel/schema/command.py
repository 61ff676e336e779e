"""The command ``esper-otel schema``, which prints the catalogue as a table or as JSON."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from esper_otel.schema import METRICS
from esper_otel.schema.render import schema_json

_NO_WIDTH = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel schema``."""
    parser.add_argument(
        "--json", action="store_true", help="print a list of objects, one per metric, with its whole contract"
    )


def main(options: argparse.Namespace) -> int:
    """Prints every metric."""
    sys.stdout.write(f"{schema_json() if options.json else _schema_text()}\n")
    return 0


def _schema_text() -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("metric", "unit", "level", "gated", "needs"):
        table.add_column(head, no_wrap=True)
    table.add_column("description", overflow="fold")
    for metric in METRICS:
        gated = "gated" if metric.gated else ""
        table.add_row(
            metric.name, metric.unit, metric.level, gated, ", ".join(metric.needs), escape(metric.description)
        )
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: one line per metric, uncut
        console = Console(width=_NO_WIDTH)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
