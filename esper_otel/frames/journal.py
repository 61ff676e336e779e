"""Journals: numbered entries of a session other than steps, such as phases, kept until they are delivered."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from esper_otel.native import threads

_MOST_WAITING = 10_000


class Numbered(Protocol):
    """What a journal keeps."""

    @property
    def number(self) -> int:
        """1, 2, ... within (attempt, rank), without holes."""

    @property
    def due_unix_ns(self) -> int:
        """It is sent after the steps before this time."""


EntryT = TypeVar("EntryT", bound=Numbered)
GivenT = TypeVar("GivenT")


class Journal(ABC, Generic[EntryT, GivenT]):
    """Entries of a session, until they are delivered. Only the newest are kept if very many wait.

    Threads: any.

    Args:
        start_unix_ns: when the session began.
        most: how many entries may wait.
        last: number of the newest entry of the session's past; 0 if it has none.

    Attributes:
        start_unix_ns: when the session began.
        added: called with new entries, on the thread that adds them; the lock is held.
        last: number of the newest entry; 0 before the first.
        dropped: how many entries were dropped before they were delivered.
    """

    def __init__(self, start_unix_ns: int = 0, most: int = _MOST_WAITING, last: int = 0) -> None:
        self.start_unix_ns: int = start_unix_ns
        self.added: Callable[[Sequence[EntryT]], None] | None = None
        self.last: int = last
        self.dropped: int = 0
        self._most = most
        self._lock = threads().RLock()
        self._given: deque[Sequence[GivenT]] = deque()
        self._is_adding = self._is_over = False
        self._waiting: deque[EntryT] = deque()
        self._taken = 0  # number of the newest entry that ``waiting`` has returned
        self._dropped_on_their_way: list[int] = []  # numbers of those that were dropped since it did

    def add_all(self, given: Sequence[GivenT]) -> None:
        """Adds entries. They are written to the journal's file in one call."""
        with self._lock:
            self._given.append(given)
            if self._is_adding:  # a signal handler, amid the call below on this thread, which then adds these, too
                return
            self._is_adding = True
            try:
                while self._given:
                    self._add(self._given.popleft())
            finally:
                self._is_adding = False

    def _add(self, given: Sequence[GivenT]) -> None:
        entries = []
        for each in given:
            entries.append(self._entry(self.last + 1, each))
            self.last += 1
        if self._is_over:
            self.dropped += len(entries)
            return
        self._waiting.extend(entries)
        while len(self._waiting) > self._most:
            number = self._waiting.popleft().number
            self.dropped += 1
            if number <= self._taken:
                self._dropped_on_their_way.append(number)
        if self.added is not None:
            self.added(entries)

    @abstractmethod
    def _entry(self, number: int, given: GivenT) -> EntryT:
        """Makes an entry."""

    def end(self) -> None:
        """Drops and counts the entries that are added from now on: nothing sends them or writes them to the disk."""
        with self._lock:
            self._is_over, self.added = True, None

    def waiting(self, until_unix_ns: int | None, most: int) -> list[EntryT]:
        """Returns the oldest entries that wait, up to the first that is due after ``until_unix_ns``; None: all."""
        found: list[EntryT] = []
        with self._lock:
            for entry in self._waiting:
                if len(found) == most or (until_unix_ns is not None and entry.due_unix_ns > until_unix_ns):
                    break
                found.append(entry)
            self._taken = found[-1].number if found else 0
            self._dropped_on_their_way.clear()
        return found

    def to_store(self) -> list[EntryT]:
        """Returns what a file of the journal must have, in the order of the numbers: the entries that wait."""
        with self._lock:
            return list(self._waiting)

    @property
    def count(self) -> int:
        """How many entries wait."""
        return len(self._waiting)

    def drop(self, number: int) -> int:
        """Drops the entries up to this number, and counts them; returns how many."""
        with self._lock:
            dropped = sum(entry.number <= number for entry in self._waiting)
            self.dropped += dropped
        self.delivered(number)
        return dropped

    def delivered(self, number: int) -> None:
        """Forgets the entries up to this number. Those dropped while they were sent do not count as dropped."""
        with self._lock:
            self.dropped -= sum(each <= number for each in self._dropped_on_their_way)
            self._dropped_on_their_way.clear()
            while self._waiting and self._waiting[0].number <= number:
                self._waiting.popleft()


def line_of(entry: object) -> bytes:
    """Returns an entry, which is a tuple, as a line of JSON, for files."""
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def entries_in(content: bytes, checked: Callable[[object], EntryT], after: int) -> Iterator[EntryT]:
    """Yields the entries of a file with rising numbers above ``after``; a line that is not an entry is skipped.

    Args:
        content: the file.
        checked: makes an entry of the content of a line; raises ValueError or TypeError if that is not one.
        after: the number.
    """
    for line in content.splitlines():
        try:
            entry = checked(json.loads(line))
        except (ValueError, TypeError, OverflowError, RecursionError):
            continue
        if entry.number > after:
            after = entry.number
            yield entry
