"""Who may come, and what is not told: tokens, certificates, names of the gateway, and logs."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path

import grpc
import pytest
import requests
from certificates import Authority, Pair
from gateways import PROGRAM, RunningGateway, pull
from programs import Redis, until
from test_in_flight import connected
from test_ports import PROTOBUF, body_of, code_of, export

import esper_otel
from esper_otel import ConfigurationError, oona
from esper_otel.gateway import options
from esper_otel.gateway.security import Tokens
from esper_otel.gateway.serve.http_port import is_own_host

pytestmark = pytest.mark.own_code

SECRET = "a-secret-token"
NAME = "gateway.corp.example"


def test_no_header_reaches_a_log_and_no_log_grows(tmp_path: Path) -> None:
    """Whatever a stranger sends, there are a few lines a minute, and no token in them."""
    tokens = tmp_path / "tokens"
    tokens.write_text("another\n")
    pair = Authority(tmp_path).pair("server")
    tls = ["--tls-cert", str(pair.certificate), "--tls-key", str(pair.key)]
    heads = (
        f"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\nbad header\r\n\r\n",
        f"GET / HTTP/1.1\r\nauthorization: Bearer {SECRET * 1_000}\r\n\r\n",
        f"{SECRET} / HTTP/9\r\n\r\n",
    )
    options = ("--send-tokens", str(tokens))
    with RunningGateway(*options) as plain, RunningGateway(*tls, program=PROGRAM) as secure:
        for gateway in (plain, secure):
            for address in (gateway.http, gateway.grpc):
                for number in range(24):
                    with contextlib.suppress(OSError), connected(address) as connection:
                        connection.sendall(heads[number % 3].encode())
                        connection.settimeout(1.0 if gateway is plain and address == gateway.http else 0.01)
                        connection.recv(100)
        url = f"http://{plain.http}/v1/metrics"
        headers = PROTOBUF | {"authorization": f"Bearer {SECRET}"}
        assert requests.post(url, b"", headers=headers, timeout=300).status_code == 401
    for gateway in (plain, secure):
        assert "-token" not in gateway.said.replace("--send-tokens", "")
        assert "Traceback" not in gateway.said
        assert len(gateway.said) < 1_500, gateway.said


def test_a_token_that_is_not_text_is_a_wrong_token(tmp_path: Path) -> None:
    """Neither a fault of the gateway, nor a request that cannot be read."""
    tokens = tmp_path / "tokens"
    tokens.write_text("good?\n")
    with RunningGateway("--send-tokens", str(tokens)) as gateway:
        for token in (b"good\xff", b"\xff\xfe", b"good\xc3"):
            with connected(gateway.http) as connection:
                connection.sendall(
                    b"POST /v1/metrics HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n"
                    b"content-length: 0\r\nauthorization: Bearer " + token + b"\r\n\r\n"
                )
                assert connection.recv(12) == b"HTTP/1.1 401"
    assert "Traceback" not in gateway.said


@pytest.mark.parametrize("line", ["a-token run=", "a-token\trun= "], ids=repr)
def test_an_empty_prefix_is_a_mistake_and_shows_no_token(tmp_path: Path, line: str) -> None:
    """A variable that was empty in a template must not open every run."""
    file = tmp_path / "tokens"
    file.write_text(f"# senders\nother run=a\n{line}\n")
    with pytest.raises(ConfigurationError) as caught:
        Tokens(file, "--send-tokens")
    assert str(file) in str(caught.value)
    assert "line 3" in str(caught.value)
    assert "a-token" not in str(caught.value)


def grpc_admits(port: str, root: Path, client: Pair) -> bool:
    credentials = grpc.ssl_channel_credentials(
        root.read_bytes(), client.key.read_bytes(), client.certificate.read_bytes()
    )
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        try:
            export(channel, body_of("over tls"))
        except grpc.RpcError:
            return False
        return True


def http_admits(address: str, root: Path, client: Pair) -> bool:
    try:
        pair = (str(client.certificate), str(client.key))
        return requests.get(f"https://{address}/healthz", verify=str(root), cert=pair, timeout=300).text == "ok\n"
    except requests.exceptions.ConnectionError:
        return False


def test_clients_authority_is_replaced_on_both_ports_or_on_none(tmp_path: Path) -> None:
    """Whom one port has ceased to trust the other must not let in; a broken file changes nothing, and is said."""
    server_authority = Authority(tmp_path, "servers")
    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    server, old, new = server_authority.pair("server"), first.pair("old"), second.pair("new")
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(first.certificate.read_bytes())
    options = ["--tls-cert", str(server.certificate), "--tls-key", str(server.key), "--client-ca", str(trusted)]
    root = server_authority.certificate
    with RunningGateway(*options, "--grpc", "0.0.0.0:0") as gateway:
        port = gateway.grpc.rpartition(":")[2]

        def admitted(client: Pair) -> tuple[bool, bool]:
            return grpc_admits(port, root, client), http_admits(gateway.http, root, client)

        assert (admitted(old), admitted(new)) == ((True, True), (False, False))
        trusted.write_bytes(second.certificate.read_bytes())
        assert (admitted(old), admitted(new)) == ((False, False), (True, True))
        trusted.write_bytes(b"not a certificate")
        assert (admitted(old), admitted(new)) == ((False, False), (True, True))
    assert "stay in use on both ports" in gateway.said


def asked_as(gateway: RunningGateway, method: str, path: str, host: str) -> int:
    answer = requests.request(
        method, f"http://{gateway.http}{path}", headers=PROTOBUF | {"host": host}, data=b"", timeout=300
    )
    return answer.status_code


def test_every_path_is_closed_to_pages_of_other_names() -> None:
    """A web page elsewhere must not read or write here by a trick with DNS; addresses and short names go on."""
    paths = (("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics"), ("POST", "/v1/metrics"), ("GET", "/nothing"))
    with RunningGateway("--http-name", NAME) as gateway:
        for method, path in paths:
            for host in (
                "evil.example",
                "evil.example:80",
                "127.0.0.1.evil.example",
                "gateway.corp.example.evil.example",
            ):
                assert asked_as(gateway, method, path, host) == 403, (path, host)
            expected = 404 if path == "/nothing" else 200
            for host in (
                "127.0.0.1",
                "10.1.2.3:4328",
                "[::1]:4328",
                "localhost",
                "gateway:4328",
                "Gateway.corp.example:1",
            ):
                assert asked_as(gateway, method, path, host) == expected, (path, host)
        with connected(gateway.http) as connection:  # such as a plain health check
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.0 200"
    assert "--http-name" in gateway.said


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("", True),
        ("::1", True),
        ("[::ffff:127.0.0.1]:80", True),
        ("[::1].evil.example", False),
        ("localhost.", True),
        ("app.localhost:80", True),
        ("127.1", False),
        ("0x7f.1", False),
        ("evil.example.", False),
        ("a.b", True),
        ("a.b.", True),
        ("a.b:x", False),
    ],
)
def test_names_by_which_a_gateway_is_asked(host: str, is_own: bool) -> None:
    assert is_own_host(host, {"a.b"}) is is_own


def test_a_run_id_that_no_run_can_have_is_refused_in_few_words() -> None:
    """gRPC itself gives up on an answer whose head is as long as a request may be."""
    with RunningGateway() as gateway, gateway.channel() as channel:
        with pytest.raises(grpc.RpcError) as caught:
            pull(channel, "x" * 10_000)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = caught.value.details() or ""
        assert "256" in details
        assert len(details) < 200
        assert code_of(pull, channel, "é" * 128) is grpc.StatusCode.NOT_FOUND


def test_the_password_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument of a process is seen by every user of the machine."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("Redis is not installed (Debian: apt-get install redis-server)")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    file = tmp_path / "password"
    file.write_text("pass:word@\n")
    with Redis(tmp_path / "redis", "--requirepass", "pass:word@") as server:
        client = server.client(password="pass:word@")
        with RunningGateway("--oona", server.url, "--oona-password-file", str(file)) as gateway:
            with gateway.channel() as channel:
                export(channel, body_of("by file"))
            until("it is published", lambda: client.xlen("oona.normal") == 1)
        monkeypatch.setenv("ESPER_OONA_PASSWORD", "pass:word@")
        with esper_otel.start(run_id="bus", rank=0) as telemetry, oona.publish(telemetry, server.url):
            telemetry.record_step({"loss": 1.0}, epoch=0)
        assert client.xlen("oona.normal") == 2
        client.close()
    assert "pass:word@" not in gateway.said


def password_of(oona_url: str | None, file: Path | None) -> str | None:
    """As ``esper-otel gateway`` finds it."""
    return options.password_of(argparse.Namespace(oona=oona_url, oona_password_file=file))


def test_passwords_that_are_seen_or_missing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each mistake names the option; no message shows a password."""
    file, url = tmp_path / "password", "redis://127.0.0.1/0"
    file.write_text("pass word\r\n")
    assert password_of(url, file) == "pass word"
    assert password_of(url, None) is None
    assert password_of("redis://user@127.0.0.1/0", None) is None
    assert caplog.text == ""
    file.write_text("\n")
    for given, message in (
        ((None, file), "needs --oona"),
        ((url, file), "empty"),
        ((url, tmp_path / "none"), "No such"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            password_of(*given)
    assert password_of("redis://:hidden@127.0.0.1/0", None) is None
    assert "ESPER_OONA_PASSWORD" in caplog.text
    assert "hidden" not in caplog.text
    with pytest.raises(ConfigurationError) as caught:
        oona.publisher._client("redis://:hid/den@127.0.0.1/0", None)
    assert "hid" not in str(caught.value)
