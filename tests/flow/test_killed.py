"""The spool, from a trainer that is killed to the endpoint that gets its steps from the next start."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import warm
from frame_examples import sealed, taken_apart
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

import esper_otel
from esper_otel import EsperSettings
from esper_otel.export.folder import Folder
from esper_otel.frames import records
from esper_otel.frames.layout import HEAD
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

# Says what it has recorded, then does what it was told to.
TRAINER = """
import json, os, resource, signal, sys, time
import esper_otel
from esper_otel import Metric
telemetry = esper_otel.start(run_id=sys.argv[1], metrics=[Metric("tokens_per_s", unit="rate")])
for step in range(int(sys.argv[2])):
    with telemetry.step(epoch=0) as now:
        loss = float("nan") if step % 7 == 3 else step / 8
        now.put({"loss": loss, "gradient_norm": 1.0 + step, "tokens_per_s": step})
        now.seed("seed-1", stage=4, alpha=step / 1024)
    if step == 5:
        telemetry.retire_seed("seed-1")
    print(json.dumps([now.time_unix_ns, loss, step]), flush=True)
exec(sys.argv[3])
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
SENT = "while telemetry.health()['queue']:\n    time.sleep(0.01)\n"

Stream = tuple[str, int, str]


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A spool directory, and an endpoint where nothing listens."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path / "spool"


def trained(run_id: str, steps: int, then: str, **environment: str) -> dict[int, Mapping[str, float]]:
    """What a trainer recorded in another process: by time, the values that were put."""
    command = ("-c", TRAINER, run_id, str(steps), then)
    done = warm.run(*command, env={**os.environ, **environment}, imported=warm.PACKAGE)
    sys.stderr.write(done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == steps
    return {
        time_ns: {"loss": loss, "tokens_per_s": float(step), "kasmina.seed.alpha": step / 1024}
        for time_ns, loss, step in rows
    }


@pytest.fixture
def collector() -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        yield collector


def sent_by_next_start(collector: MemoryCollector) -> esper_otel.Telemetry:
    """A session that sends what there is, and a step of its own; closed."""
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.http_endpoint
    telemetry = esper_otel.start(run_id="next")
    telemetry.record_step({"loss": 0.5}, epoch=0)
    telemetry.close(timeout_s=120)
    return telemetry


def received(collector: MemoryCollector, run_id: str) -> dict[Stream, list[float]]:
    """By name, time and seed: the values that came, each time they came."""
    values: dict[Stream, list[float]] = {}
    for point in collector.points():
        if point.resource["esper.run.id"] == run_id and point.value is not None and point.scope == "esper_otel":
            stream = (point.name, point.time_unix_ns, point.attributes.get("seed_id", ""))
            values.setdefault(stream, []).append(point.value)
    return values


def assert_exact(collector: MemoryCollector, run_id: str, recorded: dict[int, Mapping[str, float]]) -> None:
    """Every value put, once, under its time, and no other."""
    came = received(collector, run_id)
    for name in ("loss", "tokens_per_s", "kasmina.seed.alpha"):
        of_name = {time_ns: values for (other, time_ns, _), values in came.items() if other == name}
        assert repr(of_name) == repr({time_ns: [values[name]] for time_ns, values in recorded.items()})


def ended(collector: MemoryCollector, run_id: str) -> list[str]:
    return [
        point.attributes["outcome"]
        for point in collector.points()
        if point.name == "esper.run.ended" and point.resource["esper.run.id"] == run_id and not point.flags
    ]


def test_a_killed_trainers_steps_are_sent_by_the_next_start(nowhere: Path, collector: MemoryCollector) -> None:
    """Every step for which record_step() or the scope returned; the user's own metric too, and the end of the run."""
    recorded = trained("killed", 300, KILL)
    telemetry = sent_by_next_start(collector)
    assert_exact(collector, "killed", recorded)
    assert ended(collector, "killed") == ["killed"]
    assert telemetry.health()["dropped"] == 0
    assert list(nowhere.iterdir()) == []
    [pid] = {p.resource["process.pid"] for p in collector.points() if p.resource["esper.run.id"] == "killed"}
    assert pid != os.getpid()


def test_what_a_rank_left_goes_before_its_own_new_steps(
    nowhere: Path, collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a host share a spool. If the first that is started again sent what all have left, that would reach a
    backend after what the others record meanwhile, and one that keeps series in order would refuse it. What nobody's
    rank has left is sent after a while.
    """
    ranks = {"WORLD_SIZE": "3", "ESPER_RUN_ATTEMPT": "1"}
    for rank in range(3):
        trained("job", 5, KILL, RANK=str(rank), **ranks)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0.05")

    def sent(attempt: str) -> list[int]:
        found = {
            point.resource["esper.rank"]: None
            for point in collector.points()
            if point.name == "loss" and str(point.resource["esper.run.attempt"]) == attempt
        }
        return list(found)

    for rank in (1, 0):
        esper_otel.start(run_id="job", rank=rank, world_size=3).close()
        assert sent("1") == ([1] if rank else [1, 0])
    monkeypatch.setattr("esper_otel.export.exporter._OTHERS_AFTER_S", 0.1)
    with esper_otel.start(run_id="job", rank=0, world_size=3):
        assert collector.wait_for(lambda _: sent("1") == [1, 0, 2], 60)
    assert list(nowhere.iterdir()) == []


def test_the_series_of_a_killed_run_end(nowhere: Path, collector: MemoryCollector) -> None:
    """Dashboards must not show a dead run for another five minutes; a seed that was back at once goes on till then."""
    recorded = trained("killed", 10, KILL)
    sent_by_next_start(collector)
    stale = [p for p in collector.points() if p.flags == 1 and p.resource["esper.run.id"] == "killed"]
    times = sorted(recorded)
    assert {p.time_unix_ns for p in stale if p.name == "kasmina.seed.alpha"} == {times[9] + 1_000_000}
    assert {p.time_unix_ns for p in stale if p.name == "tokens_per_s"} == {times[9] + 1_000_000}


def test_what_close_could_not_send_is_sent_by_the_next_start(nowhere: Path, collector: MemoryCollector) -> None:
    """With the outcome that the run had, before anything of the new run, in the order of the runs."""
    first = trained("first", 20, "telemetry.close(timeout_s=0.2)")
    second = trained("second", 20, "raise KeyError('no')")
    telemetry = sent_by_next_start(collector)
    assert_exact(collector, "first", first)
    assert_exact(collector, "second", second)
    assert (ended(collector, "first"), ended(collector, "second")) == (["completed"], ["KeyError"])
    order = [p.resource["esper.run.id"] for p in collector.points() if p.name == "loss"]
    assert list(dict.fromkeys(order)) == ["first", "second", "next"]
    assert telemetry.health()["exported"] == 1


def test_only_what_was_not_acknowledged_is_sent_again(
    nowhere: Path, collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of a run that was going well."""
    then = SENT + "telemetry.record_step({'loss': 0.125}, epoch=0)\n" + KILL
    recorded = trained("killed", 50, then, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_endpoint)
    assert collector.frames_received == 50
    sent_by_next_start(collector)
    came = {time_ns: values for (name, time_ns, _), values in received(collector, "killed").items() if name == "loss"}
    assert len(came) == 51
    assert all(len(values) == 1 for values in came.values())
    assert came.keys() > recorded.keys()


def test_a_disk_that_takes_no_note_has_nothing_sent_again(
    nowhere: Path, collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was delivered is delivered, whatever becomes of the note that says so."""

    def full(_folder: Folder, _sequence: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Folder, "acknowledge", full)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
    with esper_otel.start(run_id="full", settings=EsperSettings(export_every_s=0.05)) as telemetry:
        for step in range(3):
            telemetry.record_step({"loss": step / 8}, epoch=0)
            assert collector.wait_for(lambda c, count=step + 1: c.frames_received >= count)  # type: ignore[misc]
    losses = [p.value for p in collector.points() if p.name == "loss" and p.value is not None]
    assert losses == [0.0, 0.125, 0.25]


def test_a_session_that_lives_keeps_its_spool(nowhere: Path, collector: MemoryCollector) -> None:
    """Two trainers share a directory, one of them in this very process."""
    alive = esper_otel.start(run_id="alive")
    alive.record_step({"loss": 1.0}, epoch=0)
    waits = ("-c", TRAINER, "beside", "1", "sys.stdin.read()")
    beside = warm.started(*waits, imported=warm.PACKAGE, takes_input=True)
    beside.stdout.readline()
    sent_by_next_start(collector)
    assert {p.resource["esper.run.id"] for p in collector.points()} == {"next"}
    beside.kill()
    beside.communicate()
    alive.close(timeout_s=0.1)
    sent_by_next_start(collector)
    assert {p.resource["esper.run.id"] for p in collector.points()} == {"next", "alive", "beside"}


def test_an_outage_may_outlast_the_memory(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the buffer had to drop comes from the disk."""
    is_up = False

    def answer(_request: object) -> Any:
        return ExportMetricsServiceResponse() if is_up else 503

    with MemoryCollector(answer=answer, retry_after_s=0.05) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.http_endpoint)
        telemetry = esper_otel.start(settings=EsperSettings(buffer_bytes=1024 * 1024, export_every_s=0.05))
        for step in range(5_000):
            telemetry.record_step({"loss": step / 8}, epoch=0)
        is_up = True
        telemetry.close(timeout_s=120)
        losses = [p.value for p in collector.points() if p.name == "loss" and p.value is not None]
    assert telemetry.health()["dropped"] == 0
    assert list(dict.fromkeys(losses)) == [step / 8 for step in range(5_000)]
    assert list(nowhere.iterdir()) == []


def test_a_spool_that_was_cut_short_or_damaged_gives_what_is_whole(nowhere: Path, collector: MemoryCollector) -> None:
    """What is readable is sent, and the rest is counted."""
    recorded = trained("killed", 100, KILL)
    [path] = nowhere.rglob("*.frames")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content[:-10])
    telemetry = sent_by_next_start(collector)
    came = {time_ns: values for (name, time_ns, _), values in received(collector, "killed").items() if name == "loss"}
    assert len(came) == 98
    assert all(repr(values) == repr([recorded[time_ns]["loss"]]) for time_ns, values in came.items())
    [dropped] = [p for p in collector.points() if p.name == "esper.frames.dropped" and not p.flags]
    assert (dropped.attributes, dropped.value) == ({"reason": "spool damaged"}, 2.0)
    assert telemetry.health()["dropped"] == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"not a spool", os.urandom(5_000), b"\xe5\x9e\x0f3" * 1_000],
    ids=["empty", "text", "random", "only heads"],
)
def test_a_file_that_holds_no_frame_is_no_trouble(nowhere: Path, collector: MemoryCollector, content: bytes) -> None:
    """The new run goes out all the same."""
    folder = nowhere / "1-1-1"
    folder.mkdir(parents=True)
    (folder / "00000001.frames").write_bytes(content)
    (folder / "acknowledged").write_bytes(content[:3])
    telemetry = sent_by_next_start(collector)
    assert telemetry.health()["exported"] == 1
    assert list(nowhere.iterdir()) == [folder]  # without our marker nothing is deleted
    assert (folder / "00000001.frames").read_bytes() == content


def test_records_that_somebody_else_has_made_are_skipped_and_counted(
    nowhere: Path, collector: MemoryCollector, caplog: pytest.LogCaptureFixture
) -> None:
    """With right checksums, between those of a killed trainer: all of its steps arrive, and the folder goes."""
    recorded = trained("killed", 20, KILL)
    [path] = nowhere.rglob("*.frames")
    contents = taken_apart(path.read_bytes())
    run = json.dumps([{"run_id": ["x"], "attempt": 1}, {}, ""]).encode()
    empty = HEAD.pack(1, 0, 1, 0, 0, 0, 0, 0)

    def row(sequence: int, run: int, layout: int, seeds: int, retired_bytes: int, content: bytes = empty) -> bytes:
        return b"F" + records._FIELDS.pack(sequence, run, layout, seeds, retired_bytes) + content

    hostile = [
        *(b"", b"R", b"F", b"?1234", b"R\x63\0\0\0" + run, b"L\x63\0\0\0[[[]],[]]", b"S\x63\0\0\0" + b"[" * 100_000),
        *(b"S\x63\0\0\0" + json.dumps([["\ud800"], 10]).encode(), b'S\x63\0\0\0[["a"],11]', b"S\x63\0\0\0[[],10]"),
        b'L\x63\0\0\0[[["a"],[],[],[]],[["a b","1","x"]]]',
        *(b"L\x01\0\0\0[[[],[],[],[]],[]]", b"L\0\0\0\0[[[],[],[],[]],[]]"),  # numbers that are taken
        b"R\x63\0\0\0" + json.dumps([{"run_id": "x", "attempt": 2**70}, {}, ""]).encode(),
        row(2**64 - 1, 1, 100, 0, 0),  # a number that would make all others old
        row(2**62, 1, 100, 0, 0),
        row(21, 1, 100, 0, 2**32 - 1),
        row(21, 100, 100, 0, 0),  # names in place of a run
        row(21, 1, 1, 0, 0),  # and a run in place of names
        *(row(21, 1, 100, 0, 0, empty[:40]), row(21, 1, 100, 0, 0, empty + b"1234567")),
        row(21, 1, 100, 0, 0, HEAD.pack(1, 0, 0, 0, 0, 0, 0, 0)),  # no time
        row(21, 1, 100, 0, 0, HEAD.pack(1, 0, 1, 2**48, 0, 0, 0, 0)),  # a digest that no number on the wire can be
        row(21, 1, 100, 0, 0, HEAD.pack(1, 0, 1, 0, 0, 0, 0, 2)),  # an unknown flag
    ]
    layout = b"L\x64\0\0\0[[[],[],[],[]],[]]"  # the only one that can be used
    mixed = [*contents[:6], layout, *hostile, *contents[6:]]
    path.write_bytes(sealed(mixed))
    telemetry = sent_by_next_start(collector)
    assert_exact(collector, "killed", recorded)
    assert telemetry.health()["dropped"] == sum(record[:1] == b"F" for record in hostile)
    assert f"{len(hostile)} records could not be used (the first at byte " in caplog.text
    assert not path.parent.exists()
    [aside] = (nowhere / "damaged").iterdir()
    assert str(aside) in caplog.text
    assert aside.stat().st_mode & 0o777 == 0o600
    assert sealed(hostile[:1]) in aside.read_bytes()
    assert aside.read_bytes().endswith(sealed(hostile[-1:]))


FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))  # what a full disk does to a file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for step in range(200):
    telemetry.record_step({"loss": step / 8}, epoch=0)
telemetry.close()
print(json.dumps(dict(telemetry.health())), file=sys.stderr)
"""


def test_a_full_disk_costs_the_spool_and_nothing_else(
    nowhere: Path, collector: MemoryCollector, capfd: pytest.CaptureFixture[str]
) -> None:
    """The steps are in memory; they go out as they do without a spool, and a line says what is wrong."""
    trained("full", 10, FULL, OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_endpoint)
    said = capfd.readouterr().err
    assert "kept in memory only" in said
    health = json.loads(said.splitlines()[-1])
    assert {name: health[name] for name in health if name not in ("latency_ms", "buffer_bytes", "retries")} | {
        "last_error": None
    } == {
        **dict.fromkeys(["dropped", "queue", "kept", "failed", "nonfinite", "out_of_range", "faults", "mistakes"], 0),
        **dict.fromkeys(["events", "events_dropped"], 0),
        "recorded": 210,
        "exported": 210,
        "last_error": None,
        "nonfinite": 1,
    }
    assert collector.frames_received == 210


def test_a_full_disk_at_a_dead_endpoint_loses_what_it_must_and_says_how_much(
    nowhere: Path, collector: MemoryCollector, capfd: pytest.CaptureFixture[str]
) -> None:
    """Recorded is sent, kept or dropped: the three add up."""
    trained("full", 10, FULL)
    health = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert health["recorded"] == 210 == health["kept"] + health["dropped"]
    assert 10 <= health["kept"] < 210
    sent_by_next_start(collector)
    losses = {time for (name, time, _) in received(collector, "full") if name == "loss"}
    assert len(losses) == health["kept"]
