"""Translates the error texts of gRPC and Python about a failed connection into a cause and the setting to check."""

from __future__ import annotations

import re

from esper_otel.export.endpoint import GRPC_NAMES, Endpoint
from esper_otel.export.proxies import proxy_of

# Patterns for the lower-case error texts of gRPC (1.72 to 1.85) and Python, and their meanings; the first match counts.
# Texts that contain the host's name are matched first, since that name may contain the words of any other pattern.
_HUNG_UP = "socket closed|connection reset|broken pipe|remotedisconnected|ssleoferror"
_OF_A_PROXY = (  # used when a proxy is configured: the connection that failed is then the one to the proxy
    ("invalidproxyurl", "{variable} does not name a host: set it to http://host:port"),
    ("invalidschema", "the SOCKS proxy {proxy} needs a library: pip install 'requests[socks]'"),
    ("^dns resolution failed|^errors resolving|gaierror", "the name of the proxy {proxy} cannot be resolved"),
    (
        "response code 407|connection failed: 407",
        "the proxy {proxy} refuses the credentials: set its address to http://user:password@host:port",
    ),
    (r"(?:response code|connection failed:) (?P<status>\d+)", "the proxy {proxy} answers {status} for {target}"),
    ("connection refused", "nothing listens on the address of the proxy {proxy} (connection refused)"),
    ("unreachable|no route to host", "the proxy {proxy} cannot be reached from here"),
    ("proxyerror|socks[45]error", "the proxy {proxy} refuses the connection to {target}"),
    (_HUNG_UP, "the proxy {proxy} closed the connection, or {target} did"),
)
_MEANINGS = (
    ("^dns resolution failed|^errors resolving|gaierror", "the name in {target} cannot be resolved"),
    (
        "hostname verif|peer name|mismatch",
        "the certificate of {target} is for another host name: use the name in the certificate",
    ),
    ("connection refused", "nothing listens on {target} (connection refused)"),
    ("no such file", "nothing listens on {target} (no such file)"),
    ("certificate has expired", "the certificate of {target} has expired: it must be renewed there"),
    ("certificate is not yet valid", "the certificate of {target} is not valid yet: check the clock of this machine"),
    ("certificate_verify_failed", "the certificate of {target} is not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)"),
    ("wrong_version_number|record_layer", "{target} does not speak TLS: to connect without it, {plain}"),
    ("alpn", "{target} speaks TLS, but not gRPC: {http}"),
    (
        "certificate_required|unknown_ca",
        "{target} requires a client certificate (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)",
    ),
    ("alert|handshake", "the TLS handshake with {target} failed"),
    ("http1", "{target} speaks HTTP/1.1, not gRPC: {http}"),
    ("parsing http/2", "{target} does not speak gRPC: {http}{port}"),
    (_HUNG_UP, "{target} closed the connection: it may {want}, or speak {other}"),
    ("badstatusline", "{target} does not speak HTTP/1.1: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use port 4318"),
    ("httpexception|linetoolong", "the headers of the answer from {target} are too many or too long"),
    ("unreachable|no route to host", "{target} cannot be reached from here"),
)


def meaning(words: str, endpoint: Endpoint) -> str | None:
    """Explains an error text to the user of this endpoint; None when no pattern matches."""
    proxy = proxy_of(endpoint)
    meanings = _MEANINGS if proxy is None or not proxy.is_used else _OF_A_PROXY + _MEANINGS
    found = ((re.search(pattern, words.lower()), text) for pattern, text in meanings)
    match, text = next((each for each in found if each[0]), (None, ""))
    if match is None:
        return None
    is_name = _is_name(endpoint)
    tls = "OTEL_EXPORTER_OTLP_INSECURE=false" if is_name else "https://"
    return text.format(
        target=endpoint.target,
        proxy=proxy,
        variable=proxy and proxy.variable,
        status=match.groupdict().get("status"),
        plain="set OTEL_EXPORTER_OTLP_INSECURE=true" if is_name else "use an http:// address",
        want=f"speak TLS ({tls})"
        if endpoint.is_insecure
        else "require a client certificate (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)",
        other="HTTP/1.1, not gRPC" if endpoint.protocol == "grpc" else "gRPC, not HTTP/1.1",
        http=_over_http(endpoint),
        port="" if is_name else ", or use port 4317",
    )


def _is_name(endpoint: Endpoint) -> bool:
    """Whether the address is a gRPC target name, which has no http:// or https:// prefix."""
    return endpoint.address.startswith(GRPC_NAMES)


def _over_http(endpoint: Endpoint) -> str:
    """Tells the user how to reach the endpoint over HTTP."""
    if endpoint.address.startswith(("unix:", "unix-abstract:")):
        return "use the socket of a gRPC receiver, because OTLP over HTTP does not support Unix sockets"
    address = " and use an address of the form http://host:port" if _is_name(endpoint) else ""
    return f"set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf{address}"
