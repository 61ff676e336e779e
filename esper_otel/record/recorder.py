"""Recorder: numbers, times and publishes the steps of one session."""

from __future__ import annotations

import operator
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from esper_otel.errors import InvalidValue, WrongState
from esper_otel.frame import NO_SEEDS, Frame, Run, SeedTable
from esper_otel.record import device
from esper_otel.record.clock import Clock
from esper_otel.record.counters import Counters, Warnings
from esper_otel.record.names import Names
from esper_otel.record.ring import Ring
from esper_otel.record.seeds import (
    LiveSeeds,
    checked_seed_id,
    merged_row,
    merged_tables,
    one_cell,
    table_of_columns,
    table_of_rows,
)
from esper_otel.record.step import Packet, Step
from esper_otel.record.values import FLOAT, Held, Target, read

_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1

# What is over only when the step is: inside the step, those of the step before are what is known.
_KNOWN_AFTERWARDS = (
    "hook_latency_ms",
    "tamiyo_latency_ms",
    "step_latency_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "samples_per_s",
)


# Values that stay until they are replaced.
_CONTEXT = frozenset({"esper.validation.loss", "esper.validation.accuracy"})

# What rounds to infinity in the packets' float32 begins here: the largest float32 and half a unit in its last place.
_FLOAT32_BOUND = float(2**128 - 2**103)


class Deriving(Protocol):
    """Derives metrics from those of a step; ``commit`` advances, ``peek`` does not."""

    def commit(self, given: Mapping[str, float]) -> Any:
        """Advances to the next step; what it derived."""

    def peek(self, given: Mapping[str, float]) -> Any:
        """What ``commit`` would return."""


class Probing(Protocol):
    """Readings of hardware probes."""

    def readings(self, now_s: float) -> Mapping[str, float]:
        """The readings that are fresh at ``now_s`` of ``time.monotonic``."""


class Draft(NamedTuple):
    """A step that is over, before its frame is made: device values may still be on their way."""

    global_step: int
    epoch: int
    time_unix_ns: int
    values: dict[str, float]
    table: SeedTable
    held: Held | None
    context: Mapping[str, float]
    failed: bool
    retired: Sequence[str]
    ended: tuple[str, ...]


class Recorder:
    """Takes what a trainer records and publishes one frame per step into the ring.

    Threads: one thread records. ``drain`` may be called from others; it publishes steps whose device values
    have arrived, in order. Steps wait in a queue only as long as their CUDA work does.
    """

    def __init__(
        self,
        run: Run,
        names: Names,
        ring: Ring,
        *,
        clock: Clock,
        deriving: Deriving,
        probing: Probing | None,
        to_state: Callable[[Frame], Packet],
        gradient_math: Callable[[], Any],
        context: Mapping[str, float],
        warnings: Warnings,
    ) -> None:
        self.run = run
        self.names = names
        self.ring = ring
        self.clock = clock
        self.counters = Counters()
        self.warnings = warnings
        self.live = LiveSeeds()
        self.highest_step = 0
        self.steps_backwards = 0
        self.last_finite_loss: float | None = None
        self.open_step: Step | None = None
        self.retiring: list[str] = []
        self.gradient_math = gradient_math
        self.published: Callable[[], None] | None = None
        self._device_is_named = False
        self._deriving = deriving
        self._probing = probing
        self._to_state = to_state
        self._context = dict(context)
        self._next_context: dict[str, float] = {}
        self._next_tensors: dict[Target, Any] = {}
        self._next_table: SeedTable | None = None
        self._last_ids: tuple[str, ...] = ()
        self._last_values: Mapping[str, float] = {}
        self._last_end_s: float | None = None
        self._waited_ms: float | None = None
        self._unfinished: deque[Draft] = deque()
        self._draining = threading.Lock()

    # -- steps -------------------------------------------------------------------------------------------

    def step(self, global_step: int | None, epoch: int, samples: int | None) -> Step:
        """A step, not yet open."""
        return Step(
            self,
            None if global_step is None else whole("global_step", global_step, _UINT64_MAX),
            whole("epoch", epoch, _UINT32_MAX),
            None if samples is None else whole("samples", samples, _UINT64_MAX),
        )

    def open(self, step: Step) -> None:
        """Opens a step: numbers and stamps it."""
        if self.open_step is not None:
            raise WrongState(f"step {self.open_step.global_step} is still open: one step at a time")
        step.global_step = self._numbered(step._numbered)
        step.time_unix_ns = self.clock.stamp()
        step._waited_ms = self._waited_ms
        self._waited_ms = None
        if self.retiring:
            step._retired, self.retiring = self.retiring, []
        if self._next_table is not None:
            step._table, self._next_table = self._next_table, None
        self.open_step = step

    def _numbered(self, given: int | None) -> int:
        if given is None:
            self.highest_step += 1
            return self.highest_step
        if given > self.highest_step:
            self.highest_step = given
        else:
            self.steps_backwards += 1
            self.warnings.say(
                "backwards",
                "step %d is not above %d, the highest so far; kept as given",
                given,
                self.highest_step,
            )
        return given

    def finish(self, step: Step, now_s: float) -> None:
        """Publishes a step that is over; whatever goes wrong stays here."""
        self.open_step = None
        try:
            spent_ms = (now_s - step._started_s) * 1e3
            timings = step._timings
            timings["step_latency_ms"] = spent_ms
            if step._waited_ms is not None:
                timings["input_wait_ms"] = step._waited_ms
                cycle_ms = step._waited_ms + spent_ms
            elif self._last_end_s is not None:
                cycle_ms = (now_s - self._last_end_s) * 1e3
            else:
                cycle_ms = spent_ms
            if step._samples is not None and cycle_ms > 0.0:
                timings["samples_per_s"] = step._samples * 1e3 / cycle_ms
            self._last_end_s = now_s
            self._publish(
                step.global_step,
                step.epoch,
                step.time_unix_ns,
                {**self._probed(), **timings, **step._values},
                self._table_of(step),
                step._held,
                failed=step._failed,
                retired=step._retired,
                ended=step._ended,
            )
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
            self.fault("publishing a step", error)

    def record_step(
        self, values: Mapping[str, object], epoch: int, global_step: int | None, samples: int | None
    ) -> None:
        """Publishes a step whose values the trainer has measured itself."""
        if self.open_step is not None:
            raise WrongState("record_step() inside an open step: use now.put() there")
        if not isinstance(values, Mapping):
            raise InvalidValue("record_step", f"takes a mapping of names to values, not {type(values).__name__}")
        epoch = whole("epoch", epoch, _UINT32_MAX)
        given: dict[str, Any] = dict(values)
        if not self.names.recordable.issuperset(given):
            given = self.names.resolved(given)
        held = None
        if not FLOAT.issuperset(map(type, given.values())):
            given, tensors = read(given)
            held = self._held_of(tensors)
        number = None if global_step is None else whole("global_step", global_step, _UINT64_MAX)
        rate = None if samples is None else self._rate(whole("samples", samples, _UINT64_MAX), given)
        try:
            measured = self._probed()
            if rate is not None:
                measured = {**measured, "samples_per_s": rate}
            if self._waited_ms is not None:
                measured = {**measured, "input_wait_ms": self._waited_ms}
                self._waited_ms = None
            table, self._next_table = self._next_table or NO_SEEDS, None
            retired, self.retiring = self.retiring, []
            self._publish(
                self._numbered(number),
                epoch,
                self.clock.stamp(),
                {**measured, **given} if measured else given,
                table,
                held,
                retired=retired,
            )
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
            self.fault("publishing a step", error)

    def _rate(self, samples: int, given: Mapping[str, float]) -> float | None:
        now_s = time.perf_counter()
        before, self._last_end_s = self._last_end_s, now_s
        if "step_latency_ms" in given:
            cycle_ms = given["step_latency_ms"] + given.get("input_wait_ms", self._waited_ms or 0.0)
        elif before is not None:
            cycle_ms = (now_s - before) * 1e3
        else:
            return None
        return samples * 1e3 / cycle_ms if cycle_ms > 0.0 else None

    def waited(self, milliseconds: float) -> None:
        """Adds to the next step's ``input_wait_ms``."""
        self._waited_ms = (self._waited_ms or 0.0) + milliseconds

    # -- seeds and context -------------------------------------------------------------------------------

    def seeds(self, ids: Sequence[str], columns: Mapping[str, object]) -> None:
        """Records rows of many seeds, for the open step or else for the next."""
        table = table_of_columns(ids, columns, self._last_ids)
        self._last_ids = table.ids
        step = self.open_step
        if step is None:
            earlier = self._next_table
            self._next_table = table if earlier is None else merged_tables(earlier, table)
            return
        for seed_id in [seed_id for seed_id in self.retiring if seed_id in table.ids]:
            self.is_born_again(step, seed_id)
        rows = self._table_of(step)
        step._rows = {}
        step._table = merged_tables(rows, table) if rows.ids else table

    @staticmethod
    def _table_of(step: Step) -> SeedTable:
        rows = table_of_rows(step._rows)
        if step._table is None:
            return rows
        return merged_tables(step._table, rows) if rows.ids else step._table

    def retire(self, seed_id: str) -> None:
        """Ends a seed's life: it is in no frame after the open one."""
        if (seed_id := checked_seed_id(seed_id)) not in self.retiring:
            self.retiring.append(seed_id)

    def is_born_again(self, step: Step, seed_id: str) -> None:
        """A seed retired in this very step is recorded once more: its old life ends before the step."""
        self.retiring.remove(seed_id)
        step._retired = [*step._retired, seed_id]
        step._rows.pop(seed_id, None)

    def set_context(self, values: Mapping[str, object]) -> None:
        """Replaces values that stay in every frame that follows."""
        plain, tensors = read(values)
        self.saw(tuple(tensors.values()))
        for name in plain:
            self._next_tensors.pop(name, None)
        self._next_tensors.update(tensors)
        self._next_context.update(plain)

    # -- frames ------------------------------------------------------------------------------------------

    def _probed(self) -> Mapping[str, float]:
        return {} if self._probing is None else self._probing.readings(time.monotonic())

    def _held_of(self, tensors: Mapping[Target, Any]) -> Held | None:
        if not tensors:
            return None
        self.saw(tuple(tensors.values()))
        held = Held()
        held.tensors.update(tensors)
        return held

    def _publish(
        self,
        global_step: int,
        epoch: int,
        time_unix_ns: int,
        values: dict[str, float],
        table: SeedTable,
        held: Held | None,
        *,
        failed: bool = False,
        retired: Sequence[str] = (),
        ended: tuple[str, ...] = (),
    ) -> None:
        if not self.run.device_type:
            self._settle_on_cpu()
        if self.names.left_out:
            values = self._without_gated(values)
        self._last_values = values
        context, self._next_context = self._next_context, {}
        if self._next_tensors:
            held = held or Held()
            held.tensors.update(self._next_tensors)
            self._next_tensors = {}
        draft = Draft(global_step, epoch, time_unix_ns, values, table, held, context, failed, retired, ended)
        if held is not None:
            held.seal()
        elif not self._unfinished:
            self._commit(draft)
            return
        self._unfinished.append(draft)
        self.drain()

    def _without_gated(self, values: Mapping[str, float]) -> dict[str, float]:
        left_out = self.names.left_out
        return {name: value for name, value in values.items() if name not in left_out}

    def drain(self, *, wait: bool = False) -> None:
        """Publishes the steps whose device values have arrived, in order; waits for all of them if asked to."""
        if not self._unfinished:
            return
        with self._draining:
            while self._unfinished:
                draft = self._unfinished[0]
                if draft.held is not None:
                    if wait:
                        draft.held.wait()
                    elif not draft.held.done():
                        return
                self._commit(draft)
                self._unfinished.popleft()  # only now: a step that ends meanwhile must queue behind it

    def _with_arrived(self, draft: Draft) -> Draft:
        held = draft.held
        if held is None:
            return draft
        values, context, table = dict(draft.values), dict(draft.context), draft.table
        for target, value in held.arrived().items():
            if isinstance(target, tuple):
                table = merged_tables(table, one_cell(*target, value))
            elif target in _CONTEXT:
                context[target] = value
            else:
                values[target] = value
        copy_ms = held.copy_ms()
        if copy_ms is not None:
            values.setdefault("h2d_copy_ms", copy_ms)
        if self.names.left_out:
            values = self._without_gated(values)
        return draft._replace(values=values, context=context, table=table)

    def _commit(self, draft: Draft) -> None:
        draft = self._with_arrived(draft)
        counters = self.counters
        retired = (*draft.ended, *self.live.retire(draft.retired)) if draft.retired or draft.ended else ()
        if draft.context:
            self._context = {**self._context, **draft.context}
        seeds = self.live.step(draft.table)
        self.live.commit(seeds)
        values = draft.values
        self._judge(values, draft.context, seeds.nonfinite, seeds.out_of_range)
        loss = values.get("loss")
        if loss is not None and -_FLOAT32_BOUND < loss < _FLOAT32_BOUND:
            self.last_finite_loss = loss
        if draft.failed:
            counters.failed += 1
        frame = Frame(
            self.run,
            self.ring.last + 1,
            draft.global_step,
            draft.epoch,
            draft.time_unix_ns,
            self._completed(values, seeds.violations, failed=draft.failed),
            self._context,
            seeds.recorded,
            seeds.live,
            retired,
            () if draft.failed else self._deriving.commit(values),
        )
        self.ring.append(frame)
        counters.steps += 1
        if self.published is not None:
            self.published()

    def _completed(
        self, values: dict[str, float], violations: float | None, *, failed: bool = False
    ) -> dict[str, float]:
        """Our own step values beside those of the trainer; the deriving has seen only the latter."""
        values = dict(values)
        if self.last_finite_loss is not None:
            values["esper.training.loss"] = self.last_finite_loss
        if violations is not None:
            values["esper.isolation.violations"] = violations
        if self.steps_backwards:
            values["esper.steps.backwards"] = float(self.steps_backwards)
        if failed:
            values["esper.step._failed"] = 1.0
        return values

    def _judge(
        self,
        values: Mapping[str, float],
        context: Mapping[str, float],
        nonfinite_cells: int,
        cells_out_of_range: Sequence[str],
    ) -> None:
        """Counts values that are not finite or out of range; both are kept as they are."""
        total = sum(values.values())
        nonfinite = nonfinite_cells
        if total - total != 0.0:
            nonfinite += sum(value - value != 0.0 for value in values.values())
        nonfinite += sum(value - value != 0.0 for value in context.values())
        self.counters.nonfinite += nonfinite
        outside = self.names.out_of_range(values)
        if outside or cells_out_of_range:
            self.counters.out_of_range += len(outside) + len(cells_out_of_range)
            for name in outside:
                self.warnings.say(
                    f"range {name}",
                    "%s = %g is out of its range and kept as given%s",
                    name,
                    values[name],
                    _hint(name),
                )
            for field in cells_out_of_range:
                self.warnings.say(f"range {field}", "a seed's %s is out of its range and kept as given", field)

    def state(self, step: Step) -> Packet:
        """The packet of an open step; see ``Step.state``."""
        self.drain(wait=True)
        if step._retired:
            step._ended += self.live.retire(step._retired)
            step._retired = []
        if self._next_tensors:
            step._hold(self._next_tensors)
            self._next_tensors = {}
        held = step._held
        if held is not None and held.tensors:
            held.seal()
            held.wait_for_values()
            self._take(step, held)
        before = self._last_values
        values = {name: before[name] for name in _KNOWN_AFTERWARDS if name in before}
        if step._waited_ms is not None:
            values["input_wait_ms"] = step._waited_ms
        values = {**self._probed(), **values, **step._values}
        if self.names.left_out:
            values = self._without_gated(values)
        seeds = self.live.step(self._table_of(step))
        known_loss = self.last_finite_loss
        loss = values.get("loss")
        if loss is not None and -_FLOAT32_BOUND < loss < _FLOAT32_BOUND:
            self.last_finite_loss = loss
        completed = self._completed(values, seeds.violations)
        self.last_finite_loss = known_loss
        return self._to_state(
            Frame(
                self.run,
                self.ring.last + 1,
                step.global_step,
                step.epoch,
                step.time_unix_ns,
                completed,
                {**self._context, **self._next_context} if self._next_context else self._context,
                seeds.recorded,
                seeds.live,
                (),
                self._deriving.peek(values),
            )
        )

    def _take(self, step: Step, held: Held) -> None:
        for target, value in held.arrived().items():
            if isinstance(target, tuple):
                row = one_cell(*target, value).cells.tobytes()
                earlier = step._rows.get(target[0])
                step._rows[target[0]] = row if earlier is None else merged_row(earlier, row)
            elif target in _CONTEXT:
                self._next_context[target] = value
            else:
                step._values[target] = value

    # -- the rest ----------------------------------------------------------------------------------------

    def saw(self, items: Sequence[object]) -> None:
        """Notes the training device: the first CUDA tensor seen, unless one was named at the start."""
        if self.run.device_type == "cuda" or self._device_is_named:
            return
        for item in items:
            if getattr(item, "is_cuda", False):
                self.set_device(device.device_name(item))
                return

    def _settle_on_cpu(self) -> None:
        """Trains on the CPU: torch is there, and CUDA is not in use when the first step ends."""
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


def _hint(name: str) -> str:
    return "; give a share of 1, not a percentage" if name == "accuracy" else ""


def whole(name: str, value: object, highest: int) -> int:
    """The value as an int, if it is a whole number from 0 to ``highest``."""
    try:
        number = operator.index(value)  # type: ignore[arg-type] # TypeError is the answer
    except TypeError:
        raise InvalidValue(name, f"{value!r} is not a whole number") from None
    if not 0 <= number <= highest:
        raise InvalidValue(name, f"{number} is not from 0 to {highest}")
    return number
