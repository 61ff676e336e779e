"""Template: avoids decoding requests that differ from an earlier one only in their times and values.

From the second request of a given length, the positions of all times and values in its bytes are learnt. A later
request whose other bytes are the same need not be decoded. The positions are verified once: the request is decoded
with every time and value changed, and the results are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from esper_otel.frames.frame import ABSENT_BITS
from esper_otel.gateway.receive.request import EARLIEST_UNIX_NS, LATEST_UNIX_NS, DecodedRequest, PointBlock

# The time and value of a point as common exporters write them: adjacent, each after its tag.
_TIME, _DOUBLE = b"\x19", 0x21
_PAIR_BYTES = 18

_MOST_LENGTHS = 64
_MOST_OF_A_LENGTH = 2
_LONGEST = 16 * 1024


class Template:
    """Reads requests that have the same length and layout.

    Args:
        body: a request.
        places: position of each point's time, starting at its tag.
        block: the points decoded from ``body``.
    """

    def __init__(self, body: bytes, places: list[int], block: PointBlock) -> None:
        content = np.frombuffer(body, np.uint8)
        begins = np.array(places)[:, None]
        self._times = begins + np.arange(1, 9)
        self._values = begins + np.arange(10, 18)
        self._keep = np.full(len(body), 0xFF, np.uint8)
        self._keep[self._times] = self._keep[self._values] = 0
        self._fixed = content & self._keep
        self._block = block

    def read(self, body: bytes) -> DecodedRequest | None:
        """Reads a request; returns None if it does not match the template."""
        content = np.frombuffer(body, np.uint8)
        if not np.array_equal(content & self._keep, self._fixed):
            return None
        times = content[self._times].view(np.uint64)[:, 0]
        time_unix_ns = int(times[0])
        bits = content[self._values].view(np.uint64)[:, 0]
        is_usual = EARLIEST_UNIX_NS <= time_unix_ns < LATEST_UNIX_NS and bool((times == times[0]).all())
        if not is_usual or (bits == ABSENT_BITS).any():
            return None
        block = self._block._replace(times=times, values=bits.view(np.float64))
        return DecodedRequest((block,), (), (), len(times), Counter())


class Templates:
    """The templates of a decoder.

    Threads: not thread-safe; use them from one thread at a time.

    Args:
        decode: decodes any request.
    """

    def __init__(self, decode: Callable[[bytes], DecodedRequest]) -> None:
        self._decode = decode
        self._of_length: dict[int, list[Template]] = {}

    def read(self, body: bytes) -> DecodedRequest:
        """Decodes a request, with a template if one matches."""
        known = self._of_length.get(len(body))
        if known is not None:
            for template in known:
                decoded = template.read(body)
                if decoded is not None:
                    return decoded
        decoded = self._decode(body)
        if len(body) > _LONGEST:
            return decoded
        if known is None:
            if len(self._of_length) >= _MOST_LENGTHS:
                self._of_length.clear()
            self._of_length[len(body)] = []
        elif len(known) < _MOST_OF_A_LENGTH:
            learnt = self._learnt(body, decoded)
            if learnt is not None:
                known.append(learnt)
        return decoded

    def _learnt(self, body: bytes, decoded: DecodedRequest) -> Template | None:
        if decoded.markers or decoded.ended or decoded.rejected or len(decoded.blocks) != 1:
            return None
        (block,) = decoded.blocks
        time_unix_ns = int(block.times[0])
        if len(block.times) != decoded.points or (block.times != time_unix_ns).any():
            return None
        places = _places(body, time_unix_ns)
        if len(places) != decoded.points:
            return None
        template = Template(body, places, block)
        other = _changed(body, places, time_unix_ns + 1_000_000)
        mine, theirs = template.read(other), self._decode(other)
        return template if mine is not None and _is_equal(mine, theirs) else None


def _places(body: bytes, time_unix_ns: int) -> list[int]:
    """Returns the positions where this time occurs, followed by a value."""
    pattern = _TIME + time_unix_ns.to_bytes(8, "little")
    places = []
    place = body.find(pattern)
    while place >= 0:
        if place + _PAIR_BYTES <= len(body) and body[place + 9] == _DOUBLE:
            places.append(place)
        place = body.find(pattern, place + 1)
    return places


def _changed(body: bytes, places: list[int], time_unix_ns: int) -> bytes:
    """Returns the request with another time and with values that all differ."""
    content = bytearray(body)
    for number, place in enumerate(places):
        content[place + 1 : place + 9] = time_unix_ns.to_bytes(8, "little")
        content[place + 10 : place + 18] = np.float64(number + 0.5).tobytes()
    return bytes(content)


def _is_equal(one: DecodedRequest, other: DecodedRequest) -> bool:
    if other.markers or other.ended or other.rejected or len(other.blocks) != 1 or one.points != other.points:
        return False
    mine, theirs = one.blocks[0], other.blocks[0]
    return (
        mine[:3] == theirs[:3]
        and mine.is_ours == theirs.is_ours
        and np.array_equal(mine.streams, theirs.streams)
        and np.array_equal(mine.times, theirs.times)
        and mine.values.tobytes() == theirs.values.tobytes()
    )
