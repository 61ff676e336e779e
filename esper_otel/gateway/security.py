"""Security: access control for senders and pullers, and the certificates of the gateway's ports."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from esper_otel.bearer import TokenFile, read_tokens
from esper_otel.errors import ConfigurationError, EsperOtelError
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.request import DecodedRequest
from esper_otel.log import Warnings

_MOST_ID_BYTES = Limits().text_bytes


class NotAllowed(EsperOtelError):
    """The token is valid, but not for this run."""


class BadRequest(EsperOtelError):
    """The pull request is invalid."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows: every run, or those whose id begins with ``prefix``.

    Attributes:
        prefix: empty for every run.
        tenant: whose share of the limits it uses. Tokens with the same prefix share one; a token without a prefix has
            its own.
    """

    prefix: str = ""
    tenant: str = ""

    def allows(self, run_id: str) -> bool:
        """Returns whether the token is valid for this run."""
        return run_id.startswith(self.prefix)


class TokenRefused(Exception):
    """A token is missing or unknown."""


class Tokens:
    """Bearer tokens from a file, one per line. Several tokens can be valid at once, for a rotation.

    A line is a token, optionally followed by a space and ``run=PREFIX``, which restricts it to runs whose ids begin
    with the prefix. Empty lines and lines that begin with ``#`` are ignored. The file is checked for changes
    at most once a second.

    Args:
        path: the file.
        option: the name of the option that gave the file, for messages.

    Raises:
        ConfigurationError: the file contains no token; the message names the option.
    """

    def __init__(self, path: Path, option: str) -> None:
        self._file = TokenFile(path, option, _grants_in)

    def grant(self, authorization: str | None) -> Grant:
        """Returns what the value of an ``authorization`` header allows, in constant time for any token.

        Raises:
            TokenRefused: the token is missing or unknown.
        """
        self._file.look()
        scheme, _, token = (authorization or "").partition(" ")
        given = _digest(token.strip().encode(errors="surrogateescape"))  # bytes that are not UTF-8 match no token
        found = None
        for known, grant in self._file.content:
            if hmac.compare_digest(known, given):
                found = grant
        if found is None or scheme.lower() != "bearer":
            raise TokenRefused("the bearer token is missing or unknown")
        return found


def _grants_in(path: Path) -> list[tuple[bytes, Grant]]:
    """Returns what each token allows, by the token's digest, so that no secret stays in memory."""
    return [
        (digest := _digest(text.encode()), Grant(prefix, f"run={prefix}" if prefix else digest.hex()))
        for text, prefix in read_tokens(path)
    ]


def _digest(token: bytes) -> bytes:
    # Digests have equal length, so that the time of a comparison reveals nothing about the token.
    return hashlib.sha256(token).digest()


class Content(NamedTuple):
    """The content of the files of a TLS server, as PEM."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of a TLS server: its certificate with the chain, its key, and the authority for client certificates."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Returns a value that changes when one of the files changes."""
        files = [path for path in (self.certificate, self.key, self.client_ca) if path is not None]
        stats = [path.stat() for path in files]
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in stats)

    def content(self) -> Content:
        """Reads the files, for a gRPC server.

        Raises:
            OSError: a file cannot be read.
        """
        client_ca = None if self.client_ca is None else self.client_ca.read_bytes()
        return Content(self.certificate.read_bytes(), self.key.read_bytes(), client_ca)

    def context(self) -> ssl.SSLContext:
        """Loads the files, for an HTTP server.

        Raises:
            ConfigurationError: the certificate and the key do not match, or a file cannot be read.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"--tls-cert {self.certificate}, --tls-key {self.key}"
                + (f", --client-ca {self.client_ca}" if self.client_ca else "")
                + f": {error.strerror or error}"
            ) from None
        return context


class CertificatesInForce:
    """The certificates in use on every port. They are replaced together, and only if all changed files are usable.

    Threads: thread-safe.

    Args:
        files: the files to watch.
        warnings: logs that changed files cannot be used.

    Raises:
        ConfigurationError: the files cannot be used at the start.
    """

    def __init__(self, files: Certificates, warnings: Warnings) -> None:
        self._files = files
        self._warnings = warnings
        self._lock = threading.Lock()
        self._stamp = files.stamp()
        self._context = files.context()
        self._content = files.content()

    def context(self) -> ssl.SSLContext:
        """Returns the TLS context for the next connection to the HTTP port."""
        with self._lock:
            self._look()
            return self._context

    def content(self) -> Content:
        """Returns the files' content for the next connection to the gRPC port."""
        with self._lock:
            self._look()
            return self._content

    def _look(self) -> None:
        try:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return
            context, content = self._files.context(), self._files.content()
            if stamp != self._files.stamp():
                return  # the files are being replaced: the next connection checks again
        except (OSError, ConfigurationError) as error:
            self._warnings.say("tls", "%s; the previous certificates stay in use on both ports", error)
            return
        self._stamp, self._context, self._content = stamp, context, content


def check_exposure(host: str, option: str, *, has_tls: bool, is_insecure: bool) -> None:
    """Refuses to listen in plain text on an address that others can reach, unless the user asked for it.

    Raises:
        ConfigurationError: the address is not loopback, and TLS is not configured.
    """
    if has_tls or is_insecure or is_loopback(host):
        return
    raise ConfigurationError(
        f"{option} {host}: others could reach this port in plain text; give --tls-cert and --tls-key, or --insecure if "
        "the network is trusted"
    )


def is_loopback(host: str) -> bool:
    """Returns whether an address can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_senders(decoded: DecodedRequest, grant: Grant) -> None:
    """Refuses a request that contains data of a run that the sender may not write to.

    Raises:
        NotAllowed: the request contains such data.
    """
    of_all = (decoded.blocks, decoded.markers, decoded.ended, decoded.cut, decoded.phases)
    run_ids = {each.sender.run.run_id for some in of_all for each in some}
    check_runs(run_ids | {sender.run.run_id for sender in decoded.alive}, grant)


def check_runs(run_ids: Iterable[str], grant: Grant) -> None:
    """Refuses to let a sender write to a run that is not its own.

    Raises:
        NotAllowed: the token is not for one of the runs.
    """
    for run_id in run_ids:
        if not grant.allows(run_id):
            raise NotAllowed(f"this token is not for run {run_id!r}")


def check_puller(run_id: str, grant: Grant | None) -> None:
    """Refuses a request for a run that the puller may not see.

    Raises:
        BadRequest: the request does not name a run, or the id is too long.
        NotAllowed: the token is not for this run.
    """
    if not run_id:
        raise BadRequest("run_id is empty")
    size = len(run_id.encode())
    if size > _MOST_ID_BYTES:
        raise BadRequest(f"run_id has {size} bytes; the limit is {_MOST_ID_BYTES}")
    if grant is not None and not grant.allows(run_id):
        raise NotAllowed(f"this token is not for run {run_id!r}")
