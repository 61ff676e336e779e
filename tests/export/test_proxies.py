"""Proxies: the one that we name is the one that gRPC and requests use, and what goes wrong there is put down to it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import grpc
import pytest
from endpoints import PROTOCOLS, E, http_answer, proxy, sent, server, to, unused_address

from esper_otel.check.one_frame import report_json, report_text, run_check
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.proxies import proxy_of
from esper_otel.export.transport import Result
from esper_otel.testing import MemoryCollector

# {proxy} is where one listens; the variables are set to these, all others are not there.
ENVIRONMENTS: list[dict[str, str]] = [
    {},
    *(
        {name: "http://{proxy}"}
        for lower in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
        for name in (lower, lower.upper())
    ),
    {"http_proxy": "http://me:hunter2@{proxy}/"},
    {"http_proxy": "{proxy}"},
    {"http_proxy": "", "HTTP_PROXY": "http://{proxy}"},
    {"http_proxy": "", "all_proxy": "http://{proxy}"},
    {"grpc_proxy": "", "http_proxy": "http://{proxy}"},
    {"grpc_proxy": "http://{proxy}", "http_proxy": ""},
    {"https_proxy": "", "http_proxy": "http://{proxy}"},
    {"https_proxy": "socks5://{proxy}", "http_proxy": "http://{proxy}"},
    *(
        {"http_proxy": "http://{proxy}", name: text}
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "NO_GRPC_PROXY")
        for text in ("127.0.0.1", "")
    ),
    *(
        {"http_proxy": "http://{proxy}", "no_proxy": text}
        for text in (
            *(
                "127.0.0.0/8",
                "127.0.0.0/30",
                "10.0.0.0/8",
                "127.0.0.1/32",
                "127.0.0.1/33",
                "127.0.0.0/",
                "::/0",
                "127.0.0.0/255.0.0.0",
            ),
            *(
                "*",
                ".1",
                "0.1",
                "1",
                "localhost",
                "LOCALHOST",
                " 127.0.0.1 ",
                ",x",
                "x,127.0.0.1",
            ),
            *("127.0.0.1:1", "localhost:*", "0.0.0.0/0", "127.0.0.2/8"),
        )
    ),
    {"http_proxy": "http://{proxy}", "no_proxy": "127.0.0.1", "no_grpc_proxy": ""},
    {"http_proxy": "http://{proxy}", "no_proxy": "127.0.0.1", "no_grpc_proxy": "elsewhere"},
    {"http_proxy": "http://{proxy}", "no_grpc_proxy": "127.0.0.0/8,localhost"},
    {"http_proxy": "http://{proxy}", "no_proxy": "", "NO_PROXY": "127.0.0.1"},
]

if tuple(map(int, grpc.__version__.split(".")[:2])) >= (1, 85):  # what gRPC judged otherwise before
    ENVIRONMENTS += [
        {"http_proxy": "HTTP://{proxy}"},
        *(
            {"http_proxy": "http://{proxy}", "no_proxy": text}
            for text in ("host", ".localhost", "oCALHOST", "7.0.0.1", ".0.0.1", " ,x")
        ),
    ]


def set_to(environ: dict[str, str], address: str) -> None:
    """Those variables, and no others."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update({name: text.format(proxy=address) for name, text in environ.items()})


@pytest.mark.parametrize(
    ("protocol", "target"),
    [
        *((protocol, f"http://{host}:{{}}") for protocol in PROTOCOLS for host in ("127.0.0.1", "localhost")),
        ("grpc", "dns:127.0.0.1:{}"),
        ("grpc", "ipv4:127.0.0.1:{}"),
    ],
)
def test_the_proxy_that_is_named_is_the_one_that_is_used(protocol: str, target: str) -> None:
    """Against gRPC and requests themselves."""
    faults = []
    with MemoryCollector() as collector, proxy() as (address, received):
        port = (collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint).rpartition(":")[2]
        settings = {**to(protocol, target.format(port)), f"{E}INSECURE": "true"}
        for environ in ENVIRONMENTS:
            set_to(environ, address)
            received.clear()
            named = proxy_of(endpoint_from_environment(settings))
            is_used = named is not None and named.is_used
            assert sent(settings).result is Result.DELIVERED, environ
            if bool(received) != is_used or (
                named is not None and (named.address != address or named.variable not in environ)
            ):
                faults.append((environ, bool(received), named))
    assert faults == []


def test_a_socket_file_has_no_proxy_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{unused_address()}")
    environ = {f"{E}ENDPOINT": f"unix:{tmp_path}/otel.sock", f"{E}INSECURE": "true"}
    assert proxy_of(endpoint_from_environment(environ)) is None
    assert sent(environ).reason == f"nothing listens on unix:{tmp_path}/otel.sock (no such file)"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("proxy_url", "words"),
    [
        ("http://me:hunter2@proxy.invalid:3128", "the name of the proxy proxy.invalid:3128 ({}) cannot be resolved"),
        (
            "http://me:hunter2@{unused}",
            "nothing listens on the address of the proxy {unused} ({}) (connection refused)",
        ),
    ],
)
def test_a_dead_proxy_is_named_with_its_variable_and_not_the_endpoint(
    protocol: str, scheme: str, proxy_url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is the password."""
    unused = unused_address()
    monkeypatch.setenv(f"{scheme}_proxy", proxy_url.format(unused=unused))
    outcome = sent(to(protocol, f"{scheme}://192.0.2.1:4318"))
    assert outcome.result is Result.TEMPORARY
    assert outcome.reason == words.format(f"{scheme}_proxy", unused=unused)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "407 Proxy Authentication Required",
            "the proxy {proxy} (https_proxy) refuses the credentials: set its address to http://user:",
        ),
        ("403 Forbidden", "the proxy {proxy} (https_proxy) answers 403 for "),
        ("502 Bad Gateway", "the proxy {proxy} (https_proxy) answers 502 for "),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_a_proxy_answers_is_not_put_down_to_the_endpoint(
    protocol: str, answer: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy(http_answer(answer)) as (address, _):
        monkeypatch.setenv("https_proxy", f"http://{address}")
        outcome = sent(to(protocol, "https://192.0.2.1:4318"))
    assert outcome.result is Result.TEMPORARY
    assert outcome.reason.startswith(words.format(proxy=address))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_silence_and_hanging_up_may_be_the_proxys(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: socket.socket) -> None:
        time.sleep(0.01)

    with server(silent) as address:
        monkeypatch.setenv("http_proxy", f"http://{address}")
        outcome = sent(to(protocol, "http://192.0.2.1:4318"), 0.5)
        assert outcome.reason.endswith(f" through the proxy {address} (http_proxy) within 0.5 s")
    with server(lambda connection: connection.close()) as address:
        monkeypatch.setenv("http_proxy", f"http://{address}")
        assert f"the proxy {address} (http_proxy)" in sent(to(protocol, "http://192.0.2.1:4318")).reason


def test_over_plain_text_both_the_endpoint_and_the_proxy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell which of the two has answered."""
    with proxy(http_answer("403 Forbidden")) as (address, _):
        monkeypatch.setenv("http_proxy", f"http://{address}")
        assert (
            f"192.0.2.1:4318/v1/metrics through the proxy {address} (http_proxy) answered 403"
            in sent(to("http/protobuf", "http://192.0.2.1:4318")).reason
        )


@pytest.mark.parametrize("variable", ["all_proxy", "HTTP_PROXY"])
def test_a_socks_proxy_is_explained(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """requests needs a package for it; gRPC knows no such proxy and goes straight on."""
    monkeypatch.setitem(sys.modules, "socks", None)
    monkeypatch.setenv(variable, "socks5h://me:hunter2@127.0.0.1:1080")
    outcome = sent(to("http/protobuf", "http://192.0.2.1:4318"))
    assert (
        outcome.reason == f"the SOCKS proxy 127.0.0.1:1080 ({variable}) needs a library: pip install 'requests[socks]'"
    )


@pytest.mark.parametrize("url", ["http://", "http://:8080"])
def test_a_proxy_without_a_host_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", url)
    outcome = sent(to("http/protobuf", "http://192.0.2.1:4318"))
    assert outcome.reason == "http_proxy does not name a host: set it to http://host:port"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_check_names_the_proxy_and_looks_past_one_that_is_left_out(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network in no_proxy counts, in lower case for gRPC."""
    with MemoryCollector() as collector:
        environ = to(protocol, collector.grpc_endpoint if protocol == "grpc" else collector.http_endpoint)
        dead = unused_address()
        monkeypatch.setenv("http_proxy", f"http://me:hunter2@{dead}")
        text = report_text(run_check(environ=environ))
        assert f"connection: goes through the proxy {dead} (http_proxy), which is not looked at" in text
        assert f"FAIL  frame: nothing listens on the address of the proxy {dead} (http_proxy)" in text
        assert "hunter2" not in text
        monkeypatch.setenv("no_proxy", "10.0.0.0/8,127.0.0.0/8")
        result = run_check(environ=environ)
        assert result.ok
        assert [stage.name for stage in result.stages] == ["settings", "name resolution", "connection", "frame"]


def test_check_says_that_grpc_passes_a_socks_proxy_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector is reached, but not on the way that was meant."""
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1080")
    with MemoryCollector() as collector:
        found = json.loads(report_json(run_check(environ=to("grpc", collector.grpc_endpoint))))
    assert found["ok"] is True
    assert found["stages"][1] == {
        "name": "proxy",
        "ok": None,
        "message": "127.0.0.1:1080 (https_proxy) is not http://host:port: gRPC passes it by",
        "fix": "",
    }
