"""Builds one frame for each step that has ended, in order, and appends it to the ring."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic, sleep
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
from esper_otel.record.next_step import NextStep
from esper_otel.record.seeds import merged_tables, one_cell
from esper_otel.record.signature import Signature, Signatures
from esper_otel.record.tally import Tally
from esper_otel.record.values import CONTEXT, VIOLATIONS, DeviceValues

_DEVICE_POLL_S = 0.001

# A signal handler may call drain() on the very thread that is already in drain(): it must not wait for ever.
_DRAINING_TIMEOUT_S = 1.0

# Steps that wait for a device may take up this much memory: some thousand steps. Of a step, the objects were measured
# on Python 3.11 without those of the driver.
MOST_WAITING_BYTES = 32 * 1024 * 1024
_WAITING_BYTES, _VALUE_BYTES = 4_000, 120

_NAN = float("nan")
_NOTHING: tuple[tuple[str, ...], tuple[float, ...]] = ((), ())

# The rows that count as recorded, the seeds whose lives have ended, and the number of new violations; None without any.
_SeedsChange: TypeAlias = tuple[SeedTable, tuple[str, ...], float | None]
_NO_SEEDS_CHANGE: _SeedsChange = (NO_SEEDS, (), None)

# Layouts kept; a script that makes names up in every step has others each time.
_MOST_LAYOUTS = 4_000

# Layouts by what was recorded and the names derived.
_Layouts: TypeAlias = dict[tuple[Signature, tuple[str, ...]], Layout]

_LOWEST, _HIGHEST = -FLOAT32_BOUND, FLOAT32_BOUND  # a loss beyond these is not finite as a float32


# What is the same in many steps: the values that stay in every frame, the readings of the probes, the numbers of both,
# and the layouts of steps that have these names of both. A plain tuple is unpacked quickest.
_Surroundings: TypeAlias = tuple[Mapping[str, float], Mapping[str, float], tuple[float, ...], _Layouts]

# What a step changes before its row is added, as it was before: the sequence number of the row, the processors' states,
# the last finite loss, and the live seeds, or None if the step does not change them. Then what the next step takes over
# if there is no row: the seeds whose lives end before the step, and the values that stay from it on.
_Before: TypeAlias = tuple[int, Any, float | None, Any, Sequence[str], Mapping[str, float] | None]


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
    context: Mapping[str, float] | None = None
    probed: Mapping[str, float] = NO_READINGS


def _bytes_of(draft: Draft) -> int:
    """About how much memory a waiting step takes."""
    return _WAITING_BYTES + _VALUE_BYTES * len(draft.values) + draft.table.cells.nbytes


class FrameDeriver(Protocol):
    """The interface that recording requires of the deriver, which computes further metrics from those of a step.

    Attributes:
        step: takes the only state, the loss and the gradient norm, NaN for a missing one; returns the next state, and
            what ``commit`` does. None if ``commit`` must be called, because these two are not enough.
        states: what it knows of the steps before; never changed in place. Empty if it derives nothing.
    """

    step: Callable[[Any, float, float], tuple[Any, tuple[str, ...], tuple[float, ...]]] | None
    states: Any

    def commit(self, given: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Advances to the next step, given all values and the readings of the probes; returns what is derived."""

    def peek(self, given: Mapping[str, float]) -> Mapping[str, float]:
        """Returns what ``commit`` would, by name, without advancing."""


class ReadingSource(Protocol):
    """The interface that recording requires of the probes."""

    @property
    def shown(self) -> tuple[Mapping[str, float], float]:
        """The newest readings, and until when they are fresh: a time of ``time.monotonic``."""

    def readings(self, now_s: float) -> Mapping[str, float]:
        """Returns the readings that are still fresh at ``now_s``; some are handed out only once."""

    def latest(self) -> Mapping[str, float]:
        """Returns all fresh readings, and hands none out."""


class Counters:
    """Counts of faults and odd values in one session that ``Tally`` does not count. One thread writes, any reads."""

    def __init__(self) -> None:
        self.failed: int = 0
        self.backwards: int = 0
        self.nonfinite: int = 0
        self.out_of_range: int = 0
        self.faults: int = 0
        self.without_device_values: int = 0  # steps


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
        deriving: FrameDeriver,
        probing: ReadingSource,
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
        self._live: LiveSeeds = LiveSeeds()
        self.last_finite_loss: float | None = None
        self.published: Callable[[], None] | None = None  # called after each step
        self.alarmed: Callable[[], None] | None = None  # called after a loss that is not finite
        self.waiting: deque[tuple[Draft, DeviceValues | None]] = deque()
        self._arrivals = Arrivals(self.waiting, self.drain)
        self._device_is_named = False
        self._is_unsettled = True  # the device may be unknown, or ``settle_run`` not yet called
        self.signatures: Signatures = Signatures(names.left_out)
        self.probing = probing
        self.next_step: NextStep = NextStep()  # collects values for it
        self._deriving = deriving
        self._count = 0
        self._all_layouts: dict[tuple[tuple[str, ...], tuple[str, ...]], _Layouts] = {}
        self._surroundings = self._surrounded(context, NO_READINGS)
        self._before: _Before | None = None  # while a step is being published, or after Ctrl-C has stopped that
        self._owed: tuple[Sequence[str], Mapping[str, float] | None] | None = None  # retired seeds and context
        self._first: tuple[int, Draft] | None = None  # of the waiting steps, the one that is being published
        self._draining = threads().Lock()

    def publish_later(self, draft: Draft, held: DeviceValues | None) -> None:
        """Publishes the step's frame once its device values have arrived and all earlier steps are published."""
        if held is not None:
            held.seal()
        self.waiting.append((draft, held))
        self.drain()
        if self.waiting:
            self._bound_waiting()
            self._arrivals.note()

    def _bound_waiting(self) -> None:
        """Publishes the first waiting steps without their device values while the steps take up too much memory."""
        lost = 0
        while len(self.waiting) > 1 and self._waiting_bytes() > MOST_WAITING_BYTES:
            if not self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
                break
            try:
                if self.waiting:
                    lost += self._publish_anyhow()
            finally:
                self._draining.release()
            self.drain()
        if lost:
            self.warnings.say(
                "device",
                "%d steps published without device values: more than %d MiB of steps waited for them",
                self.counters.without_device_values,
                MOST_WAITING_BYTES >> 20,
            )

    def _waiting_bytes(self) -> int:
        """About how much memory the waiting steps take. Of a copy: another thread may publish one meanwhile."""
        return sum([_bytes_of(draft) for draft, _ in self.waiting.copy()])

    def _publish_anyhow(self) -> bool:
        """Publishes the first waiting step; returns whether its device values have not arrived, and are not in it."""
        _, held = self.waiting[0]
        is_without = held is not None and not held.done()
        self.counters.without_device_values += is_without
        self._publish_first(None if is_without else held)
        return is_without

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
        while self.waiting and monotonic() < deadline_s:
            sleep(_DEVICE_POLL_S)
            self.drain()
        if not self.waiting:
            return
        lost = 0
        if self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
            try:
                while self.waiting:
                    lost += self._publish_anyhow()
            finally:
                self._draining.release()
        if lost:
            self.warnings.say("device", "%d steps published without device values that did not arrive in time", lost)

    def _publish_first(self, held: DeviceValues | None) -> None:
        """Publishes the first waiting step. If that fails, drops it, so that later steps are still published."""
        draft, _ = self.waiting[0]
        if self._first is not None and self._first[1] is draft and self._first[0] <= self.ring.last:
            self.waiting.popleft()  # Ctrl-C came after it had been published
            return
        try:
            if held is not None:
                draft = self._with_arrived(draft, held)
                self.waiting[0] = draft, None  # if Ctrl-C comes now, it is published later
            self._first = self.ring.last + 1, draft
            self._publish_draft(draft)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not hold up later steps
            self.fault("publishing a step", error)
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

    def _publish_draft(self, draft: Draft) -> None:
        step, epoch, time_unix_ns, values, table, failed, retired, context, probed = draft
        recorded, numbers = self.signatures.of(tuple(values)), tuple(values.values())
        self.publish(step, epoch, time_unix_ns, recorded, numbers, table, failed, retired, None, context, probed)

    @property
    def live(self) -> LiveSeeds:
        """The live seeds, after the last step that was published.

        While a step waits, another thread may be publishing it: what that has changed so far is not undone.
        """
        if self._before is not None and not self.waiting:
            self._go_back()
        return self._live

    def is_good(self, table: SeedTable) -> bool:
        """Whether all cells of a table are present, finite and in range. Belongs to the recording thread.

        Returns False while a step waits: another thread may be checking the cells of that one.
        """
        return not self.waiting and self.live.is_good(table)

    def publish(
        self,
        step: int,
        epoch: int,
        time_unix_ns: int,
        recorded: Signature,
        numbers: tuple[float, ...],
        table: SeedTable = NO_SEEDS,
        failed: bool = False,
        retired: Sequence[str] = (),
        held: DeviceValues | None = None,
        context: Mapping[str, float] | None = None,
        probed: Mapping[str, float] | None = None,
    ) -> None:
        """Publishes a step that has ended: at once, or later if it or an earlier step waits for a device.

        Ctrl-C may interrupt it anywhere: what it has changed stands if the row is in the ring, and is undone otherwise.
        For the arguments see ``Draft``; ``recorded`` and ``numbers`` are the names and values recorded in the step, and
        ``held`` is what is still on a device. ``context`` and ``probed`` are only given for a step that has waited.
        """
        if probed is None:
            numbers = numbers if recorded.kept is None else recorded.kept_of(numbers)
            recorded = recorded if recorded.kept is None else recorded.kept
            if self.next_step.is_anything:
                held, context = self.next_step.take_context(held)
            probed, until_s = self.probing.shown
            probed = probed if monotonic() < until_s else self.probing.readings(monotonic())
            if held is not None or self.waiting:
                values = recorded.dict_of(numbers)
                draft = Draft(step, epoch, time_unix_ns, values, table, failed, retired, context, probed)
                self.publish_later(draft, held)
                return
        if self._before is not None or self._owed is not None:
            retired, context = self._recovered(retired, context)
        ring, deriving = self.ring, self._deriving
        has_seeds = table is not NO_SEEDS or retired
        seeds = self._live.state if has_seeds else None
        self._before = (ring.last + 1, deriving.states, self.last_finite_loss, seeds, retired, context)
        self._owed = None
        table, ended, violations = self._stepped(table, retired) if has_seeds else _NO_SEEDS_CHANGE
        loss = _NAN if recorded.loss < 0 else 1.0 * numbers[recorded.loss]  # it may be an int
        if failed or deriving.step is None:
            self.counters.failed += failed
            derived, computed = _NOTHING if failed or not deriving.states else self._derived(recorded, numbers, probed)
        else:
            norm = _NAN if recorded.norm < 0 else 1.0 * numbers[recorded.norm]
            state, derived, computed = deriving.step(deriving.states[0], loss, norm)
            deriving.states = (state,)
        if self._is_unsettled:
            self._settle_run()
        has_loss = _LOWEST < loss < _HIGHEST
        self.last_finite_loss = loss if has_loss else self.last_finite_loss
        if not has_loss or violations is not None or failed or self.counters.backwards:
            notes = self._notes(violations, has_loss=has_loss, failed=failed)
            recorded, numbers = self.signatures.of((*recorded.names, *notes)), (*numbers, *notes.values())
        _, before, beside, layouts = self._surroundings
        if context or probed is not before:
            _, _, beside, layouts = self._surround(context, probed)
        layout = recorded.layout
        if recorded.layouts is not layouts or layout.derived is not derived:  # another one than in its last step
            layout = self._layout(derived, recorded)
        numbers = computed + beside + numbers
        ring.append(self.run, step, epoch, time_unix_ns, layout, numbers, table, self._live.table, ended)
        self._before = None
        if self.published is not None:
            self.published()
        if not has_loss and recorded.loss >= 0 and self.alarmed is not None:
            self.alarmed()

    def _derived(
        self, recorded: Signature, numbers: tuple[float, ...], probed: Mapping[str, float]
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Returns names and numbers of what the processors derive from a step; they advance to the next one."""
        given = dict(zip(recorded.names, map(float, numbers), strict=True))
        return self._deriving.commit({**probed, **given} if probed else given)

    def _go_back(self) -> None:
        """Undoes what a step has changed that Ctrl-C has stopped, unless its row is in the ring."""
        before = self._before
        if before is None:
            return
        sequence, states, last_finite_loss, seeds, retired, context = before
        if sequence > self.ring.last:
            if retired or context:
                self._owed = retired, context
            self._deriving.states = states
            self.last_finite_loss = last_finite_loss
            if seeds is not None:
                self._live.state = seeds
        self._before = None

    def _recovered(
        self, retired: Sequence[str], context: Mapping[str, float] | None
    ) -> tuple[Sequence[str], Mapping[str, float] | None]:
        """Undoes a step that was not published, and adds what it should have ended or set for all later ones."""
        self._go_back()
        earlier, values = self._owed or ((), None)
        return tuple(dict.fromkeys((*earlier, *retired))), {**(values or {}), **(context or {})}

    def _surround(self, context: Mapping[str, float] | None, probed: Mapping[str, float]) -> _Surroundings:
        """Takes the values that are the same in many steps: the context and the readings of probes."""
        before = self._surroundings[0]
        self._surroundings = around = self._surrounded({**before, **context} if context else before, probed)
        if context:
            self.counters.nonfinite += sum(value - value != 0.0 for value in context.values())
        return around

    def _surrounded(self, context: Mapping[str, float], probed: Mapping[str, float]) -> _Surroundings:
        layouts = self._all_layouts.setdefault((tuple(context), tuple(probed)), {})
        return context, probed, (*context.values(), *probed.values()), layouts

    def _layout(self, derived: tuple[str, ...], recorded: Signature) -> Layout:
        """Returns the layout of a step; it is compiled once for all steps that have the same names."""
        context, probed, _, layouts = self._surroundings
        layout = layouts.get((recorded, derived))
        if layout is None:
            self._count += 1
            if self._count > _MOST_LAYOUTS:
                self._all_layouts, self._count = {}, 0
                self._surround(None, self._surroundings[1])
                layouts = self._surroundings[3]
            layouts[recorded, derived] = layout = Layout(derived, tuple(context), tuple(probed), recorded.names)
        recorded.layouts, recorded.layout = layouts, layout
        return layout

    def _stepped(self, table: SeedTable, retired: Sequence[str]) -> _SeedsChange:
        """Ends the lives of seeds, then commits a step's rows. For what it returns see ``_SeedsChange``."""
        live = self._live
        ended = live.retire(retired) if retired else ()
        if not table.ids:
            return table, ended, None
        seeds = live.step(table)
        live.commit(seeds)
        if seeds.nonfinite:
            self.counters.nonfinite += seeds.nonfinite
        if seeds.out_of_range:
            self._note_cells(seeds.out_of_range)
        return seeds.recorded, ended, seeds.violations

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
        step, epoch, time_unix_ns, values, table, _, retired, context, probed = draft
        live = self.live
        retired, context = self._recovered(retired, context)
        self._before = (self.ring.last + 1, self._deriving.states, self.last_finite_loss, live.state, (), None)
        live.retire(retired)
        seeds = live.step(table)
        self._go_back()
        derived = self._deriving.peek({**probed, **values} if self._deriving.step is None else values)
        has_loss = _LOWEST < values.get("loss", _NAN) < _HIGHEST
        values = {**values, **self._notes(seeds.violations, has_loss=has_loss)}
        staying = self._surroundings[0]
        return Frame(
            self.run,
            self.ring.last + 1,
            step,
            epoch,
            time_unix_ns,
            tuple(values),
            tuple(values.values()),
            {**staying, **context} if context else staying,
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

    def settled_run(self) -> Run:
        """Returns the run as its frames would name it. Call it when the session closes: no frame follows."""
        self._settle_run()
        return self.run

    def _settle_run(self) -> None:
        """Completes the description of the run in frames. While the device is unknown, each frame looks it up again."""
        if self.settle_run is not None:
            settle, self.settle_run = self.settle_run, None
            self.run = settle(self.run)
        if not self.run.device_type:
            self.settle_on_cpu()
        self._is_unsettled = not self.run.device_type

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
