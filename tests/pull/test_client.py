"""TamiyoClient: what a controller gets from a gateway, and what it is told when it cannot have it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from gateways import RunningGateway
from patience import patience

import esper_otel
from esper_otel import (
    ConfigurationError,
    EsperSettings,
    GatewayError,
    GatewayUnavailable,
    Packets,
    Page,
    Stage,
    StaleCursor,
    TamiyoClient,
    UnknownRun,
    aio,
)
from esper_otel.log import Warnings


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningGateway]:
    """A gateway for tests that need no other."""
    with RunningGateway() as gateway:
        yield gateway


def trained(address: str, run_id: str, monkeypatch: pytest.MonkeyPatch, steps: int = 10, **start: int) -> list[Packets]:
    """Trains a little with telemetry to the gateway; the packets pulled in process."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    with esper_otel.start(run_id=run_id, settings=EsperSettings(export_every_s=0), **start) as telemetry:  # type: ignore[arg-type]
        for step in range(steps):
            with telemetry.step(epoch=0) as now:
                now.put(loss=float("nan") if step == 3 else 1 / (step + 1), hook_latency_ms=10.0 * step)
                now.seed("seed-1", stage=Stage.TRAINING, alpha=step / 16)
        return list(telemetry.pull(max_packets=steps))


def everything(client: TamiyoClient, run_id: str, *, at_once: int, rank: int | None = None) -> list[Packets]:
    """All pages of a run."""
    found: list[Packets] = []
    cursor = None
    while page := client.pull(run_id, cursor, rank=rank, max_packets=at_once):
        assert len(page) <= at_once
        found += page
        cursor = page.cursor
    return found


def test_what_is_pulled_is_equal_to_what_is_pulled_in_process(
    shared: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Packets`` compare field by field, signals included; age does not count."""
    mine = trained(shared.grpc, "equal", monkeypatch)
    assert any(event.description == "hook_budget" for packets in mine for t in packets.telemetry for event in t.events)
    with TamiyoClient(shared.grpc) as client:
        assert everything(client, "equal", at_once=3) == mine
        assert everything(client, "equal", at_once=1000) == mine
        [run] = [run for run in client.runs() if run.run_id == "equal"]
    assert (run.first_step, run.last_step, run.stored, run.ended) == (1, 10, 10, "completed")
    assert (run.missing, run.incomplete, run.writers, run.resumed) == (0, 0, 1, False)
    assert all(-1 < packets.age_s < patience(60) for packets in mine)  # stamps of fast steps run ahead


def test_ranks_can_be_pulled_alone(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its own order; together in order of release."""
    ranks = [trained(shared.grpc, "ranks", monkeypatch, rank=rank, world_size=2) for rank in (0, 1)]
    with TamiyoClient(shared.grpc) as client:
        for rank, mine in enumerate(ranks):
            assert everything(client, "ranks", at_once=4, rank=rank) == mine
        together = everything(client, "ranks", at_once=7)
        cursor = client.pull("ranks", rank=0).cursor
        with pytest.raises(StaleCursor, match="rank 0"):
            client.pull("ranks", cursor, rank=1)
    assert [packets for packets in together if packets.rank == 1] == ranks[1]
    assert len(together) == 20


def test_a_wait_ends_with_the_step(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a run that nobody knows yet."""
    pages: list[Page] = []

    def wait() -> None:
        with TamiyoClient(shared.grpc) as client:
            pages.append(client.pull("awaited", wait_s=30))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    started_s = time.monotonic()
    mine = trained(shared.grpc, "awaited", monkeypatch, steps=1)
    waiting.join(120)
    assert time.monotonic() - started_s < patience(10)
    assert list(pages[0]) == mine


def test_what_is_not_there_has_a_name(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(shared.grpc, "there", monkeypatch, steps=1)
    with TamiyoClient(shared.grpc) as client:
        with pytest.raises(UnknownRun, match="'nobody'"):
            client.pull("nobody")
        with pytest.raises(StaleCursor, match="without one"):
            client.pull("there", "not a cursor")
        with pytest.raises(GatewayError, match="1000"):
            client.pull("there", max_packets=5000)
        with pytest.raises(GatewayError, match="run_id"):
            client.pull("")
        for wrong in ({"max_packets": -1}, {"rank": -1}, {"wait_s": "soon"}, {"max_packets": 2**40}):
            with pytest.raises(ConfigurationError):
                client.pull("there", **wrong)


def test_a_gateway_that_is_away_is_waited_for_and_no_longer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A restart on the same port is not noticed, with a store; without one, the cursor is stale."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started_s = time.monotonic()
    with (
        TamiyoClient(address, timeout_s=0.5) as client,
        pytest.raises(GatewayUnavailable, match="no gateway answered there"),
    ):
        client.runs()
    assert time.monotonic() - started_s < patience(5)
    options = ["--grpc", address, "--store", str(tmp_path)]
    with TamiyoClient(address, timeout_s=120) as client:
        with RunningGateway(*options):
            mine = trained(address, "restarted", monkeypatch)
            first = client.pull("restarted", max_packets=4)
        again: list[Page] = []
        pulling = threading.Thread(target=lambda: again.append(client.pull("restarted", first.cursor)))
        pulling.start()
        time.sleep(0.5)
        with RunningGateway(*options):
            pulling.join(20)
            assert [*first, *again[0]] == mine
            [run] = client.runs()
            assert (run.ended, run.stored, run.first_step, run.last_step) == ("completed", 10, 1, 10)
        with RunningGateway("--grpc", address):
            trained(address, "restarted", monkeypatch)
            with pytest.raises(StaleCursor, match="an earlier store"):
                client.pull("restarted", first.cursor)


def test_a_gap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps fell out of the store before they were pulled."""
    with RunningGateway("--keep-steps", "5") as gateway, TamiyoClient(gateway.grpc) as client:
        trained(gateway.grpc, "short", monkeypatch, steps=12)
        page = client.pull("short")
    assert (page.gap, [packets.step for packets in page]) == (7, [8, 9, 10, 11, 12])


def test_many_pull_one_run(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at its own pace, one of them dying in the middle."""
    mine = trained(shared.grpc, "many", monkeypatch, steps=30)
    found: dict[int, list[Packets]] = {}

    def pull(number: int) -> None:
        with TamiyoClient(shared.grpc) as client:
            if number == 0:
                client.pull("many", max_packets=3)
                return
            found[number] = everything(client, "many", at_once=number)

    pullers = [threading.Thread(target=pull, args=(number,)) for number in range(8)]
    for puller in pullers:
        puller.start()
    for puller in pullers:
        puller.join(60)
    assert list(found.values()) == [mine] * 7


def test_the_same_for_asyncio(shared: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal pages, equal errors; a wait that is given up leaves nothing behind."""
    mine = trained(shared.grpc, "async", monkeypatch)

    async def pull() -> list[Packets]:
        async with aio.TamiyoClient(shared.grpc) as client:
            assert "async" in [run.run_id for run in await client.runs()]
            with pytest.raises(UnknownRun):
                await client.pull("nobody")
            page = await client.pull("async", max_packets=4)
            rest = await client.pull("async", page.cursor)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.pull("async", rest.cursor, wait_s=30), 0.2)
            assert not await client.pull("async", rest.cursor)
            both = await asyncio.gather(client.pull("async"), client.pull("async"))
            assert both[0].packets == both[1].packets == (*page, *rest)
            return [*page, *rest]

    assert asyncio.run(pull()) == mine

    async def nobody_there() -> None:
        async with aio.TamiyoClient("127.0.0.1:1", timeout_s=0.3) as client:
            await client.runs()

    with pytest.raises(GatewayUnavailable):
        asyncio.run(nobody_there())


def test_tls_certificates_and_a_token_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is read at each call."""
    authority = Authority(tmp_path)
    server, mine = authority.pair("server"), authority.pair("client")
    tokens, token = tmp_path / "tokens", tmp_path / "token"
    tokens.write_text("right\n")
    token.write_text("wrong\n")
    options = ["--tls-cert", str(server.certificate), "--tls-key", str(server.key), "--pull-tokens", str(tokens)]
    with RunningGateway(*options, "--client-ca", str(authority.certificate)) as gateway:
        files = {"certificate_file": mine.certificate, "key_file": mine.key, "token_file": token}
        with TamiyoClient(gateway.grpc, ca_file=authority.certificate, **files) as client:  # type: ignore[arg-type]
            with pytest.raises(GatewayError, match="UNAUTHENTICATED") as refused:
                client.runs()
            assert "wrong" not in str(refused.value)
            token.write_text("# by hand\nright\n")
            assert client.runs() == []
            token.unlink()
            with pytest.raises(ConfigurationError, match="token file"):
                client.runs()
            token.write_text("right")
            assert client.runs() == []
        with (
            TamiyoClient(f"https://{gateway.grpc}", ca_file=authority.certificate, timeout_s=0.5) as client,
            pytest.raises(GatewayUnavailable),
        ):
            client.runs()


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("ftp://host:1", {}, "host:port"),
        ("", {}, "host:port"),
        ("host:1", {"ca_file": "/nowhere.pem"}, "/nowhere.pem"),
        ("host:1", {"token_file": "/nowhere"}, "/nowhere"),
        ("host:1", {"key_file": "/some"}, "both files"),
        ("http://host:1", {"ca_file": __file__}, "https://"),
    ],
)
def test_arguments_that_do_not_fit_are_said_at_once(target: str, arguments: dict[str, str], message: str) -> None:
    for kind in (TamiyoClient, aio.TamiyoClient):
        with pytest.raises(ConfigurationError, match=message):
            kind(target, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "is_told"),
    [
        ("gateway-of-others:4327", True),
        ("http://192.0.2.1:4327", True),
        ("https://gateway-of-others:4327", False),
        ("127.0.0.1:4327", False),
        ("localhost:4327", False),
        ("[::1]:4327", False),
    ],
)
def test_a_token_that_others_can_read_on_the_way_is_told_once(
    target: str, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clients; sent all the same: inside a cluster plain text is common."""
    monkeypatch.setattr("esper_otel.pull.gateway_address._WARNINGS", Warnings())
    (tmp_path / "token").write_text("secret-token\n", encoding="utf-8")

    async def ask() -> None:
        await aio.TamiyoClient(target, token_file=tmp_path / "token").close()

    for _ in range(2):
        TamiyoClient(target, token_file=tmp_path / "token").close()
    asyncio.run(ask())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == is_told
    for each in told:
        assert "over plain text" in each
        assert "https://" in each
        assert "secret-token" not in each


def test_without_a_token_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    TamiyoClient("gateway-of-others:4327").close()
    assert not caplog.records
