"""Draws examples/demo.svg: the demo's screen at the end of a real run, then its table.

Run it from anywhere: ``python examples/draw_demo.py [steps]``.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from rich.console import Console

from esper_otel.demo.command import RANDOM_SEED, SEEDS, STEPS
from esper_otel.demo.receiver import Receiver
from esper_otel.demo.screen import LiveScreen
from esper_otel.demo.summary import draw
from esper_otel.demo.training import Plan, run

PICTURE = Path(__file__).with_name("demo.svg")
WIDTH = 100


def main(steps: int) -> None:
    """Trains, and draws what a terminal would show."""
    torch.set_num_threads(1)
    screen = LiveScreen(steps)
    result = run(Plan(steps, SEEDS, RANDOM_SEED), Receiver(), screen.show)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(screen.picture())
    console.print()
    draw(console, result)
    PICTURE.write_text(console.export_svg(title="esper-otel demo"), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
