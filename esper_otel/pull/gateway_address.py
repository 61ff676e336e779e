"""GatewayAddress: where a gateway is and how a client is known to it, from the arguments of both clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from esper_otel.addresses import is_on_this_machine
from esper_otel.bearer import read_tokens, reason_of
from esper_otel.errors import ConfigurationError
from esper_otel.log import Warnings

_WARNINGS = Warnings()
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),  # a page has up to about 16 MiB, or a single larger step
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GatewayAddress(NamedTuple):
    """The address and credentials of a gateway, shared by both clients."""

    address: str
    credentials: grpc.ChannelCredentials | None
    token_file: Path | None
    timeout_s: float

    @classmethod
    def of(
        cls,
        target: str,
        token_file: Path | str | None,
        ca_file: Path | str | None,
        certificate_file: Path | str | None,
        key_file: Path | str | None,
        timeout_s: float,
    ) -> GatewayAddress:
        """Checks a client's arguments and makes a target from them.

        Raises:
            ConfigurationError: the arguments cannot be used.
        """
        scheme, has_scheme, address = target.rpartition("://")
        if scheme not in {"", "http", "https"} or not address:
            raise ConfigurationError(f"target {target!r}: give host:port, or https://host:port for TLS")
        if (certificate_file is None) != (key_file is None):
            raise ConfigurationError("certificate_file and key_file: a client's certificate needs both files")
        is_secure = scheme == "https" or (not has_scheme and (ca_file is not None or certificate_file is not None))
        if not is_secure and (ca_file is not None or certificate_file is not None):
            raise ConfigurationError(f"target {target!r} does not use TLS, but a certificate is given: use https://")
        token = None if token_file is None else Path(token_file)
        try:
            credentials = (
                grpc.ssl_channel_credentials(_content(ca_file), _content(key_file), _content(certificate_file))
                if is_secure
                else None
            )
            if token is not None:
                read_tokens(token)
        except OSError as error:
            raise ConfigurationError(f"client of {target}: {error}") from error
        except ValueError as error:
            raise ConfigurationError(f"client of {target}: token file {token}: {error}") from error
        if token is not None and not is_secure and not is_on_this_machine(address):
            message = "the token of %s goes to %s over plain text, readable on the way: give https://"
            _WARNINGS.say(address, message, token, address)
        return cls(address, credentials, token, timeout_s)

    @property
    def options(self) -> Sequence[tuple[str, Any]]:
        """Options of the gRPC channel."""
        return _OPTIONS

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call: the token that is in its file now."""
        if self.token_file is None:
            return ()
        try:
            return (("authorization", f"Bearer {read_tokens(self.token_file)[0].text}"),)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"token file {self.token_file}: {reason_of(error)}") from error


def _content(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def targets_of(targets: str, *arguments: Any) -> list[GatewayAddress]:
    """Returns the gateways that a client's arguments name: addresses with commas between them.

    Raises:
        ConfigurationError: the arguments cannot be used, or an address is given twice.
    """
    found = [GatewayAddress.of(each.strip(), *arguments) for each in targets.split(",")]
    if len({each.address for each in found}) < len(found):
        raise ConfigurationError(f"target {targets!r}: an address is given twice")
    return found
