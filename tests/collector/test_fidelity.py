"""From the trainer through the collector into Prometheus and the gateway: the same streams, times and values."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways import RunningGateway
from programs import ROOT, Collector, Prometheus, until

import esper_otel
from esper_otel import EsperSettings, Packets, Stage, TamiyoClient, Telemetry
from esper_otel.frames.digest import digest_of
from esper_otel.frames.frame import Frame
from esper_otel.schema import METRICS, SEED_CELLS

pytestmark = pytest.mark.collector

STEPS = 120
Sample = tuple[str, str, str, int, str]  # name, rank, seed, milliseconds, value
SEED_NAMES = {metric.field: metric.name.replace(".", "_") for metric in SEED_CELLS}
TRAVELS = {metric.name.replace(".", "_") for metric in METRICS if metric.level != "session"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def prometheus(folder: Path) -> Iterator[Prometheus]:
    with Prometheus(folder / "prometheus", ROOT / "deploy" / "prometheus" / "prometheus.yml") as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def agent(folder: Path, prometheus: Prometheus, gateway: RunningGateway) -> Iterator[Collector]:
    variables = {"ESPER_PROMETHEUS_OTLP": prometheus.otlp, "ESPER_GATEWAY": gateway.grpc}
    with Collector(folder / "agent", **variables) as agent:
        yield agent
        assert "deprecated" not in agent.said
        assert "alias" not in agent.said


def frames_of(telemetry: Telemetry) -> list[Frame]:
    """What the session has published."""
    found, _ = telemetry._recorder.publisher.ring.after(0, 100_000)
    return found


def shown(value: float) -> str:
    """A number, comparable: NaN is NaN, and -0 is not 0."""
    return "NaN" if math.isnan(value) else repr(float(value))


def recorded(frames: list[Frame]) -> set[Sample]:
    """Each value of each frame, as Prometheus names it."""
    found = set()
    for frame in frames:
        rank, time_ms = str(frame.run.rank), frame.time_unix_ns // 10**6
        for name, value in frame.values().items():
            found.add((name.replace(".", "_"), rank, "", time_ms, shown(value)))
        for seed, cells in frame.seeds.rows():
            found |= {(SEED_NAMES[field], rank, seed, time_ms, shown(value)) for field, value in cells.items()}
        found.add(("esper_seeds_digest", rank, "", time_ms, shown(digest_of(frame.live.ids))))
        found |= {("esper_seed_retired", rank, seed, time_ms, shown(1)) for seed in frame.retired}
    return found


def stored(prometheus: Prometheus, run_id: str) -> set[Sample]:
    """Each sample that Prometheus has of the frames of a run."""
    found = set()
    for labels, time_ms, value in prometheus.samples(f'{{run_id="{run_id}"}}'):
        label = dict(labels)
        name = label.pop("__name__")
        if name.startswith("ALERTS") or ":" in name:
            continue  # of the rules
        rank, seed = label.pop("rank"), label.pop("seed_id", "")
        assert label.pop("run_id") == run_id
        assert label.pop("instance") == f"{run_id}/{rank}"
        assert label.pop("job") == "esper-tolaria"
        if name in TRAVELS - {"esper_frame_sequence", "esper_frame_points"}:
            assert label == {}, name
            found.add((name, rank, seed, time_ms, shown(float(value))))
    return found


def train(telemetry: Telemetry, steps: int) -> None:
    """Everything that is easily lost on the way: NaN, infinity, gaps, seeds that come and go, bursts."""
    for step in range(steps):
        with telemetry.step(epoch=step // 50) as now:
            now.put(loss=float("nan") if step % 17 == 5 else 2.0 / (step + 1), gradient_norm=1e-300 * step)
            if step % 3:
                now.put(accuracy=step / steps)
            if step == 40:
                now.put(gradient_norm=math.inf)
            now.seed("seed-0", stage=Stage.BLENDING, alpha=step / steps, alpha_steps=step)
            if step % 2:
                now.seed(f"seed-{1 + step // 30}", stage=Stage.TRAINING, last_kernel_latency_ms=step / 7)
        if step % 30 == 29:
            telemetry.retire_seed(f"seed-{1 + step // 30}")
        if step % 40 == 0:
            time.sleep(0.1)


def pulled(client: TamiyoClient, run_id: str, rank: int) -> list[Packets]:
    """Every step of a rank, at its newest revision."""
    newest: dict[int, Packets] = {}
    cursor = None
    while page := client.pull(run_id, cursor, rank=rank, max_packets=1000):
        newest |= {packets.state.timestamp_ns: packets for packets in page}
        cursor = page.cursor
    return list(newest.values())


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_prometheus_and_the_gateway_hold_exactly_what_was_recorded(
    agent: Collector,
    prometheus: Prometheus,
    gateway: RunningGateway,
    protocol: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ranks of two runs at once; every (stream, millisecond, value), none missing, none made up."""
    address = agent.grpc if protocol == "grpc" else agent.http
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    settings = EsperSettings(export_every_s=0.05)
    runs = [f"{protocol[:4]}-{number}" for number in range(2)]
    sessions = [
        esper_otel.start(run_id=run_id, rank=rank, world_size=2, settings=settings)
        for run_id in runs
        for rank in (0, 1)
    ]
    for telemetry in sessions:
        train(telemetry, STEPS)
    alive = {telemetry.run_id for telemetry in sessions}

    def seen_alive() -> bool:
        found = prometheus.query(f'esper_seeds{{run_id=~"{"|".join(alive)}"}}')
        return len(found) == len(sessions)

    until("the runs are seen alive", seen_alive)
    for telemetry in sessions:
        telemetry.close()
    for run_id in runs:
        mine = [telemetry for telemetry in sessions if telemetry.run_id == run_id]
        expected = set[Sample]().union(*(recorded(frames_of(telemetry)) for telemetry in mine))
        until(f"{run_id} is stored", lambda: len(stored(prometheus, run_id)) >= len(expected))  # noqa: B023
        assert stored(prometheus, run_id) == expected
        assert any(value == "NaN" for name, *_, value in expected if name == "loss")
        until("the run has ended", lambda: prometheus.query(f'loss{{run_id="{run_id}"}}') == [])  # noqa: B023
        with TamiyoClient(gateway.grpc) as client:
            for telemetry in mine:
                in_process = list(telemetry.pull(max_packets=STEPS))
                until("the gateway has it", lambda: len(pulled(client, run_id, telemetry.run.rank)) == STEPS)  # noqa: B023
                found = pulled(client, run_id, telemetry.run.rank)
                assert [packets.step for packets in found] == [packets.step for packets in in_process]
                for one, other in zip(found, in_process, strict=True):
                    assert one == other
                    assert one.complete
            states = [run for run in client.runs() if run.run_id == run_id]
            assert [(run.rank, run.ended, run.missing) for run in states] == [(0, "completed", 0), (1, "completed", 0)]


def test_a_retired_seed_is_gone_and_a_living_one_is_there(
    agent: Collector, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after the five minutes for which Prometheus takes a value for the present one."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
    with esper_otel.start(run_id="seeds", settings=EsperSettings(export_every_s=0.05)) as telemetry:
        for step in range(3):
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
                now.seed("stays", stage=Stage.TRAINING)
                if step < 2:
                    now.seed("goes", stage=Stage.TRAINING)

        def alive() -> set[str]:
            found = prometheus.query('kasmina_seed_stage{run_id="seeds"}')
            return {series["metric"]["seed_id"] for series in found}

        until("both live", lambda: alive() == {"stays", "goes"})
        telemetry.retire_seed("goes")
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
        until("one is retired", lambda: alive() == {"stays"})
    until("the run has ended", lambda: alive() == set())
