"""Signatures: the names of a step's recorded values, with what follows from these and need not be found out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from operator import itemgetter

from esper_otel.frames.layout import Layout

NO_LAYOUT = Layout((), (), (), ())

# A script that makes names up in every step has others each time.
_MOST_KNOWN = 4_000


class Signature:
    """The names of the values recorded in a step, in their order. Compared by identity; see ``Signatures``.

    Attributes:
        names: the names.
        count: how many there are.
        loss: the place of the loss; -1 if there is none.
        norm: the place of the gradient norm; -1 if there is none.
        numbers_of: returns the values of a dict with these names, in this order; raises KeyError if it lacks one.
        kept: the signature without names that are left out; None if there are none.
        kept_of: returns the numbers without those of these names.
        layout: that of the last step with this signature.
        layouts: the layouts among which it was found.
    """

    __slots__ = ("count", "kept", "kept_of", "layout", "layouts", "loss", "names", "norm", "numbers_of")

    def __init__(self, names: tuple[str, ...], kept: Signature | None = None) -> None:
        self.names: tuple[str, ...] = names
        self.count: int = len(names)
        self.loss: int = names.index("loss") if "loss" in names else -1
        self.norm: int = names.index("gradient_norm") if "gradient_norm" in names else -1
        self.numbers_of: Callable[[Mapping[str, float]], tuple[float, ...]] = (
            itemgetter(*names) if len(names) > 1 else lambda values: tuple(values[name] for name in names)
        )
        self.layout: Layout = NO_LAYOUT
        self.layouts: object = None
        self.kept: Signature | None = kept
        places = [] if kept is None else [names.index(name) for name in kept.names]
        self.kept_of: Callable[[tuple[float, ...]], tuple[float, ...]] = (
            itemgetter(*places) if len(places) > 1 else lambda numbers: tuple(numbers[place] for place in places)
        )

    def dict_of(self, numbers: tuple[float, ...]) -> dict[str, float]:
        """Returns the values by name."""
        return dict(zip(self.names, numbers, strict=True))


class Signatures:
    """Finds the signature of names; the same object as long as it is known. Threads: the publisher's.

    Args:
        left_out: names whose values are accepted and not kept.
    """

    def __init__(self, left_out: Set[str] = frozenset()) -> None:
        self._left_out = left_out
        self._known: dict[tuple[str, ...], Signature] = {}
        self._last = self.of(())

    def of(self, names: tuple[str, ...]) -> Signature:
        """Returns the signature of these names."""
        signature = self._known.get(names)
        if signature is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known = {}
            kept = tuple([name for name in names if name not in self._left_out])
            self._known[names] = signature = Signature(names, self.of(kept) if len(kept) < len(names) else None)
        return signature

    def read(self, values: Mapping[str, float]) -> tuple[Signature, tuple[float, ...]]:
        """Returns the names of a step's values, in any order, and the values in this order."""
        last = self._last
        if values.__class__ is dict and len(values) == last.count:  # most steps have the same names as the one before
            try:
                numbers = last.numbers_of(values)
            except KeyError:
                pass
            else:
                return last, numbers
        self._last = last = self.of(tuple(values))
        return last, tuple(values.values())
