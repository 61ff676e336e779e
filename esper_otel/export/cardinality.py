"""Room: how many seeds the instruments of a MeterProvider can tell apart, and which of them shows each.

An SDK keeps every attribute set that an instrument ever had, live or not, and puts those above its limit into one
point without a name. The limit is one of each instrument; so further seeds are shown by further instruments of the same
name, in a scope of their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from opentelemetry.metrics import MeterProvider

# As many ids as this are told apart at any provider that keeps to the SDK's default, or has a higher limit.
SEED_IDS = 100_000
_DEFAULT = 2_000


def limit_of(provider: MeterProvider | None, instruments: Iterable[object]) -> int:
    """How many attribute sets each of the instruments may have at the provider's readers; the lowest counts.

    The SDK has no way to ask: what is not where its present versions have it counts as the specification's default.
    """
    try:
        return min((_lowest(provider, instrument) for instrument in instruments), default=_DEFAULT)
    except Exception:  # noqa: BLE001 - another version of the SDK, or another maker's
        return _DEFAULT


def _lowest(provider: Any, instrument: Any) -> int:
    """The lowest limit of one instrument: a view's, else a reader's."""
    views = [view for view in provider._sdk_config.views if view._match(instrument)]  # noqa: SLF001
    of_views = [view._aggregation_cardinality_limit for view in views] or [None]  # noqa: SLF001
    of_readers = [
        reader._instrument_class_cardinality_limit.get(type(instrument), _DEFAULT)  # noqa: SLF001
        for reader in provider._metric_readers  # noqa: SLF001
    ]
    limits = [limit or of_reader for limit in of_views for of_reader in of_readers or [_DEFAULT]]
    return int(min(limits))


class SeedParts:
    """Gives each seed the number of the instruments that show it, for good. Threads: one collect at a time.

    A limit below the default is somebody's wish: there are no further instruments then.

    Args:
        limit: attribute sets that an instrument may have.

    Attributes:
        parts: how many instruments of one name there may be.
        size: how many ids they can tell apart together.
        used: how many have been given away.
    """

    def __init__(self, limit: int) -> None:
        # Of what is allowed one may be meant for the point of those above it.
        self._in_each = max(limit - 1, 1)
        self.parts = -(-SEED_IDS // self._in_each) if limit >= _DEFAULT else 1
        self.size = self._in_each * self.parts
        self._known: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        """How many have been given away."""
        return len(self._known)

    def part_of(self, seed: Hashable) -> int | None:
        """The part that shows a seed; None when there is no room for it."""
        part = self._known.get(seed)
        if part is None and len(self._known) < self.size:
            part = self._known[seed] = len(self._known) // self._in_each
        return part
