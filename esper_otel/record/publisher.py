"""Publisher: makes frames of the steps that are over, in order, and puts them into the ring."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from esper_otel.frame import NO_SEEDS, Frame, Run, SeedTable
from esper_otel.log import Warnings
from esper_otel.record import device
from esper_otel.record.counters import Counters
from esper_otel.record.names import Names
from esper_otel.record.seeds import LiveSeeds, merged_tables, one_cell
from esper_otel.record.values import CONTEXT, Held
from esper_otel.ring import Ring

_DEVICE_POLL_S = 0.001

# A signal may interrupt the very thread that is draining, and ask for the same: it must not wait for ever.
_DRAINING_TIMEOUT_S = 1.0

_MAX = sys.float_info.max

# What rounds to infinity in the packets' float32 begins here: the largest float32 and half a unit in its last place.
_FLOAT32_BOUND = float(2**128 - 2**103)


class Deriving(Protocol):
    """Derives metrics from those of a step; ``commit`` advances, ``peek`` does not."""

    def commit(self, given: Mapping[str, float]) -> Any:
        """Advances to the next step; what it derived."""

    def peek(self, given: Mapping[str, float]) -> Any:
        """What ``commit`` would return."""


class Draft(NamedTuple):
    """A step that is over, before its frame is made.

    Attributes:
        global_step: the step's number.
        epoch: its epoch.
        time_unix_ns: its time.
        values: what was recorded; the publisher's from now on.
        table: the seed rows recorded.
        context: values that stay in every frame from this one on.
        failed: whether the step raised.
        retired: seeds whose lives end before this step.
        ended: seeds whose lives ended when this step's state was asked for.
    """

    global_step: int
    epoch: int
    time_unix_ns: int
    values: dict[str, float]
    table: SeedTable = NO_SEEDS
    context: Mapping[str, float] | None = None
    failed: bool = False
    retired: Sequence[str] = ()
    ended: tuple[str, ...] = ()


class Publisher:
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
        self.run = run
        self.names = names
        self.ring = ring
        self.counters = Counters()
        self.warnings = warnings
        self.live = LiveSeeds()
        self.last_finite_loss: float | None = None
        self.published: Callable[[], None] | None = None
        self._device_is_named = False
        self._deriving = deriving
        self._context = dict(context)
        self._unfinished: deque[tuple[Draft, Held | None]] = deque()
        self._draining = threading.Lock()

    def publish(
        self,
        global_step: int,
        epoch: int,
        time_unix_ns: int,
        values: dict[str, float],
        table: SeedTable,
        held: Held | None,
        context: Mapping[str, float] | None,
        failed: bool,
        retired: Sequence[str],
        ended: tuple[str, ...],
    ) -> None:
        """Makes the step's frame, now or when the device has delivered what the step holds. See ``Draft``.

        Called in every step: arguments by position, since keywords cost.
        """
        if held is None and not self._unfinished:
            self._commit(global_step, epoch, time_unix_ns, values, table, context, failed, retired, ended)
            return
        if held is not None:
            held.seal()
        draft = Draft(global_step, epoch, time_unix_ns, values, table, context, failed, retired, ended)
        self._unfinished.append((draft, held))
        self.drain()

    def drain(self, *, wait: bool = False) -> None:
        """Publishes the steps whose device values have arrived, in order; waits for all of them if asked to."""
        if not self._unfinished or not self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
            return
        try:
            while self._unfinished:
                draft, held = self._unfinished[0]
                if held is not None:
                    if wait:
                        held.wait()
                    elif not held.done():
                        return
                    draft = self._with_arrived(draft, held)
                self._commit(*draft)
                self._unfinished.popleft()  # only now: a step that ends meanwhile must queue behind it
        finally:
            self._draining.release()

    def settle(self, deadline_s: float) -> None:
        """Publishes every step; one whose device values have not come by ``deadline_s`` goes without them."""
        self.drain()
        while self._unfinished and time.monotonic() < deadline_s:
            time.sleep(_DEVICE_POLL_S)
            self.drain()
        if not self._unfinished:
            return
        self.warnings.say("device", "%d steps go without device values that never came", len(self._unfinished))
        if self._draining.acquire(timeout=_DRAINING_TIMEOUT_S):
            try:
                while self._unfinished:
                    self._commit(*self._unfinished[0][0])
                    self._unfinished.popleft()
            finally:
                self._draining.release()

    def _with_arrived(self, draft: Draft, held: Held) -> Draft:
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

    def _commit(
        self,
        step: int,
        epoch: int,
        time_unix_ns: int,
        values: dict[str, float],
        table: SeedTable,
        context: Mapping[str, float] | None,
        failed: bool,
        retired: Sequence[str],
        ended: tuple[str, ...],
    ) -> None:
        counters = self.counters
        if retired or ended:
            ended = (*ended, *self.live.retire(retired))
        if context:
            self._context = {**self._context, **context}
            counters.nonfinite += sum(value - value != 0.0 for value in context.values())
        live = self.live
        violations = None
        if table.ids:
            seeds = live.step(table)
            live.commit(seeds)
            table, violations = seeds.recorded, seeds.violations
            if seeds.nonfinite:
                counters.nonfinite += seeds.nonfinite
            if seeds.out_of_range:
                self._note_cells(seeds.out_of_range)
        self._judge(values)
        derived = () if failed else self._deriving.commit(values)
        if failed:
            counters.failed += 1
        if not self.run.device_type:
            self.settle_on_cpu()
        self._complete(values, violations, failed=failed)
        ring = self.ring
        number = ring.last + 1
        ring.append(
            # As Frame(...), in half the time.
            tuple.__new__(
                Frame,
                (self.run, number, step, epoch, time_unix_ns, values, self._context, table, live.table, ended, derived),
            )
        )
        counters.steps += 1
        if self.published is not None:
            self.published()

    def _complete(self, values: dict[str, float], violations: float | None, *, failed: bool = False) -> None:
        """Adds our own step values to those of the trainer; the deriving has seen only the latter."""
        loss = values.get("loss")
        if loss is not None and -_FLOAT32_BOUND < loss < _FLOAT32_BOUND:
            self.last_finite_loss = loss
        if self.last_finite_loss is not None:
            values["esper.training.loss"] = self.last_finite_loss
        if violations is not None:
            values["esper.isolation.violations"] = violations
        if self.counters.backwards:
            values["esper.steps.backwards"] = float(self.counters.backwards)
        if failed:
            values["esper.step.failed"] = 1.0

    def _judge(self, values: Mapping[str, float]) -> None:
        """Counts values that are not finite or out of range; both are kept as they are."""
        for value in values.values():
            if not 0.0 <= value <= _MAX:
                break
        else:
            for name in self.names.ratios:
                if values.get(name, 0.0) > 1.0:
                    break
            else:
                return
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
        step, epoch, time_unix_ns, values, table, context, *_ = draft
        seeds = self.live.step(table)
        derived = self._deriving.peek(values)
        known_loss = self.last_finite_loss
        self._complete(values, seeds.violations)
        self.last_finite_loss = known_loss
        return Frame(
            self.run,
            self.ring.last + 1,
            step,
            epoch,
            time_unix_ns,
            values,
            {**self._context, **context} if context else self._context,
            seeds.recorded,
            seeds.live,
            (),
            derived,
        )

    def saw(self, items: Sequence[Any]) -> None:
        """Notes the training device: the first CUDA tensor seen, unless one was named at the start."""
        if self.run.device_type == "cuda" or self._device_is_named:
            return
        for item in items:
            if getattr(item, "is_cuda", False):
                self.set_device(device.device_name(item))
                return

    def settle_on_cpu(self) -> None:
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
