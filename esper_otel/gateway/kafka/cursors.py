"""Cursors: where a puller stands in the partitions of a run. Every server of the tier understands them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from esper_otel.errors import StaleCursor

_STAND = r"\d{1,6}\.\d{1,19}\.\d{1,4}\.\d{1,19}"
_FORM = re.compile(rf"k1-([0-9A-Za-z]{{1,12}}):(\d{{0,10}}|\d{{1,4}}/\d{{1,4}}):((?:{_STAND}(?:,|$))*)")
_MOST = 200_000


class Stand(NamedTuple):
    """Where a puller stands in one partition.

    Attributes:
        offset: of the record to read next.
        taken: how many frames of that record it has.
        number: the number of the last frame it has, among those of the run or of the rank in this partition.
    """

    offset: int
    taken: int
    number: int


class PullSelection(NamedTuple):
    """Which steps of a run a puller wants.

    Attributes:
        rank: of this rank only; None for all.
        shard: only partitions whose number has this remainder; with ``shards``.
        shards: the divisor; 0 for all partitions.
    """

    rank: int | None = None
    shard: int = 0
    shards: int = 0

    def has(self, partition: int) -> bool:
        """Whether steps in a partition are wanted."""
        return not self.shards or partition % self.shards == self.shard

    @property
    def text(self) -> str:
        """What a cursor says of it."""
        if self.shards:
            return f"{self.shard}/{self.shards}"
        return "" if self.rank is None else str(self.rank)


def cursor_text(generation: str, wanted: PullSelection, stands: Mapping[int, Stand]) -> str:
    """Formats a cursor."""
    places = ",".join(f"{partition}.{'.'.join(map(str, stands[partition]))}" for partition in sorted(stands))
    return f"k1-{generation}:{wanted.text}:{places}"


def cursor_stands(cursor: str, generation: str, wanted: PullSelection) -> dict[int, Stand]:
    """Returns where a cursor stands, by partition; nothing for an empty one.

    Raises:
        StaleCursor: it was not issued by servers of these topics, or for other ranks.
    """
    if not cursor:
        return {}
    found = _FORM.fullmatch(cursor) if len(cursor) <= _MOST else None
    if found is None:
        raise StaleCursor(f"cursor {cursor[:80]!r} was not issued by this gateway; pull without one to begin")
    if found[2] != wanted.text:
        raise StaleCursor(
            f"this cursor came from pulling {_whose(found[2])}; give the same rank and shard, or pull without a cursor"
        )
    if found[1] != generation:
        raise StaleCursor(
            "the cursor is from earlier topics that no longer exist: steps not pulled from them are gone; "
            "pull without a cursor to begin with the oldest step stored"
        )
    stands = {}
    for place in filter(None, found[3].split(",")):
        partition, *stand = map(int, place.split("."))
        stands[partition] = Stand(*stand)
    return stands


def _whose(text: str) -> str:
    if "/" in text:
        return f"shard {text}"
    return f"rank {text}" if text else "all ranks"
