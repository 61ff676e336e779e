"""Forked and spawned processes beside a session: DataLoader workers, multiprocessing, os.fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_otel.testing import MemoryCollector

TRAINER = """
import json, multiprocessing, os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
import esper_otel

class Numbers(Dataset):
    def __len__(self): return 64
    def __getitem__(self, place): return torch.tensor(float(place))

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

DATA_LOADER = """
    for epoch in range(2):
        loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context=METHOD)
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
        queue.get(timeout=20)
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


@pytest.fixture
def collector() -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        yield collector


def run(collector: MemoryCollector, protocol: str, script: str, method: str) -> str:
    """What the trainer wrote to standard error; it must have ended well, soon."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "ESPER_EXPORT_EVERY_S": "0",
    }
    # A file, since spawned processes import it.
    path = Path(os.environ["PYTEST_TMP"], "trainer.py")
    path.write_text(TRAINER + script.replace("METHOD", json.dumps(method)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path_factory.mktemp("trainer")))


def losses(collector: MemoryCollector) -> list[float]:
    """By time; each step once."""
    points = [p for p in collector.points() if p.name == "loss" and p.value is not None]
    assert len({p.time_unix_ns for p in points}) == len(points)
    assert len({p.resource["process.pid"] for p in points}) == 1
    return [p.value for p in sorted(points, key=lambda p: p.time_unix_ns) if p.value is not None]


@pytest.mark.parametrize(("method", "protocol"), [("fork", "grpc"), ("fork", "http/protobuf"), ("spawn", "grpc")])
def test_data_loader_workers_do_no_harm(collector: MemoryCollector, protocol: str, method: str) -> None:
    """Nearly every trainer has them; they start anew each epoch."""
    said = run(collector, protocol, DATA_LOADER, method)
    assert "dropped 0" in said
    assert losses(collector) == [0.0] + 2 * [float(sum(range(first, first + 4))) for first in range(0, 64, 4)]


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
