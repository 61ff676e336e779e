"""Sends serialized OTLP requests and returns the outcome of each, with a reason in words for the user."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

from esper_otel.export.endpoint import Endpoint
from esper_otel.export.outcome import Outcome, Result
from esper_otel.export.token import Headers
from esper_otel.log import logger
from esper_otel.untraced import untraced

__all__ = ["Outcome", "Result", "Sender", "open_sender"]

_FORKED = Outcome(Result.TEMPORARY, "this is a forked child: only the process that opened the connection sends")


class Sender(Protocol):
    """Sends requests to one endpoint. Threads: one sends; ``close`` may be called from another."""

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """Sends a serialized request for the endpoint's signal and returns within ``timeout_s``.

        It does not raise an exception for any behaviour of the endpoint.
        """

    def close(self) -> None:
        """Closes connections. A request that is being sent then returns at once with a temporary failure."""


def open_sender(endpoint: Endpoint, token_file: Path | None = None) -> Sender:
    """Makes a sender for the endpoint; it connects when the first request is sent.

    Args:
        endpoint: where requests are sent.
        token_file: contains the bearer token to send with each request; read again when it changes.

    Raises:
        ConfigurationError: the certificates, credential provider or token file cannot be used.
    """
    headers = Headers(endpoint, token_file)
    if headers.has_secret and endpoint.is_insecure and not endpoint.is_on_this_machine:
        logger.warning(
            "the token of %s goes to %s over plain text, where anyone on the way can read it: give https://",
            headers.variable,
            endpoint.target,
        )
    return _SteadySender(_of_protocol(endpoint, headers), headers)


def _of_protocol(endpoint: Endpoint, headers: Headers) -> Sender:
    if endpoint.protocol == "grpc":
        from esper_otel.export.grpc_sender import GrpcSender

        return GrpcSender(endpoint, headers)
    if endpoint.protocol == "file":
        from esper_otel.export.file_sender import FileSender

        return FileSender(Path(endpoint.address), signal=endpoint.signal)
    from esper_otel.export.http_sender import HttpSender

    return HttpSender(endpoint, headers)


class _SteadySender:
    """Wraps the sender of either protocol: sends nothing in a forked child, and retries once with a renewed token.

    A child shares its parent's connection and must neither use nor close it; the parent's threads do not exist there.
    """

    def __init__(self, sender: Sender, headers: Headers) -> None:
        self._sender = sender
        self._headers = headers
        self._process_id = os.getpid()

    def send(self, body: bytes, timeout_s: float) -> Outcome:
        """See ``Sender``."""
        if os.getpid() != self._process_id:
            return _FORKED
        deadline_s = time.monotonic() + timeout_s
        with untraced():
            outcome = self._sender.send(body, timeout_s)
            left_s = deadline_s - time.monotonic()
            if outcome.result is Result.UNAUTHENTICATED and left_s > 0.0 and self._headers.renewed():
                outcome = self._sender.send(body, left_s)
        return outcome

    def close(self) -> None:
        """See ``Sender``."""
        if os.getpid() == self._process_id:
            self._sender.close()
