"""Stored: what both stores give, whoever asks: entries in order of release, with a place for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from esper_otel.errors import EsperOtelError, StaleCursor
from esper_otel.gateway.items import Item, Origin, Place

NOTHING_ENDED: Mapping[Origin, str] = {}
NO_TENANTS: Mapping[str, str] = {}

# About what a run, each of its writers and each of its ranks take besides their frames.
RUN_BYTES, WRITER_BYTES, RANK_BYTES = 4_096, 1_024, 256


class StoreFull(EsperOtelError):
    """Nothing can be written now; nothing that was there is lost."""


class StoredFrame(NamedTuple):
    """One released frame and its place.

    Attributes:
        position: 1, 2, ... within the run, in order of release.
        number: 1, 2, ... within the run's rank.
        item: the frame.
        loss_before: the loss of the packet before, of the same writer; None when there is none.
    """

    position: int
    number: int
    item: Item
    loss_before: float | None


class StoredPage(NamedTuple):
    """What came after a cursor.

    Attributes:
        entries: oldest first.
        cursor: where to go on.
        gap: entries that were dropped before the first one.
    """

    entries: Sequence[StoredFrame]
    cursor: str
    gap: int


class KeptRequest(NamedTuple):
    """A request's body that is kept until all of its frames are stored as items.

    Attributes:
        number: 1, 2, ... in the order in which they came, over all lives of the store.
        body: the request.
        is_json: whether it is JSON.
        received_unix_ns: when it came.
        tenant: who sent it.
    """

    number: int
    body: bytes
    is_json: bool
    received_unix_ns: int
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much is stored; the oldest steps are dropped first, and counted.

    When all runs together take too much, the tenant that takes most gives up steps of its largest run, or its run that
    was silent for longest. Whoever takes less than an equal share loses nothing to the others.

    Attributes:
        steps: of one run.
        run_bytes: about how much one run takes.
        all_bytes: about how much all runs take.
        idle_s: a run to which nothing was added for so long is dropped; only while a gateway runs does time count.
        writers: processes of which something is stored, over all runs.
    """

    steps: int = 1_000_000
    run_bytes: int = 256 * 1024 * 1024
    all_bytes: int = 1024 * 1024 * 1024
    idle_s: float = 24 * 3600.0
    writers: int = 20_000


class Store(Protocol):
    """Where released frames are kept. Threads: one at a time.

    Attributes:
        dropped: entries that fell out.
        damaged: what was found damaged and taken out, by kind.
    """

    dropped: int
    damaged: Counter[str]

    @property
    def size(self) -> int:
        """About how many bytes the entries take."""

    def add(
        self,
        items: Iterable[Item],
        *,
        ended: Mapping[Origin, str] = NOTHING_ENDED,
        places: Iterable[Place] = (),
        tenants: Mapping[str, str] = NO_TENANTS,
        kept: KeptRequest | None = None,
        first_kept: int | None = None,
    ) -> None:
        """Stores released frames, and the body of a request of which something waits, all or nothing.

        Args:
            items: frames in order of release.
            ended: outcomes of runs that have ended.
            places: where the writers of these frames stand.
            tenants: by run, whose share of the room it takes; a run keeps the first that it was stored with.
            kept: a body to keep.
            first_kept: the number of the first body of which something waits; None when nothing waits.

        Raises:
            StoreFull: nothing was stored.
        """

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Entries after a cursor; from the oldest one when it is empty.

        Raises:
            UnknownRun: nothing of the run is stored.
            StaleCursor: the cursor is of another life, or of other ranks.
        """

    def holds(self, run_id: str) -> bool:
        """Whether a step of the run is stored: only then are its outcomes."""

    def counts(self) -> dict[Origin, int]:
        """How many entries each writer has."""

    def outcomes(self) -> dict[Origin, str]:
        """How the runs ended of which something is stored."""

    def tenant(self, run_id: str) -> str:
        """Whose share of the room a run takes; empty when nothing of it is stored."""

    def use(self) -> Mapping[str, tuple[float, float]]:
        """How much of each bound is used, and the bound."""

    def expire(self) -> list[str]:
        """Drops runs that were idle for long; returns their names."""

    def close(self) -> None:
        """Ends the use of files."""


def cursor_text(life: str, rank: int | None, place: int) -> str:
    """A cursor: whose life, which rank (empty: all), and the last place that was given."""
    return f"{life}:{'' if rank is None else rank}:{place}"


def cursor_place(cursor: str, life: str, rank: int | None, newest: int) -> int:
    """The place that a cursor names.

    Raises:
        StaleCursor: it is of another life, or of other ranks, or from the future.
    """
    if not cursor:
        return 0
    parts = cursor.split(":")
    if len(parts) != 3 or not parts[2].isdecimal() or len(parts[2]) > 18:
        raise StaleCursor(f"cursor {cursor[:80]!r} is none of this gateway; pull without one to begin")
    if parts[1] != ("" if rank is None else str(rank)):
        whose = f"rank {parts[1]}" if parts[1] else "all ranks"
        raise StaleCursor(f"the cursor is of pulls of {whose}; give the same rank, or pull without a cursor")
    if parts[0] != life or int(parts[2]) > newest:
        raise StaleCursor(
            "the cursor is of another life of this run's store: what was not pulled then is gone; "
            "pull without a cursor to begin with the oldest step stored"
        )
    return int(parts[2])
