"""Credential providers: what installed packages offer."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from endpoints import E, at, sent

from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.transport import Result, open_sender
from esper_otel.testing import MemoryCollector

PROVIDER = """
import grpc
import requests


def session():
    session = requests.Session()
    session.headers["authorization"] = "Bearer provided"
    return session


def credentials():
    with open({certificate!r}, "rb") as file:
        return grpc.ssl_channel_credentials(file.read())


def broken():
    raise RuntimeError("no metadata server")
"""


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An installed package with credential providers."""
    authority = Authority(tmp_path)
    (tmp_path / "provider_for_tests.py").write_text(PROVIDER.format(certificate=str(authority.certificate)))
    about = tmp_path / "provider_for_tests-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: provider_for_tests\nVersion: 1\n")
    names = "".join(f"test-{name} = provider_for_tests:{name}\n" for name in ("session", "credentials", "broken"))
    (about / "entry_points.txt").write_text(f"[opentelemetry_otlp_credential_provider]\n{names}")
    monkeypatch.syspath_prepend(tmp_path)
    return authority


def test_credential_providers_give_session_and_channel_credentials(provider: Authority) -> None:
    """As installed packages of clouds offer them."""
    pair = provider.pair("server")
    with MemoryCollector(headers={"authorization": "Bearer provided"}) as collector:
        environ = {"OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "test-session"}
        assert sent({**at(collector, "http/protobuf"), **environ}).result is Result.DELIVERED
    with MemoryCollector(certificate_file=pair.certificate, key_file=pair.key) as collector:
        environ = {"OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": "test-credentials"}
        assert sent({**at(collector, "grpc"), **environ}).result is Result.DELIVERED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "'nobody' is not among the entry points"),
        ("test-session", "'test-session' gives a Session, not grpc.ChannelCredentials"),
        ("test-broken", "'test-broken' fails: RuntimeError: no metadata server"),
    ],
)
def test_a_credential_provider_that_does_not_work_is_named(provider: Authority, name: str, message: str) -> None:
    """When the session starts."""
    environ = {f"{E}ENDPOINT": "https://127.0.0.1:1", "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": name}
    with pytest.raises(ConfigurationError, match=message):
        open_sender(endpoint_from_environment(environ))
