"""Reads the OTLP endpoint and its settings from the standard variables, as the official exporters read them."""

from __future__ import annotations

import math
import os
import re
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast
from urllib.parse import SplitResult, urlsplit, urlunsplit

from opentelemetry.util.re import parse_env_headers

from esper_otel._version import __version__
from esper_otel.addresses import is_on_this_machine
from esper_otel.errors import ConfigurationError
from esper_otel.export.variables import Variables, warn

Protocol = Literal["grpc", "http/protobuf", "http/json", "file"]
Compression = Literal["none", "gzip", "deflate"]
TelemetrySignal = Literal["metrics", "logs"]

USER_AGENT = f"esper_otel/{__version__}"

_GENERAL = "OTEL_EXPORTER_OTLP_"
_DEFAULT_ENDPOINT = {
    "grpc": "http://localhost:4317",
    **dict.fromkeys(("http/protobuf", "http/json"), "http://localhost:4318"),
}
_DEFAULT_TIMEOUT_S = 10.0
_LONGEST_TIMEOUT_S = 86_400.0  # much longer time-outs overflow in gRPC and in Python's locks
# What differs between gRPC and both forms of HTTP stands by this key.
_TRANSPORT = {"grpc": "grpc", "http/protobuf": "http", "http/json": "http"}
_COMPRESSIONS = {"grpc": ("none", "gzip"), "http": ("none", "gzip", "deflate")}
_PROVIDER = {
    "grpc": (
        "OTEL_PYTHON_EXPORTER_OTLP_GRPC_{signal}_CREDENTIAL_PROVIDER",
        "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER",
    ),
    "http": (  # in the official exporter's order: the general one wins
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
        "OTEL_PYTHON_EXPORTER_OTLP_HTTP_{signal}_CREDENTIAL_PROVIDER",
    ),
}

# gRPC's own target names, https://grpc.github.io/grpc/core/md_doc_naming.html
GRPC_NAMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:")
_GRPC_NAME = re.compile(rf"({'|'.join(GRPC_NAMES)})(?!//$)\S+")
_GRPC_DEFAULT_PORT = 443  # gRPC's default port, also without TLS

# Characters that are sent unchanged. For others gRPC aborts the call, and requests raises an error showing the value.
_HEADER_NAME = {"grpc": re.compile(r"[0-9a-z_.-]+(?<!-bin)"), "http": re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")}
_HEADER_VALUE = {"grpc": re.compile(r"[\x20-\x7e]*"), "http": re.compile(r"[\t\x20-\x7e\xa0-\xff]*")}
# Entries that ``parse_env_headers`` accepts; it would log any other entry, secrets included, and leave it out.
_HEADER_ENTRY = re.compile(
    r"[\x21\x23-\x27\x2a\x2b\x2d\x2e\x30-\x39\x41-\x5a\x5e-\x7a\x7c\x7e]+[ \t]*"
    r"=[ \t]*[\x20\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*"
)
_HEADER_FORM = "give authorization=Bearer%20<token>,name=value, with %20 for a space, %2C for a comma"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OTLP endpoint and all settings for sending to it.

    Attributes:
        protocol: ``grpc``, ``http/protobuf`` or ``http/json``; ``file`` for the setting ``export_file``.
        target: the address for messages: ``host:port``, or the URL without credentials.
        address: the address to connect to: ``host:port`` or a gRPC name (``unix:///path``); for HTTP the whole URL.
        is_insecure: whether it is sent as plain text, without TLS.
        headers: headers of every request, with names in lower case.
        certificate: file of the authorities that sign the endpoint's certificate; None uses the system's.
        client_key: file of the client's private key, for mutual TLS.
        client_certificate: file of the client's certificate; set if and only if ``client_key`` is.
        compression: ``none``, ``gzip`` or ``deflate``.
        timeout_s: time limit of one request.
        credential_provider: name in the entry point group ``opentelemetry_otlp_credential_provider``.
        signal: what is sent there.
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
    signal: TelemetrySignal = "metrics"

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the endpoint is on this machine, judged by its address alone, without a name lookup."""
        return is_on_this_machine(self.address)

    @property
    def host(self) -> str:
        """The host in its address; the whole address if that is not of the form host:port."""
        if _GRPC_NAME.fullmatch(self.address):
            return self.address
        return urlsplit(self.address if "://" in self.address else f"//{self.address}").hostname or self.address


class _OfSignal(Variables):
    """Variables of which each has a name of its own for the signal."""

    def __init__(self, environ: Mapping[str, str], ignored: Callable[[str], None], signal: str) -> None:
        super().__init__(environ, ignored)
        self.signal = signal
        self.prefix = f"{_GENERAL}{signal.upper()}_"

    def names(self, name: str) -> tuple[str, str]:
        """Returns the variable for the signal and the general one."""
        return self.prefix + name, _GENERAL + name


def endpoint_from_environment(
    environ: Mapping[str, str] = os.environ,
    *,
    protocol: str | None = None,
    ignored: Callable[[str], None] = warn,
    signal: TelemetrySignal = "metrics",
) -> Endpoint:
    """Reads ``OTEL_EXPORTER_OTLP_*``.

    The variable for the signal, such as metrics, takes precedence over the general one. An empty variable counts as
    not set. The default protocol is gRPC, as in OpenTelemetry's Python distribution. Time-outs are in seconds, as in
    the official Python exporters.

    Args:
        environ: the environment.
        protocol: the protocol, if it is already decided; it overrides the environment.
        ignored: called with a message for each number, switch or word that cannot be used and counts as not set.
        signal: what is to be sent.

    Raises:
        ConfigurationError: an address, header or file cannot be used. Ignoring it would send steps to another place,
            or fail every request. The message names the variable and the fix.
    """
    variables = _OfSignal(environ, ignored, signal)
    chosen = cast("Protocol", protocol or _protocol(variables))
    address, target, is_insecure = _grpc(variables) if chosen == "grpc" else _http(variables)
    certificate, client_key, client_certificate = _tls_files(variables, is_insecure=is_insecure)
    return Endpoint(
        protocol=chosen,
        target=target,
        address=address,
        is_insecure=is_insecure,
        headers=_headers(variables, chosen),
        certificate=certificate,
        client_key=client_key,
        client_certificate=client_certificate,
        compression=_compression(variables, chosen),
        timeout_s=_timeout_s(variables),
        credential_provider=_provider(variables, chosen),
        signal=signal,
    )


def is_endpoint_named() -> bool:
    """Whether a variable names the endpoint; otherwise it is the default one, on this machine."""
    variables = _OfSignal(os.environ, warn, "metrics")
    return bool(variables.text(*variables.names("ENDPOINT"))[1])


def _provider(variables: _OfSignal, protocol: str) -> str | None:
    names = [name.format(signal=variables.signal.upper()) for name in _PROVIDER[_TRANSPORT[protocol]]]
    return variables.text(*names)[1] or None


def _protocol(variables: _OfSignal) -> str:
    return variables.choice(*variables.names("PROTOCOL"), known=_DEFAULT_ENDPOINT, default="grpc", scope="")


def _grpc(variables: _OfSignal) -> tuple[str, str, bool]:
    """Returns the address, the target, and whether it is plain text."""
    variable, text = variables.text(*variables.names("ENDPOINT"))
    if _GRPC_NAME.fullmatch(text):
        return text, text, _is_insecure(variables, "")
    url, port = _url(variable, text or _DEFAULT_ENDPOINT["grpc"])
    if url.scheme not in {"", "http", "https"}:
        raise _wrong(variable, text, f"has the scheme {url.scheme!r}: give http://host:port or https://host:port")
    host = url.netloc.rpartition("@")[2]
    address = host if port is not None else f"{host.removesuffix(':')}:{_GRPC_DEFAULT_PORT}"
    return address, address, _is_insecure(variables, url.scheme)


def _http(variables: _OfSignal) -> tuple[str, str, bool]:
    """Returns the same as ``_grpc``, for HTTP."""
    variable, text = variables.text(*variables.names("ENDPOINT"))
    url, _ = _url(variable, text or _DEFAULT_ENDPOINT["http/protobuf"])
    if url.scheme not in {"http", "https"}:
        fault = f"has the scheme {url.scheme!r}" if url.scheme else "has no scheme"
        other = " (or set OTEL_EXPORTER_OTLP_PROTOCOL=grpc)" if _GRPC_NAME.fullmatch(text) else ""
        raise _wrong(variable, text, f"{fault}: over http/protobuf give http://host:port or https://host:port{other}")
    if not variable.startswith(variables.prefix):
        url = url._replace(path=url.path.removesuffix("/") + f"/v1/{variables.signal}")
    shown = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    return urlunsplit(url), shown, url.scheme == "http"


def _url(variable: str, text: str) -> tuple[SplitResult, int | None]:
    """Parses the URL and its port."""
    try:
        url = urlsplit(text if "://" in text else f"//{text}")
        port = url.port
    except ValueError as error:
        fault = "has a port that is not a number from 1 to 65535" if "Port" in str(error) else "is not a URL"
        raise _wrong(variable, text, f"{fault}: give http://host:port") from None
    if not url.hostname or re.search(r"\s", url.netloc):
        raise _wrong(variable, text, "names no host: give http://host:port")
    if port == 0:
        raise _wrong(variable, text, "has a port that is not a number from 1 to 65535: give http://host:port")
    return url, port


def _wrong(variable: str, text: str, fault: str) -> ConfigurationError:
    return ConfigurationError(f"{variable}={_without_credentials(text)!r} {fault}")


def _without_credentials(text: str) -> str:
    head, separator, rest = text.partition("?")[0].partition("://")
    if not separator:
        return head.rpartition("@")[2]
    return f"{head}://{rest.rpartition('@')[2]}"


def _is_insecure(variables: _OfSignal, scheme: str) -> bool:
    if scheme == "https":
        return False
    return variables.boolean(*variables.names("INSECURE"), default=scheme == "http")


def _headers(variables: _OfSignal, protocol: str) -> tuple[tuple[str, str], ...]:
    variable, text = variables.text(*variables.names("HEADERS"))
    transport = _TRANSPORT[protocol]
    headers: dict[str, str] = {}
    for number, part in enumerate(text.split(","), 1):
        if not part.strip():
            continue
        if not _HEADER_ENTRY.fullmatch(part.strip()):
            raise ConfigurationError(f"{variable}: entry {number} is not name=value; {_HEADER_FORM}")
        [(name, value)] = parse_env_headers(part, liberal=True).items()
        if not _HEADER_NAME[transport].fullmatch(name) or not _HEADER_VALUE[transport].fullmatch(value):
            raise ConfigurationError(
                f"{variable}: entry {number} holds, decoded, characters that {protocol} cannot carry in a header"
            )
        headers[name] = value
    return tuple(headers.items())


def _tls_files(variables: _OfSignal, *, is_insecure: bool) -> tuple[Path | None, Path | None, Path | None]:
    """Returns the files of the authorities, the client's key and the client's certificate.

    The files are loaded here once as a check, since gRPC aborts the process when a key does not fit its certificate.
    """
    certificate, key, chain = (_file(variables, name) for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"))
    if key is not None and chain is None:
        variable, _ = variables.text(*variables.names("CLIENT_KEY"))
        raise ConfigurationError(f"{variable} is set without {_GENERAL}CLIENT_CERTIFICATE: set both, or neither")
    key = chain if key is None else key  # one PEM file may hold both
    if is_insecure:
        return certificate, key, chain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = "CERTIFICATE"
    try:
        if certificate is not None:
            context.load_verify_locations(certificate)
        name = "CLIENT_CERTIFICATE"
        if chain is not None:
            context.load_cert_chain(chain, key, password="")  # without a password OpenSSL would prompt on the terminal
    except OSError as error:
        variable, text = variables.text(*variables.names(name))
        need = "CERTIFICATE" if name == "CERTIFICATE" else "CERTIFICATE and its unencrypted key (_CLIENT_KEY)"
        why = getattr(error, "reason", None) or error.strerror or error
        raise ConfigurationError(f"{variable}={text!r}: {why}; give PEM files: BEGIN {need}") from None
    return certificate, key, chain


def _file(variables: _OfSignal, name: str) -> Path | None:
    variable, text = variables.text(*variables.names(name))
    if not text:
        return None
    if "-----BEGIN" in text:
        raise ConfigurationError(f"{variable} holds PEM text: write it to a file and give the file's path")
    try:
        is_file = Path(text).is_file()
    except OSError:  # the text is not a valid file name
        is_file = False
    if not is_file:
        raise ConfigurationError(f"{variable}={text!r}: there is no such file")
    return Path(text)


def _compression(variables: _OfSignal, protocol: str) -> Compression:
    known = _COMPRESSIONS[_TRANSPORT[protocol]]
    text = variables.choice(*variables.names("COMPRESSION"), known=known, default="none", scope=f" over {protocol}")
    return cast("Compression", text)


def _timeout_s(variables: _OfSignal) -> float:
    # The specification lets 0 mean "no limit"; it is not accepted here, since a dead connection would go unnoticed.
    timeout_s = variables.number(
        *variables.names("TIMEOUT"),
        default=_DEFAULT_TIMEOUT_S,
        lowest=math.ulp(0.0),
        highest=sys.float_info.max,
        unit="a number of seconds above 0",
    )
    return min(timeout_s, _LONGEST_TIMEOUT_S)
