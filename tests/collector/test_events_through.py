"""Events through a collector: it keeps their names, queues them on disk while the gateway is away, and loses none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from gateways import RunningGateway
from programs import Collector, free_port, until

import esper_otel
from esper_otel import EsperSettings, EventPage, TamiyoClient, UnknownRun

pytestmark = pytest.mark.collector


def test_events_wait_in_the_queue_of_an_agent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway is away while the run trains, and the agent is killed before it comes back."""
    address = f"127.0.0.1:{free_port()}"
    agent = Collector(tmp_path / "agent", "agent.yaml", ESPER_GATEWAY=address)
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    with agent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
        with esper_otel.start(run_id="queued", settings=EsperSettings(export_every_s=0)) as telemetry:
            telemetry.record_step({"loss": 1.0}, epoch=0)
            with telemetry.phase("checkpoint"):
                pass
        agent.end(signal.SIGKILL)
    with agent, RunningGateway("--grpc", address), TamiyoClient(address) as client:

        def found() -> EventPage | None:
            try:
                page = client.events("queued")
            except UnknownRun:
                return None
            return page if len(page) >= 3 else None

        page = until("the events have come", found)
        assert page.gap == 0
        assert {event.name for event in page} >= {"esper.run.started", "esper.checkpoint", "esper.run.ended"}
