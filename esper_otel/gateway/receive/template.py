"""Templates: read the parts of a request that differ from an earlier part only in their times and values.

A part is one ResourceMetrics without its Resource. A trainer sends the same one with every step, apart from the
numbers, and so do the other ranks of its run; a collector appends them to each other. A template knows where the
numbers are. Parts of equal length are compared with it, and read, all at once.

A template is verified before it is used: the part is decoded with every time and value changed, for another sender,
and the results are compared.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import ABSENT_BITS
from esper_otel.gateway.receive.request import EARLIEST_UNIX_NS, LATEST_UNIX_NS, DecodedRequest, PointBlock, PointSender
from esper_otel.varint import field_head, read_varint

# A longer part holds many points of each metric; these are read at once without a template.
_LONGEST = 32 * 1024
_MOST_BYTES = 32 * 1024 * 1024
_MOST_OF_A_LENGTH = 8
_MOST_LENGTHS, _MOST_FAILURES, _EVERY = 4_096, 3, 64
_MOST_LEARNT = 8  # in one request
# Learning takes about as long as decoding five parts. What it may cost is earned by parts that templates read.
_MOST_CREDIT, _EARNED, _EARNED_BY_REQUEST = 64.0, 1 / 16, 1 / 4
_FEW, _USUAL_BYTES = 16, 64

_RESOURCE_METRICS = _RESOURCE = 0x0A
_SCOPE_METRICS, _SCHEMA_URL = 0x12, 0x1A
_METRICS, _GAUGE, _SUM, _POINT = 0x12, 0x2A, 0x3A, 0x0A
_START, _TIME, _DOUBLE, _INTEGER = 0x11, 0x19, 0x21, 0x31
_NUMBER, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_TIME_SHIFT_NS = 7_000_000

Bytes = npt.NDArray[np.uint8]


class ResourcePart(NamedTuple):
    """A ResourceMetrics of a request, as ranges of its bytes.

    Attributes:
        start: where it begins, with its tag.
        end: where it ends.
        resource: its Resource.
        rest: everything else in it; None if a template cannot read it.
    """

    start: int
    end: int
    resource: slice
    rest: slice | None


def parts_of(body: bytes) -> list[ResourcePart] | None:
    """Returns the parts of a request; None if it has very many small ones, or something else is in it."""
    parts: list[ResourcePart] = []
    position, end = 0, len(body)
    try:
        while position < end:
            if body[position] != _RESOURCE_METRICS or len(parts) > _FEW + position // _USUAL_BYTES:
                return None
            length, inside = _length(body, position + 1)
            after = inside + length
            if after > end:
                return None
            parts.append(ResourcePart(position, after, *_divided(body, inside, after)))
            position = after
    except IndexError:
        return None
    return parts


def _length(body: bytes, position: int) -> tuple[int, int]:
    length = body[position]
    if length < 0x80:
        return length, position + 1
    second = body[position + 1]
    if second < 0x80:
        return length & 0x7F | second << 7, position + 2
    return read_varint(body, position)


def _divided(body: bytes, start: int, end: int) -> tuple[slice, slice | None]:
    """Finds the Resource, which is the first field (as most exporters write it) or the last one (as a collector)."""
    nothing = slice(start, start)
    position = start
    while position < end:
        tag = body[position]
        if tag not in (_RESOURCE, _SCOPE_METRICS, _SCHEMA_URL):
            return nothing, None
        length, inside = _length(body, position + 1)
        after = inside + length
        if after > end:
            return nothing, None
        if tag == _RESOURCE:
            if position == start:
                rest = slice(after, end)
            elif after == end:
                rest = slice(start, position)
            else:
                return nothing, None
            return slice(inside, after), rest if rest.stop - rest.start <= _LONGEST else None
        position = after
    return nothing, None


class _Numbers(NamedTuple):
    """Where the numbers of a part's points are.

    Attributes:
        times: positions of the times.
        values: positions of the values.
        integers: whether each value is an integer.
        starts: positions of the start times, which nothing depends on.
    """

    times: list[int]
    values: list[int]
    integers: list[bool]
    starts: list[int]


def _numbers(rest: bytes) -> _Numbers | None:
    """Returns where the numbers are; None if a point has no value, or anything is unusual."""
    found = _Numbers([], [], [], [])
    try:
        for tag, start, end in _fields(rest, 0, len(rest)):
            if tag == _SCOPE_METRICS:
                for inner, metric, metric_end in _fields(rest, start, end):
                    if inner == _METRICS and not _of_metric(rest, metric, metric_end, found):
                        return None
            elif tag != _SCHEMA_URL:
                return None
    except (IndexError, ValueError):
        return None
    return found


def _of_metric(rest: bytes, start: int, end: int, found: _Numbers) -> bool:
    is_one = False
    for tag, data, data_end in _fields(rest, start, end):
        if tag in (_GAUGE, _SUM):
            if is_one:
                return False
            is_one = True
            for inner, point, point_end in _fields(rest, data, data_end):
                if inner == _POINT and not _of_point(rest, point, point_end, found):
                    return False
    return is_one


def _of_point(rest: bytes, start: int, end: int, found: _Numbers) -> bool:
    places = {tag: place for tag, place, _ in _fields(rest, start, end) if tag & 7 == _FIXED_64}
    has_one_value = (_DOUBLE in places) != (_INTEGER in places)
    if _TIME not in places or not has_one_value:
        return False
    found.times.append(places[_TIME])
    found.values.append(places[_DOUBLE] if _DOUBLE in places else places[_INTEGER])
    found.integers.append(_INTEGER in places)
    if _START in places:
        found.starts.append(places[_START])
    return True


def _fields(content: bytes, position: int, end: int) -> list[tuple[int, int, int]]:
    """Returns the fields of a message: the tag, and the range of the content.

    Raises:
        IndexError, ValueError: the message is malformed or unusual.
    """
    found = []
    while position < end:
        tag, position = read_varint(content, position)
        kind = tag & 7
        length = {_FIXED_64: 8, _FIXED_32: 4}.get(kind, 0)
        if kind == _BYTES:
            length, position = read_varint(content, position)
        elif kind == _NUMBER:
            length = read_varint(content, position)[1] - position
        elif not length:
            raise ValueError("a group")
        if position + length > end:
            raise ValueError("a field that is too long")
        found.append((tag, position, position + length))
        position += length
    return found


class Template:
    """Reads parts that have the same length and layout.

    Args:
        rest: a part.
        numbers: where its numbers are.
        order: for each point of the block, which of the numbers it is.
        block: the points decoded from it.
        owner: the part's Resource, if the sender depends on the attributes of the points; otherwise None.
    """

    def __init__(
        self, rest: bytes, numbers: _Numbers, order: npt.NDArray[np.intp], block: PointBlock, owner: bytes | None
    ) -> None:
        content = np.frombuffer(rest, np.uint8)
        eight = np.arange(8)
        self._all_times = (np.array(numbers.times)[:, None] + eight).reshape(-1)
        self._values = (np.array(numbers.values)[order][:, None] + eight).reshape(-1)
        is_all = len(order) == len(numbers.times)
        self._order = order if not is_all or (order != np.arange(len(order))).any() else None
        self._is_integer = np.array(numbers.integers)[order]
        self._has_integers = bool(self._is_integer.any())
        keep = np.ones(len(rest), np.bool_)
        for places in (numbers.times, numbers.values, numbers.starts):
            for place in places:
                keep[place : place + 8] = False
        self._fixed = np.flatnonzero(keep).astype(np.int32)
        self._content = content[self._fixed]
        self._block = block._replace(kind=object())
        self._changes = block.times[1:] != block.times[:-1]
        self.owner = owner
        self.points: int = len(numbers.times)
        self.size: int = len(rest) + 5 * len(self._fixed) + 150 * self.points

    def fitting(self, rows: Bytes) -> npt.NDArray[np.bool_]:
        """Returns which of the parts, one per row, differ from the template only in their numbers."""
        fits: npt.NDArray[np.bool_] = (rows.take(self._fixed, axis=1) == self._content).all(axis=1)
        return fits

    def read(self, rows: Bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Returns the times and values of parts, one per row, and which of them have the template's order of times."""
        all_times = rows.take(self._all_times, axis=1).view(np.uint64)
        times = all_times if self._order is None else all_times.take(self._order, axis=1)
        is_usual = np.all((all_times >= EARLIEST_UNIX_NS) & (all_times < LATEST_UNIX_NS), axis=1)
        before, after = times[:, :-1], times[:, 1:]
        is_usual &= np.where(self._changes, after > before, after == before).all(axis=1)
        bits = rows.take(self._values, axis=1).view(np.uint64)
        values = bits.view(np.float64)
        if self._has_integers:
            values = np.where(self._is_integer, bits.view(np.int64).astype(np.float64), values)
        looks_absent = bits == ABSENT_BITS
        if looks_absent.any():  # this NaN was sent as a value; it must not look like an empty cell
            values = np.where(looks_absent & ~self._is_integer, np.nan, values)
        return times, values, np.asarray(is_usual)

    def block(self, sender: PointSender, times: npt.NDArray[np.uint64], values: npt.NDArray[np.float64]) -> PointBlock:
        """Returns the points of one part."""
        block = self._block
        return PointBlock(
            sender if self.owner is None else block.sender,
            block.names,
            block.seeds,
            block.streams,
            times,
            values,
            block.is_ours,
            block.has_further,
            block.kind,
            block.units,
        )


class Templates:
    """The templates of a decoder; how much memory they take is limited.

    Threads: not thread-safe; use them from one thread at a time.

    Args:
        decode: decodes any request.
        sender: returns the sender that a serialized Resource describes, or why its points are rejected.
    """

    def __init__(self, decode: Callable[[bytes], DecodedRequest], sender: Callable[[bytes], PointSender | str]) -> None:
        self._decode = decode
        self._sender = sender
        self._known: OrderedDict[tuple[int, bytes | None], list[Template]] = OrderedDict()
        self._failures: OrderedDict[int, int] = OrderedDict()
        self._bytes = 0
        self._credit = _MOST_CREDIT
        self._stranger = secrets.token_hex(16)

    def blocks(self, body: bytes, parts: Sequence[ResourcePart]) -> tuple[list[PointBlock | None], int]:
        """Returns the block of each part, None for parts that no template reads; and the number of points in all."""
        found: list[PointBlock | None] = [None] * len(parts)
        of_length: dict[int, list[int]] = {}
        for number, part in enumerate(parts):
            if part.rest is not None:
                of_length.setdefault(part.rest.stop - part.rest.start, []).append(number)
        points = 0
        left = may_learn = min(_MOST_LEARNT, int(self._credit))
        for length, numbers in of_length.items():
            if not length:
                continue
            rest = b"".join([body[parts[number].rest] for number in numbers])  # type: ignore[index] # selected above
            rows = np.frombuffer(rest, np.uint8).reshape(-1, length)
            waiting = np.arange(len(numbers))
            for template in self._of_length(length):
                points += self._apply(template, body, parts, numbers, rows, waiting, found)
                waiting = waiting[[found[numbers[row]] is None for row in waiting]]
                if not len(waiting):
                    break
            for row in waiting.tolist() if len(waiting) else ():
                resource = body[parts[numbers[row]].resource]
                for template in self._known.get((length, resource), ()):
                    points += self._apply(template, body, parts, numbers, rows, np.array([row]), found)
            while left and len(waiting):
                waiting = waiting[[found[numbers[row]] is None for row in waiting]]
                if not len(waiting) or not self._may_learn(length, len(waiting)):
                    break
                left -= 1
                part = parts[numbers[int(waiting[-1])]]
                learnt = self._learnt(body[part.resource], rows[waiting[-1]].tobytes())
                if learnt is None:
                    self._failures[length] += 1
                    break
                self._failures[length] = 0
                self._keep(length, learnt)
                points += self._apply(learnt, body, parts, numbers, rows, waiting, found)
        earned = _EARNED_BY_REQUEST + _EARNED * (len(found) - found.count(None))
        self._credit = min(self._credit - (may_learn - left) + earned, _MOST_CREDIT)
        return found, points

    def _of_length(self, length: int) -> list[Template]:
        known = self._known.get((length, None))
        if known is None:
            return []
        self._known.move_to_end((length, None))
        return list(known)

    def _apply(
        self,
        template: Template,
        body: bytes,
        parts: Sequence[ResourcePart],
        numbers: list[int],
        rows: Bytes,
        some: npt.NDArray[np.intp],
        found: list[PointBlock | None],
    ) -> int:
        """Reads the parts that fit a template; returns how many points they have."""
        chosen = rows if len(some) == len(rows) else rows[some]
        fits = template.fitting(chosen)
        if not fits.all():
            some, chosen = some[fits], chosen[fits]
        if not len(some):
            return 0
        times, values, is_usual = template.read(chosen)
        count = 0
        for place, (row, is_good) in enumerate(zip(some.tolist(), is_usual.tolist(), strict=True)):
            number = numbers[row]
            resource = body[parts[number].resource]
            sender = self._sender(resource)
            is_theirs = template.owner is None or template.owner == resource
            if is_good and is_theirs and not isinstance(sender, str):
                found[number] = template.block(sender, times[place], values[place])
                count += template.points
        return count

    def _may_learn(self, length: int, count: int) -> bool:
        """Returns whether to learn now: not from the first part of a length, and seldom after failures."""
        failures = self._failures.pop(length, None)
        self._failures[length] = failures or 0
        if len(self._failures) > _MOST_LENGTHS:
            self._failures.popitem(last=False)
        if failures is None:
            return count > 1
        if failures < _MOST_FAILURES:
            return True
        self._failures[length] = failures + 1
        return failures % _EVERY == 0

    def _keep(self, length: int, template: Template) -> None:
        key = (length, template.owner)
        kept = self._known.setdefault(key, [])
        kept.insert(0, template)
        self._bytes += template.size
        self._known.move_to_end(key)
        if len(kept) > _MOST_OF_A_LENGTH:
            self._bytes -= kept.pop().size
        while self._bytes > _MOST_BYTES and len(self._known) > 1:
            _, dropped = self._known.popitem(last=False)
            self._bytes -= sum(each.size for each in dropped)

    def _learnt(self, resource: bytes, rest: bytes) -> Template | None:
        numbers = _numbers(rest)
        if numbers is None or not numbers.times:
            return None
        first = self._only_block(_request(resource, rest), len(numbers.times))
        if first is None:
            return None
        other = _changed(rest, numbers)
        stranger = _resource(self._stranger)
        second = self._only_block(_request(stranger, other), len(numbers.times))
        owner = None
        if second is None or first.sender != self._sender(resource) or second.sender != self._sender(stranger):
            owner = resource  # the points' own attributes say something about the sender
            second = self._only_block(_request(resource, other), len(numbers.times))
            if second is None:
                return None
        order = (second.values - 0.5).astype(np.intp)
        template = Template(rest, numbers, order, first, owner)
        for part, block in ((rest, first), (other, second)):
            rows = np.frombuffer(part, np.uint8)[None]
            times, values, is_usual = template.read(rows)
            mine = template.block(block.sender, times[0], values[0])
            if not (template.fitting(rows).all() and is_usual.all() and _is_equal(mine, block)):
                return None
        return template

    def _only_block(self, body: bytes, points: int) -> PointBlock | None:
        """Decodes a request; returns its block if it contains nothing else that anybody uses."""
        decoded = self._decode(body)
        beside = decoded.markers or decoded.ended or decoded.phases or decoded.alive or decoded.devices
        others = beside or decoded.rejected
        is_simple = not others and decoded.points == points
        return decoded.blocks[0] if is_simple and len(decoded.blocks) == 1 else None


def _request(resource: bytes, rest: bytes) -> bytes:
    content = field_head(1, len(resource)) + resource + rest
    return field_head(1, len(content)) + content


def _resource(run_id: str) -> bytes:
    """Returns a serialized Resource with one attribute, the run's id."""
    key, value = b"esper.run.id", run_id.encode()
    text = field_head(1, len(value)) + value
    content = field_head(1, len(key)) + key + field_head(2, len(text)) + text
    return field_head(1, len(content)) + content


def _changed(rest: bytes, numbers: _Numbers) -> bytes:
    """Returns the part with later times, in the same order, and with values that all differ."""
    content = bytearray(rest)
    for place in numbers.times:
        time_unix_ns = int.from_bytes(rest[place : place + 8], "little") + _TIME_SHIFT_NS
        content[place : place + 8] = (time_unix_ns % 2**64).to_bytes(8, "little")
    for number, (place, is_integer) in enumerate(zip(numbers.values, numbers.integers, strict=True)):
        value = np.int64(number + 1) if is_integer else np.float64(number + 0.5)
        content[place : place + 8] = value.tobytes()
    return bytes(content)


def _is_equal(mine: PointBlock, theirs: PointBlock) -> bool:
    return (
        mine[:3] == theirs[:3]
        and mine[6:8] == theirs[6:8]
        and mine.units == theirs.units
        and np.array_equal(mine.streams, theirs.streams)
        and np.array_equal(mine.times, theirs.times)
        and mine.values.tobytes() == theirs.values.tobytes()
    )
