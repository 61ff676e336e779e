"""The ``Telemetry`` of a session with ``ESPER_ON_MISTAKE=warn``: mistakes in recording are noted instead of raised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper_otel.errors import InvalidName, InvalidValue, WrongState
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.phases import PhaseScope
from esper_otel.record.recorder import Recorder
from esper_otel.record.spared_step import SparedStep
from esper_otel.record.values import UINT32_MAX, UINT64_MAX, read, whole
from esper_otel.record.work import Work, work_of
from esper_otel.session.telemetry import Telemetry, Wiring

_OF_A_STEP = ("epoch", "global_step", "samples", "tokens", "flops")


def telemetry_of(recorder: Recorder, wiring: Wiring) -> Telemetry:
    """Returns the interface of a session; one that spares mistakes if the recorder notes them."""
    mistakes = recorder.mistakes
    return Telemetry(recorder, wiring) if mistakes is None else SparedTelemetry(recorder, wiring, mistakes)


class SparedTelemetry(Telemetry):
    """A ``Telemetry`` that leaves out what is wrong in a call, records the rest, and notes each mistake.

    A step whose epoch is wrong gets that of the step before it. Calls that return something that the program needs,
    such as ``pull`` and ``load_state_dict``, raise as in ``Telemetry``.
    """

    def __init__(self, recorder: Recorder, wiring: Wiring, mistakes: Mistakes) -> None:
        super().__init__(recorder, wiring)
        self._mistakes = mistakes
        self._epoch = 0

    def step(self, *arguments: Any, **named: Any) -> SparedStep:
        """See ``Telemetry.step``."""
        numbers = self._numbers("step()", arguments, named)
        refusal = None
        try:
            self._check_open()
        except WrongState as error:
            refusal = error
        return SparedStep(self._recorder, self._mistakes, refusal, numbers)

    def record_step(self, values: Any = None, *arguments: Any, **named: Any) -> None:
        """See ``Telemetry.record_step``; wrong values are left out."""
        record = super().record_step
        try:
            record(values, *arguments, **named)
        except WrongState as error:
            self._mistakes.note(error)
            return
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            if not isinstance(values, Mapping):
                self._mistakes.note(error)
        else:
            self._epoch = named["epoch"]
            return
        given = values.items() if isinstance(values, Mapping) else ()
        good = {name: value for name, value in given if self._mistakes.spared(self._check, name, value)}
        global_step, epoch, work = self._numbers("record_step()", arguments, named)
        done = work._asdict() if isinstance(work, Work) else {"samples": work}
        self._mistakes.spared(record, good, epoch=epoch, global_step=global_step, **done)

    def _check(self, name: str, value: object) -> None:
        """Raises what recording the value would raise."""
        read(self._recorder.names.resolved({name: value}))

    def _numbers(
        self, call: str, arguments: tuple[object, ...], named: Mapping[str, Any]
    ) -> tuple[int | None, int, int | Work | None]:
        """Returns global step, epoch and work; notes what is wrong with them and with further arguments."""
        for name in named.keys() - {*_OF_A_STEP}:
            self._mistakes.note(InvalidValue(name, f"is not an argument of {call}; known: {', '.join(_OF_A_STEP)}"))
        if arguments:
            self._mistakes.note(InvalidValue(call, f"takes its arguments by name: {', '.join(_OF_A_STEP)}"))
        found: dict[str, int | None] = {}
        for name, highest in (("global_step", UINT64_MAX), ("epoch", UINT32_MAX)):
            given = named.get(name)
            try:
                found[name] = None if given is None and name != "epoch" else whole(name, given, highest)
            except InvalidValue as error:
                self._mistakes.note(error)
        epoch = found.get("epoch")
        self._epoch = self._epoch if epoch is None else epoch
        done: dict[str, Any] = {}
        for name in ("samples", "tokens", "flops"):
            one = {"samples": None, "tokens": None, "flops": None, name: named.get(name)}
            if self._mistakes.spared(work_of, **one):
                done[name] = one[name]
        return found.get("global_step"), self._epoch, work_of(*map(done.get, ("samples", "tokens", "flops")))

    def seeds(self, ids: Any = (), *arguments: Any, **columns: Any) -> None:
        """See ``Telemetry.seeds``; wrong columns are left out."""
        seeds = super().seeds
        try:
            seeds(ids, *arguments, **columns)
        except (InvalidName, WrongState) as error:
            self._mistakes.note(error)
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            if getattr(error, "name", "") in {"seed id", "seed ids"}:
                self._mistakes.note(error)
            else:
                self._mistakes.record_parts(error, lambda part: seeds(ids, **part), columns)

    def retire_seed(self, *arguments: Any, **named: Any) -> None:
        """See ``Telemetry.retire_seed``."""
        self._mistakes.spared(super().retire_seed, *arguments, **named)

    def validation(self, *arguments: Any, **results: Any) -> None:
        """See ``Telemetry.validation``; wrong results are left out."""
        validation = super().validation
        try:
            validation(*arguments, **results)
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            given = {name: value for name, value in results.items() if value is not None}
            self._mistakes.record_parts(error, lambda part: validation(**part), given)

    def phase(self, *arguments: Any, **named: Any) -> PhaseScope:
        """See ``Telemetry.phase``; with a wrong name nothing is timed."""
        try:
            return super().phase(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - see Mistakes.spared
            self._mistakes.note(error)
            return PhaseScope(None, "")

    def close(self, *arguments: Any, **named: Any) -> None:
        """See ``Telemetry.close``; wrong arguments are ignored."""
        close = super().close
        if not self._mistakes.spared(close, *arguments, **named):
            close()
