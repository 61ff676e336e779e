"""What leaves us is the same as ever: requests, packets and a gateway's answers, byte by byte, for a fixed run.

A change of the file is a change of what users receive. Record it anew by:

    PYTHONPATH=tests python tests/contract/test_recorded.py
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from wire import resource

from esper_otel import Metric, Stage, schema
from esper_otel.export.encode import Encoder
from esper_otel.frames.ring import blocks_of

pytestmark = pytest.mark.own_code

RECORDED = Path(__file__).with_name("recorded.json.gz")
_START_NS = 1_790_000_000_000_000_000
_TICK_NS = 20_000_000
_OWN = Metric("own.share", "ratio", "a share of the user's own")


def steps() -> Iterator[tuple[dict[str, float], dict[str, dict[str, float]], tuple[str, ...]]]:
    """Values, rows of seeds and retirements of each step; names and seeds come and go."""
    for number in range(48):
        values = {
            "loss": 2.0 / (number + 1) if number % 11 != 7 else math.nan,
            "accuracy": number / 64,
            "gradient_norm": 1e3 * math.exp(-number) if number % 13 != 5 else math.inf,
            "step_latency_ms": 12.5 + number % 4,
            "hook_latency_ms": 0.25 * (number % 8),
            "samples_per_s": 64.0 + number,
        }
        if number % 3 == 0:
            values |= {"grad_conflict_rate": (number % 5) / 5, "tamiyo_latency_ms": 0.5, "own.share": 0.125}
        if number % 4 == 1:
            values |= {"gpu_util_percent": 97.0, "gpu_mem_used_gb": 3.5, "gpu_mem_free_gb": 0.25, "input_wait_ms": -0.0}
        rows: dict[str, dict[str, float]] = {}
        if number % 5 != 4:
            rows["a"] = {"stage": float(Stage.TRAINING if number < 20 else Stage.BLENDING), "alpha": number / 100}
            rows["a"] |= {"alpha_steps": float(number), "isolation_violations": float(number // 6)}
        if 8 <= number < 30:
            rows["ümlaut/b"] = {"stage": float(Stage.GERMINATED), "isolation_dot": -0.5, "last_kernel_latency_ms": 0.75}
        if number % 9 == 2:
            rows["c"] = {"alpha": math.nan, "learning_rate": 0.01, "risk_score": 0.875, "gradient_norm": math.inf}
        yield values, rows, (("c",) if number in (25, 40) else ()) + (("ümlaut/b",) if number == 29 else ())


class Probes:
    """A machine that never changes."""

    shown: tuple[Mapping[str, float], float] = ({}, 0.0)

    def readings(self, now_s: float) -> Mapping[str, float]:
        return {"cpu_util_percent": 25.0, "memory_gb": 1.5}

    def latest(self) -> Mapping[str, float]:
        return self.readings(0.0)


def session(patched: pytest.MonkeyPatch) -> Any:
    """A session, after all steps; its clock moves on by 20 ms with each step."""
    import esper_otel
    from esper_otel.record import clock

    elapsed_ns = 0
    patched.setattr(time, "time_ns", lambda: _START_NS)
    patched.setattr(clock.Clock.__init__, "__kwdefaults__", {"wall_ns": time.time_ns, "steady_ns": lambda: elapsed_ns})
    settings = {"OTEL_METRICS_EXPORTER": "none", "ESPER_BLACK_BOX_FRAMES": "0", "ESPER_RUN_ATTEMPT": "3"}
    for name, value in settings.items():
        patched.setenv(name, value)
    telemetry = esper_otel.start(run_id="recorded", experiment="contract", metrics=[_OWN], device="cpu", epochs=4)
    telemetry._recorder.publisher.probing = Probes()
    for number, (values, rows, retired) in enumerate(steps()):
        elapsed_ns += _TICK_NS
        if number == 16:
            telemetry.validation(loss=0.5, accuracy=0.75)
        for seed_id in retired:
            telemetry.retire_seed(seed_id)
        if number % 2:
            with telemetry.step(epoch=number // 12) as now:
                now.put(values)
                for seed_id, cells in rows.items():
                    now.seed(seed_id, **cells)
        else:
            for seed_id, cells in rows.items():
                telemetry.seeds([seed_id], **{name: [cell] for name, cell in cells.items()})
            telemetry.record_step(values, epoch=number // 12)
    return telemetry


def _bytes(message: Any) -> str:
    return str(message.SerializeToString(deterministic=True).hex())


def _fault(where: str, error: Exception) -> None:
    raise AssertionError(where) from error


def made(patched: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Everything that leaves, in hexadecimal digits."""
    telemetry = session(patched)
    frames, _ = telemetry._recorder.publisher.ring.after(0, 1_000)
    encoder = Encoder({each.name: each for each in (*schema.METRICS, _OWN)}, resource)
    parts = [blocks_of(frames[start : start + 7]) for start in range(0, 48, 7)]
    requests = [each.body for blocks in parts for each in encoder.requests(blocks)]
    packets = telemetry.pull(max_packets=1_000)
    telemetry.close()
    return {
        "requests": [body.hex() for body in requests],
        "states": [_bytes(step.state) for step in packets],
        "telemetry": [_bytes(each) for step in packets for each in step.telemetry],
        "names": [" ".join(sorted(step.names)) for step in packets],
    }


def in_order(body: str) -> str:
    """A request without descriptions, and with the points of each metric sorted.

    Descriptions are for people and may be reworded; points of several series may stand in any order.
    """
    request = ExportMetricsServiceRequest.FromString(bytes.fromhex(body))
    for of_run in request.resource_metrics:
        for scoped in of_run.scope_metrics:
            for metric in scoped.metrics:
                metric.ClearField("description")
                points = sorted(metric.gauge.data_points, key=lambda point: (point.time_unix_nano, str(point)))
                of_series = [list(map(str, point.attributes)) for point in metric.gauge.data_points]
                times = [point.time_unix_nano for point in metric.gauge.data_points]
                for series in of_series:
                    mine = [time for time, other in zip(times, of_series, strict=True) if other == series]
                    assert mine == sorted(mine)
                metric.gauge.ClearField("data_points")
                metric.gauge.data_points.extend(points)
    return request.SerializeToString(deterministic=True).hex()


def test_what_leaves_is_what_has_always_left(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json.loads(gzip.decompress(RECORDED.read_bytes()))
    found = made(monkeypatch)
    assert [len(each) for each in found.values()] == [len(each) for each in expected.values()]
    for each in (found, expected):
        each["requests"] = list(map(in_order, each["requests"]))
    for kind, bodies in expected.items():
        for number, (one, other) in enumerate(zip(found[kind], bodies, strict=True)):
            assert one == other, f"{kind} {number}"


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patches:
        RECORDED.write_bytes(gzip.compress(json.dumps(made(patches)).encode(), mtime=0))
    sys.stdout.write(f"{RECORDED}\n")
