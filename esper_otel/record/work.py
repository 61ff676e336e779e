"""How much work a step did, and the rates that follow from it."""

from __future__ import annotations

import math
from typing import NamedTuple

from esper_otel.errors import InvalidValue
from esper_otel.record.values import UINT64_MAX, whole


class Work(NamedTuple):
    """What one step processed.

    Attributes:
        samples: training samples; None if not given.
        tokens: tokens; None if not given.
        flops: floating-point operations of the model, forward and backward; None if not given.
    """

    samples: int | None
    tokens: int | None
    flops: float | None

    def rates(self, cycle_ms: float, peak_tflops: float | None) -> dict[str, float]:
        """Returns the rates of a cycle of more than 0 ms, by metric.

        Args:
            cycle_ms: the wait for the batch and the step.
            peak_tflops: the highest rate of the training device in TFLOP/s; None if it is unknown.
        """
        found: dict[str, float] = {}
        if self.samples is not None:
            found["samples_per_s"] = self.samples * 1e3 / cycle_ms
        if self.tokens is not None:
            found["esper.tokens_per_s"] = self.tokens * 1e3 / cycle_ms
        if self.flops is not None:
            tflops = self.flops / cycle_ms / 1e9
            found["esper.tflops_per_s"] = tflops
            if peak_tflops is not None:
                found["esper.mfu"] = tflops / peak_tflops
        return found


def work_of(samples: object, tokens: object, flops: object) -> int | Work | None:
    """Returns the work of a step: samples alone as a number, which most steps have; None if nothing is given.

    Raises:
        InvalidValue: samples or tokens are not a whole number, or flops is not a finite number, of at least 0.
    """
    samples = None if samples is None else whole("samples", samples, UINT64_MAX)
    if tokens is None and flops is None:
        return samples
    return Work(
        samples,
        None if tokens is None else whole("tokens", tokens, UINT64_MAX),
        None if flops is None else _operations(flops),
    )


def _operations(flops: object) -> float:
    try:
        number = float(flops)  # type: ignore[arg-type] # TypeError is the answer
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(flops, str | bool) or not 0.0 <= number < math.inf:
        raise InvalidValue("flops", f"{flops!r} is not a finite number of at least 0")
    return number
