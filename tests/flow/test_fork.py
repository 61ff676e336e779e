"""Forked and spawned processes beside a session: DataLoader workers, multiprocessing, os.fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from patience import patience

from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

TRAINER = """
import json, multiprocessing, os, signal, sys, time
import esper_otel

def work(queue):
    # The session came along with a fork; whatever is done with it here must do no harm.
    if telemetry is not None:
        telemetry.record_step({"loss": -1.0}, epoch=0)
        telemetry.health(); telemetry.pull(); telemetry.absent()
        telemetry.close()
    queue.put(os.getpid())

telemetry = None
if __name__ == "__main__":
    telemetry = esper_otel.start(run_id="forked")
    telemetry.record_step({"loss": 0.0}, epoch=0)
"""

# Before the trainer, whose module spawned processes import.
DATA = """
import torch
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self): return 64
    def __getitem__(self, place): return torch.tensor(float(place))
"""

DATA_LOADER = """
    for epoch in range(EPOCHS):
        loader = DataLoader(Numbers(), batch_size=4, num_workers=EPOCHS, multiprocessing_context=METHOD)
        for batch in telemetry.batches(loader):
            with telemetry.step(epoch=epoch) as now:
                now.put(loss=float(batch.sum()))
    telemetry.close()
"""

PROCESSES = """
    context = multiprocessing.get_context(METHOD)
    queue = context.Queue()
    for _ in range(2):
        process = context.Process(target=work, args=(queue,))
        process.start()
        for step in range(12):
            telemetry.record_step({"loss": 1.0 + step}, epoch=0)
        queue.get(timeout=300)
        process.join(20)
        assert process.exitcode == 0, process.exitcode
    telemetry.close()
"""

FORK = """
    for number in range(4):
        child = os.fork()
        if child == 0:
            if number % 4 == 0: os._exit(0)
            if number % 4 == 1: sys.exit(0)      # atexit handlers run in the child
            if number % 4 == 2: raise SystemExit(0)
            os.kill(os.getpid(), signal.SIGTERM)
        for step in range(6):
            telemetry.record_step({"loss": 1.0 + step}, epoch=0)
        _, status = os.waitpid(child, 0)
        expected = -signal.SIGTERM if number % 4 == 3 else 0
        assert os.waitstatus_to_exitcode(status) == expected, (number, status)
    telemetry.close()
"""

CHILDREN = """
    import threading, traceback, warnings
    warnings.simplefilter("ignore")  # Python's, about a fork beside threads

    def session():
        with esper_otel.start(run_id="child") as own:
            for _ in range(3):
                own.record_step({"loss": -2.0}, epoch=0)
        assert own.health()["exported"] == 3, own.health()

    def stock():
        if os.environ["OTEL_EXPORTER_OTLP_PROTOCOL"] == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        provider = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], shutdown_on_exit=False)
        provider.get_meter("theirs").create_gauge("theirs").set(1.0)
        assert provider.force_flush(10_000)

    def grandchild():
        child = os.fork()
        if child == 0:
            ends(session)
        assert os.waitpid(child, 0)[1] == 0

    def ends(work):
        try:
            signal.alarm(30)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def record():
        while not done.wait(0.002):
            telemetry.record_step({"loss": 1.0}, epoch=0)

    done = threading.Event()
    recording = threading.Thread(target=record)
    recording.start()
    longest_s = 0.0
    for work in FORKS:
        time.sleep(0.01)
        started_s = time.monotonic()
        child = os.fork()
        if child == 0:
            ends(work)
        longest_s = max(longest_s, time.monotonic() - started_s)
        assert os.waitpid(child, 0)[1] == 0, work
    done.set()
    recording.join()
    telemetry.close()
    health = telemetry.health()
    assert health["exported"] == health["recorded"], health
    assert health["retries"] == 0, health
    assert longest_s < MOST_S, longest_s
    assert "GRPC_ENABLE_FORK_SUPPORT" not in os.environ
"""


@pytest.fixture
def collector() -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        yield collector


def run(collector: MemoryCollector, protocol: str, script: str, method: str, before: str = "", by: Any = None) -> str:
    """What the trainer wrote to standard error; it must have ended well, soon."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "ESPER_EXPORT_EVERY_S": "0",
    }
    # A file, since spawned processes import it.
    path = Path(os.environ["PYTEST_TMP"], "trainer.py")
    script = script.replace("METHOD", json.dumps(method)).replace("MOST_S", str(patience(1.0)))
    path.write_text(before + TRAINER + script, encoding="utf-8")
    done = (by or with_us)(path, {**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stderr


def by_python(path: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, path], env=environ, capture_output=True, text=True, timeout=300, check=False)


def with_us(path: Path, environ: dict[str, str]) -> warm.Done:
    return warm.run(path, env=environ, imported=warm.PACKAGE)


def with_torch(path: Path, environ: dict[str, str]) -> warm.Done:
    return warm.run(path, env=environ)


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("trainer")))


def losses(collector: MemoryCollector) -> list[float]:
    """By time; each step once, although a request that a fork cuts off is sent again."""
    points = [p for p in collector.points() if p.name == "loss" and p.value is not None]
    steps = {(p.time_unix_ns, p.value) for p in points if p.value is not None}
    assert len({time_unix_ns for time_unix_ns, _ in steps}) == len(steps)
    assert len({p.resource["process.pid"] for p in points}) == 1
    return [loss for _, loss in sorted(steps)]


@pytest.mark.parametrize(("method", "protocol"), [("fork", "grpc"), ("fork", "http/protobuf"), ("spawn", "grpc")])
def test_data_loader_workers_do_no_harm(collector: MemoryCollector, protocol: str, method: str) -> None:
    """Nearly every trainer has them; they start anew each epoch. A spawned one imports PyTorch, for seconds."""
    epochs = 2 if method == "fork" else 1
    script = DATA_LOADER.replace("EPOCHS", str(epochs))
    said = run(collector, protocol, script, method, DATA, with_torch)
    assert "dropped 0" in said
    assert losses(collector) == [0.0] + epochs * [float(sum(range(first, first + 4))) for first in range(0, 64, 4)]


@pytest.mark.parametrize(("method", "protocol"), [("fork", "grpc"), ("fork", "http/protobuf"), ("spawn", "grpc")])
def test_what_a_child_does_with_the_session_stays_in_the_child(
    collector: MemoryCollector, protocol: str, method: str
) -> None:
    """Its steps are nobody's: they are not sent, and nothing that the parent sends is lost, repeated or held up."""
    said = run(collector, protocol, PROCESSES, method)
    assert "exported 25, dropped 0" in said
    assert Counter(losses(collector)) == {0.0: 1} | {1.0 + step: 2 for step in range(12)}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_forked_child_ends_as_it_would_without_us(collector: MemoryCollector, protocol: str) -> None:
    """At once, however it ends: it flushes nothing and waits for nobody."""
    said = run(collector, protocol, FORK, "fork")
    assert said.count("esper_otel closed") == 1
    assert "exported 25, dropped 0" in said
    assert len(losses(collector)) == 25


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_child_may_send_too_whoever_sends(collector: MemoryCollector, protocol: str) -> None:
    """A session of its own, OpenTelemetry's own exporter, a session in a child of the child; also to a slow endpoint.

    gRPC crashes in the child, and complains on standard error, when a thread of the parent is inside it at a fork.
    """
    said = run(collector, protocol, CHILDREN.replace("FORKS", "2 * [session, stock, grandchild] + 10 * [int]"), "fork")
    assert "Other threads" not in said
    assert len({p.resource["process.pid"] for p in collector.points() if p.value == -2.0}) == 4
    assert sum(p.name == "theirs" for p in collector.points()) == 2
    collector.answer = lambda _request: time.sleep(0.3)
    said = run(collector, protocol, CHILDREN.replace("FORKS", "[session, stock] + 5 * [int]"), "fork")
    assert "Other threads" not in said


def test_a_child_in_which_grpc_cannot_work_is_told_so(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user has switched off that gRPC gets ready for a fork."""
    script = """
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        telemetry.close()
    else:
        try:
            esper_otel.start(run_id="child")
        except esper_otel.ConfigurationError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(0)
        os._exit(1)
    """
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    said = run(collector, "grpc", script, "fork", by=by_python)
    assert "its parent sent over gRPC with GRPC_ENABLE_FORK_SUPPORT off" in said
    assert losses(collector) == [0.0]
