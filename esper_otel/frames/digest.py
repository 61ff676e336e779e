"""Lives: one number for the set of live seeds, and which seeds have died when the number is another one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, reduce
from hashlib import sha256
from operator import xor
from typing import Any

# Six bytes: a double holds every such number exactly.
_BYTES = 6
DIGEST_LIMIT = 256**_BYTES
_STALE_NS = 300 * 10**9
# So few candidates have 2**24 subsets: that another one than the dead has their digest happens once in 2**24 times.
_FEW = 24


@lru_cache(maxsize=16)
def digest_of(seed_ids: tuple[str, ...]) -> int:
    """The digest of a set of seeds, from 0 to below 2**48; their order does not count.

    It is the exclusive or of one number for each seed: the first six bytes of the SHA-256 of its id in UTF-8, the
    first byte being the highest. So the digest of the dead is that of the living before, exclusive or that after.
    """
    return reduce(xor, map(_number_of, seed_ids), 0)


def prepare(seed_ids: Collection[str]) -> None:
    """Computes in advance what the digest of a set with these seeds needs, because that takes long for very many."""
    for seed_id in seed_ids:
        _number_of(seed_id)


@lru_cache(maxsize=65_536)
def _number_of(seed_id: str) -> int:
    return int.from_bytes(sha256(seed_id.encode(errors="surrogatepass")).digest()[:_BYTES], "big")


def dead_of(
    live: tuple[str, ...], recorded: Collection[str], count: int | None, digest: int, likelihood: Callable[[str], Any]
) -> Collection[str] | None:
    """Which of the seeds that are assumed to be live have died; None if it cannot be determined.

    Args:
        live: the seeds.
        recorded: those that were recorded in this step, and are therefore live.
        count: number of live seeds, as reported by the trainer.
        digest: the digest of the live seeds, as reported by the trainer.
        likelihood: sorts seeds, those that have most likely died first.
    """
    other = digest_of(live) ^ digest
    if not other:
        return ()
    if count is None:
        return None
    candidates = sorted((seed for seed in live if seed not in recorded), key=likelihood)
    return dead_among(candidates, len(live) - count, other)


def silent_of(
    live: Collection[str], recorded: Collection[str], seen_unix_ns: Mapping[str, int], now_unix_ns: int
) -> list[str]:
    """The seeds whose series have ended without a marker: they have not been seen for as long as Prometheus waits."""
    horizon = now_unix_ns - _STALE_NS
    return [seed for seed in live if seed not in recorded and seen_unix_ns.get(seed, 0) < horizon]


def dead_among(candidates: Sequence[str], count: int, digest: int) -> Collection[str] | None:
    """Which of the candidates have died; None when no choice has the digest, or none could be found.

    A choice that has the digest is right: a wrong one has it less than once in a million times, however many
    candidates there are.

    Args:
        candidates: seeds that may have died, the likeliest first.
        count: how many have died.
        digest: the digest of those that have.
    """
    if not 0 <= count <= len(candidates):
        return None
    numbers = [_number_of(seed) for seed in candidates]
    if reduce(xor, numbers[:count], 0) == digest:
        return candidates[:count]
    living = len(candidates) - count
    if living <= 2:
        kept = _one_or_two(numbers, living, reduce(xor, numbers, digest))
        places = None if kept is None else {*range(len(numbers))} - kept
    elif count <= 2:
        places = _one_or_two(numbers, count, digest)
    else:
        places = _some_of_few(numbers, digest) if len(numbers) <= _FEW else None
    if places is None or len(places) != count:
        return None
    return [candidates[place] for place in sorted(places)]


def _one_or_two(numbers: Sequence[int], count: int, digest: int) -> set[int] | None:
    """The places of one or two numbers whose exclusive or is the digest."""
    place = {number: position for position, number in enumerate(numbers)}
    if count == 1:
        return {place[digest]} if digest in place else None
    for position, number in enumerate(numbers):
        other = place.get(number ^ digest, position)
        if count == 2 and other != position:
            return {position, other}
    return None


def _some_of_few(numbers: Sequence[int], digest: int) -> set[int] | None:
    """The places of the numbers whose exclusive or is the digest: Gaussian elimination over bits."""
    reduced: dict[int, tuple[int, int]] = {}  # by their highest bit: combinations, and the places that make them up

    def rest_of(number: int, places: int) -> tuple[int, int]:
        while number and (known := reduced.get(number.bit_length())):
            number, places = number ^ known[0], places ^ known[1]
        return number, places

    for position, number in enumerate(numbers):
        rest, places = rest_of(number, 1 << position)
        if rest:
            reduced[rest.bit_length()] = rest, places
    rest, places = rest_of(digest, 0)
    return None if rest else {position for position in range(len(numbers)) if places >> position & 1}
