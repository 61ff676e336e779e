"""The recorder: numbers the steps of one session, stamps them with their times and hands them to the publisher."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esper_otel.errors import InvalidValue, WrongState
from esper_otel.frames.frame import NO_SEEDS, Frame
from esper_otel.frames.phase_log import PhaseLog
from esper_otel.record.clock import Clock
from esper_otel.record.frame_publisher import Draft, FramePublisher
from esper_otel.record.names import PARTS
from esper_otel.record.next_step import NextStep
from esper_otel.record.open_step import OpenStep
from esper_otel.record.peak import Peak
from esper_otel.record.phases import Phases
from esper_otel.record.seed_columns import SeedColumns
from esper_otel.record.seeds import NO_IDS, checked_seed_id, merged_row, one_cell
from esper_otel.record.signature import Signature
from esper_otel.record.step_parts import Timer, timer_for
from esper_otel.record.values import (
    CONTEXT,
    UINT32_MAX,
    UINT64_MAX,
    DeviceValues,
    Target,
    read,
    whole,
)
from esper_otel.record.work import Work

if TYPE_CHECKING:
    from esper_otel.leyline.messages import SystemStatePacket
    from esper_otel.record.mistakes import Mistakes
    from esper_otel.record.names import Names

# Values known only when the step has ended. A state requested inside the step uses those of the previous step.
_KNOWN_AFTERWARDS = (
    "hook_latency_ms",
    "tamiyo_latency_ms",
    "step_latency_ms",
    "kasmina.apply_ms",
    "kasmina.finalize_ms",
    "samples_per_s",
    *PARTS.values(),
)


_NOBODY: Sequence[str] = ()
_NUMBERS = frozenset({float, int, bool})


class Recorder:
    """Takes the values that a trainer records and hands one draft per step to the publisher.

    Threads: one thread, called the recording thread.

    Attributes:
        mistakes: notes the mistakes of the program; None if they are raised.
        phases: times phases, such as checkpoints.
        peak: the highest rate of the training device, for ``esper.mfu``.

    Args:
        began_unix_ns: when start-up began, which ends with the first step; None if it is not to be recorded.
    """

    def __init__(
        self,
        publisher: FramePublisher,
        *,
        clock: Clock,
        to_state: Callable[[Frame], SystemStatePacket],
        gradient_math: Callable[[], Any],
        peak: Peak,
        mistakes: Mistakes | None = None,
        began_unix_ns: int | None = None,
    ) -> None:
        self.publisher = publisher
        self.names: Names = publisher.names
        self.clock = clock
        self.highest_step: int = 0
        self.open_step: OpenStep | None = None
        self.next_step: NextStep = publisher.next_step
        self.gradient_math = gradient_math
        self.peak = peak
        self.mistakes = mistakes
        self._to_state = to_state
        self._columns = SeedColumns(publisher.is_good)
        self._last_end_s: float | None = None
        self._recorded = publisher.signatures.of(())  # of the last step recorded in one call
        self.phases: Phases = Phases(PhaseLog(began_unix_ns or clock.now_ns()), clock, self, began_unix_ns)
        self.next_step.is_anything = True  # so that the first step ends start-up

    @property
    def last_end_s(self) -> float | None:
        """When the last step ended, on the clock of ``time.perf_counter``."""
        return self._last_end_s

    # -- steps -------------------------------------------------------------------------------------------

    def open(self, step: OpenStep) -> None:
        """Opens a step: gives it its number and its time."""
        if self.open_step is not None and self._still_open():
            raise WrongState(f"step {self.open_step.global_step} is still open: one step at a time")
        number = step._numbered
        if number is None:
            self.highest_step = number = self.highest_step + 1
        else:
            self._note_number(number)
        step.global_step = number
        step.time_unix_ns = self.clock.stamp()
        following = self.next_step
        if following.is_anything:
            step._waited_ms, step._table, step._retired = following.take()
            if self.phases.follows_steps:
                self.phases.step_opens(step._waited_ms)
                following.is_anything |= self.phases.follows_steps
        step._retiring = following.retiring
        self.open_step = step
        step._known = self.publisher.live.ids

    def _still_open(self) -> bool:
        """Whether the open step's scope still runs. If not, a KeyboardInterrupt left it open: finishes the step."""
        step = self.open_step
        if step is None or step.is_in_its_scope():
            return step is not None
        self.open_step = None
        if step._started_s:
            step._failed = True
            self.finish(step, time.perf_counter())
        return False

    def _note_number(self, given: int) -> None:
        """Takes a number that the trainer has given to a step."""
        if given > self.highest_step:
            self.highest_step = given
        else:
            self.publisher.counters.backwards += 1
            self.publisher.warnings.say(
                "backwards", "step %d is not above %d, the highest step so far; kept as given", given, self.highest_step
            )

    def finish(self, step: OpenStep, now_s: float) -> None:
        """Hands a step that has ended to the publisher. Never raises; faults are counted and logged."""
        self.open_step = None
        step._known = NO_IDS
        try:
            spent_ms = (now_s - step._started_s) * 1e3
            values = step._values
            # Values that the caller gave take precedence over measured ones.
            for name, timing_ms in step._timings.items():
                values.setdefault(name, timing_ms)
            values.setdefault("step_latency_ms", spent_ms)
            waited_ms = step._waited_ms
            if waited_ms is not None:
                values.setdefault("input_wait_ms", waited_ms)
            if step._work is not None:
                if waited_ms is not None:
                    cycle_ms = waited_ms + spent_ms
                elif self._last_end_s is not None:
                    cycle_ms = (now_s - self._last_end_s) * 1e3
                else:
                    cycle_ms = spent_ms
                if cycle_ms > 0.0:
                    for name, rate in self._rates(step._work, cycle_ms).items():
                        values.setdefault(name, rate)
            self._last_end_s = now_s
            table = step._all_rows() if step._rows or step._table is not None else NO_SEEDS
            recorded, numbers = self.publisher.signatures.read(values)
            self.publisher.publish(
                step.global_step,
                step.epoch,
                step.time_unix_ns,
                recorded,
                numbers,
                table,
                step._failed,
                step._retired,
                step._held,
            )
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
            self.fault("publishing a step", error)

    def record_step(
        self, values: Mapping[str, Any], epoch: int, global_step: int | None, work: int | Work | None
    ) -> None:
        """Records a whole step in one call, with values that the trainer has measured itself."""
        if self.open_step is not None and self._still_open():
            raise WrongState("record_step() inside an open step: use now.put() there")
        if epoch.__class__ is not int or not 0 <= epoch <= UINT32_MAX:
            epoch = whole("epoch", epoch, UINT32_MAX)
        # Most steps have the names of the one before, and numbers of Python's, whose sum is a float if one of them is.
        # A value of another kind makes it something else, or raises an exception.
        recorded, held = self._recorded, None
        numbers: tuple[float, ...] = ()
        is_usual = values.__class__ is dict and len(values) == recorded.count
        try:
            if is_usual:
                numbers = recorded.numbers_of(values)
                is_usual = sum(numbers).__class__ is float
        except Exception:  # noqa: BLE001 - a value may be anything
            is_usual = False
        if not is_usual:
            recorded, numbers, held = self._converted(values)
        if global_step is not None:
            global_step = whole("global_step", global_step, UINT64_MAX)
        try:
            table, retired = NO_SEEDS, _NOBODY
            if work is not None or self.next_step.is_anything:
                waited_ms, rows, retired = self.next_step.take()
                table = rows or NO_SEEDS
                if waited_ms is not None or work is not None:
                    recorded, numbers = self._timed(recorded, numbers, waited_ms, work)
                if self.phases.follows_steps:
                    given = recorded.dict_of(numbers)
                    self.phases.step_recorded(given.get("input_wait_ms"), given.get("step_latency_ms"))
                    self.next_step.is_anything |= self.phases.follows_steps
            if global_step is None:
                self.highest_step = global_step = self.highest_step + 1
            else:
                self._note_number(global_step)
            time_unix_ns = self.clock.stamp()
            self.publisher.publish(global_step, epoch, time_unix_ns, recorded, numbers, table, False, retired, held)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
            self.fault("publishing a step", error)

    def _converted(self, values: Mapping[str, Any]) -> tuple[Signature, tuple[float, ...], DeviceValues | None]:
        """Returns names, numbers and what is still on a device, of values of any names and types."""
        if not isinstance(values, Mapping):
            raise InvalidValue("record_step", f"takes a mapping of names to values, not {type(values).__name__}")
        if not self.names.recordable.issuperset(values):
            values = self.names.resolved(values)
        # Counting compares classes by identity, without hashing them.
        held = None
        if [*map(type, values.values())].count(float) == len(values):
            self._recorded = recorded = self.publisher.signatures.of(tuple(values))
        else:
            is_quick = _NUMBERS.issuperset(map(type, values.values()))
            values, tensors = read(values)
            held = self._held_of(tensors)
            recorded = self.publisher.signatures.of(tuple(values))
            if is_quick:
                self._recorded = recorded
        return recorded, tuple(values.values()), held

    def _timed(
        self, recorded: Signature, numbers: tuple[float, ...], waited_ms: float | None, work: int | Work | None
    ) -> tuple[Signature, tuple[float, ...]]:
        """Adds the time waited for input and the rates of the work to names and numbers, unless they were given."""
        given = recorded.dict_of(numbers)
        if waited_ms is not None:
            given = {"input_wait_ms": waited_ms, **given}
        if work is not None:
            given = {**self._rates_of(work, given), **given}
        return self.publisher.signatures.read(given)

    def _rates_of(self, work: int | Work, given: Mapping[str, float]) -> Mapping[str, float]:
        """Returns the rates of the work for ``record_step``; none if the step's duration is unknown."""
        now_s = time.perf_counter()
        before, self._last_end_s = self._last_end_s, now_s
        if "step_latency_ms" in given:
            cycle_ms = given["step_latency_ms"] + given.get("input_wait_ms", 0.0)
        elif before is not None:
            cycle_ms = (now_s - before) * 1e3
        else:
            return {}
        return self._rates(work, cycle_ms) if cycle_ms > 0.0 else {}

    def _rates(self, work: int | Work, cycle_ms: float) -> Mapping[str, float]:
        """Returns the rates of the work, by metric."""
        if not isinstance(work, Work):
            return {"samples_per_s": work * 1e3 / cycle_ms}
        return work.rates(cycle_ms, None if work.flops is None else self.peak.tflops())

    def timer(self) -> Timer:
        """Returns what measures parts of a step on the device that trains."""
        run = self.publisher.run
        return timer_for(run.device_id or run.device_type, enriched=not self.names.left_out)

    def waited(self, milliseconds: float) -> None:
        """Adds to the next step's ``input_wait_ms``."""
        self.next_step.wait(milliseconds)

    def _held_of(self, tensors: Mapping[Target, Any]) -> DeviceValues | None:
        if not tensors:
            return None
        self.publisher.saw(tuple(tensors.values()))
        held = DeviceValues()
        held.tensors.update(tensors)
        return held

    # -- seeds and context -------------------------------------------------------------------------------

    def seeds(self, ids: Sequence[str], columns: Mapping[str, object]) -> None:
        """Records rows of many seeds for the open step or, if none is open, for the next one."""
        table = self._columns.table(ids, columns)
        if self.open_step is None:
            self.next_step.add(table)
        else:
            self.open_step._add(table)

    def retire(self, seed_id: str) -> None:
        """Ends a seed's life: frames after the open step do not contain it."""
        self.next_step.retire(checked_seed_id(seed_id))
        if self.open_step is not None:
            self.open_step._known = NO_IDS

    def set_context(self, values: Mapping[str, object]) -> None:
        """Replaces values that stay in all later frames."""
        plain, tensors = read(values)
        self.publisher.saw(tuple(tensors.values()))
        self.next_step.replace_context(plain, tensors)

    # -- the state inside a step ---------------------------------------------------------------------------

    def state(self, step: OpenStep) -> SystemStatePacket:
        """Returns the packet of an open step; see ``Step.state``."""
        publisher = self.publisher
        publisher.drain(wait=True)
        if self.next_step.tensors:
            step._hold(self.next_step.tensors)
            self.next_step.tensors = {}
        held = step._held
        if held is not None and held.tensors:
            held.seal()
            held.wait_for_values()
            self._take(step, held)
        newest = publisher.ring.row(publisher.ring.last)
        before = {} if newest is None else newest.recorded
        values: dict[str, float] = {name: before[name] for name in _KNOWN_AFTERWARDS if name in before}
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
                    step._all_rows(),
                    retired=step._retired,
                    context=self.next_step.context,
                    probed=publisher.probing.latest(),
                )
            )
        )

    def _take(self, step: OpenStep, held: DeviceValues) -> None:
        for target, value in held.arrived().items():
            if isinstance(target, tuple):
                row = one_cell(*target, value).cells.tobytes()
                earlier = step._rows.get(target[0])
                step._rows[target[0]] = row if earlier is None else merged_row(earlier, row)
            elif target in CONTEXT:
                self.next_step.context[target] = value
            else:
                step._values[target] = value

    # -- faults ------------------------------------------------------------------------------------------

    def fault(self, where: str, error: Exception) -> None:
        """See ``FramePublisher.fault``."""
        self.publisher.fault(where, error)
