"""Position: where a puller of several gateways stands, as one cursor."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from bisect import bisect_right
from typing import Any, NamedTuple, Self, TypeAlias

from esper_otel.errors import StaleCursor

# The least step that a sender did not state; see pull.proto.
GUESSED_STEP = 2**63
_MARK = "m1:"
_MOST_BYTES = 16 * 1024 * 1024
# Ranges of numbers that a puller has of one writer. Beyond it the oldest two become one: what is missing between them
# is no longer taken if it comes.
_MOST_RANGES = 100

# Attempt, rank and name of a writer.
Writer: TypeAlias = tuple[int, int, str]


class NumberSet:
    """The numbers of one writer's steps that a puller has.

    Attributes:
        ranges: the first and the last number of each range, in order.
    """

    def __init__(self, ranges: list[list[int]] | None = None) -> None:
        self.ranges: list[list[int]] = ranges or []

    @property
    def last(self) -> int:
        """The highest number; 0 if there is none."""
        return self.ranges[-1][1] if self.ranges else 0

    def __contains__(self, number: int) -> bool:
        place = bisect_right(self.ranges, number, key=lambda each: each[0]) - 1
        return place >= 0 and number <= self.ranges[place][1]

    def add(self, number: int) -> None:
        """Adds a number that is not in the set."""
        place = bisect_right(self.ranges, number, key=lambda each: each[0])
        before = self.ranges[place - 1] if place and self.ranges[place - 1][1] == number - 1 else None
        after = self.ranges[place] if place < len(self.ranges) and self.ranges[place][0] == number + 1 else None
        if before is not None:
            before[1] = number if after is None else after[1]
            if after is not None:
                del self.ranges[place]
        elif after is not None:
            after[0] = number
        else:
            self.ranges.insert(place, [number, number])
        if len(self.ranges) > _MOST_RANGES:
            self.ranges[:2] = [[self.ranges[0][0], self.ranges[1][1]]]


class Position:
    """Where a puller stands: a cursor for each gateway, and which steps of each writer it has.

    Attributes:
        rank: the rank that is pulled; None for all.
        cursors: by the gateway's address; empty to begin there.
        numbers: by writer, the numbers of its steps that the puller has.
        steps: by writer of a plain sender, which numbers no steps: the last global step.
        is_inherited: whether it goes on from a single gateway's cursor: which numbers the puller has is then not known.
        had: by gateway, which steps after its cursor the puller has already, as far as ``numbers`` do not say so.
        again: gateways that are read from the beginning, each with a writer of which the puller has steps already.
    """

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.cursors: dict[str, str] = {}
        self.numbers: dict[Writer, NumberSet] = {}
        self.steps: dict[Writer, int] = {}
        self.is_inherited: bool = False
        self.had: dict[str, set[StepKey]] = {}
        self.again: set[tuple[str, Writer]] = set()

    @classmethod
    def of(cls, cursor: str, rank: int | None, addresses: tuple[str, ...]) -> Self:
        """Reads a cursor: one of several gateways, or one that a single gateway has issued.

        Raises:
            StaleCursor: it was issued for another rank, or is damaged.
        """
        position = cls(rank)
        if not cursor.startswith(_MARK):
            position.cursors, position.is_inherited = dict.fromkeys(addresses, cursor), bool(cursor)
            return position
        try:
            known = _content(cursor)
            position.cursors = {address: known["cursors"].get(address, "") for address in addresses}
            position.numbers = {(a, r, w): NumberSet(ranges) for a, r, w, ranges in known["numbers"]}
            position.steps = {(a, r, w): step for a, r, w, step in known["steps"]}
            position.is_inherited = known["inherited"] is True
            for address, a, r, w, *rest in known["had"]:
                position.had.setdefault(address, set()).add(StepKey((a, r, w), *rest))
            position.again = {(address, (a, r, w)) for address, a, r, w in known["again"]}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error, zlib.error):
            raise StaleCursor(f"cursor {cursor[:80]!r} was not issued by a client of several gateways") from None
        if known["rank"] != rank:
            raise StaleCursor("this cursor came from pulling another rank; give the same one, or pull without a cursor")
        return position

    def text(self) -> str:
        """Returns it as a cursor."""
        content = {
            "rank": self.rank,
            "cursors": self.cursors,
            "inherited": self.is_inherited,
            "numbers": [[*writer, numbers.ranges] for writer, numbers in self.numbers.items()],
            "steps": [[*writer, step] for writer, step in self.steps.items()],
            "had": [[address, *step.writer, *step[1:]] for address, steps in self.had.items() for step in steps],
            "again": [[address, *writer] for address, writer in sorted(self.again)],
        }
        packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)
        return _MARK + base64.urlsafe_b64encode(packed).decode()

    def move(self, address: str, cursor: str) -> None:
        """Goes on at a gateway after this cursor: nothing is known of the steps after it."""
        self.cursors[address] = cursor
        self.had.pop(address, None)

    def begin_anew(self, address: str) -> None:
        """Reads a gateway from its beginning: what it had is gone, and it has begun anew."""
        self.move(address, "")
        self.again |= {(address, writer) for writer in (*self.numbers, *self.steps)}

    def has(self, step: StepKey, address: str) -> bool:
        """Whether the puller has a step already, in its first revision or because a gateway is read again."""
        if step in self.had.get(address, ()):
            return True
        is_again = (address, step.writer) in self.again
        if step.number:
            return (step.revision == 1 or is_again) and step.number in self.numbers.get(step.writer, ())
        return is_again and step.step <= self.steps.get(step.writer, -1)

    def knows(self, step: StepKey) -> bool:
        """Whether what is missing before a step follows from its number; otherwise a gateway has to report it."""
        return step.number > 0 and (step.writer in self.numbers or not self.is_inherited)

    def missed(self, step: StepKey, address: str) -> int:
        """Returns how many steps directly before this one the puller does not have, as far as that can be known."""
        if step.number:
            known = self.numbers.get(step.writer)
            return max(step.number - 1 - (0 if known is None else known.last), 0) if self.knows(step) else 0
        if (address, step.writer) in self.again and step.writer in self.steps and step.step < GUESSED_STEP:
            return max(step.step - 1 - self.steps[step.writer], 0)
        return 0

    def add(self, step: StepKey, address: str) -> None:
        """Records that the puller gets a step."""
        if not step.number or step.revision > 1:
            self.had.setdefault(address, set()).add(step)
        if step.number:
            if step.writer not in self.numbers:
                self.numbers[step.writer] = NumberSet(
                    [] if self.knows(step) or step.number == 1 else [[1, step.number - 1]]
                )
            known = self.numbers[step.writer]
            if step.number not in known:
                known.add(step.number)
                self.again.discard((address, step.writer))
        elif self.steps.get(step.writer, -1) < step.step < GUESSED_STEP:
            self.steps[step.writer] = step.step
            self.again.discard((address, step.writer))


class StepKey(NamedTuple):
    """What tells one step from another; see ``Packets``."""

    writer: Writer
    number: int
    step: int
    revision: int


def _content(cursor: str) -> Any:
    unpacking = zlib.decompressobj()
    content = unpacking.decompress(base64.urlsafe_b64decode(cursor[len(_MARK) :]), _MOST_BYTES)
    if not unpacking.eof or unpacking.unused_data:
        raise ValueError("too large, or damaged")
    return json.loads(content)
