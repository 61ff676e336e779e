"""Steps that are written to files, carried over and sent later are those that a live session would have sent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import warm
from gateways import RunningGateway
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

import esper_otel
from esper_otel import ConfigurationError, EsperSettings, Stage, TamiyoClient
from esper_otel.cli import main
from esper_otel.export import file_sender
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.file_sender import FileSender
from esper_otel.export.transport import Result, open_sender
from esper_otel.send import lines as lines_module
from esper_otel.send.lines import NOTES, Progress, lines_of
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

STEPS = 120
PARTIAL = ExportMetricsServiceResponse(partial_success=ExportMetricsPartialSuccess(rejected_data_points=7))
# Records, and is killed in the middle of it; with "end" it ends by itself.
TRAIN = """
import math, os, signal, sys
import esper_otel
from esper_otel import Stage
telemetry = esper_otel.start(run_id=sys.argv[1])
for step in range(int(sys.argv[2])):
    with telemetry.step(epoch=step // 50) as now:
        now.put(loss=math.nan if step % 17 == 5 else 2.0 / (step + 1))
        now.seed("stays", stage=Stage.BLENDING, alpha=step / 7)
        if 20 <= step < 60:
            now.seed("goes", stage=Stage.TRAINING, alpha=0.5)
    while step == 80 and "end" not in sys.argv and telemetry.health()["exported"] < 40:
        pass
    if step == 60:
        telemetry.retire_seed("goes")
if "end" not in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
telemetry.close()
"""
NOWHERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://192.0.2.1:4317"}  # no route from behind the air gap


def trained(run_id: str, *more: str, **environ: str) -> warm.Done:
    return warm.run("-c", TRAIN, run_id, str(STEPS), *more, env={**os.environ, **environ}, imported=warm.PACKAGE)


def sent(gateway: RunningGateway, *paths: Path) -> warm.Process:
    environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}"}
    return warm.started("-m", "esper_otel", "send", *paths, env=environ, imported=warm.PACKAGE)


def steps_at(gateway: RunningGateway, run_id: str) -> list[Any]:
    """Every step of a run: its number, epoch, values and seeds, without what differs from run to run."""
    found: dict[int, tuple[Any, ...]] = {}
    cursor = None
    with TamiyoClient(gateway.grpc) as client:
        while page := client.pull(run_id, cursor, max_packets=1000):
            cursor = page.cursor
            for each in page:
                seeds = [(s.seed_id, str(s)) for s in each.state.seed_states]
                values = {name: repr(each.state.training_metrics.get(name)) for name in ("loss", "loss_delta")}
                found[each.step] = (each.step, each.state.current_epoch, each.complete, seeds, values)
        [run] = client.runs(run_id)
    return [*(found[step] for step in sorted(found)), run.missing]


def test_a_run_in_files_is_equal_to_one_that_was_sent_live(tmp_path: Path) -> None:
    """Killed while it is recorded, carried elsewhere, killed while it is delivered, and delivered twice."""
    files, spool, elsewhere = tmp_path / "files", tmp_path / "spool", tmp_path / "elsewhere"
    spool.mkdir()
    written = {
        "ESPER_EXPORT_FILE": str(files),
        "ESPER_SPOOL_DIR": str(spool),
        "ESPER_EXPORT_EVERY_S": "0.05",
        **NOWHERE,
    }
    killed = trained("carried", **written)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with RunningGateway() as gateway:
        assert trained("live", "end", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://{gateway.grpc}").returncode == 0
        elsewhere.mkdir()
        shutil.move(files, elsewhere / "files")
        shutil.move(spool, elsewhere / "spool")
        first = sent(gateway, elsewhere / "files", elsewhere / "spool")
        first.stdout.readline()  # a file is delivered
        first.kill()
        first.communicate()
        paths = [elsewhere / "files", *([elsewhere / "spool"] if any((elsewhere / "spool").iterdir()) else [])]
        last = sent(gateway, *paths)
        said, errors = last.communicate(timeout=120)
        assert last.returncode == 0, (said, errors)
        assert steps_at(gateway, "carried") == steps_at(gateway, "live")
        for notes in elsewhere.glob(f"files/*{NOTES}"):
            notes.unlink()
        again = sent(gateway, elsewhere / "files")
        again.communicate(timeout=120)
        assert again.returncode == 0
        assert steps_at(gateway, "carried") == steps_at(gateway, "live")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a session with five steps, each in a line of its own."""
    monkeypatch.setenv("ESPER_EXPORT_FILE", str(tmp_path / "files"))
    with esper_otel.start(run_id="written", settings=EsperSettings(export_every_s=0)) as telemetry:
        for step in range(5):
            telemetry.record_step({"loss": float(step)}, epoch=0)
            while telemetry.health()["exported"] != step + 1:
                pass
    monkeypatch.delenv("ESPER_EXPORT_FILE")
    [path] = (tmp_path / "files").iterdir()
    return path


def losses(collector: MemoryCollector) -> list[float | None]:
    return [point.value for point in collector.points() if point.name == "loss" and not point.flags]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Any:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        yield collector


def test_each_line_is_a_request_in_otlps_json(written: Path) -> None:
    """What the Collector's receiver ``otlpjsonfile`` reads. Ends of series stand in the scope of the series."""
    scopes: dict[bool, set[str]] = {False: set(), True: set()}
    for text in written.read_text(encoding="utf-8").splitlines():
        [of_resource] = json.loads(text)["resourceMetrics"]
        attributes = {each["key"]: each["value"] for each in of_resource["resource"]["attributes"]}
        assert attributes["esper.run.id"] == {"stringValue": "written"}
        for scope in of_resource["scopeMetrics"]:
            for metric in scope["metrics"]:
                if metric["name"] == "loss":
                    for point in metric["gauge"]["dataPoints"]:
                        assert isinstance(point["timeUnixNano"], str)
                        assert ("asDouble" in point) != bool(point.get("flags"))
                        scopes[bool(point.get("flags"))].add(json.dumps(scope["scope"]))
    assert scopes[False] == scopes[True] != set()
    assert written.stat().st_mode & 0o077 == 0


def test_delivery_goes_on_where_it_was(
    written: Path, collector: MemoryCollector, capsys: pytest.CaptureFixture[str]
) -> None:
    """By endpoint; what a process writes at the moment has no end yet, and comes with the next call."""
    whole = written.read_bytes()
    lines = whole.splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:2]) + lines[2][:-20])
    assert main(["send", str(written)]) == 0
    assert "2 requests delivered" in (said := capsys.readouterr().out)
    assert "the last line has no end" in said
    written.write_bytes(whole)
    assert main(["send", str(written.parent)]) == 0
    assert f"{len(lines) - 2} requests delivered" in capsys.readouterr().out
    assert losses(collector) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert main(["send", str(written)]) == 0
    assert "0 requests delivered" in capsys.readouterr().out
    with MemoryCollector() as other, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", other.grpc_endpoint)
        assert main(["send", str(written)]) == 0
        assert losses(other) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_is_not_otlp_is_left_out_and_said(
    written: Path, collector: MemoryCollector, capsys: pytest.CaptureFixture[str]
) -> None:
    written.write_bytes(b'{"resourceLogs": []}\n\xff\n[1]\n\n' + written.read_bytes())
    assert main(["send", str(written)]) == 1
    assert "3 lines that are not OTLP metrics were left out" in capsys.readouterr().out
    assert losses(collector) == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("refusal", [grpc.StatusCode.INVALID_ARGUMENT, PARTIAL])
def test_what_was_refused_is_told_until_its_note_is_removed(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refusal: Any
) -> None:
    """A job that calls it again would otherwise report that everything is delivered."""
    second = written.read_bytes().splitlines(keepends=True)[1]
    start = written.read_bytes().index(second)
    answers = [None, refusal]
    kind = "7 points refused" if refusal is PARTIAL else "1 refused for good"
    with MemoryCollector(answer=lambda _: answers.pop(0) if answers else None) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        assert main(["send", str(written)]) == 1
        assert kind in capsys.readouterr().out
        notes = written.with_name(written.name + NOTES)
        for _ in range(2):
            assert main(["send", str(written)]) == 1
            assert f", in earlier calls {kind}: see {notes}, and remove it" in capsys.readouterr().out
        [of_endpoint] = json.loads(notes.read_text(encoding="utf-8")).values()
        [named] = of_endpoint["named"]
        assert named.startswith(f"bytes {start} to {start + len(second)}, run ")
        notes.unlink()
        assert main(["send", str(written)]) == 0


def test_what_was_refused_of_a_spool_is_told_until_its_note_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps are gone with their folder; their number is not."""
    spool = tmp_path / "spool"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    telemetry = esper_otel.start(run_id="refused", settings=EsperSettings(spool_dir=spool))
    telemetry.record_step({"loss": 1.0}, epoch=0)
    telemetry.close(timeout_s=0.1)
    with MemoryCollector(answer=lambda _: grpc.StatusCode.INVALID_ARGUMENT) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        assert main(["send", str(spool)]) == 1
        assert "1 steps lost: refused" in (first := capsys.readouterr().out)
        for _ in range(2):
            assert main(["send", str(spool)]) == 1
            said = capsys.readouterr().out
            assert ", in earlier calls " in said
            assert "1 steps lost: refused: see " in said
        assert first != said
        (spool / "refused.json").unlink()
        assert main(["send", str(spool)]) == 0


def test_an_endpoint_that_is_away_leaves_the_rest_for_later(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert main(["send", "--within", "0.2", str(written)]) == 1
    assert "the rest is for the next call" in capsys.readouterr().out


def test_notes_that_are_damaged_or_cannot_be_written_cost_a_repetition(
    written: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = written.with_name(written.name + NOTES)
    for text in ("nonsense", "[]", '{"here": -1}', '{"here": "far"}', f'{{"here": {10**12}}}'):
        notes.write_text(text, encoding="utf-8")
        assert Progress(written, "here").offset == 0

    def full(*_arguments: Any, **_named: Any) -> int:
        raise OSError(28, "No space left on device")

    progress = Progress(written, "here")
    caplog.clear()
    monkeypatch.setattr(Path, "replace", full)
    progress.note(5)
    progress.note(6)
    assert progress.offset == 6
    assert len(caplog.records) == 1


@pytest.mark.parametrize("content", ["a file of mine\n", '{"refused": "mine"}', "[" * 100_000, None])
def test_a_file_with_the_name_of_a_note_is_left_alone(
    written: Path, collector: MemoryCollector, caplog: pytest.LogCaptureFixture, tmp_path: Path, content: str | None
) -> None:
    """So is a link, and what it leads to. The steps are sent all the same, each time anew."""
    notes, elsewhere = written.with_name(written.name + NOTES), tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    if content is None:
        notes.symlink_to(elsewhere)
    else:
        notes.write_text(content)
    before = notes.read_text()
    assert main(["send", str(written)]) == 0
    assert losses(collector) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert notes.is_symlink() == (content is None)
    assert notes.read_text() == before
    assert {each.name for each in written.parent.iterdir()} == {written.name, notes.name}
    assert "is left alone" in caplog.text


def test_files_of_others_are_read_as_text_and_within_bounds(
    written: Path, collector: MemoryCollector, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is too long or has too many values is left out; control characters do not reach the terminal."""
    monkeypatch.setattr(lines_module, "_MOST_BYTES", 100_000)
    monkeypatch.setattr(lines_module, "_MOST_WORDS", 20_000)
    bad = [b'{"resourceMetrics": "' + b"x" * 350_000 + b'"}', b'{"resourceMetrics": [' + b"{}," * 25_000 + b"{}]}"]
    hostile = written.with_name("\x1b]0;gone\x07.jsonl")
    hostile.write_bytes(b"\n".join([*bad, b""]) + written.read_bytes())
    notes = hostile.with_name(hostile.name + NOTES)
    notes.write_text(json.dumps({"elsewhere": {"offset": 1, "refused": {"\x1b[31mred": 3}, "named": ["\x1b[2J"]}}))
    earlier = Progress(hostile, "elsewhere").refusals
    assert not [text for text in (*earlier.counts, *earlier.noted()["named"]) if "\x1b" in text]
    assert main(["send", str(hostile)]) == 1
    said = capsys.readouterr().out
    assert "2 lines that are not OTLP metrics were left out" in said
    assert "\x1b" not in said
    assert losses(collector) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_pipe_holds_up_nothing(
    tmp_path: Path, collector: MemoryCollector, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    assert main(["send", str(tmp_path / "x.jsonl")]) == 2
    assert "not a plain file" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["no/such", "."])
def test_a_path_that_cannot_be_meant_is_a_mistake(tmp_path: Path, path: str, collector: MemoryCollector) -> None:
    (tmp_path / "notes.txt").touch()
    assert main(["send", str(tmp_path / path)]) == 2


def test_an_empty_directory_has_nothing_to_send_and_holds_nothing_up(
    written: Path, tmp_path: Path, collector: MemoryCollector, capsys: pytest.CaptureFixture[str]
) -> None:
    """The spool of a run that has ended well, next to its files."""
    spool = tmp_path / "spool"
    spool.mkdir()
    assert main(["send", str(written.parent), str(spool)]) == 0
    assert f"{spool}: nothing to send\n" in capsys.readouterr().out
    assert losses(collector) == [0.0, 1.0, 2.0, 3.0, 4.0]


# -- the files ---------------------------------------------------------------------------------------------


def body_of_a_step() -> bytes:
    with MemoryCollector() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        with esper_otel.start(run_id="one") as telemetry, telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
            now.seed("a", stage=Stage.TRAINING)
        return collector.requests[0].SerializeToString()


def test_files_rotate_and_a_full_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of_a_step()
    sender = FileSender(tmp_path / "new" / "files", most_bytes=15_000)
    try:
        for _ in range(10):
            assert sender.send(body, 1.0).result is Result.DELIVERED
        monkeypatch.setattr("os.write", lambda file, line: os.pwrite(file, line[:100], 0) and 100)
        outcome = sender.send(body, 1.0)
        assert outcome.result is Result.TEMPORARY
        assert "the disk is full" in outcome.reason
        monkeypatch.undo()
        assert sender.send(body, 1.0).result is Result.DELIVERED
    finally:
        sender.close()
    assert sender.send(body, 1.0).result is Result.TEMPORARY
    files = sorted((tmp_path / "new" / "files").iterdir())
    assert len(files) > 2
    assert all(file.stat().st_size <= 15_000 for file in files)
    assert [line.body for file in files for line in lines_of(file, 0)].count(body) >= 10


@pytest.mark.parametrize("name", ["os.write", "os.fsync"])
def test_a_disk_that_does_not_answer_does_not_hold_up_the_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network's file system whose server is gone."""
    monkeypatch.setattr(file_sender, "_CLOSE_S", 0.05)
    call: Any = getattr(os, name.removeprefix("os."))
    asked, answers = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        asked.set()
        answers.wait()
        return call(*arguments)

    body = body_of_a_step()
    said: list[str] = []

    def close() -> None:
        try:
            sender.close()
        except TimeoutError as error:
            said.append(str(error))

    sender = FileSender(tmp_path)
    assert sender.send(body, 1.0).result is Result.DELIVERED
    monkeypatch.setattr(name, held)
    writing = threading.Thread(target=sender.send, args=(body, 1.0))
    closing = threading.Thread(target=close)
    try:
        if name == "os.write":
            writing.start()
            assert asked.wait(30)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
        assert "has not answered" in said[0]
    finally:
        answers.set()
        closing.join()
        if writing.ident is not None:
            writing.join()


def test_a_disk_that_fails_at_the_end_leaves_the_rest_of_the_end_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        if os.path.samestat(os.fstat(file), next((tmp_path / "files").iterdir()).stat()):
            raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr("os.fsync", fail)
    settings = EsperSettings(export_file=tmp_path / "files", spool_dir=tmp_path / "spool")
    with esper_otel.start(run_id="one", settings=settings) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    assert telemetry.health()["exported"] == 1
    assert telemetry.health()["faults"] == 1
    assert not [folder for folder in (tmp_path / "spool").iterdir() if folder.is_dir()]  # closed, and taken as sent


def test_a_directory_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="export_file"):
        esper_otel.start(settings=EsperSettings(export_file=tmp_path / "file"))


def test_the_setting_needs_no_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of another place do not matter."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://nonsense")
    with pytest.raises(ConfigurationError):
        open_sender(endpoint_from_environment())
    with esper_otel.start(settings=EsperSettings(export_file=tmp_path)) as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    assert telemetry.health()["exported"] == 1
