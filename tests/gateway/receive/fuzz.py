"""Fuzzing: mutates the corpus for a while; the fast decoder must agree with the plain one, and nothing may grow.

Run it as ``PYTHONPATH=tests python tests/gateway/receive/fuzz.py --seconds 30``; an input that fails is written to the
corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import sys
import time
import tracemalloc
from pathlib import Path

from wire import said

from esper_otel.gateway.receive.decoder import Decoder, decode_plain
from esper_otel.gateway.receive.request import Malformed

CORPUS = Path(__file__).with_name("corpus")
MOST_GROWTH = 64 * 1024 * 1024


def mutated(luck: random.Random, corpus: list[bytes]) -> bytes:
    """An input with some bytes changed, left out, repeated, or taken from another one."""
    body = bytearray(luck.choice(corpus))
    for _ in range(luck.randint(1, 4)):
        place, length = luck.randrange(len(body) + 1), luck.randint(1, 16)
        match luck.randrange(5):
            case 0 if place < len(body):
                body[place] ^= 1 << luck.randrange(8)
            case 1:
                del body[place : place + length]
            case 2:
                body[place:place] = body[place : place + length]
            case 3:
                other = luck.choice(corpus)
                start = luck.randrange(len(other) + 1)
                body[place : place + length] = other[start : start + length]
            case _:
                body[place:place] = luck.randbytes(luck.randint(1, 3))
    return bytes(body)


def fuzz(seconds: float, seed: int) -> int:
    """Fuzzes; returns how many inputs were tried. The one that fails is written down first."""
    luck, decoder = random.Random(seed), Decoder()
    corpus = [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    end, tried = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        body = mutated(luck, corpus)
        try:
            assert said(decoder.decode, body) == said(decode_plain, body), "the decoders disagree"
            with contextlib.suppress(Malformed):
                decoder.decode_json(body)
        except Exception:
            path = CORPUS / f"found-{hashlib.sha256(body).hexdigest()[:12]}.bin"
            path.write_bytes(body)
            print(f"failed: {path}", file=sys.stderr)
            raise
        tried += 1
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < MOST_GROWTH, f"grown by {grown} bytes"
    return tried


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    given = parser.parse_args()
    print(f"{fuzz(given.seconds, given.seed)} inputs, seed {given.seed}")
