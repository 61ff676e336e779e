"""Health check of the gateway's container: asks the gateway at the address, and by the scheme, of its own command line.

Standard library only, since Docker calls it every few seconds. The command line is that of the first process.
The certificate is not verified: the question goes to this container. A gateway with --client-ca, or without an HTTP
port, is only asked whether it accepts connections.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import ssl
import sys
from pathlib import Path

_WAIT_S = 2.0
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what it listens on, not what is opened here


def is_ready(arguments: list[str]) -> bool:
    """Whether the gateway that was started with these arguments takes requests."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--http", default="127.0.0.1:4328")
    parser.add_argument("--grpc", default="127.0.0.1:4327")
    parser.add_argument("--tls-cert")
    parser.add_argument("--client-ca")
    options, _ = parser.parse_known_args(arguments)
    address = options.grpc if options.http == "none" else options.http
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    host = _EVERY_ADDRESS.get(host, host)
    plain = http.client.HTTPConnection(host, int(port), timeout=_WAIT_S)
    try:
        if options.http == "none" or options.client_ca:
            with contextlib.closing(plain):
                plain.connect()
            return True
        if options.tls_cert is None:
            return _is_ready(plain)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return _is_ready(http.client.HTTPSConnection(host, int(port), timeout=_WAIT_S, context=context))
    except (OSError, http.client.HTTPException):
        return False


def _is_ready(connection: http.client.HTTPConnection) -> bool:
    with contextlib.closing(connection):
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200


if __name__ == "__main__":
    command = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace")
    sys.exit(0 if is_ready(command.split("\0")) else 1)
