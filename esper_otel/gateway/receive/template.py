"""Template: requests of one step, sent again and again, differ in their times and values only.

Of the second request of a length it is learnt where each point's time and value stand in its bytes. A request whose
other bytes are the same needs no decoding then. That the places are right is proven once, by decoding the request with
every time and value changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from esper_otel.frames.frame import ABSENT_BITS
from esper_otel.gateway.receive.request import EARLIEST_UNIX_NS, LATEST_UNIX_NS, DecodedRequest, PointBlock

# A point's time and value as our exporter and others write them: side by side, each behind its tag.
_TIME, _DOUBLE = b"\x19", 0x21
_PAIR_BYTES = 18

_MOST_LENGTHS = 64
_MOST_OF_A_LENGTH = 2
_LONGEST = 16 * 1024


class Template:
    """Reads requests that are alike.

    Args:
        body: a request.
        places: where each point's time begins, its tag included.
        block: what it was decoded to.
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
        """The request, if it is one of these."""
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

    Threads: one at a time.

    Args:
        decode: decodes any request.
    """

    def __init__(self, decode: Callable[[bytes], DecodedRequest]) -> None:
        self._decode = decode
        self._of_length: dict[int, list[Template]] = {}

    def read(self, body: bytes) -> DecodedRequest:
        """The request, decoded."""
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
    """Where a time stands with a value behind it."""
    pattern = _TIME + time_unix_ns.to_bytes(8, "little")
    places = []
    place = body.find(pattern)
    while place >= 0:
        if place + _PAIR_BYTES <= len(body) and body[place + 9] == _DOUBLE:
            places.append(place)
        place = body.find(pattern, place + 1)
    return places


def _changed(body: bytes, places: list[int], time_unix_ns: int) -> bytes:
    """The request with another time, and with values that are all different."""
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
