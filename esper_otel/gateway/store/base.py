"""The interface of both stores: entries in order of release, each with its position, read through cursors."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from esper_otel.errors import EsperOtelError, StaleCursor
from esper_otel.gateway.items import Item, Origin, Place

_NOTHING: Mapping[Any, str] = MappingProxyType({})


class StoreFull(EsperOtelError):
    """Raised when nothing can be written at present. Nothing that was stored is lost."""


# How many runs ``expire`` drops at once.
EXPIRED_AT_ONCE = 100


class StoredFrame(NamedTuple):
    """One released frame and its position.

    Attributes:
        position: 1, 2, ... within the run, in order of release.
        number: 1, 2, ... within the run's rank.
        item: the frame.
        loss_before: the loss in the previous packet from the same writer; None when there is none.
    """

    position: int
    number: int
    item: Item
    loss_before: float | None


class StoredPage(NamedTuple):
    """The entries after a cursor.

    Attributes:
        entries: the entries, oldest first.
        cursor: the cursor for the next page.
        gap: how many entries before the first one were dropped.
    """

    entries: Sequence[StoredFrame]
    cursor: str
    gap: int


class KeptRequest(NamedTuple):
    """A request's body, kept until all of its frames are stored as items.

    Attributes:
        number: 1, 2, ... in order of arrival; it continues over restarts.
        body: the request.
        is_json: whether the body is JSON.
        received_unix_ns: when it was received.
        tenant: the tenant that sent it.
    """

    number: int
    body: bytes
    is_json: bool
    received_unix_ns: int
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much is stored. The oldest steps are dropped first, and counted.

    When all runs together exceed a limit, the tenant that uses the most loses steps of its largest run, or the run
    that has sent nothing for longest. A tenant that uses less than an equal share loses nothing to other tenants.

    Attributes:
        steps: steps kept per run.
        run_bytes: approximate size limit of one run.
        all_bytes: approximate size limit of all runs together.
        idle_s: a run that received nothing for this long is dropped; time counts only while a gateway runs.
        writers: limit of writers (sending processes) with stored frames, over all runs.
    """

    steps: int = 1_000_000
    run_bytes: int = 256 * 1024 * 1024
    all_bytes: int = 1024 * 1024 * 1024
    idle_s: float = 24 * 3600.0
    writers: int = 20_000


class NewData(NamedTuple):
    """What is stored together, all or nothing: the arguments of ``Store.add``."""

    items: list[Item]
    ended: Mapping[Origin, str]
    places: list[Place]
    tenants: Mapping[str, str]
    kept: KeptRequest | None
    first_kept: int | None


class Store(ABC):
    """A store of released frames. Threads: one at a time.

    The answers given here are those of a store that has no limits and knows nothing but frames.

    Attributes:
        dropped: how many entries were dropped.
        damaged: how many damaged things were found and removed, by kind.
    """

    def __init__(self) -> None:
        self.dropped: int = 0
        self.damaged: Counter[str] = Counter()

    def _note_dropped(self, count: int) -> None:
        self.dropped += count

    @property
    @abstractmethod
    def size(self) -> int:
        """Approximate size of the entries in bytes."""

    def add(
        self,
        items: Iterable[Item],
        *,
        ended: Mapping[Origin, str] = _NOTHING,
        places: Iterable[Place] = (),
        tenants: Mapping[str, str] = _NOTHING,
        kept: KeptRequest | None = None,
        first_kept: int | None = None,
    ) -> None:
        """Stores released frames and the body of a request with frames still to be released, all or nothing.

        Args:
            items: frames in order of release.
            ended: outcomes of runs that have ended.
            places: the positions that the writers of these frames have reached.
            tenants: by run, the tenant whose share it uses; a run keeps the tenant it was first stored with.
            kept: a body to keep.
            first_kept: the number of the oldest body that is still needed; None when none is.

        Raises:
            StoreFull: nothing was stored.
        """
        self._add(NewData([*items], ended, [*places], tenants, kept, first_kept))

    @abstractmethod
    def _add(self, new: NewData) -> None:
        """Stores what ``add`` was given."""

    @abstractmethod
    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Returns the entries after a cursor; an empty cursor starts at the oldest entry.

        Raises:
            UnknownRun: nothing of the run is stored.
            StaleCursor: the cursor is from an earlier store of the run, or was issued for other ranks.
        """

    @abstractmethod
    def last_number(self, run_id: str, rank: int) -> int:
        """Returns the number of the newest entry of a rank; 0 if there is none."""

    @abstractmethod
    def holds(self, run_id: str) -> bool:
        """Whether a step of the run is stored. Outcomes are stored only for such runs."""

    @abstractmethod
    def run_ids(self) -> list[str]:
        """Returns the ids of the stored runs."""

    def counts(self, run_id: str | None = None) -> dict[Origin, int]:  # noqa: ARG002
        """Returns how many entries each writer has: of one run, or of all."""
        return {}

    def outcomes(self, run_id: str | None = None) -> dict[Origin, str]:  # noqa: ARG002
        """Returns how the stored runs ended: one, or all."""
        return {}

    def recalled(self, origin: Origin) -> tuple[list[tuple[Item, bool]], list[Place]]:  # noqa: ARG002
        """Returns what an assembler needs of a writer that it has forgotten; nothing if no frame of it is stored.

        Returns:
            Its newest frames, oldest first, each in its newest revision and with a flag: whether it is the first frame
            of the writer that was ever stored. The position of the writer, if it is stored.
        """
        return [], []

    def tenant(self, run_id: str) -> str:  # noqa: ARG002
        """Returns the tenant whose share a run uses; empty when nothing of the run is stored."""
        return ""

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns, for each limit by name, how much of it is used, and the limit."""
        return {}

    def age_s(self) -> float:
        """Returns a time in seconds that passes only while a gateway runs on this store, and never jumps."""
        return time.monotonic()

    def expire(self) -> list[str]:
        """Drops runs that were idle for longer than ``idle_s``, at most ``EXPIRED_AT_ONCE``; returns their names."""
        return []

    def close(self) -> None:  # noqa: B027 - only a store in files has something to close
        """Closes files."""


def cursor_text(life: str, rank: int | None, place: int) -> str:
    """Formats a cursor: the id of the run's store, the rank (empty for all), and the last position returned."""
    return f"{life}:{'' if rank is None else rank}:{place}"


def cursor_place(cursor: str, life: str, rank: int | None, newest: int, what: str = "steps") -> int:
    """Returns the position in a cursor.

    Args:
        cursor: the cursor.
        life: the id of the run's store.
        rank: the rank that is asked for; None for all.
        newest: the position of the newest entry.
        what: what the entries are, for messages.

    Raises:
        StaleCursor: it is from an earlier store of the run, was issued for other ranks, or is beyond the newest entry.
    """
    if not cursor:
        return 0
    parts = cursor.split(":")
    if len(parts) != 3 or not parts[2].isdecimal() or len(parts[2]) > 18:
        raise StaleCursor(f"cursor {cursor[:80]!r} was not issued by this gateway; pull without one to begin")
    if parts[1] != ("" if rank is None else str(rank)):
        whose = f"rank {parts[1]}" if parts[1] else "all ranks"
        raise StaleCursor(f"this cursor came from pulling {whose}; give the same rank, or pull without a cursor")
    if parts[0] != life or int(parts[2]) > newest:
        raise StaleCursor(
            "the cursor is from an earlier store of this run that no longer exists: "
            f"{what} not pulled from it are gone; pull without a cursor to begin with the oldest of the {what} stored"
        )
    return int(parts[2])
