"""The collector's exporter in front of a tier on Kafka: a process is a key and a partition, and its steps arrive."""

from __future__ import annotations

from pathlib import Path

import pytest
from gateways import post
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from programs import Collector, soak, until
from tiers import Puller, Ranks, RunningTierProcess, Tier, broker

import esper_otel
from esper_otel import EsperSettings
from esper_otel.schema.events import RUN_ENDED, RUN_STARTED

__all__ = ["broker"]
pytestmark = pytest.mark.collector


def test_steps_reach_pullers_through_the_collector(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the shipped files."""
    tier = Tier(broker)
    configs = ("agent.yaml", "to-kafka.yaml", "to-kafka-plain.yaml")
    collector = Collector(tmp_path, *configs, ESPER_KAFKA=broker, ESPER_KAFKA_TOPICS=tier.prefix)
    with collector, tier.member("one"), tier.server() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.grpc}")
        monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
        for rank in range(3):
            fast = EsperSettings(export_every_s=0.05)
            with esper_otel.start(run_id="through", rank=rank, world_size=3, settings=fast) as telemetry:
                for step in range(1, 31):
                    with telemetry.step(epoch=0) as now:
                        now.put(loss=rank * 1e6 + step)
        puller = Puller("through", [server])
        puller.pull(90)
        assert puller.losses == {rank: [rank * 1e6 + step for step in range(1, 31)] for rank in range(3)}
        until("the end", lambda: _ended(server.grpc) == "completed")
        wanted = {(rank, name) for rank in range(3) for name in (RUN_STARTED, RUN_ENDED)}
        until("the events", lambda: _events(server.grpc) >= wanted)
        _check_too_large(tier, collector, server)
    places: dict[int, set[tuple[bytes, int]]] = {}
    for record in tier.records("otlp"):
        if b"through" not in record.value():
            continue
        (of_process,) = ExportMetricsServiceRequest.FromString(record.value()).resource_metrics
        rank = next(each.value.int_value for each in of_process.resource.attributes if each.key == "esper.rank")
        places.setdefault(rank, set()).add((record.key(), record.partition()))
    assert [len(each) for each in places.values()] == [1, 1, 1]


def _ended(address: str) -> str | None:
    with esper_otel.TamiyoClient(address) as client:
        return client.ended("through")


def _events(address: str) -> set[tuple[int, str]]:
    """Rank and name of each event."""
    with esper_otel.TamiyoClient(address) as client:
        page = client.events("through")
    assert page.gap == 0
    return {(event.rank, event.name) for event in page}


def _check_too_large(tier: Tier, collector: Collector, server: RunningTierProcess) -> None:
    """A record that the topic refuses is dropped and counted; those after it, and of others, arrive."""
    tier.change("otlp", max_message_bytes="20000")
    ranks = Ranks(tier, "large", 2)
    for body in (ranks.body(0, [1]), ranks.large_body(1, 1), ranks.body(0, [2])):
        assert post(collector.http, body)[0] == 200
    puller = Puller("large", [server])
    puller.pull(2)
    assert puller.losses == {0: [1.0, 2.0]}
    failed = "otelcol_exporter_send_failed_metric_points"
    until("it is counted", lambda: sum(count for name, count in collector.counts().items() if failed in name) >= 16_000)
    assert "too large" in collector.said.lower() or "MESSAGE_TOO_LARGE" in collector.said


def test_many_ranks_arrive_all(broker: str, tmp_path: Path) -> None:
    """In small; ``make soak`` has 4,000 of them."""
    module = soak("kafka_tier")
    tier = Tier(broker)
    variables = {"ESPER_KAFKA": broker, "ESPER_KAFKA_TOPICS": tier.prefix}
    collector = Collector(tmp_path, *module.CONFIGS, **variables)
    with collector, tier.member("one") as member, tier.server() as server:
        found = module.many_ranks(collector, member, server, Ranks(tier, "many", 120, apart=4096), 4, 0.0)
    assert found.pulled == found.expected
    assert (found.compared, found.gap) == (120, 0)
