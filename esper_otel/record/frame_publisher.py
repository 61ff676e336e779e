"""Builds one frame for each step that has ended, in order, and appends it to the ring."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from esper_otel.frames.frame import (
    FLOAT32_BOUND,
    LAST_LOSS,
    NO_READINGS,
    NO_SEEDS,
    Frame,
    Run,
    SeedTable,
)
from esper_otel.frames.layout import Layout
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.native import threads
from esper_otel.record import device
from esper_otel.record.arrivals import Arrivals
from esper_otel.record.names import Names
from esper_otel.record.seeds import merged_tables, one_cell
from esper_otel.record.tally import Tally
from esper_otel.record.values import CONTEXT, VIOLATIONS, DeviceValues

_DEVICE_POLL_S = 0.001

# A signal handler may call drain() on the very thread that is already in drain(): it must not wait for ever.
_DRAINING_TIMEOUT_S = 1.0

_NAN = float("nan")

# Layouts by the names recorded, then by the names derived.
_Layouts: TypeAlias = dict[tuple[str, ...], dict[tuple[str, ...], Layout]]

# Layouts kept; a script that makes names up in every step has others each time.
_MOST_LAYOUTS = 4_000


class Draft(NamedTuple):
    """A step that has ended, as the recorder hands it to the publisher.

    Attributes:
        global_step: the step's number.
        epoch: its epoch.
        time_unix_ns: its time.
        values: the values recorded in it, by metric name.
        table: the seed rows recorded in it.
        failed: whether the step raised an exception.
        retired: seeds whose lives end before this step.
        ended: seeds whose lives ended when the controller requested this step's state.
        context: values that stay in every frame from this one on.
        probed: readings from the probes.
    """

    global_step: int
    epoch: int
    time_unix_ns: int
    values: Mapping[str, float]
    table: SeedTable = NO_SEEDS
    failed: bool = False
    retired: Sequence[str] = ()
    ended: tuple[str, ...] = ()
    context: Mapping[str, float] | None = None
    probed: Mapping[str, float] = NO_READINGS


class Deriving(Protocol):
    """The interface that recording requires of the deriver, which computes further metrics from those of a step.

    Attributes:
        reads_probes: whether the deriver also needs the readings of the probes.
    """

    reads_probes: bool

    def commit(self, given: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Returns names and numbers of the derived metrics and advances to the next step."""

    def peek(self, given: Mapping[str, float]) -> Mapping[str, float]:
        """Returns what ``commit`` would, by name, without advancing."""


class Counters:
    """Counts of faults and odd values in one session that ``Tally`` does not count. One thread writes, any reads."""

    def __init__(self) -> None:
        self.failed: int = 0
        self.backwards: int = 0
        self.nonfinite: int = 0
        self.out_of_range: int = 0
        self.faults: int = 0


class FramePublisher:
    """Publishes one frame per step, in step order. A step with CUDA values waits in a queue until they have arrived.

    Threads: ``publish`` and ``preview`` belong to the recording thread; ``drain`` and ``settle`` may be called
    from others.
    """

    def __init__(
        self,
        run: Run,
        names: Names,
        ring: Ring,
        *,
        deriving: Deriving,
        context: Mapping[str, float],
        warnings: Warnings,
    ) -> None:
        self.run: Run = run
        self.settle_run: Callable[[Run], Run] | None = None  # called once, for the first frame
        self.names = names
        self.ring = ring
        self.counters: Counters = Counters()
        self.warnings = warnings
        self.tally: Tally = Tally(ring, names, warnings, self.fault)
        self.live: LiveSeeds = LiveSeeds()
        self.last_finite_loss: float | None = None
        self.published: Callable[[], None] | None = None  # called after each step
        self.alarmed: Callable[[], None] | None = None  # called after a loss that is not finite
        self.waiting: deque[tuple[Draft, DeviceValues | None]] = deque()
        self._arrivals = Arrivals(self.waiting, self.drain)
        self._device_is_named = False
        self._deriving = deriving
        self._context = dict(context)
        self._probed: Mapping[str, float] = NO_READINGS
        # Values of the context and of probes, and the layouts of steps that have these.
        self._beside: tuple[float, ...] = ()
        self._layouts: _Layouts = {}
        self._all_layouts: dict[tuple[tuple[str, ...], tuple[str, ...]], _Layouts] = {}
        self._count = 0
        self._surround(None, NO_READINGS)
        self._draining = threads().Lock()

    def publish_later(self, draft: Draft, held: DeviceValues | None) -> None:
        """Publishes the step's frame once its device values have arrived and all earlier steps are published."""
        if held is not None:
            held.seal()
        self.waiting.append((draft, held))
        self.drain()
        if self.waiting:
            self._arrivals.note()

    def drain(self, *, wait: bool = False) -> None:
        """Publishes the steps whose device values have arrived, in order. With ``wait``, waits for all steps."""
        if not self.waiting or not self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
            return
        try:
            while self.waiting:
                _, held = self.waiting[0]
                if held is not None:
                    if wait:
                        held.wait()
                    elif not held.done():
                        return
                self._publish_first(held)
        finally:
            self._draining.release()

    def settle(self, deadline_s: float) -> None:
        """Publishes every waiting step, without device values that have not arrived by ``deadline_s``.

        No step may be published after this call.
        """
        self._arrivals.stop()
        try:
            self._settle(deadline_s)
        finally:
            self.tally.stop()
            self.tally.catch_up()

    def _settle(self, deadline_s: float) -> None:
        self.drain()
        while self.waiting and time.monotonic() < deadline_s:
            time.sleep(_DEVICE_POLL_S)
            self.drain()
        if not self.waiting:
            return
        self.warnings.say(
            "device", "%d steps published without device values that did not arrive in time", len(self.waiting)
        )
        if self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
            try:
                while self.waiting:
                    self._publish_first(None)
            finally:
                self._draining.release()

    def _publish_first(self, held: DeviceValues | None) -> None:
        """Publishes the first waiting step. If that fails, drops it, so that later steps are still published."""
        draft, _ = self.waiting[0]
        try:
            self.publish(*(draft if held is None else self._with_arrived(draft, held)))
        except Exception as error:  # noqa: BLE001 - a fault of ours must not hold up later steps
            self.fault("publishing a step", error)
        finally:
            self.waiting.popleft()  # not earlier: a step that ends meanwhile must queue after it

    def fault(self, where: str, error: Exception) -> None:
        """Counts and logs a fault of the telemetry; training continues."""
        self.counters.faults += 1
        self.warnings.say(
            f"fault {where}",
            "%s failed (%s: %s); training continues with less telemetry",
            where,
            type(error).__name__,
            error,
            exc_info=error,
        )

    def _with_arrived(self, draft: Draft, held: DeviceValues) -> Draft:
        values, context, table = dict(draft.values), dict(draft.context or {}), draft.table
        for target, value in held.arrived().items():
            if isinstance(target, tuple):
                table = merged_tables(table, one_cell(*target, value))
            elif target in CONTEXT:
                context[target] = value
            else:
                values[target] = value
        copy_ms = held.copy_ms()
        if copy_ms is not None:
            values.setdefault("h2d_copy_ms", copy_ms)
        if held.parts:
            values = {**held.parts_ms(), **values}
        return draft._replace(values=self.names.kept(values), context=context, table=table)

    def is_settled(self, table: SeedTable) -> bool:
        """Whether every cell of the table is already known to be valid. Belongs to the recording thread.

        Returns False while a step waits: another thread may publish it and change the known seeds.
        """
        return not self.waiting and self.live.is_settled(table)

    def publish(
        self,
        step: int,
        epoch: int,
        time_unix_ns: int,
        values: Mapping[str, float],
        table: SeedTable = NO_SEEDS,
        failed: bool = False,
        retired: Sequence[str] = (),
        ended: tuple[str, ...] = (),
        context: Mapping[str, float] | None = None,
        probed: Mapping[str, float] = NO_READINGS,
    ) -> None:
        """Publishes a step at once; allowed only while no earlier step waits. For the arguments see ``Draft``."""
        live, violations = self.live, None
        if retired or ended:
            ended = (*ended, *live.retire(retired))
        if table.ids:
            table, violations = self._stepped(table)
        deriving = self._deriving
        derived: tuple[str, ...] = ()
        numbers: tuple[float, ...] = ()
        if failed:
            self.counters.failed += 1
        else:
            derived, numbers = deriving.commit({**probed, **values} if deriving.reads_probes else values)
        if not self.run.device_type or self.settle_run is not None:
            self._settle_run()
        loss = values.get("loss", _NAN)
        has_loss = -FLOAT32_BOUND < loss < FLOAT32_BOUND
        if has_loss:
            self.last_finite_loss = loss
        if not has_loss or violations is not None or failed or self.counters.backwards:
            values = {**values, **self._notes(violations, has_loss=has_loss, failed=failed)}
        if context or probed is not self._probed:
            self._surround(context, probed)
        names = tuple(values)
        layouts = self._layouts.get(names)
        layout = None if layouts is None else layouts.get(derived)
        if layout is None:
            layout = self._compiled(derived, names)
        numbers += self._beside + tuple(values.values())
        self.ring.append(self.run, step, epoch, time_unix_ns, layout, numbers, table, live.table, ended)
        if self.published is not None:
            self.published()
        if not has_loss and self.alarmed is not None and "loss" in values:
            self.alarmed()

    def _surround(self, context: Mapping[str, float] | None, probed: Mapping[str, float]) -> None:
        """Takes the values that are the same in many steps: the context and the readings of probes."""
        if context:
            self._context = {**self._context, **context}
            self.counters.nonfinite += sum(value - value != 0.0 for value in context.values())
        self._probed = probed
        self._beside = (*self._context.values(), *probed.values())
        self._layouts = self._all_layouts.setdefault((tuple(self._context), tuple(probed)), {})

    def _compiled(self, derived: tuple[str, ...], recorded: tuple[str, ...]) -> Layout:
        """Compiles the layout of a step, and keeps it for those that have the same names."""
        self._count += 1
        if self._count > _MOST_LAYOUTS:
            self._all_layouts, self._count = {}, 0
            self._surround(None, self._probed)
        layout = Layout(derived, tuple(self._context), tuple(self._probed), recorded)
        self._layouts.setdefault(recorded, {})[derived] = layout
        return layout

    def _stepped(self, table: SeedTable) -> tuple[SeedTable, float | None]:
        """Commits a step's seed rows. Returns the rows that count as recorded and the number of new violations."""
        settled = self.live.settled(table)
        if settled is not None:
            return settled, self.live.settled_violations
        seeds = self.live.step(table)
        self.live.commit(seeds)
        if seeds.nonfinite:
            self.counters.nonfinite += seeds.nonfinite
        if seeds.out_of_range:
            self._note_cells(seeds.out_of_range)
        return seeds.recorded, seeds.violations

    def _notes(self, violations: float | None, *, has_loss: bool, failed: bool = False) -> dict[str, float]:
        """Values that the publisher adds to those of the trainer. The deriver does not see them."""
        notes = {}
        if not has_loss and self.last_finite_loss is not None:
            notes[LAST_LOSS] = self.last_finite_loss
        if violations is not None:
            notes[VIOLATIONS] = violations
        if self.counters.backwards:
            notes["esper.steps.backwards"] = float(self.counters.backwards)
        if failed:
            notes["esper.step.failed"] = 1.0
        return notes

    def _note_cells(self, fields: Sequence[str]) -> None:
        self.counters.out_of_range += len(fields)
        for field in fields:
            self.warnings.say(f"range {field}", "a seed's %s is out of range; kept as given", field)

    def preview(self, draft: Draft) -> Frame:
        """Returns the frame that the step would have if it ended now; commits nothing."""
        self.drain(wait=True)
        step, epoch, time_unix_ns, values, table, *_, context, probed = draft
        seeds = self.live.step(table)
        derived = self._deriving.peek({**probed, **values} if self._deriving.reads_probes else values)
        has_loss = -FLOAT32_BOUND < values.get("loss", _NAN) < FLOAT32_BOUND
        values = {**values, **self._notes(seeds.violations, has_loss=has_loss)}
        return Frame(
            self.run,
            self.ring.last + 1,
            step,
            epoch,
            time_unix_ns,
            tuple(values),
            tuple(values.values()),
            {**self._context, **context} if context else self._context,
            seeds.recorded,
            seeds.live,
            (),
            derived,
            probed,
        )

    def saw(self, items: Sequence[Any]) -> None:
        """Takes the device of the first CUDA tensor as the training device, unless the user has named one."""
        if self.run.device_type == "cuda" or self._device_is_named:
            return
        for item in items:
            if getattr(item, "is_cuda", False):
                self.set_device(device.device_name(item))
                return

    def _settle_run(self) -> None:
        """Completes the description of the run in frames. While the device is unknown, each frame looks it up again."""
        if self.settle_run is not None:
            settle, self.settle_run = self.settle_run, None
            self.run = settle(self.run)
        if not self.run.device_type:
            self.settle_on_cpu()

    def settle_on_cpu(self) -> None:
        """Sets the training device to the CPU if torch is imported and CUDA has not been initialised."""
        torch = sys.modules.get("torch")
        if torch is not None and not torch.cuda.is_initialized():
            self.set_device("cpu")

    def set_device(self, name: str, *, named: bool = False) -> None:
        """Sets the training device for all later frames. If the user ``named`` it, CUDA tensors do not change it."""
        self._device_is_named = named
        self.run = replace(
            self.run,
            device_type=name.partition(":")[0],
            device_id=name,
            compute_capability=device.compute_capability(name),
        )
