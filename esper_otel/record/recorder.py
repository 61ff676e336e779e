"""Recorder: numbers, times and hands over the steps of one session."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from esper_otel.errors import InvalidValue, WrongState
from esper_otel.frame import NO_SEEDS, Frame, SeedTable
from esper_otel.record.clock import Clock
from esper_otel.record.publisher import Draft, Publisher
from esper_otel.record.seeds import (
    checked_seed_id,
    merged_row,
    merged_tables,
    one_cell,
    table_of_columns,
    table_of_rows,
)
from esper_otel.record.step import Step
from esper_otel.record.values import CONTEXT, UINT32_MAX, UINT64_MAX, Held, Target, are_floats, read, whole

if TYPE_CHECKING:
    from esper_otel.leyline.messages import SystemStatePacket

# What is over only when the step is: inside the step, those of the step before are what is known.
_KNOWN_AFTERWARDS = (
    "hook_latency_ms",
    "tamiyo_latency_ms",
    "step_latency_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "samples_per_s",
)


class Probing(Protocol):
    """Readings of hardware probes."""

    def readings(self, now_s: float) -> Mapping[str, float]:
        """The readings that are fresh at ``now_s`` of ``time.monotonic``."""


class Recorder:
    """Takes what a trainer records and hands one draft per step to the publisher.

    Threads: one thread records.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        clock: Clock,
        probing: Probing | None,
        to_state: Callable[[Frame], SystemStatePacket],
        gradient_math: Callable[[], Any],
    ) -> None:
        self.publisher = publisher
        self.names = publisher.names
        self.clock = clock
        self.highest_step = 0
        self.open_step: Step | None = None
        self.retiring: list[str] = []
        self.gradient_math = gradient_math
        self._probing = probing
        self._to_state = to_state
        self._next_context: dict[str, float] = {}
        self._next_tensors: dict[Target, Any] = {}
        self._next_table: SeedTable | None = None
        self._last_ids: tuple[str, ...] = ()
        self._last_values: Mapping[str, float] = {}
        self._last_end_s: float | None = None
        self._waited_ms: float | None = None

    # -- steps -------------------------------------------------------------------------------------------

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
            self.publisher.counters.backwards += 1
            self.publisher.warnings.say(
                "backwards", "step %d is not above %d, the highest so far; kept as given", given, self.highest_step
            )
        return given

    def finish(self, step: Step, now_s: float) -> None:
        """Hands over a step that is over; whatever goes wrong stays here."""
        self.open_step = None
        try:
            spent_ms = (now_s - step._started_s) * 1e3
            waited_ms = step._waited_ms
            values = {**self._probed(), **step._timings, "step_latency_ms": spent_ms}
            if waited_ms is not None:
                values["input_wait_ms"] = waited_ms
            if step._samples is not None:
                if waited_ms is not None:
                    cycle_ms = waited_ms + spent_ms
                elif self._last_end_s is not None:
                    cycle_ms = (now_s - self._last_end_s) * 1e3
                else:
                    cycle_ms = spent_ms
                if cycle_ms > 0.0:
                    values["samples_per_s"] = step._samples * 1e3 / cycle_ms
            self._last_end_s = now_s
            values.update(step._values)  # what the caller gave stands
            table = NO_SEEDS if step._table is None and not step._rows else self._table_of(step)
            held, context = step._held, None
            if self._next_context or self._next_tensors:
                held, context = self._with_context(held)
            self._last_values = values = self.names.kept(values)
            self.publisher.publish(
                step.global_step,
                step.epoch,
                step.time_unix_ns,
                values,
                table,
                held,
                context,
                step._failed,
                step._retired,
                step._ended,
            )
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
            self.fault("publishing a step", error)

    def record_step(
        self, values: Mapping[str, object], epoch: int, global_step: int | None, samples: int | None
    ) -> None:
        """Hands over a step whose values the trainer has measured itself."""
        if self.open_step is not None:
            raise WrongState("record_step() inside an open step: use now.put() there")
        if type(values) is not dict and not isinstance(values, Mapping):
            raise InvalidValue("record_step", f"takes a mapping of names to values, not {type(values).__name__}")
        if type(epoch) is not int or not 0 <= epoch <= UINT32_MAX:
            epoch = whole("epoch", epoch, UINT32_MAX)
        if not self.names.recordable.issuperset(values):
            values = self.names.resolved(values)
        given: dict[str, Any] = {**self._probed(), **values}
        held = None
        if not are_floats(given):
            given, tensors = read(given)
            held = self._held_of(tensors)
        if global_step is not None:
            global_step = whole("global_step", global_step, UINT64_MAX)
        if samples is not None:
            self._rate(whole("samples", samples, UINT64_MAX), given)
        try:
            if self._waited_ms is not None:
                given.setdefault("input_wait_ms", self._waited_ms)
                self._waited_ms = None
            table = NO_SEEDS
            if self._next_table is not None:
                table, self._next_table = self._next_table, None
            retired: Sequence[str] = ()
            if self.retiring:
                retired, self.retiring = self.retiring, []
            context = None
            if self._next_context or self._next_tensors:
                held, context = self._with_context(held)
            self._last_values = given = self.names.kept(given)
            self.publisher.publish(
                self._numbered(global_step), epoch, self.clock.stamp(), given, table, held, context, False, retired, ()
            )
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
            self.fault("publishing a step", error)

    def _rate(self, samples: int, given: dict[str, float]) -> None:
        now_s = time.perf_counter()
        before, self._last_end_s = self._last_end_s, now_s
        if "step_latency_ms" in given:
            cycle_ms = given["step_latency_ms"] + given.get("input_wait_ms", self._waited_ms or 0.0)
        elif before is not None:
            cycle_ms = (now_s - before) * 1e3
        else:
            return
        if cycle_ms > 0.0:
            given.setdefault("samples_per_s", samples * 1e3 / cycle_ms)

    def _with_context(self, held: Held | None) -> tuple[Held | None, Mapping[str, float]]:
        """What ``set_context`` has been given since the last step, and the tensors of it that are to come."""
        context, self._next_context = self._next_context, {}
        if self._next_tensors:
            held = held or Held()
            held.tensors.update(self._next_tensors)
            self._next_tensors = {}
        return held, context

    def waited(self, milliseconds: float) -> None:
        """Adds to the next step's ``input_wait_ms``."""
        self._waited_ms = (self._waited_ms or 0.0) + milliseconds

    def _probed(self) -> Mapping[str, float]:
        return _NOTHING if self._probing is None else self._probing.readings(time.monotonic())

    def _held_of(self, tensors: Mapping[Target, Any]) -> Held | None:
        if not tensors:
            return None
        self.publisher.saw(tuple(tensors.values()))
        held = Held()
        held.tensors.update(tensors)
        return held

    @property
    def known_ids(self) -> Mapping[str, int]:
        """Seed ids that need no checking: those of live seeds."""
        return self.publisher.live.ids

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
        if step._rows or step._table is not None:
            table = merged_tables(self._table_of(step), table)
            step._rows = {}
        step._table = table

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
        if step._table is not None and seed_id in step._table.ids:
            kept = [row for row, other in enumerate(step._table.ids) if other != seed_id]
            step._table = SeedTable(tuple(step._table.ids[row] for row in kept), step._table.cells[kept])

    def set_context(self, values: Mapping[str, object]) -> None:
        """Replaces values that stay in every frame that follows."""
        plain, tensors = read(values)
        self.publisher.saw(tuple(tensors.values()))
        for name in plain:
            self._next_tensors.pop(name, None)
        self._next_tensors.update(tensors)
        self._next_context.update(plain)

    # -- the state inside a step ---------------------------------------------------------------------------

    def state(self, step: Step) -> SystemStatePacket:
        """The packet of an open step; see ``Step.state``."""
        publisher = self.publisher
        publisher.drain(wait=True)
        if step._retired:
            step._ended += publisher.live.retire(step._retired)
            step._retired = ()
        if self._next_tensors:
            step._hold(self._next_tensors)
            self._next_tensors = {}
        held = step._held
        if held is not None and held.tensors:
            held.seal()
            held.wait_for_values()
            self._take(step, held)
        before = self._last_values
        values = {**self._probed(), **{name: before[name] for name in _KNOWN_AFTERWARDS if name in before}}
        if step._waited_ms is not None:
            values["input_wait_ms"] = step._waited_ms
        values.update(step._values)
        return self._to_state(
            publisher.preview(
                Draft(
                    step.global_step,
                    step.epoch,
                    step.time_unix_ns,
                    self.names.kept(values),
                    self._table_of(step),
                    self._next_context,
                )
            )
        )

    def _take(self, step: Step, held: Held) -> None:
        for target, value in held.arrived().items():
            if isinstance(target, tuple):
                row = one_cell(*target, value).cells.tobytes()
                earlier = step._rows.get(target[0])
                step._rows[target[0]] = row if earlier is None else merged_row(earlier, row)
            elif target in CONTEXT:
                self._next_context[target] = value
            else:
                step._values[target] = value

    # -- the rest ----------------------------------------------------------------------------------------

    def fault(self, where: str, error: Exception) -> None:
        """Counts and logs a fault of the telemetry; training goes on."""
        self.publisher.counters.faults += 1
        self.publisher.warnings.say(
            f"fault {where}",
            "%s failed (%s: %s); training goes on, with less telemetry",
            where,
            type(error).__name__,
            error,
            exc_info=error,
        )


_NOTHING: Mapping[str, float] = {}
