"""Requests of the corpus with some bytes changed, over both protocols."""

from __future__ import annotations

import random
from pathlib import Path

from attack.target import Attack, Target

_CORPUS = Path(__file__).parents[1] / "gateway" / "receive" / "corpus"


def _fuzz(target: Target) -> None:
    luck = random.Random(7)
    corpus = [path.read_bytes() for path in sorted(_CORPUS.glob("*.bin"))]
    with target.channel() as channel:
        for number in target.rounds():
            content = bytearray(luck.choice(corpus))
            for _ in range(luck.randint(1, 4)):
                place = luck.randrange(len(content) + 1)
                content[place : place + luck.randint(0, 8)] = luck.randbytes(luck.randint(0, 8))
            if number % 2:
                code = target.export(channel, bytes(content)).name
                target.hold(holds=code not in {"UNKNOWN", "INTERNAL"}, otherwise=f"answered {code}")
            else:
                kind = "application/json" if number % 4 else "application/x-protobuf"
                status, _ = target.post(bytes(content), kind=kind)
                target.hold(holds=status != 500, otherwise="answered 500")


ATTACKS = (Attack("fuzz", "mutated requests", _fuzz),)
