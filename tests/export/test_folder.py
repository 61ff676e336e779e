"""The folders of a spool: only what this library has made is sent, changed or deleted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm
from frame_examples import make_frame, records_of

import esper_otel
from esper_otel import EsperSettings
from esper_otel.export.folder import MARKER, Folder, abandoned
from esper_otel.export.resource import resource_for
from esper_otel.frames.records import RecordWriter
from esper_otel.log import Warnings
from esper_otel.schema import METRICS
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

NAME = "00000000000000000007-1-0123abcd"
STEPS = 3


def segment() -> bytes:
    """A file of three steps, as a session writes it."""
    writer = RecordWriter({metric.name: metric for metric in METRICS}, resource_for)
    frames = [make_frame(sequence=n, global_step=n, time_unix_ns=n * 10**9) for n in range(1, STEPS + 1)]
    return b"".join(records_of(writer, frames))


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A folder that a killed session has left with three steps."""
    folder = Folder.create(tmp_path)
    file = folder.append_to("00000001.frames")
    os.write(file, segment())
    os.close(file)
    folder.release()
    return folder.path.rename(tmp_path / NAME)


@contextmanager
def session(directory: Path, caplog: pytest.LogCaptureFixture) -> Iterator[MemoryCollector]:
    """A session with this spool, from its start to its end."""
    with MemoryCollector() as collector, pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
        patch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        with esper_otel.start(run_id="now", settings=EsperSettings(spool_dir=directory)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
        yield collector


def contents(directory: Path) -> dict[str, bytes]:
    """Every plain file under a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_a_killed_session_left_is_sent_and_deleted(
    tmp_path: Path, left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The control for the tests below."""
    with session(tmp_path, caplog) as collector:
        assert collector.frames_received == STEPS + 1
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_folders_are_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A spool directory may be one that the user has other things in, behind links too."""
    elsewhere = tmp_path / "elsewhere"
    spool = tmp_path / "spool"
    for folder in (spool / "checkpoints", spool / "1-1-1x", elsewhere / "data"):
        folder.mkdir(parents=True)
        (folder / "model.pt").write_bytes(b"weights")
        (folder / "00000001.frames").write_bytes(b"mine")
    (spool / "notes.txt").write_bytes(b"notes")
    (spool / "link").symlink_to(elsewhere / "data")
    (spool / "12-3-4").symlink_to(elsewhere / "data")
    before = contents(tmp_path)
    with session(spool, caplog) as collector:
        assert collector.frames_received == 1
    assert contents(tmp_path) == before
    assert "12-3-4" in caplog.text  # the link has a session's name: it is refused in words


def test_a_folder_without_a_marker_is_refused(tmp_path: Path, left: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has a session's name, but who knows whose it is."""
    (left / MARKER).unlink()
    before = contents(left)
    with session(tmp_path, caplog) as collector:
        assert collector.frames_received == 1
    assert contents(left) == before
    assert f"{NAME} (it has no file {MARKER}" in caplog.text


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_of_another_version_is_left_alone_and_named(
    tmp_path: Path, left: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """That version can send its steps; this one can read none of them, and deletes none."""
    (left / f"0000000{number}.frames").write_bytes(segment().replace(b"\xe5\x9e\x0f3", b"\xe5\x9e\x0f2"))
    before = contents(left)
    for _ in range(2):
        caplog.clear()
        with session(tmp_path, caplog) as collector:
            assert collector.frames_received == 1
        assert contents(left) == before
        assert f"another version of esper_otel wrote its 0000000{number}.frames: send it with that one" in caplog.text


def test_another_file_in_a_folder_of_ours_stays(tmp_path: Path, left: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody has put it there; the steps are sent all the same."""
    (left / "model.pt").write_bytes(b"weights")
    with session(tmp_path, caplog) as collector:
        assert collector.frames_received == STEPS + 1
    assert contents(left) == {"model.pt": b"weights"}


@pytest.mark.parametrize("name", ["00000001.frames", "00000002.frames", "outcome", "acknowledged", MARKER])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_no_link_and_no_pipe_in_a_folder_is_followed(
    tmp_path: Path, left: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They would lead to a file that is not ours, or stop the exporter."""
    target = tmp_path / "target"
    target.write_bytes(segment())
    before = target.read_bytes()
    (left / name).unlink(missing_ok=True)
    if kind == "link":
        (left / name).symlink_to(target)
    elif kind == "hard link":
        (left / name).hardlink_to(target)
    else:
        os.mkfifo(left / name)
    with session(tmp_path, caplog) as collector:
        assert collector.frames_received == 1
    assert target.read_bytes() == before
    assert left.is_dir()
    assert NAME in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user takes root")
@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_folder_of_another_user_is_not_adopted(
    tmp_path: Path, left: Path, of: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its steps would go out with this user's token."""
    os.chown(left if of == "folder" else left / "00000001.frames", 65534, 65534)
    before = contents(left)
    with session(tmp_path, caplog) as collector:
        assert collector.frames_received == 1
    assert contents(left) == before
    assert NAME in caplog.text


def test_a_folder_that_others_may_write_to_is_not_adopted(
    tmp_path: Path, left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its steps may be forged."""
    left.chmod(0o777)
    with session(tmp_path, caplog) as collector:
        assert collector.frames_received == 1
    assert "others may write to it" in caplog.text


def test_many_refused_folders_are_one_short_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A log does not grow with what others plant."""
    for number in range(100):
        (tmp_path / f"{number}-1-1").mkdir()
        (tmp_path / f"{number}-1-1" / "model.pt").touch()
    assert list(abandoned(tmp_path, Warnings())) == []
    assert len(caplog.records) == 1
    assert "and 97 more" in caplog.text


RANK = """
import pathlib, sys
from esper_otel.export.folder import Folder, abandoned
from esper_otel.log import Warnings
directory = pathlib.Path(sys.argv[1])
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    folder = Folder.create(directory)
    for other in abandoned(directory, Warnings()):
        other.remove()
    folder.remove()
"""


def test_ranks_that_start_at_the_same_moment_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each makes its folder while the others look for what was left. No exception, no warning, no trace."""
    command = ("-c", RANK, tmp_path, "300")
    ranks = [warm.started(*command, imported=warm.PACKAGE, takes_input=True) for _ in range(4)]
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    ended = [(rank.communicate()[1], rank.returncode) for rank in ranks]
    assert ended == [("", 0)] * 4
    assert list(tmp_path.iterdir()) == []
