"""Publisher: makes frames of the steps that are over, in order, and puts them into the ring."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from esper_otel.frames.frame import (
    FLOAT32_BOUND,
    LAST_LOSS,
    NO_READINGS,
    NO_SEEDS,
    Frame,
    Run,
    SeedTable,
)
from esper_otel.frames.live_seeds import LiveSeeds
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.native import threads
from esper_otel.record import device
from esper_otel.record.arrivals import Arrivals
from esper_otel.record.names import Names
from esper_otel.record.seeds import merged_tables, one_cell
from esper_otel.record.values import CONTEXT, VIOLATIONS, DeviceValues, ValueShape

_DEVICE_POLL_S = 0.001

# A signal may interrupt the very thread that is draining, and ask for the same: it must not wait for ever.
_DRAINING_TIMEOUT_S = 1.0

_NAN = float("nan")
_new = tuple.__new__


class Draft(NamedTuple):
    """What a recorder hands to the publisher.

    Attributes:
        global_step: the step's number.
        epoch: its epoch.
        time_unix_ns: its time.
        values: what was recorded.
        table: the seed rows recorded.
        failed: whether the step raised.
        retired: seeds whose lives end before this step.
        ended: seeds whose lives ended when this step's state was asked for.
        context: values that stay in every frame from this one on.
        probed: readings of probes.
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
    """What recording asks of the deriving: metrics from those of a step. ``commit`` advances, ``peek`` does not.

    Attributes:
        reads_probes: whether it needs what probes read, too.
    """

    reads_probes: bool

    def commit(self, given: Mapping[str, float]) -> Mapping[str, float]:
        """Advances to the next step; what it derived, by name."""

    def peek(self, given: Mapping[str, float]) -> Mapping[str, float]:
        """What ``commit`` would return."""


class Counters:
    """Counts of one session by metric name; each is written by one thread and read by any."""

    def __init__(self) -> None:
        self.failed: int = 0
        self.backwards: int = 0
        self.nonfinite: int = 0
        self.out_of_range: int = 0
        self.faults: int = 0


class FramePublisher:
    """One frame per step, in step order. Steps wait in a queue only as long as their CUDA work does.

    Threads: ``publish`` and ``preview`` belong to the thread that records; ``drain`` and ``settle`` may be called
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
        self.settle_run: Callable[[Run], Run] | None = None  # asked once, by the first frame
        self.names = names
        self.ring = ring
        self.counters: Counters = Counters()
        self.warnings = warnings
        self.live: LiveSeeds = LiveSeeds()
        self.last_finite_loss: float | None = None
        self.published: Callable[[Frame], None] | None = None
        self.alarmed: Callable[[], None] | None = None  # of a loss that is not finite
        self.waiting: deque[tuple[Draft, DeviceValues | None]] = deque()
        self._arrivals = Arrivals(self.waiting, self.drain)
        self._device_is_named = False
        self._names: tuple[str, ...] = ()
        self._deriving = deriving
        self._context = dict(context)
        self._draining = threads().Lock()

    def publish_later(self, draft: Draft, held: DeviceValues | None) -> None:
        """Makes the step's frame when the device has delivered what it holds, behind the steps that wait already."""
        if held is not None:
            held.seal()
        self.waiting.append((draft, held))
        self.drain()
        if self.waiting:
            self._arrivals.note()

    def drain(self, *, wait: bool = False) -> None:
        """Publishes the steps whose device values have arrived, in order; waits for all of them if asked to."""
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
        """Publishes every step; one whose device values have not come by ``deadline_s`` goes without them.

        No step may come after it.
        """
        self._arrivals.stop()
        self.drain()
        while self.waiting and time.monotonic() < deadline_s:
            time.sleep(_DEVICE_POLL_S)
            self.drain()
        if not self.waiting:
            return
        self.warnings.say("device", "%d steps go without device values that never came", len(self.waiting))
        if self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
            try:
                while self.waiting:
                    self._publish_first(None)
            finally:
                self._draining.release()

    def _publish_first(self, held: DeviceValues | None) -> None:
        """Publishes the first step that waits. Whatever goes wrong, it is not published again, and others follow."""
        draft, _ = self.waiting[0]
        try:
            self.publish(draft if held is None else self._with_arrived(draft, held))
        except Exception as error:  # noqa: BLE001 - a fault of ours must not hold up later steps
            self.fault("publishing a step", error)
        finally:
            self.waiting.popleft()  # only now: a step that ends meanwhile must queue behind it

    def fault(self, where: str, error: Exception) -> None:
        """Counts and logs a fault of the telemetry; training goes on."""
        self.counters.faults += 1
        self.warnings.say(
            f"fault {where}",
            "%s failed (%s: %s); training goes on, with less telemetry",
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
        return draft._replace(values=self.names.kept(values), context=context, table=table)

    def is_settled(self, table: SeedTable) -> bool:
        """Whether every cell of the rows is known to be good as it is. Belongs to the thread that records.

        While a step waits another thread may publish it, and what is known changes.
        """
        return not self.waiting and self.live.is_settled(table)

    def publish_plain(
        self,
        step: int,
        epoch: int,
        time_unix_ns: int,
        shape: ValueShape,
        numbers: tuple[float, ...],
        values: Mapping[str, float],
        table: SeedTable,
        probed: Mapping[str, float],
    ) -> None:
        """As ``publish``, in half the time, for a step of ordinary values and no more; by position, which costs less.

        Args:
            step: the step's number.
            epoch: its epoch.
            time_unix_ns: its time.
            shape: of the values.
            numbers: the values, in the order of the shape.
            values: the values by name; left as they are.
            table: the seed rows recorded.
            probed: readings of probes.
        """
        deriving, live, recorded = self._deriving, self.live, NO_SEEDS
        is_plain = shape.is_plain(numbers) and not (
            self.counters.backwards or deriving.reads_probes or not self.run.device_type or self.settle_run
        )
        names = shape.names
        if is_plain and table.ids:
            recorded = live.settled(table) or NO_SEEDS
            if recorded is NO_SEEDS:
                is_plain = False
            elif (violations := live.settled_violations) is not None:
                names, numbers = shape.names_with_violations, (*numbers, violations)
        if not is_plain:
            self.publish(Draft(step, epoch, time_unix_ns, values, table, probed=probed))
            return
        self.last_finite_loss = values["loss"]
        ring = self.ring
        # As Frame(...), in half the time.
        frame: Frame = _new(
            Frame,
            (
                self.run,
                ring.last + 1,
                step,
                epoch,
                time_unix_ns,
                names,
                numbers,
                self._context,
                recorded,
                live.table,
                (),
                deriving.commit(values),
                probed,
            ),
        )
        ring.append(frame)
        if self.published is not None:
            self.published(frame)

    def publish(self, draft: Draft, *, is_ordinary: bool = False) -> None:
        """Makes the step's frame now; only while none waits.

        Args:
            draft: the step.
            is_ordinary: whether its values are known to be finite and in their ranges.
        """
        step, epoch, time_unix_ns, values, table, failed, retired, ended, context, probed = draft
        if not is_ordinary:
            self._judge(values)
        live = self.live
        if retired or ended:
            ended = (*ended, *live.retire(retired))
        if context:
            self._context = {**self._context, **context}
            self.counters.nonfinite += sum(value - value != 0.0 for value in context.values())
        table, violations = self._stepped(table) if table.ids else (NO_SEEDS, None)
        derived = NO_READINGS
        if failed:
            self.counters.failed += 1
        else:
            deriving = self._deriving
            derived = deriving.commit({**probed, **values} if deriving.reads_probes else values)
        if self.settle_run is not None or not self.run.device_type:
            self._settle_run()
        has_loss = -FLOAT32_BOUND < values.get("loss", _NAN) < FLOAT32_BOUND
        if has_loss:
            self.last_finite_loss = values["loss"]
        names, numbers = tuple(values), tuple(values.values())
        if not has_loss or violations is not None or failed or self.counters.backwards:
            notes = self._notes(violations, has_loss=has_loss, failed=failed)
            names, numbers = (*names, *notes), (*numbers, *notes.values())
        if names == self._names:
            names = self._names  # one tuple for all frames of these names
        else:
            self._names = names
        frame = Frame(
            self.run,
            self.ring.last + 1,
            step,
            epoch,
            time_unix_ns,
            names,
            numbers,
            self._context,
            table,
            live.table,
            ended,
            derived,
            probed,
        )
        self.ring.append(frame)
        if self.published is not None:
            self.published(frame)
        if not has_loss and self.alarmed is not None and "loss" in values:
            self.alarmed()

    def _stepped(self, table: SeedTable) -> tuple[SeedTable, float | None]:
        """Takes a step's rows: what of them counts as recorded, and the violations that are new."""
        seeds = self.live.step(table)
        self.live.commit(seeds)
        if seeds.nonfinite:
            self.counters.nonfinite += seeds.nonfinite
        if seeds.out_of_range:
            self._note_cells(seeds.out_of_range)
        return seeds.recorded, seeds.violations

    def _notes(self, violations: float | None, *, has_loss: bool, failed: bool = False) -> dict[str, float]:
        """What we have to say of a step beside the trainer's values; the deriving has seen only the latter."""
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

    def _judge(self, values: Mapping[str, float]) -> None:
        """Counts values that are not finite or out of range; both are kept as they are."""
        self.counters.nonfinite += sum(value - value != 0.0 for value in values.values())
        outside = self.names.out_of_range(values)
        self.counters.out_of_range += len(outside)
        for name in outside:
            hint = "; give a share of 1, not a percentage" if name == "accuracy" else ""
            self.warnings.say(
                f"range {name}", "%s = %g is out of its range and kept as given%s", name, values[name], hint
            )

    def _note_cells(self, fields: Sequence[str]) -> None:
        self.counters.out_of_range += len(fields)
        for field in fields:
            self.warnings.say(f"range {field}", "a seed's %s is out of its range and kept as given", field)

    def preview(self, draft: Draft) -> Frame:
        """The frame that the step would make now; nothing is committed."""
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
        """Notes the training device: the first CUDA tensor seen, unless one was named at the start."""
        if self.run.device_type == "cuda" or self._device_is_named:
            return
        for item in items:
            if getattr(item, "is_cuda", False):
                self.set_device(device.device_name(item))
                return

    def _settle_run(self) -> None:
        """Completes what every frame says of the run; what is still not known is asked for again by the next one."""
        if self.settle_run is not None:
            settle, self.settle_run = self.settle_run, None
            self.run = settle(self.run)
        if not self.run.device_type:
            self.settle_on_cpu()

    def settle_on_cpu(self) -> None:
        """Trains on the CPU, if torch is there and CUDA is not in use when the first step ends."""
        torch = sys.modules.get("torch")
        if torch is not None and not torch.cuda.is_initialized():
            self.set_device("cpu")

    def set_device(self, name: str, *, named: bool = False) -> None:
        """Names the training device in every frame that follows; for good if the user ``named`` it."""
        self._device_is_named = named
        self.run = replace(
            self.run,
            device_type=name.partition(":")[0],
            device_id=name,
            compute_capability=device.compute_capability(name),
        )
