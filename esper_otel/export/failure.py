"""Failure: what gRPC's and Python's words about a connection that fails mean, and which setting to look at."""

from __future__ import annotations

import re

from esper_otel.export.endpoint import Endpoint

# What gRPC (1.72 to 1.85) or Python say, in lower case, and what it means; the first that fits. Those that come with
# the host's name stand first: it may hold any other word.
_HUNG_UP = "socket closed|connection reset|broken pipe|remotedisconnected|ssleoferror"
_MEANINGS = (
    ("proxyerror.*gaierror", "the name of the proxy on the way to {target} cannot be resolved"),
    ("proxyerror.*refused", "nothing listens where the proxy on the way to {target} should be (connection refused)"),
    ("^dns resolution failed|^errors resolving|gaierror", "the name in {target} cannot be resolved"),
    ("hostname verif|peer name|mismatch", "the certificate of {target} is for another host name: give its own"),
    ("proxyerror", "the proxy on the way to {target} does not let us through"),
    ("connection refused", "nothing listens on {target} (connection refused)"),
    ("no such file", "nothing listens on {target} (no such file)"),
    ("certificate has expired", "the certificate of {target} has expired: it must be renewed there"),
    ("certificate is not yet valid", "the certificate of {target} is not valid yet: is the clock right?"),
    ("certificate_verify_failed", "the certificate of {target} is not trusted (OTEL_EXPORTER_OTLP_CERTIFICATE)"),
    ("wrong_version_number|record_layer", "{target} does not speak TLS; for plain text give http://"),
    ("alpn", "{target} speaks TLS, but not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("certificate_required|unknown_ca", "{target} wants a certificate of ours (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)"),
    ("alert|handshake", "the TLS handshake with {target} failed"),
    ("http1", "{target} speaks HTTP/1.1, not gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("parsing http/2", "{target} does not speak gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use port 4317"),
    (_HUNG_UP, "{target} closed the connection: it may {want}, or speak {other}"),
    ("badstatusline", "{target} does not speak HTTP/1.1: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use port 4318"),
    ("httpexception|linetoolong", "{target} answers with more headers, or longer ones, than anybody can read"),
    ("unreachable|no route to host", "{target} cannot be reached from here"),
)


def meaning(words: str, endpoint: Endpoint) -> str | None:
    """What the words mean for the user of this endpoint; None when they are not known."""
    found = next((text for pattern, text in _MEANINGS if re.search(pattern, words.lower())), None)
    other = "HTTP/1.1, not gRPC" if endpoint.protocol == "grpc" else "gRPC, not HTTP/1.1"
    want = "speak TLS (https://)" if endpoint.is_insecure else "want OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"
    return None if found is None else found.format(target=endpoint.target, want=want, other=other)
