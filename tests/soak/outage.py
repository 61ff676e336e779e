"""An outage, to the last point: ``python tests/soak/outage.py [--steps 100000] [--rate 1000] [--protocol grpc]``.

A trainer records 21 metrics and 8 seeds x 10 a step. Its endpoint takes requests, refuses connections, accepts them and
never answers, comes back on the same port; in the end the trainer gets SIGTERM. Then what the endpoint has received is
compared with what was recorded: each (stream, time, value), none missing, none made up.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from esper_otel.schema import SEED_METRICS, STEP_METRICS
from esper_otel.testing import MemoryCollector

STEPS = [metric.name for metric in STEP_METRICS]
FIELDS = [metric.field for metric in SEED_METRICS]
SEEDS = [f"seed-{number}" for number in range(8)]
STREAMS = [(name, "") for name in STEPS]
STREAMS += [(metric.name, seed_id) for seed_id in SEEDS for metric in SEED_METRICS]

_STAGE, _TRAINING = FIELDS.index("stage"), 3.0


def value_of(step: int, stream: int) -> float:
    """What is recorded: every bit says where it belongs. Some are NaN or infinite."""
    name, seed_id = STREAMS[stream]
    if seed_id and name == SEED_METRICS[_STAGE].name:
        return _TRAINING
    if seed_id and name == "kasmina.seed.alpha_steps":
        return math.nan  # outside BLENDING it is not kept
    if step % 97 == stream % 97:
        return math.nan if step % 2 else math.inf
    return step * 128.0 + stream


def train(steps: int, rate: float, times: Path) -> None:
    """The trainer's process: writes each step's time to a file, records, and waits to be told to end."""
    import esper_otel

    telemetry = esper_otel.start(run_id="outage")
    started_s = time.monotonic()
    with times.open("wb", buffering=0) as file:
        for step in range(steps):
            with telemetry.step(epoch=0) as now:
                now.put({name: value_of(step, stream) for stream, name in enumerate(STEPS)})
                for number, seed_id in enumerate(SEEDS):
                    first = len(STEPS) + number * len(FIELDS)
                    cells = {field: value_of(step, first + place) for place, field in enumerate(FIELDS)}
                    now.seed(seed_id, **{field: cell for field, cell in cells.items() if field != "alpha_steps"})
            file.write(now.time_unix_ns.to_bytes(8, "little"))
            ahead_s = (step + 1) / rate - (time.monotonic() - started_s)
            if ahead_s > 0.002:
                time.sleep(ahead_s)
    while True:  # a training job that is told to stop
        time.sleep(0.01)


class Report(NamedTuple):
    """What came of it.

    Attributes:
        steps: recorded.
        points: recorded, all streams.
        missing: of them, never received.
        wrong: received with another value or at another time.
        duplicates: received once more.
        flush_s: from SIGTERM to the end of the trainer.
        status: the trainer's exit status.
        said: what it wrote to standard error.
    """

    steps: int
    points: int
    missing: int
    wrong: int
    duplicates: int
    flush_s: float
    status: int
    said: str


class _Received(MemoryCollector):
    """An endpoint that is no slower than a real one: it only keeps what comes, and reads it in the end."""

    def __init__(self) -> None:
        super().__init__()
        self._contents: list[bytes] = []
        self._place = {stream: place for place, stream in enumerate(STREAMS)}
        self.times: list[list[npt.NDArray[np.uint64]]] = [[] for _ in STREAMS]
        self.values: list[list[npt.NDArray[np.float64]]] = [[] for _ in STREAMS]

    def _receive(self, request: ExportMetricsServiceRequest) -> ExportMetricsServiceResponse:
        self._contents.append(request.SerializeToString())
        return ExportMetricsServiceResponse()

    def read(self) -> None:
        """Reads the frames of what was taken."""
        for content in self._contents:
            self._read(ExportMetricsServiceRequest.FromString(content))
        self._contents.clear()

    def _read(self, request: ExportMetricsServiceRequest) -> None:
        for of_run in request.resource_metrics:
            for scoped in of_run.scope_metrics:
                if scoped.scope.name != "esper_otel":
                    continue
                for metric in scoped.metrics:
                    self._take(metric.name, metric.gauge.data_points)

    def _take(self, name: str, points: object) -> None:
        by_stream: dict[str, tuple[list[int], list[float]]] = {}
        for point in points:  # type: ignore[attr-defined] # a repeated field
            if point.flags:  # the end of a series
                continue
            seed_id = point.attributes[0].value.string_value if point.attributes else ""
            times, values = by_stream.setdefault(seed_id, ([], []))
            times.append(point.time_unix_nano)
            values.append(point.as_double)
        for seed_id, (times, values) in by_stream.items():
            place = self._place.get((name, seed_id))
            if place is not None:
                self.times[place].append(np.array(times, np.uint64))
                self.values[place].append(np.array(values))


class _Door:
    """The endpoint's address: what comes is handed on to ``port``, or, without one, accepted and never answered.

    Closing it cuts every connection, as the end of a process does.
    """

    def __init__(self, port: int | None, at: int = 0) -> None:
        self._onward = port
        self._listening = socket.create_server(("127.0.0.1", at), backlog=128)
        self._sockets = [self._listening]
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                outer, _ = self._listening.accept()
                self._sockets.append(outer)
                if self._onward is not None:
                    inner = socket.create_connection(("127.0.0.1", self._onward))
                    self._sockets.append(inner)
                    for source, target in ((outer, inner), (inner, outer)):
                        threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)


def _wait(path: Path, steps: int, trainer: subprocess.Popen[bytes]) -> None:
    while (path.stat().st_size if path.exists() else 0) < 8 * steps:
        if trainer.poll() is not None:
            raise RuntimeError(f"the trainer ended with status {trainer.returncode}")
        time.sleep(0.005)


@contextmanager
def _ended_with_us(trainer: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        trainer.kill()
        raise


def run(steps: int, rate: float, protocol: str, folder: Path, **environment: str) -> Report:
    """The whole story; the endpoint lives in this process."""
    times = folder / "times"
    with _Received() as received:
        address = received.grpc_endpoint if protocol == "grpc" else received.http_endpoint
        behind = int(address.rpartition(":")[2])
        with _Door(behind) as door:
            port = door.port
            variables = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
                "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
                "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
            }
            arguments = [sys.executable, __file__, "--train", str(times), "--steps", str(steps), "--rate", str(rate)]
            with (folder / "said").open("wb") as said:
                trainer = subprocess.Popen(arguments, env={**os.environ, **variables, **environment}, stderr=said)
            with _ended_with_us(trainer):
                _wait(times, steps * 1 // 4, trainer)
        with _ended_with_us(trainer):
            _wait(times, steps * 2 // 4, trainer)  # refused: nothing listens
            with _Door(None, port):
                _wait(times, steps * 3 // 4, trainer)  # hanging
            with _Door(behind, port):
                _wait(times, steps, trainer)
                started_s = time.monotonic()
                trainer.send_signal(signal.SIGTERM)
                status = trainer.wait(60)
                flush_s = time.monotonic() - started_s
    received.read()
    stamps = np.frombuffer(times.read_bytes(), np.uint64)
    missing, wrong, duplicates, points = _compared(received, stamps)
    text = (folder / "said").read_text(encoding="utf-8")
    return Report(len(stamps), points, missing, wrong, duplicates, flush_s, status, text)


def _compared(received: _Received, stamps: npt.NDArray[np.uint64]) -> tuple[int, int, int, int]:
    missing = wrong = duplicates = points = 0
    for stream, (name, _) in enumerate(STREAMS):
        if name == "kasmina.seed.alpha_steps":
            continue
        expected = np.array([value_of(step, stream) for step in range(len(stamps))])
        times = np.concatenate([np.empty(0, np.uint64), *received.times[stream]])
        values = np.concatenate([np.empty(0), *received.values[stream]])
        place = np.searchsorted(stamps, times)
        known = (place < len(stamps)) & (stamps[np.minimum(place, len(stamps) - 1)] == times)
        same = np.zeros(len(times), np.bool_)
        same[known] = expected[place[known]].view(np.uint64) == values[known].view(np.uint64)
        came = np.bincount(place[same], minlength=len(stamps))
        points += len(stamps)
        missing += int((came == 0).sum())
        wrong += int((~same).sum())
        duplicates += int((came - 1).clip(0).sum())
    return missing, wrong, duplicates, points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=1_000.0, help="steps a second")
    parser.add_argument("--protocol", choices=["grpc", "http/protobuf"], default="grpc")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(options.steps, options.rate, options.train)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.steps, options.rate, options.protocol, Path(folder))
    print(report.said)
    print(
        f"{report.steps:,} steps, {report.points:,} points over {options.protocol}: {report.missing:,} missing, "
        f"{report.wrong:,} wrong, {report.duplicates:,} received twice; flushed in {report.flush_s:.1f} s"
    )
    return int(bool(report.missing or report.wrong))


if __name__ == "__main__":
    sys.exit(main())
