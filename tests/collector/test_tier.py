"""The files for a cluster: an agent, the tier over TLS with tokens, gateways found by name, one of them killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from certificates import Authority
from gateways import RunningGateway
from programs import ROOT, Collector, Prometheus, free_port, needs_namespaces, until

import esper_otel
from esper_otel import EsperSettings, TamiyoClient, Telemetry, UnknownRun

pytestmark = pytest.mark.collector

PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
FAST = EsperSettings(export_every_s=0.05)
NAME = "esper-gateway"
Losses = dict[int, float]  # by millisecond


class Tier:
    """A cluster on one machine: an agent, the tier, Prometheus, and gateways at addresses of their own."""

    def __init__(self, folder: Path, gateways: int) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.port = free_port()
        self.addresses = [f"127.0.0.{2 + number}" for number in range(gateways)]
        self.secrets = folder / "secrets"
        self.secrets.mkdir()
        own = self.authority.pair("tier")
        for name, content in {
            "tls.crt": own.certificate.read_text(),
            "tls.key": own.key.read_text(),
            "ca.crt": self.authority.certificate.read_text(),
            "agents.tokens": "s3cret\n",
            "esper-gateway.token": "tier",
            "prometheus.token": "unused",
            "agent.token": "s3cret",
        }.items():
            (self.secrets / name).write_text(content, encoding="utf-8")
        (folder / "send.tokens").write_text("tier\n", encoding="utf-8")
        self._gateway_tls = self.authority.pair("gateways", NAME, *self.addresses)
        self.prometheus = Prometheus(
            folder / "prometheus",
            PROMETHEUS,
            tls=self.authority.pair("prometheus"),
            authority=self.authority.certificate,
        )
        self.tier = Collector(
            folder / "tier",
            "gateway.yaml",
            ESPER_OTELCOL_SECRETS=str(self.secrets),
            ESPER_PROMETHEUS_OTLP=self.prometheus.otlp,
            ESPER_GATEWAYS=NAME,
            ESPER_GATEWAYS_PORT=str(self.port),
        )
        self.tier.hosts = folder / "hosts"
        self.known(self.addresses)
        self.agent = Collector(
            folder / "agent",
            "agent.yaml",
            "to-gateway.yaml",
            ESPER_TIER=self.tier.grpc,
            ESPER_TIER_TOKEN_FILE=str(self.secrets / "agent.token"),
            ESPER_TIER_CA=str(self.authority.certificate),
        )

    def gateway(self, address: str) -> RunningGateway:
        """One of the gateways; its store outlives it."""
        return RunningGateway(
            *("--grpc", f"{address}:{self.port}", "--store", str(self.folder / f"store-{address}")),
            *("--tls-cert", str(self._gateway_tls.certificate), "--tls-key", str(self._gateway_tls.key)),
            *("--send-tokens", str(self.folder / "send.tokens")),
        )

    def known(self, addresses: list[str]) -> None:
        """What the gateways' name stands for."""
        lines = ["127.0.0.1 localhost", *(f"{address} {NAME}" for address in addresses)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def held(self, address: str) -> dict[str, Losses]:
        """What a gateway has, by run."""
        found: dict[str, Losses] = {}
        with TamiyoClient(f"{address}:{self.port}", ca_file=self.authority.certificate) as client:
            for run_id in {run.run_id for run in client.runs()}:
                cursor = None
                losses = found.setdefault(run_id, {})
                with suppress(UnknownRun):  # it has said its name, and no step yet
                    while page := client.pull(run_id, cursor, max_packets=1000):
                        losses |= {p.state.timestamp_ns // 10**6: p.state.training_loss for p in page}
                        cursor = page.cursor
        return found

    def count_stored(self) -> float:
        """How many steps Prometheus has."""
        found = self.prometheus.query("sum(count_over_time(loss[1d]))")
        return float(found[0]["value"][1]) if found else 0.0

    def last_steps(self, address: str) -> dict[str, int]:
        """How far a gateway has come, by run."""
        with TamiyoClient(f"{address}:{self.port}", ca_file=self.authority.certificate) as client:
            return {run.run_id: run.last_step for run in client.runs() if run.last_step is not None}

    def has_events(self, run_id: str) -> bool:
        """Whether the gateways together have a run's events from its start to its end, without a gap."""
        targets = ",".join(f"{address}:{self.port}" for address in self.addresses)
        with TamiyoClient(targets, ca_file=self.authority.certificate) as client:
            page = client.events(run_id, max_events=1_000)
        names = {event.name for event in page}
        return not page.gap and {"esper.run.started", "esper.run.ended"} <= names

    def stored(self) -> dict[str, Losses]:
        """What Prometheus has, by run."""
        found: dict[str, Losses] = {}
        for labels, time_ms, value in self.prometheus.samples("loss"):
            found.setdefault(dict(labels)["run_id"], {})[time_ms] = float(value)
        return found


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    needs_namespaces()
    made = Tier(tmp_path, gateways=3)
    with made.prometheus, made.tier, made.agent:
        yield made
        for collector in (made.tier, made.agent):
            assert "deprecated" not in collector.said
            assert "s3cret" not in collector.said


def losses(runs: dict[str, list[int]]) -> dict[str, Losses]:
    """What was recorded: the loss is the step."""
    return {run_id: {time_ms: float(at) for at, time_ms in enumerate(times)} for run_id, times in runs.items()}


def step(sessions: list[Telemetry], runs: dict[str, list[int]], seconds: float) -> None:
    """All of them train for a while."""
    over_s = time.monotonic() + seconds
    while time.monotonic() < over_s:
        for telemetry in sessions:
            times = runs.setdefault(telemetry.run_id, [])
            with telemetry.step(epoch=0) as now:
                now.put(loss=float(len(times)))
            times.append(now.time_unix_ns // 10**6)
        time.sleep(0.04)


def test_each_run_is_at_one_gateway_and_moves_when_that_is_killed(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty runs over three gateways. One is killed: its runs go on at the others, and no step is missing."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{tier.agent.grpc}")
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    runs: dict[str, list[int]] = {}
    first, *rest = tier.addresses
    with tier.gateway(rest[0]), tier.gateway(rest[1]):
        with tier.gateway(first) as killed:
            sessions = [esper_otel.start(run_id=f"run-{number}", settings=FAST) for number in range(20)]
            step(sessions, runs, 1.0)
            until("all have come", lambda: sum(map(len, map(tier.last_steps, tier.addresses))) == 20)
            held = [set(tier.held(address)) for address in tier.addresses]
            assert set().union(*held) == set(runs)
            assert all(held)
            killed.process.kill()
            step(sessions, runs, 1.0)
        tier.known(rest)
        step(sessions, runs, 1.0)
        for telemetry in sessions:
            telemetry.close()
        count = sum(map(len, runs.values()))
        until("Prometheus has all", lambda: tier.count_stored() == count)
        assert tier.stored() == losses(runs)

        def have_all_lasts() -> bool:
            found = [tier.last_steps(address) for address in rest]
            return all(len(times) in {each.get(run_id) for each in found} for run_id, times in runs.items())

        until("the last steps have come", have_all_lasts)
        with tier.gateway(first):  # what it had acknowledged before it was killed is in its store
            assert merged(*map(tier.held, tier.addresses)) == losses(runs)
            until("the events of all runs have come", lambda: all(map(tier.has_events, runs)))


def merged(*parts: dict[str, Losses]) -> dict[str, Losses]:
    """Of several gateways."""
    found: dict[str, Losses] = {}
    for part in parts:
        for run_id, of_run in part.items():
            found.setdefault(run_id, {}).update(of_run)
    return found


def test_a_token_is_exchanged_without_a_loss_and_a_wrong_one_is_seen(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are accepted for a while. The control: one that the tier does not know; the agent drops, and counts."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{tier.agent.grpc}")
    runs: dict[str, list[int]] = {}
    tokens, token = tier.secrets / "agents.tokens", tier.secrets / "agent.token"
    failed = "otelcol_exporter_send_failed_metric_points"

    def refused() -> float:
        return sum(value for name, value in tier.agent.counts().items() if name.startswith(failed))

    with esper_otel.start(run_id="rotated", settings=FAST) as telemetry:
        step([telemetry], runs, 0.5)
        until("the first came", lambda: "rotated" in tier.stored())
        tokens.write_text("s3cret\nnew\n", encoding="utf-8")
        step([telemetry], runs, 1.5)
        token.write_text("new", encoding="utf-8")
        step([telemetry], runs, 1.5)
        tokens.write_text("new\n", encoding="utf-8")
        step([telemetry], runs, 1.5)
        telemetry.close()
    until("Prometheus has all", lambda: len(tier.stored()["rotated"]) == len(runs["rotated"]))
    assert tier.stored()["rotated"] == losses(runs)["rotated"]
    assert refused() == 0
    token.write_text("wrong", encoding="utf-8")
    time.sleep(1.5)
    with esper_otel.start(run_id="refused", settings=FAST) as telemetry:
        step([telemetry], runs, 0.2)
    until("it is counted", lambda: refused() >= len(runs["refused"]))
    assert "refused" not in tier.stored()
