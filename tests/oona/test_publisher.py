"""Oona with a real Redis: signed, in order, at least once, whatever happens to Redis; as a consumer meets it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import warm
from frame_examples import RUN, TIME_UNIX_NS, make_frame
from gateways import RunningGateway
from patience import patience
from programs import Redis, free_port, until

import esper_otel
from esper_otel import ConfigurationError, EsperSettings, Stage, Telemetry, oona
from esper_otel.gateway.items import Item, Origin
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.leyline import BusEnvelope, BusMessageType, Packets, SystemStatePacket, TelemetryPacket
from esper_otel.leyline.episodes import QUIET_STEPS
from esper_otel.oona.emergencies import Emergencies

redis = pytest.importorskip("redis")

SERVER = shutil.which("redis-server")
SECRET = "of the bus"
pytestmark = [
    pytest.mark.lengthy,
    pytest.mark.skipif(SERVER is None, reason="Redis is not installed (Debian: apt-get install redis-server)"),
]


class Message(NamedTuple):
    """What a consumer has read and verified."""

    stream: str
    packet: Any
    attributes: dict[str, str]


def consumed(client: Any, *, secret: str | None = SECRET) -> list[Message]:
    """Reads as a group that was there first, verifies, and acknowledges; in the order of each stream."""
    found = []
    for stream in oona.STREAMS:
        with suppress(redis.ResponseError):  # it is there
            client.xgroup_create(stream, "tests", id="0", mkstream=True)
        while answer := client.xreadgroup("tests", "one", {stream: ">"}, count=100):
            for _, of_stream in answer:
                for entry_id, fields in of_stream:
                    payload = fields[b"payload"]
                    if secret is None:
                        assert b"signature" not in fields
                    else:
                        expected = base64.b64encode(hmac.new(secret.encode(), payload, hashlib.sha256).digest())
                        assert fields[b"signature"] == expected
                    envelope = BusEnvelope.FromString(payload)
                    kind = (
                        SystemStatePacket
                        if envelope.message_type == BusMessageType.BUS_MESSAGE_TYPE_SYSTEM_STATE
                        else TelemetryPacket
                    )
                    found.append(Message(stream, kind.FromString(envelope.payload), dict(envelope.attributes)))
                    client.xack(stream, "tests", entry_id)
        assert client.xpending(stream, "tests")["pending"] == 0
    return found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with Redis(tmp_path / "redis") as server:
        yield server


def steps(telemetry: Telemetry, count: int, **values: float) -> None:
    for _ in range(count):
        with telemetry.step(epoch=0) as now:
            now.put({"loss": 1.0, "accuracy": 0.5, **values})
            now.seed("seed-1", stage=Stage.TRAINING, alpha=0.25)


def states(messages: list[Message]) -> set[int]:
    return {message.packet.global_step for message in messages if isinstance(message.packet, SystemStatePacket)}


def collecting(client: Any, messages: list[Message]) -> Callable[[], set[int]]:
    """Reads on; the steps whose states have come."""

    def read() -> set[int]:
        with suppress(redis.RedisError):
            messages.extend(consumed(client))
        return states(messages)

    return read


def test_what_is_published_is_what_is_pulled_and_where_it_belongs(server: Redis) -> None:
    """States and telemetry apart; a step that alarms, and a seed that violates, on the emergency stream instead."""
    with esper_otel.start(run_id="bus", rank=0) as telemetry:
        with oona.publish(telemetry, server.url) as publisher:
            steps(telemetry, 3)
            steps(telemetry, 1, hook_latency_ms=75.0)
            steps(telemetry, 1, loss=math.nan)
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
                now.seed("seed-2", stage=Stage.TRAINING, isolation_violations=1)
        page = telemetry.pull()
        with server.client() as client:
            messages = consumed(client)
    assert publisher.counts["published"] == len(messages)
    found = sorted(message.packet.SerializeToString(deterministic=True) for message in messages)
    expected = [p.state for p in page] + [packet for p in page for packet in p.telemetry]
    assert found == sorted(packet.SerializeToString(deterministic=True) for packet in expected)
    by_stream = {stream: [m.packet.packet_id for m in messages if m.stream == stream] for stream in oona.STREAMS}
    assert by_stream["oona.normal"] == ["bus-step-1", "bus-step-2", "bus-step-3"]
    assert set(by_stream["oona.emergency"]) == {
        *("bus-step-4", "bus-step-4-events"),
        *("bus-step-5", "bus-step-5-events"),
        *("bus-step-6", "bus-step-6-events", "kasmina-seed-seed-2-6"),
    }
    first = messages[0].attributes
    assert (first["run_id"], first["rank"], first["priority"]) == ("bus", "0", "MESSAGE_PRIORITY_NORMAL")


def urgent(messages: list[Message]) -> list[str]:
    return [message.packet.packet_id for message in messages if message.stream == "oona.emergency"]


def test_a_steady_signal_is_an_emergency_once(server: Redis) -> None:
    """And again when it escalates, and when it comes back after it had ended. Its events stay as they are."""
    with esper_otel.start(run_id="bus") as telemetry:
        with oona.publish(telemetry, server.url):
            steps(telemetry, 1)
            steps(telemetry, 40, hook_latency_ms=75.0)  # from step 2 on
            steps(telemetry, 20, hook_latency_ms=300.0)  # from step 42 on
            steps(telemetry, 5)
            steps(telemetry, 5, hook_latency_ms=75.0)  # not over in between
            steps(telemetry, QUIET_STEPS)
            steps(telemetry, 5, hook_latency_ms=75.0)  # from step 82 on
        page = telemetry.pull(max_packets=100)
        with server.client() as client:
            messages = consumed(client)
    steady = [f"bus-step-{step}" for step in (2, 42, 82)]
    assert urgent(messages) == [each for step in steady for each in (step, f"{step}-events")]
    found = sorted(message.packet.SerializeToString(deterministic=True) for message in messages)
    expected = [p.state for p in page] + [packet for p in page for packet in p.telemetry]
    assert found == sorted(packet.SerializeToString(deterministic=True) for packet in expected)
    events = [m.packet for m in messages if m.packet.packet_id.endswith("-events")]
    assert len(events) == 40 + 20 + 5 + 5
    assert {packet.system_health.indicators["priority"] for packet in events} == {"MESSAGE_PRIORITY_HIGH"}
    assert {packet.events[0].attributes["severity"] for packet in events} == {"high"}


def test_a_loss_that_stays_nan_and_a_seed_that_stays_unhealthy_are_emergencies_once(server: Redis) -> None:
    """A seed's number of violations does not fall. Another seed is another emergency."""
    with esper_otel.start(run_id="bus") as telemetry:
        with oona.publish(telemetry, server.url):
            for step in range(1, 61):
                with telemetry.step(epoch=0) as now:
                    now.put(loss=1.0 if step < 30 else math.nan)
                    now.seed("seed-1", stage=Stage.TRAINING, isolation_violations=int(step >= 10))
                    now.seed("seed-2", stage=Stage.TRAINING, isolation_violations=int(step >= 50))
        with server.client() as client:
            messages = consumed(client)
    assert sorted(urgent(messages)) == sorted(
        [
            *("bus-step-10", "bus-step-10-events", "kasmina-seed-seed-1-10"),
            *("bus-step-30", "bus-step-30-events"),
            *("bus-step-50", "bus-step-50-events", "kasmina-seed-seed-2-50"),
        ]
    )


@pytest.mark.parametrize(("device", "emergencies"), [("cpu", 0), ("cuda:0", 2)])
def test_a_busy_cpu_is_no_emergency_where_the_cpu_trains(server: Redis, device: str, emergencies: int) -> None:
    with esper_otel.start(run_id="bus", device=device) as telemetry:
        with oona.publish(telemetry, server.url):
            steps(telemetry, 20, cpu_util_percent=100.0)
        with server.client() as client:
            messages = consumed(client)
    assert len(urgent(messages)) == emergencies
    events = [m.packet for m in messages if m.packet.packet_id.endswith("-events")]
    assert [packet.events[0].description for packet in events] == ["cpu_pressure_high"] * 20
    assert {packet.system_health.indicators["priority"] for packet in events} == {"MESSAGE_PRIORITY_HIGH"}


def test_an_emergency_that_cannot_be_sent_is_one_when_it_can(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is decided once."""
    with (
        server.client() as client,
        esper_otel.start(run_id="bus") as telemetry,
        oona.publish(telemetry, server.url) as publisher,
    ):
        steps(telemetry, 1)
        until("it is connected", lambda: publisher.counts["published"] == 2)
        client.config_set("maxmemory", "1")
        steps(telemetry, 30, hook_latency_ms=75.0)
        until("it has tried", lambda: publisher.counts["failures"] > 1, 30)
        client.config_set("maxmemory", "0")
        until("the rest is there", lambda: client.xlen("oona.normal") == 30, 30)
        assert urgent(consumed(client)) == ["bus-step-2", "bus-step-2-events"]


def test_a_source_that_dropped_what_was_decided_announces_it_again() -> None:
    """And a page that comes again, alone or with more steps behind it, has the same emergencies."""
    with esper_otel.start(run_id="bus", export_steps=False) as telemetry:
        steps(telemetry, 1)
        steps(telemetry, 30, hook_latency_ms=75.0)
        page = list(telemetry.pull(max_packets=100))
    emergencies = Emergencies()

    def decided(some: list[Packets]) -> list[int]:
        emergencies.expect(some)
        return [packets.step for packets in some if emergencies.of(packets)]

    assert decided(page[:10]) == decided(page[:10]) == decided(page[:20]) == [2]
    assert decided(page[5:20]) == [6]
    emergencies.confirm()
    assert decided(page[20:]) == []


def test_more_alarms_than_a_consumer_lets_through_go_where_they_usually_would(server: Redis) -> None:
    """None is dropped."""
    with esper_otel.start(run_id="bus") as telemetry, oona.publish(telemetry, server.url) as publisher:
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
            for number in range(150):
                now.seed(f"seed-{number}", stage=Stage.TRAINING, isolation_violations=1)
        until("all are published", lambda: publisher.counts["published"] == 152)
        with server.client() as client:
            messages = consumed(client)
    assert len(urgent(messages)) == publisher.counts["emergencies"] == 120
    assert len({message.packet.packet_id for message in messages}) == 152


def test_a_step_that_fits_no_message_holds_up_no_other(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted as lost; those behind it are published, once."""
    entries = oona.entries

    def picky(packets: Packets, secret: str | None = None) -> list[oona.StreamEntry]:
        if packets.step == 3:
            raise ValueError("a fault of ours")
        return entries(packets, secret)

    monkeypatch.setattr(oona.publisher, "entries", picky)
    with esper_otel.start(run_id="bus") as telemetry:
        with oona.publish(telemetry, server.url) as publisher:
            steps(telemetry, 6)
        with server.client() as client:
            messages = consumed(client)
    found = [message.packet.global_step for message in messages if isinstance(message.packet, SystemStatePacket)]
    assert found == [1, 2, 4, 5, 6]
    assert publisher.counts["lost"] == 1


def test_without_a_secret_there_is_no_signature(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_LEYLINE_SECRET")
    with esper_otel.start(run_id="bus") as telemetry:
        with oona.publish(telemetry, server.url):
            steps(telemetry, 1)
        with server.client() as client:
            assert len(consumed(client, secret=None)) == 2


def test_old_entries_are_trimmed(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oona.publisher, "_TRIM_EVERY_S", 0.1)
    with esper_otel.start(run_id="bus") as telemetry, oona.publish(telemetry, server.url, ttl_ms=500):
        steps(telemetry, 5)
        with server.client() as client:
            until("they are there", lambda: client.xlen("oona.normal") == 5)
            until("they are gone", lambda: client.xlen("oona.normal") + client.xlen("oona.telemetry") == 0)


@pytest.mark.parametrize("weather", ["restart", "memory", "disk", "password"])
def test_nothing_is_lost_whatever_happens_to_redis(server: Redis, weather: str) -> None:
    """Killed and started again; full; its disk gone; a password that we do not have."""
    messages: list[Message] = []
    with server.client() as client, esper_otel.start(run_id="bus") as telemetry:
        read = collecting(client, messages)
        with oona.publish(telemetry, server.url) as publisher:
            steps(telemetry, 5)
            until("the first are there", lambda: read() == {1, 2, 3, 4, 5})
            if weather == "restart":
                server.end(signal.SIGKILL)
            elif weather == "memory":
                client.config_set("maxmemory", "1")
            elif weather == "disk":
                server.folder.rename(server.folder.with_name("gone"))
                shutil.rmtree(server.folder.with_name("gone"))
                client.config_set("appendonly", "no")
                client.set("changed", 1)
                client.bgsave()
                until("it cannot save", lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            else:
                client.config_set("requirepass", "another")
                client.client_kill_filter(_type="normal", skipme=True)
            steps(telemetry, 5)
            until("it is noticed", lambda: publisher.counts["failures"] > 0)
            assert publisher.last_error
            if weather == "restart":
                server.start()
            elif weather == "memory":
                client.config_set("maxmemory", "0")
            elif weather == "disk":
                client.config_set("stop-writes-on-bgsave-error", "no")
            else:
                client.config_set("requirepass", "")
            until("the rest is there", lambda: read() == {*range(1, 11)})
    server.end(signal.SIGKILL)  # one that cannot save refuses to end
    order = [m.packet.global_step for m in messages if isinstance(m.packet, SystemStatePacket)]
    assert order == sorted(order)


def test_a_gateway_publishes_and_goes_on_after_it_was_killed(
    server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of each run once; the cursor is in Redis."""
    monkeypatch.delenv("OTEL_METRICS_EXPORTER")
    options = ("--store", str(tmp_path / "store"), "--oona", server.url)
    messages: list[Message] = []
    with server.client() as client:
        read = collecting(client, messages)
        for life in range(2):
            with RunningGateway(*options) as gateway:
                monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
                with esper_otel.start(run_id="bus", settings=EsperSettings(export_every_s=0)) as telemetry:
                    for step in range(10):
                        telemetry.record_step({"loss": 1.0}, epoch=0, global_step=10 * life + step + 1)
                until("they are there", lambda: read() == {*range(1, 10 * life + 11)})  # noqa: B023
                text = requests.get(f"http://{gateway.http}/metrics", timeout=300).text
                assert "esper_gateway_oona_published_total 10\n" in text
                gateway.process.send_signal(signal.SIGKILL)
    assert [m.packet.global_step for m in messages] == [*range(1, 21)]


def test_a_gateway_that_ends_with_a_backlog_ends_in_time_and_without_a_traceback(server: Redis, tmp_path: Path) -> None:
    """More steps than the time is enough for: those that are published are the first ones, and the rest is said."""
    store = FileStore(tmp_path)
    frames = [make_frame(sequence=n, global_step=n, time_unix_ns=TIME_UNIX_NS + n) for n in range(1, 20_001)]
    store.add([Item(Origin(RUN.run_id, RUN.attempt, 0), frame, 1, True, 1) for frame in frames])
    store.close()
    with server.client() as client, RunningGateway("--store", str(tmp_path), "--oona", server.url) as gateway:
        until("it publishes", lambda: client.xlen("oona.normal") > 0)
        started_s = time.monotonic()
        assert gateway.end() == 0
        assert time.monotonic() - started_s < patience(8)
        steps = [
            SystemStatePacket.FromString(BusEnvelope.FromString(fields[b"payload"]).payload).global_step
            for _, fields in client.xrange("oona.normal")
        ]
    assert 0 < len(steps) < len(frames)
    assert steps == [*range(1, len(steps) + 1)]
    assert "Traceback" not in gateway.said
    assert "the rest is published after a restart" in gateway.said


@pytest.mark.parametrize("jump_s", [30 * 3600, -30 * 3600], ids=["ahead", "back"])
def test_a_clock_that_jumps_trims_nothing(server: Redis, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """What consumers have not read yet is not deleted for its age because of one reading of a clock."""
    monkeypatch.setattr(oona.publisher, "_TRIM_EVERY_S", 0.05)
    monkeypatch.setattr(oona.publisher, "_MOST_MARKS", 100_000)
    with esper_otel.start(run_id="bus") as telemetry, oona.publish(telemetry, server.url) as publisher:
        steps(telemetry, 5)
        until("they are published", lambda: publisher.counts["published"] == 10)
        real, real_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(jump_s * 1e9))
        with server.client() as client:
            until("it has trimmed", lambda: client.info("commandstats")["cmdstat_xrevrange"]["calls"] > 12)
            assert client.xlen("oona.normal") + client.xlen("oona.telemetry") == 10


def test_a_redis_that_is_not_there_harms_neither_training_nor_gateway(tmp_path: Path) -> None:
    """The end comes in time; a URL that is none is said at once, without its password."""
    with RunningGateway("--oona", f"redis://:secret@127.0.0.1:{free_port()}/0") as gateway:
        assert requests.get(f"http://{gateway.http}/healthz", timeout=300).status_code == 200
        time.sleep(0.3)
        started_s = time.monotonic()
        assert gateway.end() == 0
        assert time.monotonic() - started_s < patience(10)
    assert "packets cannot be sent to Redis" in gateway.said
    assert "secret" not in gateway.said
    with (
        esper_otel.start(run_id="bus", export_steps=False) as telemetry,
        pytest.raises(ConfigurationError, match="redis://"),
    ):
        oona.publish(telemetry, "http://127.0.0.1")
    done = warm.run("-m", "esper_otel", "gateway", "--oona", "nonsense", cwd=tmp_path, imported=warm.PACKAGE)
    assert done.returncode == 2
    assert "redis://" in done.stderr
