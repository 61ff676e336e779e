"""Where OTLP goes: the standard variables, read as the official exporters read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as OfficialGrpc
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as OfficialHttp

from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.opening import token_for

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
        ({f"{E}ENDPOINT": "ftp://host:1"}, r"OTEL_EXPORTER_OTLP_ENDPOINT='ftp://host:1' has the scheme 'ftp'"),
        ({f"{E}ENDPOINT": "http://host:port"}, r"OTEL_EXPORTER_OTLP_ENDPOINT='http://host:port'"),
        ({f"{E}ENDPOINT": "http://host:99999"}, r"has a port that is not a number from 1 to 65535"),
        ({f"{E}ENDPOINT": "http://host:0"}, r"has a port that is not a number"),
        ({f"{E}ENDPOINT": "http://"}, r"names no host"),
        ({f"{E}ENDPOINT": "http://my host:4317"}, r"names no host"),
        ({f"{E}ENDPOINT": "http://[::1:4317"}, r"is not a URL"),
        ({**HTTP, f"{E}ENDPOINT": "unix:///socket"}, r"has the scheme 'unix'|names no host"),
        ({**HTTP, f"{E}ENDPOINT": "host:4318"}, r"has no scheme.*http://host:port"),
        ({f"{E}HEADERS": "token"}, r"OTEL_EXPORTER_OTLP_HEADERS: entry 1 is not name=value.*%20"),
        ({f"{E}HEADERS": "a=1,x y=2"}, r"entry 2 is not name=value"),
        ({f"{E}HEADERS": "authorization=two%0Alines"}, r"entry 1 holds, decoded, characters that grpc cannot carry"),
        ({**HTTP, f"{E}HEADERS": "price=%E2%82%AC"}, r"entry 1 holds, decoded, characters that http/protobuf cannot"),
        ({f"{E}HEADERS": "trace-bin=abc"}, r"entry 1 holds"),
        ({f"{E}CERTIFICATE": "x" * 5000}, r"there is no such file"),
        ({f"{M}CERTIFICATE": "/no/such.pem"}, r"OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE='/no/such.pem': there is no"),
        ({f"{E}CLIENT_KEY": "/no/such.key"}, r"OTEL_EXPORTER_OTLP_CLIENT_KEY"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_used_names_itself_and_the_fix(environ: dict[str, str], message: str) -> None:
    """At the start of the run, not in hour three."""
    with pytest.raises(ConfigurationError, match=message):
        endpoint_from_environment(environ)


@pytest.mark.parametrize(
    "name",
    ["unix:///run/otel.sock", "unix:run/otel.sock", "dns:///host:4317", "dns:host:4317", "ipv4:10.0.0.1:4317"],
)
@pytest.mark.parametrize("insecure", ["true", "false", ""])
def test_names_of_grpcs_own_are_passed_on(name: str, insecure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sidecar listens on a socket file; the official exporter takes it, and encrypts unless told otherwise."""
    monkeypatch.setenv(f"{E}ENDPOINT", name)
    monkeypatch.setenv(f"{E}INSECURE", insecure)
    ours = endpoint_from_environment()
    official: Any = OfficialGrpc()
    official.shutdown()
    assert ours.address == ours.target == official._endpoint == name
    assert ours.is_insecure == bool(official._insecure) == (insecure == "true")


def test_without_a_port_grpc_goes_to_443() -> None:
    """As gRPC does, for plain text too; and the user sees it."""
    endpoint = endpoint_from_environment({f"{E}ENDPOINT": "http://collector"})
    assert (endpoint.address, endpoint.target) == ("collector:443", "collector:443")


@given(st.lists(st.sampled_from([*'aB-_.=,;:%20 "()\\/\té€\n', "%0A", "%2C", "=", "x=1"]), max_size=14).map("".join))
def test_header_text_is_taken_as_the_official_exporters_take_it_or_refused(text: str) -> None:
    """Never quietly without one of them: an exporter without its token is refused all night."""
    from opentelemetry.util.re import parse_env_headers

    for environ in ({}, HTTP):
        try:
            ours = endpoint_from_environment({**environ, f"{E}HEADERS": text})
        except ConfigurationError:
            continue
        assert dict(ours.headers) == parse_env_headers(text, liberal=True)
        assert len(ours.headers) <= sum(bool(part.strip()) for part in text.split(","))


def test_a_header_that_cannot_be_used_is_neither_logged_nor_shown(caplog: pytest.LogCaptureFixture) -> None:
    """The official exporters log it, token and all, and send without it."""
    for text in ("a=1,auth orization=hunter2", 'authorization="hunter2"', "authorization=hunter2%0Ax", "hunter2"):
        with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_HEADERS") as raised:
            endpoint_from_environment({f"{E}HEADERS": text})
        assert "hunter2" not in str(raised.value)
    assert not caplog.records


def test_files_mean_what_they_mean_to_the_official_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable for metrics wins."""
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    pair = authority.pair("client")
    for name, text in {
        **HTTP,
        f"{E}ENDPOINT": "https://collector:4318",
        f"{M}CERTIFICATE": str(authority.certificate),
        f"{E}CERTIFICATE": str(other.certificate),
        f"{E}CLIENT_KEY": str(pair.key),
        f"{E}CLIENT_CERTIFICATE": str(pair.certificate),
    }.items():
        monkeypatch.setenv(name, text)
    ours = endpoint_from_environment()
    official: Any = OfficialHttp()
    session = official._client._transport._session
    official.shutdown()
    assert (str(ours.certificate), ours.certificate) == (session.verify, authority.certificate)
    assert (str(ours.client_certificate), str(ours.client_key)) == session.cert


def test_half_a_pair_is_refused_before_grpc_aborts_the_process(tmp_path: Path) -> None:
    """gRPC's core ends the trainer with SIGABRT over a key without a certificate."""
    authority = Authority(tmp_path)
    pair, other = authority.pair("client"), authority.pair("other")
    both = tmp_path / "both.pem"
    both.write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    environ = {f"{E}ENDPOINT": "https://collector:4317"}
    with pytest.raises(ConfigurationError, match="CLIENT_KEY is set without OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"):
        endpoint_from_environment({**environ, f"{E}CLIENT_KEY": str(pair.key)})
    with pytest.raises(ConfigurationError, match=r"CLIENT_CERTIFICATE='.*client.pem'.*_CLIENT_KEY"):
        endpoint_from_environment({**environ, f"{E}CLIENT_CERTIFICATE": str(pair.certificate)})
    files = {f"{E}CLIENT_CERTIFICATE": str(pair.certificate), f"{E}CLIENT_KEY": str(other.key)}
    with pytest.raises(ConfigurationError, match="KEY_VALUES_MISMATCH"):
        endpoint_from_environment({**environ, **files})
    endpoint = endpoint_from_environment({**environ, f"{E}CLIENT_CERTIFICATE": str(both)})
    assert (endpoint.client_certificate, endpoint.client_key) == (both, both)


def test_files_that_are_no_certificates_are_refused_at_the_start(tmp_path: Path) -> None:
    """An encrypted key would otherwise stop the training to ask for a password."""
    text = tmp_path / "notes.txt"
    text.write_text("nothing")
    with pytest.raises(ConfigurationError, match=r"OTEL_EXPORTER_OTLP_CERTIFICATE='.*notes.txt'.*BEGIN CERTIFICATE"):
        endpoint_from_environment({f"{E}ENDPOINT": "https://collector", f"{E}CERTIFICATE": str(text)})
    pair = Authority(tmp_path).pair("client")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    pair.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hunter2"),
        )
    )
    files = {f"{E}CLIENT_CERTIFICATE": str(pair.certificate), f"{E}CLIENT_KEY": str(pair.key)}
    with pytest.raises(ConfigurationError, match="unencrypted key"):
        endpoint_from_environment({f"{E}ENDPOINT": "https://collector", **files})


def test_a_key_in_place_of_its_files_name_is_not_shown(tmp_path: Path) -> None:
    """Secrets are often injected as text; the message stands in a job's log."""
    key = Authority(tmp_path).pair("client").key.read_text()
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_CLIENT_KEY holds PEM text") as raised:
        endpoint_from_environment({f"{E}CLIENT_KEY": key})
    assert key.splitlines()[1] not in str(raised.value)


def test_time_outs_are_seconds_and_bounded() -> None:
    """The specification's 10000 milliseconds are 10000 seconds to every Python exporter, ours too."""
    assert endpoint_from_environment({f"{E}TIMEOUT": "10000"}).timeout_s == 10_000.0
    assert endpoint_from_environment({f"{E}TIMEOUT": "1e300"}).timeout_s == 86_400.0


@pytest.mark.parametrize(
    ("protocol", "names", "expected"),
    [
        ("grpc", {"GRPC": "all", "GRPC_METRICS": "metrics"}, "metrics"),
        ("grpc", {"GRPC": "all", "HTTP": "http"}, "all"),
        ("http/protobuf", {"HTTP": "all", "HTTP_METRICS": "metrics"}, "all"),
        ("http/protobuf", {"HTTP_METRICS": "metrics", "GRPC": "grpc"}, "metrics"),
    ],
)
def test_credential_providers_win_as_in_the_official_exporters(
    protocol: str, names: dict[str, str], expected: str
) -> None:
    """Over HTTP the general one wins there, which is odd, but the same set-up must mean the same."""
    environ = {f"OTEL_PYTHON_EXPORTER_OTLP_{name}_CREDENTIAL_PROVIDER": text for name, text in names.items()}
    endpoint = endpoint_from_environment({f"{E}PROTOCOL": protocol, **environ})
    assert endpoint.credential_provider == expected


def test_logs_have_variables_of_their_own_beside_the_general_ones() -> None:
    """And none of those for metrics, as specified."""
    environ = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://general:4318",
        "OTEL_EXPORTER_OTLP_HEADERS": "a=general",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://metrics:1",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "a=metrics",
    }
    logs = endpoint_from_environment(environ, signal="logs")
    assert (logs.address, logs.headers) == ("http://general:4318/v1/logs", (("a", "general"),))
    environ |= {"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://logs:1/x", "OTEL_EXPORTER_OTLP_LOGS_HEADERS": "a=logs"}
    logs = endpoint_from_environment(environ, signal="logs")
    assert (logs.address, logs.headers) == ("http://logs:1/x", (("a", "logs"),))
    assert endpoint_from_environment(environ).address == "http://metrics:1"


def test_only_the_host_of_the_steps_gets_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    steps = endpoint_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://gateway:4317"})
    for address, expected in {"https://gateway:4318": token, "http://elsewhere:4317": None}.items():
        logs = endpoint_from_environment({"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": address}, signal="logs")
        assert token_for(logs, steps, token) == expected
    socket = endpoint_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "unix:///run/otlp"})
    assert token_for(socket, socket, token) == token
