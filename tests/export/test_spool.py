"""The spool: frames on disk until they are acknowledged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm
from frame_examples import append, make_frame

from esper_otel.errors import ConfigurationError
from esper_otel.export import spool as spool_module
from esper_otel.export.folder import Folder, abandoned
from esper_otel.export.resource import resource_for
from esper_otel.export.spool import Spool
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.schema import METRICS

pytestmark = pytest.mark.own_code

SMALL = 20_000
CATALOGUE = {metric.name: metric for metric in METRICS}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", SMALL)


@pytest.fixture
def ring() -> Ring:
    return Ring(100 * 1024)


@pytest.fixture
def spool(tmp_path: Path, ring: Ring) -> Iterator[Spool]:
    spool = open_spool(tmp_path, ring)
    yield spool
    spool.close("completed", is_delivered=False)


def open_spool(directory: Path, ring: Ring, most_bytes: int = 10**9) -> Spool:
    return Spool(directory, ring, CATALOGUE, resource_for, most_bytes=most_bytes, warnings=Warnings())


def publish(ring: Ring, spool: Spool, count: int, *, tend_every: int = 10) -> None:
    for _ in range(count):
        frame = make_frame(sequence=ring.last + 1, global_step=ring.last + 1, time_unix_ns=ring.last + 1)
        append(ring, frame)
        spool.write()
        if ring.last % tend_every == 0:
            spool.tend()


def sequences(spool: Spool, after: int, limit: int) -> list[int]:
    block = spool.after(after, limit)
    return [] if block is None else block.steps.tolist()


def test_what_the_ring_has_dropped_is_still_there(ring: Ring, spool: Spool) -> None:
    """An outage may last longer than the memory does."""
    publish(ring, spool, 1_000)
    assert ring.first > 400
    read = 0
    while read < 1_000:
        steps = sequences(spool, read, 70)
        assert steps == list(range(read + 1, read + 1 + len(steps)))
        assert steps
        read = steps[-1]
    assert sequences(spool, 1_000, 70) == []


def test_reading_may_go_back(ring: Ring, spool: Spool) -> None:
    """A request that failed is made anew."""
    publish(ring, spool, 200)
    assert sequences(spool, 50, 3) == [51, 52, 53]
    assert sequences(spool, 50, 3) == [51, 52, 53]
    assert sequences(spool, 0, 2) == [1, 2]


def test_acknowledged_segments_are_deleted(tmp_path: Path, ring: Ring, spool: Spool) -> None:
    """The disk holds what is owed, not the run."""
    publish(ring, spool, 1_000)
    before = len(list(tmp_path.rglob("*.frames")))
    spool.acknowledge(990)
    assert before > 5
    assert len(list(tmp_path.rglob("*.frames"))) == 1


def test_the_oldest_segments_give_way_when_the_disk_is_used_up(tmp_path: Path, ring: Ring) -> None:
    """Bounded like the memory."""
    spool = open_spool(tmp_path, ring, most_bytes=5 * SMALL)
    publish(ring, spool, 2_000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.frames")) < 6.5 * SMALL
    [first] = sequences(spool, 0, 1)
    assert 1_000 < first < 2_000
    assert sequences(spool, first - 1, 3) == [first, first + 1, first + 2]
    spool.close("completed", is_delivered=True)


def test_frames_that_came_while_a_segment_was_begun_are_written_afterwards(ring: Ring, spool: Spool) -> None:
    """The training thread never waits for the exporter's."""
    publish(ring, spool, 10)
    with spool._lock:
        publish(ring, spool, 5, tend_every=100)
    publish(ring, spool, 5, tend_every=100)
    assert spool.last == 10
    spool.tend()
    assert spool.last == 20
    assert sequences(spool, 0, 100) == list(range(1, 21))


def test_a_forked_child_writes_nothing(ring: Ring, spool: Spool) -> None:
    """It shares the file with its parent."""
    publish(ring, spool, 3)
    child = os.fork()
    if child == 0:
        publish(ring, spool, 3)
        os._exit(0)
    os.waitpid(child, 0)
    publish(ring, spool, 1)
    assert sequences(spool, 0, 100) == [1, 2, 3, 4]


def test_a_folder_is_deleted_when_everything_was_delivered(tmp_path: Path, ring: Ring) -> None:
    """A healthy run leaves nothing behind."""
    spool = open_spool(tmp_path, ring)
    publish(ring, spool, 3)
    spool.close("completed", is_delivered=True)
    assert list(tmp_path.iterdir()) == []


OTHER = """
import pathlib, sys
from esper_otel.export.folder import Folder
folder = Folder.create(pathlib.Path(sys.argv[1]))
print(folder.path.name, flush=True)
sys.stdin.read()
"""


def test_only_folders_whose_sessions_are_over_are_taken(tmp_path: Path, ring: Ring, spool: Spool) -> None:
    """Neither another session of this process, nor one of another process that lives."""
    assert list(abandoned(tmp_path, Warnings())) == []
    other = warm.started("-c", OTHER, tmp_path, imported=warm.PACKAGE, takes_input=True)
    name = other.stdout.readline().strip()
    assert list(abandoned(tmp_path, Warnings())) == []
    other.kill()
    other.communicate()
    [folder] = abandoned(tmp_path, Warnings())
    assert folder.path.name == name
    assert list(abandoned(tmp_path, Warnings())) == []
    folder.remove()
    assert list(tmp_path.iterdir()) == [spool.path]


def test_what_was_acknowledged_is_known_to_the_next_owner(tmp_path: Path) -> None:
    """A killed trainer's steps must not all be sent again."""
    first = Folder.create(tmp_path)
    first.acknowledge(41)
    first.acknowledge(7)
    first.release()
    [second] = abandoned(tmp_path, Warnings())
    assert second.acknowledged == 41
    second.remove()


@pytest.mark.parametrize("below", [".", "folder"])
def test_a_directory_that_cannot_be_used_is_an_error_that_names_the_setting(
    tmp_path: Path, ring: Ring, below: str
) -> None:
    """At the start, not when the trainer has been killed."""
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ConfigurationError, match=r"spool_dir.*ESPER_SPOOL_DIR"):
        open_spool(tmp_path / "file" / below, ring)
