"""Loop: steps of a training loop that says, event by event, where it is. One step is one optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from esper_otel.derive.gradients import gradient_norm
from esper_otel.record.device import scalar
from esper_otel.telemetry import Telemetry


class _StepFailed(Exception):
    """Ends the scope of a step that has failed elsewhere."""


class Loop:
    """Turns the events of a loop into recorded steps. Threads: the one that trains.

    ``wait`` and ``batch`` around each batch, ``gradients`` before and ``stepped`` after the optimizer's step, ``put``
    in between, ``end`` when the step's work is done. Of several batches before one optimizer step the waits and the
    samples add up; waits inside the step are no part of its latency.

    Args:
        telemetry: where steps are recorded.

    Attributes:
        has_stepped: whether the optimizer has stepped since the last recorded step.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.has_stepped = False
        self._asked_s: float | None = None
        self._began_s: float | None = None
        self._over_s: float | None = None
        self._waited_s = 0.0
        self._waited_inside_s = 0.0
        self._samples: int | None = None
        self._values: dict[str, float | Tensor] = {}

    def wait(self) -> None:
        """The loop asks for a batch."""
        self._asked_s = time.perf_counter()

    def batch(self, samples: int | None = None) -> None:
        """The batch is there; with it a step begins, unless one is under way."""
        now_s = time.perf_counter()
        waited_s = 0.0 if self._asked_s is None else now_s - self._asked_s
        self._waited_s += waited_s
        if self._began_s is None:
            self._began_s = now_s
        else:
            self._waited_inside_s += waited_s
        self._asked_s = None
        if samples is not None:
            self.count(samples)

    def count(self, samples: int) -> None:
        """Adds samples to the step under way."""
        self._samples = samples + (self._samples or 0)

    def discard(self) -> None:
        """The batches since the last step were not for training."""
        if not self.has_stepped:
            self.forget()

    def no_batch(self) -> None:
        """The batch that was asked for does not come."""
        self._asked_s = None

    def gradients(self, of: nn.Module | Iterable[Tensor], scale: float | Tensor | None = None) -> None:
        """Notes the norm of the gradients; waits for no GPU.

        Args:
            of: the model, or the parameters, whose gradients count.
            scale: what the gradients are still multiplied by.
        """
        norm = gradient_norm(of)
        if norm is not None:
            self._values["gradient_norm"] = norm if scale is None else norm / scale

    def put(self, values: Mapping[str, Any]) -> None:
        """Notes step metrics of the step under way; the last value of a name counts.

        Raises:
            UnknownMetric: a name that is not declared.
            InvalidValue: a value that is not one number.
        """
        names = self._telemetry._recorder.names  # noqa: SLF001 - of the same package
        for name, value in names.resolved(values).items():
            if value is None:
                self._values.pop(name, None)
            else:
                self._values[name] = scalar(name, value)

    def stop(self) -> None:
        """The loop was left, by a ``break`` or an exception: the step under way lasts no longer."""
        self._over_s = time.perf_counter()

    def stepped(self) -> None:
        """The optimizer has stepped."""
        self.has_stepped = True

    def end(self, *, epoch: int, global_step: int | None = None) -> None:
        """Records the step, if the optimizer has stepped; else goes on with it."""
        if self.has_stepped:
            values = {**self._measured(), **self._values}
            samples = self._samples if self._began_s is None else None
            self.forget()
            self._telemetry.record_step(values, epoch=epoch, global_step=global_step, samples=samples)

    def fail(self, *, epoch: int, global_step: int | None = None) -> None:
        """Records the step under way as failed, as far as it got."""
        if self._began_s is None:
            return
        values = {**self._measured(), **self._values}
        self.forget()
        with suppress(_StepFailed), self._telemetry.step(epoch=epoch, global_step=global_step) as now:
            now.put(values)
            raise _StepFailed

    def forget(self) -> None:
        """Nothing of what has happened belongs to the next step."""
        self.has_stepped = False
        self._asked_s = self._began_s = self._over_s = self._samples = None
        self._waited_s = self._waited_inside_s = 0.0
        self._values = {}

    def _measured(self) -> dict[str, float]:
        if self._began_s is None:  # no batch was asked for: the step has no begin
            return {}
        over_s = time.perf_counter() if self._over_s is None else self._over_s
        spent_s = over_s - self._began_s - self._waited_inside_s
        measured = {"input_wait_ms": self._waited_s * 1e3, "step_latency_ms": spent_s * 1e3}
        if self._samples is not None and (cycle_s := self._waited_s + spent_s) > 0.0:
            measured["samples_per_s"] = self._samples / cycle_s
        return measured
