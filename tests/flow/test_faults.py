"""Faults of our own after a delivery: counted, and nothing is sent twice, lost or held up for them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import warm
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import esper_otel
from esper_otel import EsperSettings, Telemetry
from esper_otel.export import encode, provider
from esper_otel.export.blocks import Points, points_of
from esper_otel.export.encode import Encoder
from esper_otel.export.folder import Folder
from esper_otel.export.streams import Streams
from esper_otel.frames.block import Block
from esper_otel.gateway.core import Core
from esper_otel.gateway.ranks import Ranks
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.store.memory import MemoryStore
from esper_otel.record.frame_publisher import Draft
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

TRAINER = """
import os, signal
import esper_otel
telemetry = esper_otel.start(run_id="killed")
for step in range(20):
    with telemetry.step(epoch=0) as now:
        now.put(loss=1.0)
        now.seed("a", stage=3.0, alpha=0.5, **({"learning_rate": 0.25} if step % 3 == 0 else {}))
    if step % 7 == 6:
        telemetry.retire_seed("a")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
        yield collector


def sent(telemetry: Telemetry) -> None:
    while telemetry.health()["queue"]:
        time.sleep(0.001)


def trained(telemetry: Telemetry, steps: int = 12) -> None:
    """Steps in several requests, with seeds that retire."""
    for step in range(steps):
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
            now.seed(f"seed-{step // 4}", stage=3.0, alpha=0.5)
        if step % 4 == 3:
            telemetry.retire_seed(f"seed-{step // 4}")
            sent(telemetry)


def steps_of(collector: MemoryCollector, run_id: str) -> list[float]:
    """The numbers of the steps that came, each time they came."""
    return [
        point.value
        for point in collector.points()
        if point.name == "esper.global_step"
        and point.resource["esper.run.id"] == run_id
        and point.scope == encode.FRAME_SCOPE
        and point.value is not None
    ]


def outcomes(collector: MemoryCollector, run_id: str) -> list[str]:
    return [
        point.attributes["outcome"]
        for point in collector.points()
        if point.name == "esper.run.ended" and point.resource["esper.run.id"] == run_id and point.value is not None
    ]


def broken(*_: object, **__: object) -> Any:
    raise ValueError("a fault of ours")


PARTS = [
    *((Streams, name) for name in ("note", "named", "settled", "all_ended")),
    *((Encoder, name) for name in ("stale", "health_scope")),
]


@pytest.mark.parametrize("has_spool", [False, True], ids=["memory", "spool"])
@pytest.mark.parametrize(("owner", "name"), PARTS, ids=[name for _, name in PARTS])
def test_a_fault_after_the_delivery_repeats_nothing_and_holds_up_nothing(
    collector: MemoryCollector,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    owner: type,
    name: str,
    has_spool: bool,
) -> None:
    """Twenty steps were once sent 428 times, and the end of the run never."""
    if has_spool:
        monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setattr(owner, name, broken)
    with esper_otel.start(run_id="run") as telemetry:
        trained(telemetry)
    assert steps_of(collector, "run") == list(range(1, 13))
    if name != "health_scope":
        assert outcomes(collector, "run") == ["completed"]
    health = telemetry.health()
    assert (health["exported"], health["dropped"], health["queue"], health["kept"]) == (12, 0, 0, 0)
    assert health["last_error"] is None
    assert health["faults"]
    assert not has_spool or list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(("owner", "name"), PARTS, ids=[name for _, name in PARTS])
def test_no_folder_of_the_spool_is_poisoned_by_a_fault_after_the_delivery(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: type, name: str
) -> None:
    """What is delivered is deleted, whatever else becomes of it; each start after it begins with a clean folder."""
    left_behind(tmp_path, monkeypatch)
    monkeypatch.setattr(owner, name, broken)
    esper_otel.start(run_id="next").close()
    assert steps_of(collector, "killed") == list(range(1, 21))
    if name != "health_scope":
        assert outcomes(collector, "killed") == ["killed"]
    assert list(tmp_path.iterdir()) == []
    esper_otel.start(run_id="third").close()
    assert len(steps_of(collector, "killed")) == 20


def left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a trainer that nothing took and that was killed."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(folder))
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    warm.run("-c", TRAINER, env=environment, imported=warm.PACKAGE)
    assert list(folder.iterdir())


def test_a_frame_that_cannot_be_encoded_is_dropped_and_counted(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not hold up those before and behind it."""

    def picky(block: Block, known: Collection[str]) -> Points:
        if any(block.first <= number <= block.last for number in (7, 900)):
            raise ValueError("a fault of ours")
        return points_of(block, known)

    monkeypatch.setattr(encode, "points_of", picky)
    with esper_otel.start(run_id="run", settings=EsperSettings(export_every_s=0.2)) as telemetry:
        for _ in range(1_000):
            telemetry.record_step({"loss": 1.0}, epoch=0)
    assert steps_of(collector, "run") == [step for step in range(1, 1_001) if step not in {7, 900}]
    assert outcomes(collector, "run") == ["completed"]
    assert (telemetry.health()["exported"], telemetry.health()["dropped"]) == (998, 2)
    [dropped] = [p for p in collector.points() if p.name == "esper.frames.dropped" and p.value is not None]
    assert (dropped.attributes, dropped.value) == ({"reason": "cannot be encoded"}, 2.0)


def test_a_folder_that_is_deleted_in_part_has_nothing_sent_again(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kill, or a file that the disk keeps, between the first deletion and the last."""
    left_behind(tmp_path, monkeypatch)
    for most in range(4):
        unlink, deleted = os.unlink, 0

        def some(path: str, *, dir_fd: int | None = None, most: int = most, unlink: Any = unlink) -> None:
            nonlocal deleted
            deleted += dir_fd is not None  # a file in a folder of the spool
            if deleted > most:
                raise OSError(16, "Device or resource busy")
            unlink(path, dir_fd=dir_fd)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "unlink", some)
            telemetry = esper_otel.start(run_id=f"next-{most}")
            telemetry.record_step({"loss": 1.0}, epoch=0)
            telemetry.close()
    esper_otel.start(run_id="last").close()
    assert steps_of(collector, "killed") == list(range(1, 21))
    assert [steps_of(collector, f"next-{most}") for most in range(4)] == [[1.0]] * 4
    assert list(tmp_path.iterdir()) == []


class Raises(logging.Handler):
    """A handler of the user's with a fault of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(record.getMessage())


def test_a_log_handler_that_raises_ends_neither_training_nor_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning about a step that was delivered must not have it sent again."""

    def in_part(_request: object) -> Any:
        response = ExportMetricsServiceResponse()
        response.partial_success.rejected_data_points = 1
        response.partial_success.error_message = "no"
        return response

    logger, handler = logging.getLogger("esper_otel"), Raises()
    logger.addHandler(handler)
    try:
        with MemoryCollector(answer=in_part) as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
            with esper_otel.start(run_id="run", settings=EsperSettings(export_every_s=0.0)) as telemetry:
                for step in range(5):
                    telemetry.record_step({"loss": 1.0, "accuracy": 97.0}, epoch=0, global_step=1 + step % 3)
                    sent(telemetry)
            assert steps_of(collector, "run") == [1.0, 2.0, 3.0, 1.0, 2.0]
            assert outcomes(collector, "run") == ["completed"]
    finally:
        logger.removeHandler(handler)
    assert telemetry.health()["faults"] == 0


def test_a_step_that_waited_for_a_device_is_published_once_whatever_raises(collector: MemoryCollector) -> None:
    """Steps that wait are published by whoever drains; one that raises there must neither stay nor come again."""
    with esper_otel.start(run_id="run") as telemetry:
        publisher = telemetry._recorder.publisher
        told = publisher.published
        assert told is not None

        def picky() -> None:
            told()
            if publisher.ring.last == 3:
                raise ValueError("a fault of ours")

        publisher.published = picky
        drafts = [Draft(step, 0, time.time_ns() + step * 10**6, {"loss": 1.0}) for step in range(1, 7)]
        publisher.waiting.extend((draft, None) for draft in drafts)
        publisher.drain()
        assert not publisher.waiting
    assert steps_of(collector, "run") == list(range(1, 7))
    assert telemetry.health()["faults"] == 1


INTERRUPTED = """
import signal, time
import esper_otel
telemetry = esper_otel.start(run_id="run")
for _ in range(12):
    telemetry.record_step({"loss": 1.0}, epoch=0)
signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
signal.setitimer(signal.ITIMER_REAL, 0.3)
started_s = time.monotonic()
try:
    telemetry.close(timeout_s=120, outcome="KeyboardInterrupt")
except KeyboardInterrupt:
    print(time.monotonic() - started_s < 60.0, telemetry.health()["kept"], telemetry.health()["dropped"])
"""


def test_ctrl_c_while_the_session_closes_loses_no_step_and_no_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second Ctrl-C of somebody who does not want to wait; the next session sends the rest."""
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    with MemoryCollector(hang=True) as hanging:
        environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": hanging.grpc_endpoint}
        done = warm.run("-c", INTERRUPTED, env=environment, imported=warm.PACKAGE)
    assert (done.stdout, done.returncode) == ("True 12 0\n", 0), done.stderr
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        esper_otel.start(run_id="next").close()
        assert steps_of(collector, "run") == list(range(1, 13))
        assert outcomes(collector, "run") == ["KeyboardInterrupt"]
    assert list(tmp_path.iterdir()) == []


def trained_unsent(telemetry: Telemetry) -> None:
    for _ in range(12):
        telemetry.record_step({"loss": 1.0}, epoch=0)


def test_a_reader_that_fails_to_stop_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the session ends all the same."""

    class Stubborn(InMemoryMetricReader):
        def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
            raise RuntimeError("no")

    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "console")
    monkeypatch.setattr(provider, "_reader", lambda _name: Stubborn())
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({"loss": 1.0}, epoch=0)
    assert telemetry.health()["faults"] == 1


def test_a_disk_that_takes_no_note_has_the_series_ended_all_the_same(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is no fault of ours, and no reason to pause."""

    def full(_folder: Folder, _sequence: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    monkeypatch.setattr(Folder, "acknowledge", full)
    with esper_otel.start(run_id="run") as telemetry:
        trained(telemetry)
    assert steps_of(collector, "run") == list(range(1, 13))
    ends: Mapping[str, int] = Counter(p.name for p in collector.points() if p.value is None)
    assert (ends["kasmina.seed.alpha"], ends["loss"]) == (3, 1)
    assert (telemetry.health()["faults"], telemetry.health()["last_error"]) == (0, None)
    assert list(tmp_path.iterdir()) == []


def test_steps_that_a_pull_could_not_give_come_with_the_next_one(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a controller that pulls costs it no step."""
    with esper_otel.start(run_id="run") as telemetry:
        trained_unsent(telemetry)
        with monkeypatch.context() as patched:
            patched.setattr("esper_otel.session.telemetry.packets", broken)
            with pytest.raises(ValueError, match="fault"):
                telemetry.pull()
        assert [packets.step for packets in telemetry.pull()] == list(range(1, 13))


def test_a_gateway_goes_on_after_a_fault_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has stored is acknowledged, and a fault in releasing one step stops no other."""

    async def scenario() -> None:
        core = Core(MemoryStore(), hold_s=0.01, linger_s=0.01)
        core.start()
        with monkeypatch.context() as patched:
            patched.setattr(Ranks, "note", broken)
            assert core.receive(request_of("first")).rejected == 0
            await asyncio.sleep(0.05)
        with monkeypatch.context() as patched:
            patched.setattr(Assembler, "release", broken)
            before = core.counts["faults"]
            core._release()
            assert core.counts["faults"] == before + 1 > 1
        core.receive(request_of("second"))
        await asyncio.sleep(0.05)
        assert {run.run_id: run.stored for run in core.runs().runs} == {"first": 1, "second": 1}
        core.close()

    asyncio.run(scenario())


def request_of(run_id: str) -> bytes:
    """A step of a plain sender: it is released a little later."""
    request = ExportMetricsServiceRequest()
    of_run = request.resource_metrics.add()
    of_run.resource.attributes.add(key="esper.run.id").value.string_value = run_id
    metric = of_run.scope_metrics.add().metrics.add(name="loss")
    metric.gauge.data_points.add(time_unix_nano=time.time_ns(), as_double=1.0)
    return request.SerializeToString()
