"""Works around the SDK's cardinality limit: assigns each seed id to one of several instruments of the same name.

An SDK keeps every attribute set that an instrument ever reported, even after the seed is retired, and merges those
above its limit into one overflow point. The limit applies to each instrument, so further seeds are reported by further
instruments of the same name, each group in a scope of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from opentelemetry.metrics import MeterProvider

# Number of seed ids that can be distinguished at a provider with the SDK's default limit or a higher one.
SEED_IDS = 100_000
_DEFAULT = 2_000


def limit_of(provider: MeterProvider | None, instruments: Iterable[object]) -> int:
    """Returns the lowest limit on attribute sets that any reader of the provider has for any of the instruments.

    The SDK has no public way to read these limits. If they are not where current versions of the SDK store them, the
    default of the specification is returned.
    """
    try:
        return min((_lowest(provider, instrument) for instrument in instruments), default=_DEFAULT)
    except Exception:  # noqa: BLE001 - another version of the SDK, or another implementation
        return _DEFAULT


def _lowest(provider: Any, instrument: Any) -> int:
    """Returns the lowest limit for one instrument: that of a view, or of a reader if no view sets one."""
    views = [view for view in provider._sdk_config.views if view._match(instrument)]  # noqa: SLF001
    of_views = [view._aggregation_cardinality_limit for view in views] or [None]  # noqa: SLF001
    of_readers = [
        reader._instrument_class_cardinality_limit.get(type(instrument), _DEFAULT)  # noqa: SLF001
        for reader in provider._metric_readers  # noqa: SLF001
    ]
    limits = [limit or of_reader for limit in of_views for of_reader in of_readers or [_DEFAULT]]
    return int(min(limits))


class SeedParts:
    """Assigns each seed permanently to a part, that is, to one of the instruments of the same name.

    A limit below the default was set on purpose, so no further instruments are added then.

    Threads: one collect at a time.

    Args:
        limit: how many attribute sets an instrument may have.

    Attributes:
        parts: how many instruments of one name there may be.
        size: how many seed ids all parts can distinguish together.
        used: how many seed ids have been assigned to a part.
    """

    def __init__(self, limit: int) -> None:
        # The SDK may reserve one attribute set of the limit for the overflow point.
        self._in_each = max(limit - 1, 1)
        self.parts: int = -(-SEED_IDS // self._in_each) if limit >= _DEFAULT else 1
        self.size: int = self._in_each * self.parts
        self._known: dict[Hashable, int] = {}

    @property
    def used(self) -> int:
        """How many seed ids have been assigned to a part."""
        return len(self._known)

    def part_of(self, seed: Hashable) -> int | None:
        """Returns the part that reports a seed, or None when all parts are full."""
        part = self._known.get(seed)
        if part is None and len(self._known) < self.size:
            part = self._known[seed] = len(self._known) // self._in_each
        return part
