"""Shows the progress of the run, live in a terminal or else as a few plain lines."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper_otel import Packets, Stage
from esper_otel.demo.tamiyo import Decision

if TYPE_CHECKING:
    from esper_otel.leyline import SystemStatePacket

STYLES = {
    Stage.DORMANT: "bright_black",
    Stage.GERMINATED: "yellow",
    Stage.TRAINING: "cyan",
    Stage.BLENDING: "blue",
    Stage.SHADOWING: "magenta",
    Stage.PROBATIONARY: "bright_magenta",
    Stage.FOSSILIZED: "green",
    Stage.CULLED: "red",
    Stage.EMBARGOED: "bright_red",
    Stage.RESETTING: "yellow",
}
# One character for each span of a seed's life; readable without colours, too.
MARKS = {
    Stage.TRAINING: "░",
    Stage.BLENDING: "▒",
    Stage.SHADOWING: "▓",
    Stage.PROBATIONARY: "▓",
    Stage.FOSSILIZED: "█",
    Stage.CULLED: "x",
    Stage.EMBARGOED: "x",
}
_SPARKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 48
_EVENTS = 6
_SHOWN_SEEDS = 8
_REFRESH_S = 0.1
_PLAIN_LINES = 10


class Screen(Protocol):
    """Shows a run."""

    def show(self, packets: Packets, decision: Decision, /) -> None:
        """Adds a pulled step and Tamiyo's latest decision."""


class PlainScreen:
    """Prints about ten lines over the whole run, without control codes."""

    def __init__(self, out: TextIO, steps: int) -> None:
        self._out = out
        self._steps = steps
        self._every = max(1, steps // _PLAIN_LINES)

    def show(self, packets: Packets, _decision: Decision, /) -> None:
        """See ``Screen``."""
        state = packets.state
        if packets.step % self._every and packets.step != self._steps:
            return
        stages = ", ".join(f"{seed.seed_id} {Stage(seed.stage).name}" for seed in state.seed_states[:_SHOWN_SEEDS])
        self._out.write(
            f"step {packets.step} of {self._steps}, loss {state.training_loss:.3f}, {stages or 'no seeds'}\n"
        )
        self._out.flush()


class LiveScreen:
    """Shows progress, loss, the seeds' lives and Tamiyo's commands, all from pulled packets."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._state: SystemStatePacket | None = None
        self._losses: list[float] = []
        self._lives: dict[str, list[Stage]] = {}
        self._events: deque[Text] = deque(maxlen=_EVENTS)
        self._notes: tuple[str, ...] = ()
        self._live: Live | None = None
        self._drawn_s = 0.0

    @contextmanager
    def on(self, console: Console) -> Iterator[LiveScreen]:
        """Draws on a terminal within the context."""
        with Live(console=console, auto_refresh=False) as self._live:
            yield self
            self._live.update(self.picture(), refresh=True)

    def show(self, packets: Packets, decision: Decision, /) -> None:
        """See ``Screen``."""
        self._state = packets.state
        self._losses.append(packets.state.training_loss)
        for seed in packets.state.seed_states:
            self._lives.setdefault(seed.seed_id, []).append(Stage(seed.stage))
        self._notes = decision.notes
        for command in decision.commands:
            line = Text.assemble(
                (f"{packets.step:>5} ", "bright_black"), f"{command.seed_id} ", (command.action, "bold")
            )
            self._events.append(line.append(f"  {command.reason}", "bright_black"))
        now_s = time.monotonic()
        if self._live is not None and now_s - self._drawn_s >= _REFRESH_S:
            self._drawn_s = now_s
            self._live.update(self.picture(), refresh=True)

    def picture(self) -> RenderableType:
        """Returns the current screen."""
        state = self._state
        if state is None:
            return Text("starting")
        width = min(_COLUMNS, self._steps)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(no_wrap=True, width=_COLUMNS)
        grid.add_column(no_wrap=True)
        progress = ProgressBar(total=self._steps, completed=state.global_step, width=_COLUMNS)
        grid.add_row("steps", progress, f"{state.global_step} of {self._steps}, epoch {state.current_epoch}")
        grid.add_row("loss", Text(_spark(self._losses, self._steps, width), "cyan"), _numbers(state))
        for seed in state.seed_states[:_SHOWN_SEEDS]:
            stage = Stage(seed.stage)
            label = Text.assemble((stage.name, STYLES.get(stage, "")), f" alpha {seed.metrics['alpha']:.2f}")
            grid.add_row(seed.seed_id, _life(self._lives[seed.seed_id], self._steps, width), label)
        if len(state.seed_states) > _SHOWN_SEEDS:
            grid.add_row("", f"and {len(state.seed_states) - _SHOWN_SEEDS} more", "")
        return Group(
            grid,
            Text("; ".join(self._notes), "yellow", no_wrap=True, overflow="ellipsis"),
            *self._events,
            *(Text() for _ in range(_EVENTS - len(self._events))),
        )


def _numbers(state: SystemStatePacket) -> str:
    numbers = f"{state.training_loss:.3f}"
    return f"{numbers}, validation {state.validation_accuracy:.1%}" if state.validation_accuracy else numbers


def _spans(count: int, steps: int, width: int) -> Iterator[tuple[int, int]]:
    """Returns the range of steps for each column that the run has reached."""
    for column in range(width):
        first, last = column * steps // width, (column + 1) * steps // width
        if first >= count:
            return
        yield first, min(last, count)


def _spark(losses: list[float], steps: int, width: int) -> str:
    means = [sum(losses[first:last]) / (last - first) for first, last in _spans(len(losses), steps, width)]
    top = max(means)
    return "".join(_SPARKS[min(int(mean / top * len(_SPARKS)), len(_SPARKS) - 1)] if top > 0 else " " for mean in means)


def _life(stages: list[Stage], steps: int, width: int) -> Text:
    life = Text()
    for first, last in _spans(len(stages), steps, width):
        stage = _most(stages[first:last])
        life.append(MARKS.get(stage, "·"), STYLES.get(stage, ""))
    return life


def _most(stages: Iterable[Stage]) -> Stage:
    return Counter(stages).most_common(1)[0][0]
