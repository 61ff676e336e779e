"""gevent, which turns threads into greenlets of one thread: telemetry still does not hold up the training loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

pytest.importorskip("gevent")

TRAINER = """
from gevent import monkey
monkey.patch_all()
import json, time
import esper_otel
longest_s = 0.0
telemetry = esper_otel.start(run_id="greenlets")
for _ in range(100):
    started_s = time.monotonic()
    with telemetry.step(epoch=0) as now:
        now.put(loss=1.0)
        time.sleep(0.01)
    longest_s = max(longest_s, time.monotonic() - started_s)
telemetry.close(1.0)
print(json.dumps({"longest_s": longest_s, **telemetry.health()}))
"""


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("hang", [False, True])
def test_a_step_waits_for_no_endpoint(protocol: str, hang: bool) -> None:
    """A request that is not answered within 10 s held up one step for as long."""
    with MemoryCollector(hang=hang) as collector:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "ESPER_EXPORT_EVERY_S": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", TRAINER],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        health = json.loads(done.stdout)
        assert health["longest_s"] < 8.0, "nowhere near the 10 s that a request may take"
        assert (health["exported"], health["dropped"]) == ((0, 100) if hang else (100, 0))
        assert collector.frames_received == (0 if hang else 100)
