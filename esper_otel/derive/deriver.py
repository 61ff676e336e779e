"""The deriver, which runs the processors on each step, in order, and keeps their states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from esper_otel.derive.dynamics import Dynamics
from esper_otel.derive.processor import Processor
from esper_otel.errors import ConfigurationError, InvalidCatalogue, InvalidValue, UnknownMetric
from esper_otel.schema import Metric

# Takes a state, the loss and the gradient norm; returns the next state, and names and numbers of what is derived.
Trends: TypeAlias = Callable[[Any, float, float], tuple[Any, tuple[str, ...], tuple[float, ...]]]


_NAN = float("nan")


def _name(entry: str | Metric) -> str:
    return entry if isinstance(entry, str) else entry.name


def checked_processors(processors: Sequence[Processor], known: Mapping[str, Metric]) -> None:
    """Raises an exception for processors with missing methods, unknown names, or the same metric given twice."""
    givers: dict[str, Processor] = {}
    for processor in processors:
        if not isinstance(processor, Processor):
            raise InvalidValue(
                "processors",
                f"{processor!r} is not a processor: it lacks one of needs, gives, initial, advance, readings",
            )
        for entry in (*processor.needs, *processor.gives):
            if _name(entry) not in known:
                raise UnknownMetric(_name(entry), known)
        for name in map(_name, processor.gives):
            if name in givers:
                raise InvalidCatalogue([f"{name} is given by {givers[name]!r} and by {processor!r}"])
            givers[name] = processor


class _GuardedProcessor:
    """Wraps a user's processor so that exceptions in its readings do not affect the step."""

    def __init__(self, processor: Processor, fault: Callable[[str, Exception], None]) -> None:
        self.needs = tuple(map(_name, processor.needs))
        self.gives = tuple(map(_name, processor.gives))
        self.initial = processor.initial
        self.advance = processor.advance
        self.name = type(processor).__name__
        self._readings = processor.readings
        self._fault = fault

    def readings(self, state: Any) -> dict[str, float]:
        """Returns the readings that the processor declared in ``gives``; an empty dict if it raises."""
        try:
            readings = self._readings(state)
            return {name: float(readings[name]) for name in self.gives if readings.get(name) is not None}
        except Exception as error:  # noqa: BLE001 - a user's processor must not stop training
            self._fault(f"readings of {self.name}", error)
            return {}


class Deriver:
    """Advances every processor once per published step. Not thread-safe: the publisher calls it in step order.

    A processor that raises keeps its old state and has no readings in that step, and ``fault`` is called.

    Attributes:
        step: does what ``commit`` does, given the only state, the loss and the gradient norm; see ``Dynamics.step``.
            None if these are not enough: a user's processors may read any value, and the readings of the probes.
        states: the processors' states; never changed in place, so a caller can go back to earlier ones.
    """

    def __init__(self, processors: Sequence[Processor], fault: Callable[[str, Exception], None]) -> None:
        self._processors: tuple[Processor, ...] = tuple(
            processor if type(processor) is Dynamics else _GuardedProcessor(processor, fault)
            for processor in processors
        )
        # The built-in processor comes first. It needs no guard: numbers never make it raise.
        first = processors[0] if processors else None
        self._trends: Trends | None = first.step if type(first) is Dynamics else None
        others = self._processors if self._trends is None else self._processors[1:]
        self._advances = tuple((processor, processor.advance) for processor in others)
        self.states: tuple[Any, ...] = tuple(processor.initial() for processor in self._processors)
        self.step: Trends | None = None if others else self._trends  # most runs have no other processor
        self._fault = fault
        given_before: set[str] = set()
        self._chained = False
        for processor in self._processors:
            self._chained |= not given_before.isdisjoint(map(_name, processor.needs))
            given_before.update(map(_name, processor.gives))

    def commit(self, given: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Advances to the next step and returns names and numbers of the derived metrics."""
        self.states, names, numbers = self._advance(given)
        return names, numbers

    def peek(self, given: Mapping[str, float]) -> Mapping[str, float]:
        """Returns what ``commit`` would, by name, without advancing."""
        _, names, numbers = self._advance(given)
        return dict(zip(names, numbers, strict=True))

    def _advance(self, given: Mapping[str, float]) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[float, ...]]:
        """Returns the next states, and names and numbers of the derived metrics, each of which one processor gives."""
        states = [*self.states]
        names: tuple[str, ...] = ()
        numbers: tuple[float, ...] = ()
        if self._trends is not None:
            loss, norm = given.get("loss", _NAN), given.get("gradient_norm", _NAN)
            states[0], names, numbers = self._trends(states[0], loss, norm)
            if self._chained:  # values given by the caller take precedence
                given = {**dict(zip(names, numbers, strict=True)), **given}
        place = len(states) - len(self._advances)
        for processor, advance in self._advances:
            before = states[place]
            try:
                states[place] = after = advance(before, given)
            except Exception as error:  # noqa: BLE001 - a user's processor must not stop training
                self._fault(f"processor {getattr(processor, 'name', type(processor).__name__)}", error)
                after = before
            place += 1
            if after is before:
                continue
            readings = processor.readings(after)
            names, numbers = names + tuple(readings), numbers + tuple(readings.values())
            if self._chained:
                given = {**readings, **given}
        return tuple(states), names, numbers

    def _keys(self) -> list[str]:
        # The key is the list of metrics given: it does not depend on the processor's class or its place in the list.
        return ["+".join(map(_name, processor.gives)) for processor in self._processors]

    def state_dict(self) -> dict[str, Any]:
        """Returns the states, keyed by each processor's metrics: plain values for ``torch.load(weights_only=True)``."""
        return dict(zip(self._keys(), self.states, strict=True))

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restores the states from ``state_dict()``. A processor without a state there starts afresh.

        Raises:
            ConfigurationError: a state is not a tuple, list or plain value.
        """
        if not isinstance(states, Mapping):
            raise ConfigurationError(f"derive state in the checkpoint is a {type(states).__name__}, not a mapping")
        self.states = tuple(
            _frozen(states[key]) if key in states else processor.initial()
            for key, processor in zip(self._keys(), self._processors, strict=True)
        )


def _frozen(state: Any) -> Any:
    """Converts lists to tuples: a checkpoint that was stored as JSON has lists."""
    return tuple(map(_frozen, state)) if isinstance(state, list | tuple) else state
