"""Fuzzing of files that may come from anybody: black boxes with their reports, spools, and stores of a gateway.

Run it as ``python tests/fuzz_files.py --seconds 30``; a file that fails is left in the folder that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import json
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from frame_examples import make_frame, records_of, sealed, seed_table, taken_apart
from fuzz_stores import fuzz_store
from opentelemetry.sdk.resources import Resource

from esper_otel.cli import main
from esper_otel.export.encode import AccompanyingData, Encoder
from esper_otel.export.resource import resources
from esper_otel.export.streams import Streams
from esper_otel.frames import black_box, records
from esper_otel.frames.layout import HEAD
from esper_otel.frames.records import RecordWriter, StoredContext, chunks_in
from esper_otel.schema import METRICS, Metric, Stage

HOSTILE_TEXTS = (
    *("", "\x00", "\x1b[2J\x1b]0;gone\x07", "two\nlines\rand\ttabs", "\u202eesrever", "\ud800", "é" * 300, "x" * 5000),
    *(
        "=cmd|' /C calc'!A0",
        "+1",
        "-1+1",
        "@SUM(A1)",
        "../../../etc/passwd",
        "-rf",
        "nan",
        "step",
        "seed.alpha",
        "loss",
    ),
    *("<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</style><script>1</script>", "&lt;", "'", '"'),
)
HOSTILE: tuple[Any, ...] = (
    *(None, True, [], {}, [[]], {"a": {}}, [None], 0, -1, 1, 1.5, 2**31, 2**53, 2**63, 2**64, 10**300, 10**400),
    *(float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 1.7976931348623157e308, 5e-324, "NaN", "-Infinity"),
    *HOSTILE_TEXTS,
)
# What a page of ours is made of.
TAGS = {
    *(
        "html",
        "head",
        "body",
        "meta",
        "title",
        "style",
        "script",
        "section",
        "div",
        "h1",
        "h2",
        "p",
        "br",
        "dl",
        "dt",
        "dd",
    ),
    *("table", "tr", "td", "th"),
}
ATTRIBUTES = {
    *("lang", "charset", "name", "content", "http-equiv", "class", "id", "type", "nonce"),
}


def honest_box() -> list[Any]:
    """What a box is about, and its steps."""
    head = {"esper_otel": "0.1.0", "run_id": "run", "attempt": 1, "rank": 0, "world_size": 2, "experiment": "e"}
    rows = [
        {
            "step": step,
            "epoch": step // 8,
            "time_unix_ns": 1_790_000_000_000_000_000 + step,
            "values": {"loss": 1 / step, "gradient_norm": 1.0, "input_wait_ms": 2.0, "step_latency_ms": 9.0, "own": 1.0}
            | ({"loss": float("nan"), "hook_latency_ms": float("inf")} if step == 20 else {}),
            "seeds": {"seed-1": {"stage": 1.0 + step // 10, "alpha": 0.5, "last_kernel_latency_ms": 20.0}},
            "retired": ["seed-2"] if step == 7 else [],
        }
        for step in range(1, 21)
    ]
    return [head | {"device": "cpu", "reason": "loss not finite", "written_unix_s": 1.0}, *rows]


def changed(luck: random.Random, said: Any) -> Any:
    """The value with one part of it, somewhere inside, replaced, left out, renamed or repeated."""
    if isinstance(said, dict | list) and said and luck.random() < 0.85:
        key = luck.choice(list(said) if isinstance(said, dict) else range(len(said)))
        match luck.randrange(8):
            case 0:
                del said[key]
            case 1 if isinstance(said, dict):
                said[luck.choice(HOSTILE_TEXTS)] = said.pop(key)
            case 2 if isinstance(said, dict):
                said[luck.choice(HOSTILE_TEXTS)] = luck.choice(HOSTILE)
            case 3 if isinstance(said, list):
                said.insert(key, copy.deepcopy(said[key]))
            case _:
                said[key] = changed(luck, said[key])
        return said
    return copy.deepcopy(luck.choice(HOSTILE))


def mutated_bytes(luck: random.Random, content: bytes) -> bytes:
    """Some bytes changed, left out or repeated."""
    body = bytearray(content)
    for _ in range(luck.randint(1, 4)):
        place, length = luck.randrange(len(body) + 1), luck.randint(1, 16)
        match luck.randrange(3):
            case 0 if place < len(body):
                body[place] ^= 1 << luck.randrange(8)
            case 1:
                del body[place : place + length]
            case _:
                body[place:place] = body[place : place + length]
    return bytes(body)


def box_bytes(box: list[Any]) -> bytes:
    """A box with this content: what it is about, and steps."""
    frames = [
        make_frame(
            sequence=sequence,
            global_step=row["step"],
            epoch=row["epoch"],
            time_unix_ns=row["time_unix_ns"],
            recorded=row["values"],
            seeds=(seeds := seed_table(row["seeds"])),
            live=seeds,
            retired=tuple(row["retired"]),
        )
        for sequence, row in enumerate(box[1:], 1)
    ]
    about = [b"H" + json.dumps(box[0]).encode()] if box else []
    return sealed(about) + b"".join(records_of(RecordWriter(), frames))


def hostile_box(luck: random.Random) -> bytes:
    """A box that somebody has made, or damaged."""
    contents = taken_apart(box_bytes(honest_box()))
    for _ in range(luck.randint(1, 3)):
        place = 0 if luck.random() < 0.3 else luck.randrange(len(contents))
        contents[place] = hostile_record(luck, contents[place])
    content = sealed(contents)
    return content if luck.randrange(4) else mutated_bytes(luck, content)


class _Page(HTMLParser):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        assert {name for name, _ in attrs} <= ATTRIBUTES, attrs


def check_report(folder: Path, *arguments: str) -> int:
    """Makes a report with everything in an empty folder, and checks what it says and writes; gives the exit status."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["report", *arguments, "--csv", "t.csv", "--parquet", "t.parquet"])
    for text in (out.getvalue(), err.getvalue()):
        assert all(line.isprintable() and len(line) <= 2_100 for line in text.split("\n")), text
    assert status in {0, 2}
    assert (err.getvalue().count("\n"), out.getvalue() == "") == ((0, False) if status == 0 else (1, True))
    for page in folder.glob("*.html"):
        _Page().feed(page.read_text(encoding="utf-8"))
    if status == 0:
        with (folder / "t.csv").open(encoding="utf-8", newline="") as file:
            cells = [cell for line in csv.reader(file) for cell in line]
        assert not any(re.match(r"[=+\-@\t\r]", cell) and not _is_number(cell) for cell in cells)
    return status


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def fuzz_boxes(luck: random.Random, folder: Path) -> None:
    """One box, and what its report says."""
    box = folder / f"box{black_box.SUFFIX}"
    box.write_bytes(hostile_box(luck))
    vs = ["--vs", str(box)] if luck.random() < 0.3 else []
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        check_report(Path(empty), str(box), *vs)


def honest_records() -> list[bytes]:
    """The contents of records of a session's file."""
    own = Metric("tokens_per_s", unit="rate", description="Tokens a second.")
    writer = RecordWriter({metric.name: metric for metric in (*METRICS, own)}, resources())
    seeds = seed_table({"seed-1": {"stage": Stage.TRAINING, "alpha": 0.5}, "seed-2": {"alpha": 1.0}})
    made = [
        make_frame(sequence=1, time_unix_ns=1_790_000_000_000_000_000),
        make_frame(sequence=2, time_unix_ns=1_790_000_000_001_000_000, recorded={"loss": 1.0, "tokens_per_s": 2.0}),
        make_frame(sequence=3, time_unix_ns=1_790_000_000_002_000_000, seeds=seeds, live=seeds, retired=("seed-3",)),
        make_frame(sequence=4, time_unix_ns=1_790_000_000_003_000_000, live=seeds),
    ]
    return taken_apart(b"".join(records_of(writer, made)))


def hostile_record(luck: random.Random, record: bytes) -> bytes:
    """A record's content, with one part of it changed in a way that a checksum does not tell."""
    kind = luck.choice([b"H", b"R", b"L", b"S", b"F", b"A", b"?", b""]) if luck.random() < 0.1 else record[:1]
    body = record[1:]
    if record[:1] == b"F" and len(body) >= records._FIELDS.size + HEAD.size:
        fields, place = records._FIELDS, records._FIELDS.size
        numbers = list(fields.unpack_from(body))
        for _ in range(luck.randint(0, 2)):
            numbers[luck.randrange(len(numbers))] = luck.choice([0, 1, 2, 3, 4, 5, 100, 2**31, 2**32 - 1])
        head = list(HEAD.unpack_from(body, place))
        head[luck.randrange(len(head))] = luck.choice([0, 1, 5, 2**31, 2**32 - 1])
        head[luck.randrange(4)] = luck.choice([0, 1, 5, 2**48, 2**53, 2**63, 2**64 - 1, 1_790_000_000_000_000_000])
        body = fields.pack(*numbers) + HEAD.pack(*head) + body[place + HEAD.size :]
    elif luck.random() < 0.8:
        start = 0 if record[:1] == b"H" else 4
        with contextlib.suppress(ValueError):  # it is not whole any more
            body = body[:start] + json.dumps(changed(luck, json.loads(body[start:]))).encode()
    return kind + (mutated_bytes(luck, body) if luck.random() < 0.3 else body)


def fuzz_records(luck: random.Random, _folder: Path) -> None:
    """One file of a spool: what it gives can be sent, and what others wrote into it is skipped."""
    contents = honest_records()
    place = luck.randrange(len(contents) + 1)
    hostile = [hostile_record(luck, luck.choice(contents)) for _ in range(luck.randint(1, 3))]
    contents[place : place + luck.randint(0, 1)] = hostile
    stored = StoredContext()
    content = sealed(contents)
    chunks = list(chunks_in(mutated_bytes(luck, content) if luck.random() < 0.3 else content, stored))
    chunks.sort(key=lambda chunk: chunk.first)
    catalogue = {metric.name: metric for metric in (*METRICS, *stored.metrics.values())}
    encoder = Encoder(catalogue, lambda run: Resource(*stored.resources[run]))
    streams = Streams()
    for chunk in chunks:
        for row in range(chunk.rows):
            block = chunk.block(row, row + 1)
            requests = list(encoder.requests([block], AccompanyingData(streams.note([block]))))
            assert all(request.body for request in requests)
    streams.all_ended()


def _raise(_where: str, error: Exception) -> None:
    raise error


def fuzz_stores(luck: random.Random, folder: Path) -> None:
    """One store of a gateway."""
    fuzz_store(luck, folder, changed)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "boxes": fuzz_boxes,
    "records": fuzz_records,
    "stores": fuzz_stores,
}


def fuzz(kind: str, seconds: float, seed: int, folder: Path) -> int:
    """Fuzzes; returns how many files were tried. Each has a seed of its own, which the one that fails names."""
    end, tried = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        try:
            KINDS[kind](random.Random(seed + tried), folder)
        except BaseException as error:
            error.add_note(f"fuzz_files.py --kind {kind} --seed {seed + tried}; the file may be in {folder}")
            raise
        tried += 1
    return tried


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() + os.getpid())
    parser.add_argument("--kind", choices=list(KINDS))
    given = parser.parse_args()
    logging.disable()  # what a gateway says of each damage
    kinds = [given.kind] if given.kind else list(KINDS)
    for each in kinds:
        number = fuzz(each, given.seconds / len(kinds), given.seed, Path(tempfile.mkdtemp()))
        print(f"{number} {each}, seed {given.seed}")
