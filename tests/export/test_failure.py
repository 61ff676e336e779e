"""Connections that fail: what is wrong, and which setting to look at."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from certificates import Authority
from endpoints import PROTOCOLS, E, at, grpc_server, sent, to, unused_address

from esper_otel.export.transport import Result
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code


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


@pytest.mark.parametrize("name", ["unix:{folder}/otel.sock", "dns:localhost:{port}", "ipv4:127.0.0.1:{port}"])
def test_what_is_offered_for_a_name_of_grpcs_own_can_be_done(name: str, tmp_path: Path) -> None:
    """There is no http:// before it that could stand for plain text."""
    folder = tmp_path if len(str(tmp_path)) < 80 else Path(tempfile.mkdtemp())
    with (
        grpc_server(lambda *_: b"", f"unix:{folder}/otel.sock"),
        MemoryCollector() as collector,
    ):
        target = name.format(folder=folder, port=collector.grpc_endpoint.rpartition(":")[2])
        outcome = sent({f"{E}ENDPOINT": target})
        assert (
            outcome.reason
            == f"{target} does not speak TLS: to connect without it, set OTEL_EXPORTER_OTLP_INSECURE=true"
        )
        assert sent({f"{E}ENDPOINT": target, f"{E}INSECURE": "true"}).result is Result.DELIVERED


def test_http_behind_a_name_of_grpcs_own_needs_another_address(tmp_path: Path) -> None:
    """OTLP over HTTP takes neither names nor sockets."""
    with MemoryCollector() as collector:
        outcome = sent({f"{E}ENDPOINT": f"dns:{collector.http_endpoint[7:]}", f"{E}INSECURE": "true"})
    assert outcome.reason.endswith(
        "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf and use an address of the form http://host:port"
    )
