"""Where OTLP goes: the standard variables, read as the official exporters read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as OfficialGrpc
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as OfficialHttp

from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import endpoint_from_environment

E = "OTEL_EXPORTER_OTLP_"
M = "OTEL_EXPORTER_OTLP_METRICS_"
HTTP = {f"{E}PROTOCOL": "http/protobuf"}

ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {f"{E}ENDPOINT": "http://collector:4317"},
    {f"{E}ENDPOINT": "https://collector:4317"},
    {f"{E}ENDPOINT": "http://collector:4318/", f"{M}TIMEOUT": "3"},
    {f"{E}ENDPOINT": "http://collector:4318/base", f"{E}TIMEOUT": "2.5"},
    {f"{M}ENDPOINT": "http://metrics:4318/elsewhere", f"{E}ENDPOINT": "http://all:1"},
    {f"{E}ENDPOINT": "http://[::1]:4318"},
    {f"{E}HEADERS": "a=1,B=two%20words", f"{E}COMPRESSION": "gzip"},
    {f"{E}HEADERS": "a=1", f"{M}HEADERS": "b=2", f"{M}COMPRESSION": "gzip", f"{E}COMPRESSION": "none"},
    {f"{E}ENDPOINT": "http://collector:4317", f"{E}INSECURE": "false"},
]


@pytest.mark.parametrize(
    "environ", [*ENVIRONMENTS, {f"{E}ENDPOINT": "collector:4317", f"{E}INSECURE": "true"}], ids=str
)
def test_grpc_settings_mean_what_they_mean_to_the_official_exporter(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has set up one exporter has set up ours."""
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    ours = endpoint_from_environment()
    official: Any = OfficialGrpc()
    try:
        assert ours.protocol == "grpc"
        assert ours.address == official._endpoint
        assert ours.is_insecure == bool(official._insecure)
        assert dict(ours.headers).items() <= dict(official._headers).items()
        assert ours.timeout_s == official._timeout
        assert (ours.compression == "gzip") == (official._compression.name == "Gzip")
    finally:
        official.shutdown()


@pytest.mark.parametrize("environ", [*ENVIRONMENTS, {f"{E}COMPRESSION": "deflate"}], ids=str)
def test_http_settings_mean_what_they_mean_to_the_official_exporter(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of the general endpoint is completed, that of the metrics endpoint is taken as it is."""
    for name, text in {**environ, **HTTP}.items():
        monkeypatch.setenv(name, text)
    ours = endpoint_from_environment()
    official: Any = OfficialHttp()
    try:
        assert ours.address == official._endpoint
        assert dict(ours.headers).items() <= official._client._headers.items()
        assert ours.timeout_s == official._client._timeout
        assert ours.compression == official._compression.value
    finally:
        official.shutdown()


_HEADER_NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
_HEADER_TEXTS = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1).filter(str.strip)


@given(st.dictionaries(_HEADER_NAMES, _HEADER_TEXTS, min_size=1, max_size=4))
def test_percent_encoded_headers_arrive_decoded(headers: dict[str, str]) -> None:
    """Spaces and commas in a token are common."""
    from urllib.parse import quote

    text = ",".join(f"{name}={quote(value.strip(), safe='')}" for name, value in headers.items())
    found = dict(endpoint_from_environment({f"{E}HEADERS": text}).headers)
    assert found == {name: value.strip() for name, value in headers.items()}


def test_secrets_are_neither_shown_nor_printed() -> None:
    """The target stands in logs; so may the endpoint's repr."""
    endpoint = endpoint_from_environment(
        {
            **HTTP,
            f"{E}ENDPOINT": "https://me:hunter2@backend:4318?token=hunter2",
            f"{E}HEADERS": "authorization=hunter2",
        }
    )
    assert endpoint.target == "https://backend:4318/v1/metrics"
    assert "hunter2" not in repr(endpoint)
    with pytest.raises(ConfigurationError) as raised:
        endpoint_from_environment({f"{E}ENDPOINT": "ftp://me:hunter2@backend"})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({f"{E}PROTOCOL": "http/json"}, r"OTEL_EXPORTER_OTLP_PROTOCOL='http/json'.* grpc or http/protobuf"),
        ({f"{M}PROTOCOL": "thrift"}, r"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL='thrift'"),
        ({f"{E}ENDPOINT": "ftp://host:1"}, r"OTEL_EXPORTER_OTLP_ENDPOINT='ftp://host:1' has the scheme 'ftp'"),
        ({f"{E}ENDPOINT": "http://host:port"}, r"OTEL_EXPORTER_OTLP_ENDPOINT='http://host:port'"),
        ({f"{E}ENDPOINT": "http://host:99999"}, r"Port out of range"),
        ({f"{E}ENDPOINT": "http://"}, r"names no host"),
        ({**HTTP, f"{E}ENDPOINT": "host:4318"}, r"has no scheme.*http://host:port"),
        ({f"{E}COMPRESSION": "zstd"}, r"OTEL_EXPORTER_OTLP_COMPRESSION='zstd'.*none, gzip"),
        ({f"{E}COMPRESSION": "deflate"}, r"not supported over grpc"),
        ({f"{E}TIMEOUT": "soon"}, r"OTEL_EXPORTER_OTLP_TIMEOUT='soon' is not a number of seconds above 0"),
        ({f"{E}TIMEOUT": "-1"}, r"above 0"),
        ({f"{E}TIMEOUT": "nan"}, r"above 0"),
        ({f"{E}INSECURE": "perhaps"}, r"OTEL_EXPORTER_OTLP_INSECURE='perhaps' is neither true nor false"),
        ({f"{E}HEADERS": "token"}, r"OTEL_EXPORTER_OTLP_HEADERS: an entry has no '='"),
        ({f"{M}CERTIFICATE": "/no/such.pem"}, r"OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE='/no/such.pem': there is no"),
        ({f"{E}CLIENT_KEY": "/no/such.key"}, r"OTEL_EXPORTER_OTLP_CLIENT_KEY"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used_names_itself_and_the_fix(environ: dict[str, str], message: str) -> None:
    """At the start of the run, not in hour three."""
    with pytest.raises(ConfigurationError, match=message):
        endpoint_from_environment(environ)


def test_files_and_providers_are_taken(tmp_path: Path) -> None:
    """The variable for metrics wins."""
    certificate, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    certificate.touch()
    other.touch()
    endpoint = endpoint_from_environment(
        {
            f"{M}CERTIFICATE": str(certificate),
            f"{E}CERTIFICATE": str(other),
            "OTEL_PYTHON_EXPORTER_OTLP_GRPC_METRICS_CREDENTIAL_PROVIDER": "gcp",
        }
    )
    assert endpoint.certificate == certificate
    assert endpoint.credential_provider == "gcp"
