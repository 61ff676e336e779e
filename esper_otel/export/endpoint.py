"""Endpoint: where OTLP goes and how, from the standard variables, read as the official exporters read them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast
from urllib.parse import SplitResult, urlsplit, urlunsplit

from opentelemetry.util.re import parse_env_headers

from esper_otel.errors import ConfigurationError

Protocol = Literal["grpc", "http/protobuf"]
Compression = Literal["none", "gzip", "deflate"]

_GENERAL = "OTEL_EXPORTER_OTLP_"
_METRICS = "OTEL_EXPORTER_OTLP_METRICS_"
_DEFAULT_ENDPOINT = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}
_DEFAULT_TIMEOUT_S = 10.0
_COMPRESSIONS = {"grpc": ("none", "gzip"), "http/protobuf": ("none", "gzip", "deflate")}
_PROVIDER = {
    "grpc": ("OTEL_PYTHON_EXPORTER_OTLP_GRPC_METRICS_CREDENTIAL_PROVIDER",),
    "http/protobuf": (
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_METRICS_CREDENTIAL_PROVIDER",
    ),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Everything that sending needs to know.

    Attributes:
        protocol: ``grpc`` or ``http/protobuf``.
        target: what users are shown: ``host:port``, or the URL without credentials.
        address: what is dialled: ``host:port`` for gRPC, the whole URL for HTTP.
        is_insecure: whether it is plain text.
        headers: sent with every request, names in lower case.
        certificate: file of the authorities that sign the endpoint's certificate; the system's when None.
        client_key: file of our key, for mutual TLS.
        client_certificate: file of our certificate.
        compression: ``none``, ``gzip`` or ``deflate``.
        timeout_s: for one request.
        credential_provider: name in the entry point group ``opentelemetry_otlp_credential_provider``.
    """

    protocol: Protocol
    target: str
    address: str = field(repr=False)
    is_insecure: bool
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    certificate: Path | None = None
    client_key: Path | None = None
    client_certificate: Path | None = None
    compression: Compression = "none"
    timeout_s: float = _DEFAULT_TIMEOUT_S
    credential_provider: str | None = None


def endpoint_from_environment(environ: Mapping[str, str] = os.environ) -> Endpoint:
    """Reads ``OTEL_EXPORTER_OTLP_*``; the variable for metrics wins over the general one, an empty one is not set.

    The protocol is gRPC unless another is asked for, as Python's distribution has it. Time-outs are in seconds, as
    the official Python exporters read them.

    Raises:
        ConfigurationError: a value that cannot be used; the message names the variable and the fix.
    """
    variable, protocol = _found(environ, "PROTOCOL")
    protocol = protocol or "grpc"
    if protocol not in _DEFAULT_ENDPOINT:
        raise ConfigurationError(f"{variable}={protocol!r} is not supported: set it to grpc or http/protobuf")
    chosen = cast("Protocol", protocol)
    variable, text = _found(environ, "ENDPOINT")
    url = _url(variable, text or _DEFAULT_ENDPOINT[protocol], protocol)
    if protocol == "http/protobuf" and not variable.startswith(_METRICS):
        url = url._replace(path=url.path.removesuffix("/") + "/v1/metrics")
    host = url.netloc.rpartition("@")[2]
    shown = host if protocol == "grpc" else urlunsplit((url.scheme, host, url.path, "", ""))
    return Endpoint(
        protocol=chosen,
        target=shown,
        address=host if protocol == "grpc" else urlunsplit(url),
        is_insecure=_is_insecure(environ, url) if protocol == "grpc" else url.scheme == "http",
        headers=_headers(environ),
        certificate=_file(environ, "CERTIFICATE"),
        client_key=_file(environ, "CLIENT_KEY"),
        client_certificate=_file(environ, "CLIENT_CERTIFICATE"),
        compression=_compression(environ, protocol),
        timeout_s=_timeout_s(environ),
        credential_provider=next(filter(None, map(environ.get, _PROVIDER[protocol])), None),
    )


def _found(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """The variable that counts and its text, stripped; empty when neither is set."""
    for variable in (_METRICS + name, _GENERAL + name):
        text = environ.get(variable, "").strip()
        if text:
            return variable, text
    return _GENERAL + name, ""


def _url(variable: str, text: str, protocol: str) -> SplitResult:
    wrong = f"{variable}={_without_credentials(text)!r}"
    with_scheme = text if "://" in text else f"//{text}"
    try:
        url = urlsplit(with_scheme)
        port = url.port
    except ValueError as error:
        raise ConfigurationError(f"{wrong}: {error}; give http://host:port") from None
    if protocol == "http/protobuf" and url.scheme not in {"http", "https"}:
        raise ConfigurationError(
            f"{wrong} has no scheme: over http/protobuf give http://host:port or https://host:port"
        )
    if url.scheme not in {"", "http", "https"}:
        raise ConfigurationError(f"{wrong} has the scheme {url.scheme!r}: give http://host:port or https://host:port")
    if not url.hostname:
        raise ConfigurationError(f"{wrong} names no host: give http://host:port")
    if protocol == "grpc" and port is None:
        url = url._replace(netloc=f"{url.netloc}:{80 if url.scheme == 'http' else 443}")
    return url


def _without_credentials(text: str) -> str:
    head, separator, rest = text.partition("://")
    if not separator:
        return text.rpartition("@")[2]
    return f"{head}://{rest.rpartition('@')[2]}"


def _is_insecure(environ: Mapping[str, str], url: SplitResult) -> bool:
    if url.scheme == "https":
        return False
    variable, text = _found(environ, "INSECURE")
    if text:
        if text.lower() not in {"true", "false"}:
            raise ConfigurationError(f"{variable}={text!r} is neither true nor false")
        return text.lower() == "true"
    return url.scheme == "http"


def _headers(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    variable, text = _found(environ, "HEADERS")
    for part in text.split(","):
        if part.strip() and "=" not in part:
            raise ConfigurationError(f"{variable}: an entry has no '='; give name=value,name=value with %20 for spaces")
    headers = {name.lower(): value for name, value in parse_env_headers(text, liberal=True).items()}
    if text.strip(", ") and not headers:
        raise ConfigurationError(f"{variable} holds no valid header; give name=value,name=value with %20 for spaces")
    return tuple(headers.items())


def _file(environ: Mapping[str, str], name: str) -> Path | None:
    variable, text = _found(environ, name)
    if not text:
        return None
    path = Path(text)
    if not path.is_file():
        raise ConfigurationError(f"{variable}={text!r}: there is no such file")
    return path


def _compression(environ: Mapping[str, str], protocol: str) -> Compression:
    variable, text = _found(environ, "COMPRESSION")
    text = text.lower() or "none"
    if text not in _COMPRESSIONS[protocol]:
        known = ", ".join(_COMPRESSIONS[protocol])
        raise ConfigurationError(f"{variable}={text!r} is not supported over {protocol}: set it to one of {known}")
    return cast("Compression", text)


def _timeout_s(environ: Mapping[str, str]) -> float:
    variable, text = _found(environ, "TIMEOUT")
    if not text:
        return _DEFAULT_TIMEOUT_S
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0.0 < timeout_s < math.inf:
        raise ConfigurationError(f"{variable}={text!r} is not a number of seconds above 0")
    return timeout_s
