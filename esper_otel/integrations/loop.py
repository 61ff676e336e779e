"""Records the steps of a training loop from its events. One step is one optimizer step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from esper_otel.derive.gradients import norm_of
from esper_otel.errors import MistakeError
from esper_otel.integrations.loop_parts import StepParts
from esper_otel.log import logger
from esper_otel.record.device import scalar
from esper_otel.record.phases import Phases
from esper_otel.record.values import CopyTime
from esper_otel.session.telemetry import Telemetry

_LONGEST_HOLD_S = 2.0
_LATER = (
    "values put after an evaluation of more than two seconds (%s) are recorded with the next step: "
    "the step before the evaluation has been recorded; put them before the evaluation"
)

# For these metrics, a step has the last value; for others, the mean over its batches.
_OF_THE_STEP = frozenset({"gradient_norm", "esper.optimizer.lr", "esper.optimizer.index"})
_PLAIN = {Tensor}
_SHARDED = (
    "gradient_norm is left out: the gradients are FSDP2 shards (DTensor), and computing their norm needs all ranks; "
    "record it on all of them: put(gradient_norm=esper_otel.gradient_norm(model))"
)


class _StepFailed(Exception):
    """Raised to end the scope of a step that has failed elsewhere."""


class _Mean:
    """The mean of a value over batches, weighted by their numbers of samples if all of these are known."""

    def __init__(self, value: float | Tensor, samples: int | None) -> None:
        self.first = value
        self.count = 1
        self.sum = value
        self.samples = samples
        self.weighted = value * samples if samples is not None else value

    def add(self, other: _Mean) -> None:
        self.count += other.count
        self.sum = self.sum + other.sum
        if self.samples is None or other.samples is None:
            self.samples = None
        else:
            self.samples += other.samples
            self.weighted = self.weighted + other.weighted

    def value(self) -> float | Tensor:
        if self.count == 1:
            return self.first
        return self.weighted / self.samples if self.samples else self.sum / self.count


class _Batches:
    """Times and values of the batches of a step, one or more."""

    def __init__(self) -> None:
        self.began_s: float | None = None
        self.over_s: float | None = None
        self.has_waited = False
        self.waited_s = 0.0
        self.waited_inside_s = 0.0
        self.samples: int | None = None
        self.values: dict[str, float | Tensor] = {}
        self.means: dict[str, _Mean] = {}

    def close(self) -> None:
        """Ends the batch: the values put in it are weighted by its number of samples."""
        for name in [name for name in self.values if name not in _OF_THE_STEP]:
            self._mean(name, _Mean(self.values.pop(name), self.samples))

    def add(self, later: _Batches) -> None:
        """Adds batches that belong to the same step."""
        self.close()
        later.close()
        if self.began_s is None:
            self.began_s = later.began_s
            self.waited_inside_s += later.waited_inside_s
        else:
            self.waited_inside_s += later.waited_s + later.waited_inside_s
        self.over_s = later.over_s
        self.has_waited |= later.has_waited
        self.waited_s += later.waited_s
        if later.samples is not None:
            self.samples = later.samples + (self.samples or 0)
        self.values.update(later.values)
        for name, mean in later.means.items():
            self._mean(name, mean)

    def all_values(self) -> dict[str, float | Tensor]:
        """Returns all values to record."""
        self.close()
        return {**self.measured(), **self.values, **{name: mean.value() for name, mean in self.means.items()}}

    def measured(self) -> dict[str, float]:
        """Returns latency, wait and rate; empty if the beginning is unknown."""
        if self.began_s is None:
            return {}
        over_s = time.perf_counter() if self.over_s is None else self.over_s
        spent_s = over_s - self.began_s - self.waited_inside_s
        measured = {"step_latency_ms": spent_s * 1e3}
        if self.has_waited:
            measured["input_wait_ms"] = self.waited_s * 1e3
        if self.samples is not None and (cycle_s := self.waited_s + spent_s) > 0.0:
            measured["samples_per_s"] = self.samples / cycle_s
        return measured

    def _mean(self, name: str, mean: _Mean) -> None:
        if (earlier := self.means.get(name)) is None:
            self.means[name] = mean
        else:
            earlier.add(mean)


class _Ended(NamedTuple):
    """A step that is over: its batches, the durations of its parts, and when it was found to be over."""

    since_s: float
    batches: _Batches
    host_ms: dict[str, float]
    device: list[tuple[str, CopyTime]]
    epoch: int
    global_step: int | None


def _weakly(loop: Loop) -> Callable[[], int | None]:
    """Returns a function that returns the step that the loop is in, without keeping the loop alive."""
    reference = weakref.ref(loop)

    def inside() -> int | None:
        found = reference()
        return None if found is None else found.step_inside()

    return inside


class Loop:
    """Turns the events of a loop into recorded steps. Threads: the training thread.

    Call ``wait`` and ``batch`` before and after loading each batch, ``gradients`` before and ``stepped`` after the
    optimizer's step, ``put`` in between, and ``end`` when the step's work is done. If several batches precede an
    optimizer step, their waits and samples are summed, and the values put are averaged. The latency of a step does not
    include waits for batches inside it.

    Args:
        telemetry: the session that records the steps.

    Attributes:
        has_stepped: whether the optimizer has stepped since the last recorded step.
        phases: times the session's phases.
        parts: tells forward, backward and optimizer apart.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.phases: Phases = telemetry._recorder.phases  # noqa: SLF001 - same package
        self.phases.inside = _weakly(self)
        self.has_stepped: bool = False
        self._asked_s: float | None = None
        self._asked_mark_s = 0.0
        self._earlier: _Batches | None = None
        self._now = _Batches()
        self.parts: StepParts = StepParts(telemetry._recorder.timer)  # noqa: SLF001 - same package
        self._is_sharded = False
        self._held: _Ended | None = None
        self._later: dict[str, float | Tensor] = {}
        self._has_said_later = False

    @property
    def has_earlier(self) -> bool:
        """Whether there are batches before the last one that have not been followed by an optimizer step."""
        return self._earlier is not None

    @property
    def is_in_batch(self) -> bool:
        """Whether a batch has arrived since the last recorded step."""
        return self._now.began_s is not None

    def step_inside(self) -> int | None:
        """Returns the number of the step that is in progress; None between steps."""
        return self.phases.next_step if self._now.began_s is not None and self._now.over_s is None else None

    def wait(self) -> None:
        """The loop requests a batch. If the optimizer has stepped, the step is over; ``put`` still applies to it."""
        self.parts.over()
        self._asked_s = time.perf_counter()
        self._asked_mark_s = self.phases.mark() if self.phases.has_any else 0.0
        if self.has_stepped and self._now.over_s is None:
            self._now.over_s = self._asked_s

    def batch(self, samples: int | None = None) -> None:
        """The batch has arrived. It begins a step unless one is in progress."""
        now_s = time.perf_counter()
        waited_s = 0.0 if self._asked_s is None else now_s - self._asked_s
        if waited_s and self.phases.has_any:
            waited_s = self.phases.waited(waited_s, self._asked_mark_s)
        self._asked_s = None
        if self._now.began_s is not None and not self.has_stepped:
            self._set_aside()
        part = self._now
        part.has_waited = True
        part.waited_s += waited_s
        if part.began_s is None:
            part.began_s = now_s
        else:
            part.waited_inside_s += waited_s
        if samples is not None:
            self.count(samples)
        self.parts.batch()

    def count(self, samples: int) -> None:
        """Adds samples to the current step."""
        self._now.samples = samples + (self._now.samples or 0)

    def uncount(self) -> None:
        """The last batch is for a later step: its samples are not of this one."""
        self._now.samples = None

    def discard(self) -> None:
        """The batches since the last step were not for training."""
        if not self.has_stepped:
            self.forget()

    def discard_last(self) -> None:
        """The last batch was not for training."""
        if not self.has_stepped:
            self._now = _Batches()

    def no_batch(self) -> None:
        """The requested batch does not exist or could not be loaded."""
        self._asked_s = None

    def gradients(self, parameters: Iterable[Tensor], scale: float | Tensor | None = None) -> None:
        """Records the norm of the gradients, without waiting for a GPU or for other ranks.

        Args:
            parameters: those whose gradients are used.
            scale: the factor by which the gradients are still scaled.
        """
        gradients = [gradient for each in parameters if (gradient := each.grad) is not None]
        if {*map(type, gradients)} <= _PLAIN or not any(hasattr(each, "device_mesh") for each in gradients):
            norm = norm_of(gradients)
            if norm is not None:
                self._now.values["gradient_norm"] = norm if scale is None else norm / scale
        elif not self._is_sharded:
            self._is_sharded = True
            logger.warning(_SHARDED)

    def put(self, values: Mapping[str, Any]) -> None:
        """Records step metrics of the current batch; the last value of a name counts.

        Raises:
            UnknownMetric: a name is not declared.
            InvalidValue: a value is not a single number.
        """
        for name, value in self.checked(values).items():
            if value is None:
                self._now.values.pop(name, None)
            else:
                self._now.values[name] = value

    def put_between(self, values: Mapping[str, Any]) -> None:
        """Like ``put``, but for the step that is held or, if it has been recorded, for the next one.

        A value that was put for that step itself takes precedence: those of an evaluation's batches come here, too.
        """
        if self._held is None and not self._has_said_later:
            self._has_said_later = True
            logger.warning(_LATER, ", ".join(values))
        self._later |= {name: value for name, value in self.checked(values).items() if value is not None}

    def checked(self, values: Mapping[str, Any]) -> dict[str, float | Tensor | None]:
        """Returns the numbers by their full names. If mistakes are not raised, notes them and leaves them out.

        Raises:
            UnknownMetric: a name is not declared.
            InvalidValue: a value is not a single number.
        """
        try:
            return self._numbers(values)
        except MistakeError as error:
            mistakes = self._telemetry.mistakes
            if mistakes is None:
                raise
            good: dict[str, float | Tensor | None] = {}
            mistakes.record_parts(error, lambda part: good.update(self._numbers(part)), values)
            return good

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float | Tensor | None]:
        resolved = self._telemetry._recorder.names.resolved(values)  # noqa: SLF001 - same package
        return {name: None if value is None else scalar(name, value) for name, value in resolved.items()}

    def stop(self) -> None:
        """The loop was left by ``break`` or an exception, which ends the current step."""
        self.stop_at(time.perf_counter())

    def stop_at(self, over_s: float) -> None:
        """The current step ended at ``over_s``."""
        self.parts.over()
        if self._now.over_s is None:
            self._now.over_s = over_s

    def stepped(self) -> None:
        """The optimizer has stepped."""
        self.has_stepped = True

    def end(self, *, epoch: int, global_step: int | None = None) -> None:
        """Records the step if the optimizer has stepped; otherwise the step continues."""
        if self.has_stepped:
            self._record(self._taken(epoch, global_step))

    def hold(self, *, epoch: int) -> None:
        """Ends the step, if the optimizer has stepped, but records it later: ``put_between`` may add to it.

        Call it for each batch of an evaluation. It waits for two seconds at most, since others wait for the step.
        """
        if self.has_stepped:
            self.release()
            self._held = self._taken(epoch, None)
        elif self._held is not None and time.perf_counter() - self._held.since_s > _LONGEST_HOLD_S:
            self.release()

    def release(self) -> None:
        """Records the step that is held, if there is one."""
        held, self._held = self._held, None
        if held is not None:
            self._add_later(held.batches)
            self._record(held)

    def say_what_is_left(self) -> None:
        """The run is over: says which values were put for a next step that did not come."""
        if self._later:
            logger.warning("not recorded, since no step followed: %s", ", ".join(self._later))
            self._later = {}

    def _add_later(self, batches: _Batches) -> None:
        """Adds the values of ``put_between`` to those of a step, as far as it has none of its own."""
        for name, value in self._later.items():
            if name not in batches.means:
                batches.values.setdefault(name, value)
        self._later = {}

    def _taken(self, epoch: int, global_step: int | None) -> _Ended:
        batches, asked_s = self._whole(), self._asked_s
        self._add_later(batches)
        ended = _Ended(time.perf_counter(), batches, *self.parts.take(), epoch, global_step)
        self.forget()
        self._asked_s = asked_s
        return ended

    def _record(self, step: _Ended) -> None:
        self.release()
        values, batches = step.batches.all_values(), step.batches
        if batches.began_s is not None:
            values |= step.host_ms
            if step.device:
                self._telemetry._recorder.next_step.add_parts(step.device)  # noqa: SLF001 - same package
        samples = batches.samples if batches.began_s is None else None
        self._telemetry.record_step(values, epoch=step.epoch, global_step=step.global_step, samples=samples)

    def go_on(self, since_s: float) -> None:
        """Another step with the same batch has begun. The wait and the samples were recorded with the previous step."""
        if self._now.began_s is None:
            self._now.began_s = since_s
            self.parts.batch()

    def fail(self, *, epoch: int, global_step: int | None = None) -> None:
        """Records the current step as failed, with its values so far."""
        if self._earlier is None and self._now.began_s is None:
            return
        whole = self._whole()
        self.forget()
        self._record_failed(whole, epoch, global_step)

    def skip(self, *, epoch: int) -> None:
        """The optimizer did not use the batches before the last one: records values put there as a failed step."""
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            earlier.close()
            if earlier.means:
                self._record_failed(earlier, epoch, None)

    def skip_all(self, *, epoch: int) -> None:
        """Like ``skip``, but including the last batch, since no step will follow."""
        self._set_aside()
        self.skip(epoch=epoch)

    def forget(self) -> None:
        """Discards all batches and values since the last recorded step."""
        self.parts.take()
        self.has_stepped = False
        self._asked_s = self._earlier = None
        self._now = _Batches()

    def _set_aside(self) -> None:
        if self._now.over_s is None:
            self._now.over_s = time.perf_counter()
        if self._earlier is None:
            self._earlier = self._now
            self._now.close()
        else:
            self._earlier.add(self._now)
        self._now = _Batches()

    def _whole(self) -> _Batches:
        if self._earlier is None:
            return self._now
        self._earlier.add(self._now)
        return self._earlier

    def _record_failed(self, part: _Batches, epoch: int, global_step: int | None) -> None:
        self.release()
        values = part.all_values()
        with suppress(_StepFailed), self._telemetry.step(epoch=epoch, global_step=global_step) as now:
            now.put(values)
            raise _StepFailed
