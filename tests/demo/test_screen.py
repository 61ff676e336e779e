"""The screen in a terminal and the table, drawn from a real run."""

from __future__ import annotations

import io

import pytest
from later import needs
from rich.console import Console

pytest.importorskip("torch")
needs("sklearn")

from esper_otel.demo.receiver import Receiver  # noqa: E402 - only where torch is
from esper_otel.demo.result import DemoResult  # noqa: E402
from esper_otel.demo.screen import LiveScreen  # noqa: E402
from esper_otel.demo.summary import draw  # noqa: E402
from esper_otel.demo.training import Plan, run  # noqa: E402


def _shown(seeds: int) -> tuple[str, DemoResult]:
    out = io.StringIO()
    with LiveScreen(20).on(Console(file=out, force_terminal=True, width=120, height=40)) as screen:
        result = run(Plan(steps=20, seeds=seeds, random_seed=7), Receiver(), screen.show)
    return out.getvalue(), result


def _table(result: DemoResult) -> str:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        draw(console, result)
    return capture.get()


def test_a_terminal_shows_steps_loss_stages_and_commands() -> None:
    text, _ = _shown(seeds=3)
    assert "20 of 20, epoch 0" in text
    assert "seed-3" in text
    assert "alpha 0.00" in text
    assert "germinate" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_many_seeds_are_cut_on_the_screen_and_counted() -> None:
    """A screen has so many lines; --json has all seeds."""
    text, result = _shown(seeds=10)
    assert "and 2 more" in text
    table = _table(result)
    assert "6 more seeds: --json has them all" in table
    assert result.packets == {"states": 20, "telemetry": 200}
    assert table.count("seed-") == 4


def test_a_run_without_seeds_has_a_screen_and_a_table() -> None:
    text, result = _shown(seeds=0)
    assert "20 of 20" in text
    assert _table(result).count("no live seed") == 10
