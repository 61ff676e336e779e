"""Entries: frames read from partitions, in the order in which pullers get them, as a store of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

from esper_otel.gateway.items import Origin
from esper_otel.gateway.kafka.cursors import PullSelection, Stand, cursor_text
from esper_otel.gateway.kafka.topic_records import FrameBatch, NewerForm, UnknownForm, block_of, frames_of, origin_of
from esper_otel.gateway.store.base import StoredFrame, StoredPage

_RECORD_BYTES, _FRAME_BYTES = 500, 900
_MOST_INDEX = 1024  # more than a record has frames


class Record:
    """A record of the topic of frames. It is decoded when somebody wants it, once.

    Attributes:
        partition: its partition.
        offset: its offset.
        time_ms: when the broker received it.
        origin: the writer; None for a record that is none of ours.
        size: about how much memory it takes when it has been decoded, in bytes.
    """

    __slots__ = ("__dict__", "_key", "_value", "offset", "origin", "partition", "size", "time_ms")

    def __init__(self, partition: int, offset: int, time_ms: int, key: bytes, value: bytes) -> None:
        self.partition: int = partition
        self.offset: int = offset
        self.time_ms: int = time_ms
        self._key, self._value = key, value
        self.size: int = 2 * len(value) + _RECORD_BYTES + _FRAME_BYTES * frames_of(value)
        self.origin: Origin | None = None
        with suppress(UnknownForm):
            self.origin = origin_of(key)

    @cached_property
    def block(self) -> FrameBatch | None:
        """Its frames; None if nobody can read them.

        Raises:
            NewerForm: a newer version has written them.
        """
        try:
            return block_of(self._key, self._value)
        except NewerForm:
            raise
        except UnknownForm:
            return None

    def is_wanted(self, run_id: str, rank: int | None) -> bool:
        """Whether it has frames of a run, or of a rank of it."""
        origin = self.origin
        return origin is not None and origin.run_id == run_id and rank in (None, origin.rank)


class Entry(NamedTuple):
    """A frame to be pulled.

    Attributes:
        frame: the frame as stores have it.
        partition: its partition.
        after: where a puller stands that has it.
        gap: how many frames before it are gone.
    """

    frame: StoredFrame
    partition: int
    after: Stand
    gap: int


def entries_of(record: Record, stand: Stand, rank: int | None) -> list[Entry]:
    """Returns the frames of a record that a puller does not have yet.

    Args:
        record: the record; it is wanted.
        stand: where the puller stands in its partition.
        rank: the rank that is pulled; None for all.

    Raises:
        NewerForm: a newer version has written them.
    """
    block = record.block
    if block is None:
        return []
    found: list[Entry] = []
    first = block.of_run if rank is None else block.of_rank
    last = len(block.frames) - 1
    index = stand.taken if stand.offset == record.offset else 0
    number = stand.number
    if first == 1 and not index:
        number = 0  # its writers had been silent for so long that they were forgotten, and are counted anew
    for place in range(index, last + 1):
        item, loss_before = block.frames[place]
        mine = first + place
        if mine <= number:
            continue
        after = Stand(record.offset, place + 1, mine) if place < last else Stand(record.offset + 1, 0, mine)
        position = (record.offset * _MOST_INDEX + place) * 2**17 + record.partition  # no other frame has it
        frame = StoredFrame(position, block.of_rank + place, item, loss_before)
        found.append(Entry(frame, record.partition, after, mine - number - 1))
        number = mine
    return found


class FetchedEntries:
    """The entries of one request, read as from a store: see ``pages.page``.

    Args:
        generation: of the topics.
        wanted: which steps are wanted.
        stands: where the puller stood.
        entries: what comes after that, in order.
        final: where the puller stands after the last of them, in each partition.
    """

    def __init__(
        self,
        generation: str,
        wanted: PullSelection,
        stands: Mapping[int, Stand],
        entries: Sequence[Entry],
        final: Mapping[int, Stand],
    ) -> None:
        self._generation, self._wanted = generation, wanted
        self._entries, self._final = entries, final
        self._stands = dict(stands)
        self._places: dict[str, int] = {}
        self._at: tuple[int, dict[int, Stand]] = (0, dict(stands))
        self.first: str = cursor_text(generation, wanted, stands)

    def __len__(self) -> int:
        return len(self._entries)

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:  # noqa: ARG002 - they are fixed
        """Returns the entries after a cursor, up to the next gap; the first call may have any cursor."""
        start = self._places.get(cursor, 0)
        stop = min(start + most, len(self._entries))
        gap = self._entries[start].gap if start < stop else 0
        stop = next((place for place in range(start + 1, stop) if self._entries[place].gap), stop)
        text = self._text(stop)
        self._places[text] = stop
        return StoredPage([entry.frame for entry in self._entries[start:stop]], text, gap)

    def _text(self, stop: int) -> str:
        if stop == len(self._entries):
            return cursor_text(self._generation, self._wanted, self._final)
        at, stands = self._at
        if stop < at:
            at, stands = 0, dict(self._stands)
        for entry in self._entries[at:stop]:
            stands[entry.partition] = entry.after
        self._at = (stop, stands)
        return cursor_text(self._generation, self._wanted, stands)
