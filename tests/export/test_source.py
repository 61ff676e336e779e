"""Sources of the exporter: what an earlier session left, and what the ring has dropped."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from frame_examples import append, make_frame, records_of, seed_table

from esper_otel.export.encode import Encoder
from esper_otel.export.folder import Folder
from esper_otel.export.resource import resource_for
from esper_otel.export.source import LeftoverSource, LiveSource, leftovers_in
from esper_otel.export.spool import Spool
from esper_otel.frames.frame import Frame
from esper_otel.frames.records import RecordWriter
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.schema import METRICS

CATALOGUE = {metric.name: metric for metric in METRICS}


def failed(where: str, error: Exception) -> None:
    raise AssertionError(where) from error


def steps(numbers: Iterable[int]) -> list[Frame]:
    return [make_frame(sequence=number, global_step=number, time_unix_ns=number * 10**6) for number in numbers]


def leave(directory: Path, *files: Iterable[int], acknowledged: int = 0) -> None:
    """A folder of a killed session, with a file for each of these ranges of steps."""
    folder = Folder.create(directory)
    for number, of_file in enumerate(files, 1):
        file = folder.append_to(f"{number:08d}.frames")
        os.write(file, b"".join(records_of(RecordWriter(CATALOGUE, resource_for), steps(of_file))))
        os.close(file)
    folder.acknowledge(acknowledged)
    folder.release()


def left_in(directory: Path, most_bytes: int = 10**9) -> LeftoverSource:
    [source] = leftovers_in(directory, Encoder, failed, most_bytes=most_bytes, warnings=Warnings())
    return source


def sent(source: LeftoverSource, limit: int) -> tuple[list[list[int]], int]:
    """The steps taken each time, and how many are missing in all."""
    taken: list[list[int]] = []
    missing = 0
    while True:
        blocks, gone = source.after(limit)
        missing += gone
        source.advance(gone)
        if not blocks:
            return taken, missing
        taken.append([step for block in blocks for step in block.steps.tolist()])
        is_last = source.are_last(blocks)
        source.advance(len(taken[-1]))
        assert is_last == (not source.after(limit)[0])


def test_each_step_is_given_once_in_order(tmp_path: Path) -> None:
    """Files may overlap, after a disk that was full, and steps may be missing between them."""
    leave(tmp_path, range(1, 6), range(4, 9), range(11, 13), acknowledged=2)
    source = left_in(tmp_path)
    assert sent(source, 2) == ([[3, 4], [5, 6], [7, 8], [11, 12]], 2)
    assert source.folder.acknowledged == 12
    source.folder.remove()


def test_the_series_of_steps_that_were_delivered_are_known(tmp_path: Path) -> None:
    """They have not been ended yet."""
    leave(tmp_path, range(1, 6), acknowledged=5)
    source = left_in(tmp_path)
    assert sent(source, 10) == ([], 0)
    assert ("kasmina.seed.alpha", {"seed_id": "seed-1"}) in source.streams.all_ended()
    assert source.run is not None
    source.folder.remove()


def test_the_oldest_files_give_way_and_are_counted(tmp_path: Path) -> None:
    """Only steps that nobody has taken yet are lost with them."""
    leave(tmp_path, range(1, 6), range(6, 11), range(11, 16), acknowledged=2)
    size = max(path.stat().st_size for path in tmp_path.rglob("*.frames"))
    source = left_in(tmp_path, most_bytes=size)
    assert source.deleted == 8
    assert sent(source, 10) == ([[11, 12, 13, 14, 15]], 0)
    source.folder.remove()


@pytest.fixture
def ring() -> Ring:
    return Ring(64 * 1024)


def publish(ring: Ring, spool: Spool, count: int) -> None:
    seeds = seed_table({"seed-1": {"alpha": 0.5}})
    for _ in range(count):
        append(ring, make_frame(global_step=ring.last + 1, time_unix_ns=ring.last + 1, seeds=seeds, live=seeds))
        spool.write()


def spool_in(directory: Path, ring: Ring) -> Spool:
    return Spool(directory, ring, CATALOGUE, resource_for, most_bytes=10**9, warnings=Warnings())


def test_steps_that_were_spooled_and_dropped_while_others_were_read_are_found(tmp_path: Path, ring: Ring) -> None:
    """A file is read once, and the trainer goes on writing to it."""
    spool = spool_in(tmp_path, ring)
    source = LiveSource(ring, Encoder(CATALOGUE, resource_for), spool)
    publish(ring, spool, 500)
    found: list[int] = []
    while len(found) < 1_000:
        blocks, gone = source.after(100)
        assert blocks
        assert gone == 0
        for block in blocks:
            found += block.steps.tolist()
            source.advance(block.rows)
        if blocks[-1].last >= ring.first - 1 and ring.last == 500:
            publish(ring, spool, 500)
    assert found == list(range(1, 1_001))
    spool.close("completed", is_delivered=True)


def test_steps_in_memory_are_not_lost_where_the_disk_has_only_later_ones(tmp_path: Path, ring: Ring) -> None:
    """The oldest files have been deleted, to keep to the size that the user allows."""
    spool = spool_in(tmp_path, ring)
    source = LiveSource(ring, Encoder(CATALOGUE, resource_for), spool)
    with spool._lock:
        publish(ring, spool, 500)
    first, spool._last = ring.first, 490
    spool.tend()
    blocks, gone = source.after(100)
    assert (blocks[0].first, gone) == (first, first - 1)
    spool.close("completed", is_delivered=True)
