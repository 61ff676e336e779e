"""A step whose mistakes are noted instead of raised (``ESPER_ON_MISTAKE=warn``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from esper_otel.errors import WrongState
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.recorder import Recorder
from esper_otel.record.seeds import checked_seed_id
from esper_otel.record.step import Step
from esper_otel.record.timed import CallbackTiming
from esper_otel.record.work import Work


class SparedStep(Step):
    """A ``Step`` that leaves out what is wrong in a call, records the rest, and notes each mistake.

    A step that cannot be opened, because another one is open or the session is closed, records nothing; its block runs
    all the same. ``to`` and ``state`` return something that the program needs, so they raise as in ``Step``. So do the
    arguments' own exceptions in ``to``, such as those of CUDA.

    Args:
        recorder: records the step.
        mistakes: notes the mistakes.
        refusal: why the step cannot be opened; None if it can.
        numbers: global step, epoch and work.
    """

    __slots__ = ("_is_refused", "_mistakes", "_refusal")

    def __init__(
        self,
        recorder: Recorder,
        mistakes: Mistakes,
        refusal: WrongState | None,
        numbers: tuple[int | None, int, int | Work | None],
    ) -> None:
        super().__init__(recorder, *numbers)
        self._mistakes = mistakes
        self._refusal = refusal
        self._is_refused = False

    def __enter__(self) -> SparedStep:
        try:
            if self._refusal is not None:
                raise self._refusal
            super().__enter__()
        except WrongState as error:
            self._is_refused = True
            self._mistakes.note(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recorder.open_step is self:
            super().__exit__(kind, error, trace)

    def put(self, *mappings: Any, **values: Any) -> None:
        """See ``Step.put``; wrong values are left out."""
        if self._is_refused:
            return
        put = super().put
        try:
            put(*mappings, **values)
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            given = [*(each for each in mappings if isinstance(each, Mapping)), values]
            self._mistakes.record_parts(error, put, {name: each[name] for each in given for name in each})

    def gradients(self, model_or_parameters: Any, *arguments: Any, **named: Any) -> None:
        """See ``Step.gradients``; the norm is recorded even if the sources are wrong."""
        if self._is_refused:
            return
        given = list(model_or_parameters) if isinstance(model_or_parameters, Iterator) else model_or_parameters
        gradients = super().gradients
        is_recorded = self._mistakes.spared(gradients, given, *arguments, **named)
        if not is_recorded and named.pop("sources", None) is not None:
            self._mistakes.spared(gradients, given, *arguments, **named)

    def kernel(self, seed_id: Any) -> CallbackTiming:
        """See ``Step.kernel``; with a wrong id nothing is recorded."""
        return (
            super().kernel(seed_id)
            if self._mistakes.spared(checked_seed_id, seed_id)
            else CallbackTiming(lambda _: None)
        )

    def part(self, name: Any) -> Any:
        """See ``Step.part``; with a wrong name nothing is recorded."""
        try:
            return super().part(name)
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            self._mistakes.note(error)
            return CallbackTiming(lambda _: None)

    def seed(self, seed_id: Any = None, *arguments: Any, **cells: Any) -> None:
        """See ``Step.seed``; wrong cells are left out."""
        if self._is_refused:
            return
        seed = super().seed
        try:
            seed(seed_id, *arguments, **cells)
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            if self._mistakes.spared(checked_seed_id, seed_id):
                self._mistakes.record_parts(error, lambda part: seed(seed_id, **part), cells)
