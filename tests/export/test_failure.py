"""Connections that fail: what is wrong, and which setting to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from endpoints import PROTOCOLS, E, at, sent, to, unused_address

from esper_otel.export.transport import Outcome, Result
from esper_otel.testing import MemoryCollector


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_port_where_nothing_listens_is_named(protocol: str) -> None:
    """The commonest mistake."""
    address = unused_address()
    outcome = sent(to(protocol, f"http://{address}"))
    assert outcome.result is Result.TEMPORARY
    assert "nothing listens on" in outcome.reason
    assert address in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_name_that_is_not_known_is_told_whatever_it_contains(protocol: str) -> None:
    """The words that are looked for may stand in the host's name."""
    environ = to(protocol, "http://ssl-alert-http1.invalid:4317")
    outcome = sent(environ, 3.0)
    assert outcome.result is Result.TEMPORARY
    assert outcome.reason.endswith("cannot be resolved")


def test_the_protocols_are_told_apart_when_they_meet_the_wrong_port() -> None:
    """gRPC at 4318 and HTTP at 4317: the second commonest mistake."""
    with MemoryCollector() as collector:
        outcome = sent(to("grpc", collector.http_endpoint))
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in outcome.reason
        outcome = sent(to("http/protobuf", collector.grpc_endpoint))
        assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_needs_the_authority_and_the_right_name(protocol: str, tmp_path: Path) -> None:
    """Trusted with it, named when not."""
    authority = Authority(tmp_path)
    good, elsewhere = authority.pair("good"), authority.pair("elsewhere", "elsewhere.example")
    with MemoryCollector(certificate_file=good.certificate, key_file=good.key) as collector:
        assert sent(at(collector, protocol, CERTIFICATE=str(authority.certificate))).result is Result.DELIVERED
        outcome = sent(at(collector, protocol))
        assert outcome.result is Result.TEMPORARY
        assert "not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)" in outcome.reason
    with MemoryCollector(certificate_file=elsewhere.certificate, key_file=elsewhere.key) as collector:
        outcome = sent(at(collector, protocol, CERTIFICATE=str(authority.certificate)))
        assert outcome.result is Result.TEMPORARY
        assert "is for another host name" in outcome.reason


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_and_plain_text_are_told_apart(protocol: str, tmp_path: Path) -> None:
    """http:// where https:// is meant, and the other way round."""
    authority = Authority(tmp_path)
    pair = authority.pair("good")
    with MemoryCollector() as collector:
        environ = at(collector, protocol)
        outcome = sent({**environ, f"{E}ENDPOINT": environ[f"{E}ENDPOINT"].replace("http:", "https:")})
        assert (outcome.result, "does not speak TLS" in outcome.reason) == (Result.TEMPORARY, True)
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        environ = at(collector, protocol)
        outcome = sent({**environ, f"{E}ENDPOINT": environ[f"{E}ENDPOINT"].replace("https:", "http:")})
        assert (outcome.result, "may speak TLS (https://)" in outcome.reason) == (Result.TEMPORARY, True)


def test_grpc_meets_tls_without_http2(tmp_path: Path) -> None:
    """The HTTP port of a collector with TLS."""
    authority = Authority(tmp_path)
    pair = authority.pair("good")
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        outcome = sent({f"{E}ENDPOINT": collector.http_endpoint, f"{E}CERTIFICATE": str(authority.certificate)})
    assert "speaks TLS, but not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf" in outcome.reason


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("http://proxy.invalid:3128", "the name of the proxy on the way to {target} cannot be resolved"),
        ("http://{unused}", "nothing listens where the proxy on the way to {target} should be (connection refused)"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_fault_of_the_proxy_is_not_put_down_to_the_endpoint(
    scheme: str, proxy: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name that cannot be resolved is not the one that the user has given."""
    monkeypatch.setenv(f"{scheme}_proxy", proxy.format(unused=unused_address()))
    outcome = sent(to("http/protobuf", f"{scheme}://192.0.2.1:4318"))
    assert outcome == Outcome(Result.TEMPORARY, words.format(target=f"{scheme}://192.0.2.1:4318/v1/metrics"))
