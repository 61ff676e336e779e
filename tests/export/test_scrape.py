"""OTEL_METRICS_EXPORTER=prometheus: each session can be scraped, whoever has the port that was asked for."""

from __future__ import annotations

import os
import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import requests
import warm
from patience import patience
from programs import until
from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.parser import text_string_to_metric_families

import esper_otel

HOST, PORT = "OTEL_EXPORTER_PROMETHEUS_HOST", "OTEL_EXPORTER_PROMETHEUS_PORT"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Where the first session is to be scraped: a port with two free ones after it, that no client is given."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    monkeypatch.setenv(HOST, "127.0.0.1")
    while True:
        found = random.randrange(10_000, 30_000)
        with suppress(OSError), ExitStack() as bound:
            for each in range(found, found + 3):
                bound.enter_context(socket.socket()).bind(("127.0.0.1", each))
            monkeypatch.setenv(PORT, str(found))
            return found


def started(caplog: pytest.LogCaptureFixture) -> str:
    """What the newest session said when it started."""
    return [line for line in caplog.messages if line.startswith("started: ")][-1]


def scraped(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by name; each series once, as Prometheus wants it."""
    answer = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    for name, samples in found.items():
        assert len({frozenset(labels.items()) for labels, _ in samples}) == len(samples), name
    return found


def loss_and_run(port: int) -> tuple[float, str]:
    found = scraped(port)
    [(_, loss)] = found["loss_loss"]
    [(labels, _)] = found["target_info"]
    return loss, labels["esper_run_id"]


def test_a_session_is_scraped_at_the_port_that_is_set_and_frees_it(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """The next session gets it again."""
    caplog.set_level("INFO")
    for run_id in ("first", "second"):
        with esper_otel.start(run_id=run_id) as telemetry:
            telemetry.record_step({"loss": 0.5}, epoch=0)
            assert loss_and_run(port) == (0.5, run_id)
            assert f"scraped at http://127.0.0.1:{port}/metrics" in started(caplog)
            assert PORT not in started(caplog)
        socket.create_server(("127.0.0.1", port)).close()


def test_a_second_session_of_the_process_has_a_port_of_its_own(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """At one port the two would have the same series."""
    caplog.set_level("INFO")
    with esper_otel.start(run_id="first") as first, esper_otel.start(run_id="second") as second:
        first.record_step({"loss": 1.0}, epoch=0)
        second.record_step({"loss": 2.0}, epoch=0)
        assert loss_and_run(port) == (1.0, "first")
        assert loss_and_run(port + 1) == (2.0, "second")
        words = f"scraped at http://127.0.0.1:{port + 1}/metrics ({PORT}={port}: address already in use)"
        assert words in started(caplog)


RANK = """
import sys, esper_otel
with esper_otel.start() as telemetry:
    telemetry.record_step({"loss": 1.0}, epoch=0)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_all_ranks_of_a_host_train_and_are_scraped(port: int) -> None:
    """They start at the same moment with the same settings."""
    processes = []
    try:
        for rank in range(3):
            environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "ESPER_RUN_ID": "job"}
            processes.append(warm.started("-c", RANK, env=environ, imported=warm.PACKAGE, takes_input=True))
        assert [each.stdout.readline() for each in processes] == ["ready\n"] * 3
        ranks = {scraped(port + offset)["target_info"][0][0]["esper_rank"] for offset in range(3)}
        assert ranks == {"0", "1", "2"}
        said = [each.communicate("\n")[1] for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert [each.returncode for each in processes] == [0, 0, 0]
    assert sum("address already in use" in text for text in said) == 2


@contextmanager
def somebody_else(port: int) -> Iterator[None]:
    """As ``opentelemetry-instrument`` with the same settings, or a program's own server."""
    registry = CollectorRegistry()
    Counter("theirs", "Somebody else's.", registry=registry).inc()
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_somebody_elses_server_is_left_alone(port: int) -> None:
    with somebody_else(port), esper_otel.start(run_id="ours") as telemetry:
        telemetry.record_step({"loss": 0.5}, epoch=0)
        assert loss_and_run(port + 1) == (0.5, "ours")
        assert scraped(port)["theirs_total"] == [({}, 1.0)]


def test_the_sdks_own_reader_in_the_process_is_left_alone(port: int) -> None:
    """What ``opentelemetry-instrument`` starts before the script."""
    from opentelemetry.exporter.prometheus import _AutoPrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import exposition

    running: list[tuple[Any, Any]] = []
    patched = pytest.MonkeyPatch()
    patched.setattr(
        "opentelemetry.exporter.prometheus.start_http_server",
        lambda **settings: running.append(exposition.start_http_server(**settings)),
    )
    provider = MeterProvider([_AutoPrometheusMetricReader()], shutdown_on_exit=False)
    patched.undo()
    provider.get_meter("theirs").create_counter("theirs").add(1)
    try:
        with esper_otel.start(run_id="ours") as telemetry:
            telemetry.record_step({"loss": 0.5}, epoch=0)
            assert loss_and_run(port + 1) == (0.5, "ours")
            assert "theirs_total" in scraped(port)
            assert "loss_loss" not in scraped(port)
    finally:
        provider.shutdown()
        for server, thread in running:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (HOST, "no-such-host.invalid", "OTEL_EXPORTER_PROMETHEUS_HOST='no-such-host.invalid'"),
        (HOST, "192.0.2.1", "OTEL_EXPORTER_PROMETHEUS_HOST='192.0.2.1'.*annot assign requested address"),
    ],
)
def test_a_host_that_cannot_be_had_costs_the_scrapes_and_not_the_training(
    name: str, text: str, words: str, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, text)
    with esper_otel.start() as telemetry:
        telemetry.record_step({"loss": 0.5}, epoch=0)
    assert re.search(f"'prometheus' cannot be started and is left out: {words}", caplog.text)


@pytest.mark.parametrize("text", ["-1", "65536", "9464.5", "http", "0x2"])
def test_a_port_that_is_none_is_warned_about(
    text: str, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the specification's default takes its place."""
    monkeypatch.setenv(PORT, text)
    caplog.set_level("INFO")
    with esper_otel.start():
        assert f"{PORT}={text!r} is not a port; it counts as not set, the default is 9464" in caplog.text
        assert "scraped at http://127.0.0.1:94" in started(caplog)


def test_empty_ones_are_not_set_and_port_0_is_any_free_one(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv(PORT, "0")
    with esper_otel.start(run_id="any") as telemetry:
        telemetry.record_step({"loss": 0.5}, epoch=0)
        found = int(started(caplog).partition("127.0.0.1:")[2].partition("/")[0])
        assert loss_and_run(found) == (0.5, "any")
        assert PORT not in caplog.text
    monkeypatch.setenv(HOST, "")
    monkeypatch.setenv(PORT, "")
    with esper_otel.start():
        assert "scraped at http://localhost:94" in started(caplog)


def can_be_bound(port: int) -> bool:
    with socket.socket() as bare:
        try:
            bare.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def test_a_forked_child_does_not_hold_the_port(port: int) -> None:
    """DataLoader workers may outlive the session."""
    with esper_otel.start():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        assert until("free", lambda: can_be_bound(port))  # the child may not have run at all yet
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_client_that_says_nothing_keeps_nobody(port: int) -> None:
    """Neither other scrapes nor the end of the session."""
    with esper_otel.start(run_id="run") as telemetry, socket.create_connection(("127.0.0.1", port)):
        telemetry.record_step({"loss": 0.5}, epoch=0)
        assert loss_and_run(port) == (0.5, "run")
        began_s = time.monotonic()
        telemetry.close()
        assert time.monotonic() - began_s < patience(3.0)


def test_a_session_that_cannot_start_leaves_no_port_open(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cell is corrected and run again."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus,otlp")
    monkeypatch.setenv("ESPER_TOKEN_FILE", "/no/such")
    with pytest.raises(esper_otel.ConfigurationError):
        esper_otel.start()
    with socket.socket() as bare:
        bare.bind(("127.0.0.1", port))
