"""Security: who may send and who may pull, and the certificates of the gateway's ports."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import ssl
import threading
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
    """A token that is good, and not for this run."""


class BadRequest(EsperOtelError):
    """A pull that cannot be right."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows: every run, or those whose id begins with ``prefix``.

    Attributes:
        prefix: empty for every run.
        tenant: whose share it uses: tokens with one prefix share one, a token without a prefix has its own.
    """

    prefix: str = ""
    tenant: str = ""

    def allows(self, run_id: str) -> bool:
        """Whether it is good for this run."""
        return run_id.startswith(self.prefix)


EVERYTHING = Grant()


class Refused(Exception):
    """A token is missing or unknown."""


class Tokens:
    """Bearer tokens of a file: one a line, several at once for a rotation, each for every run or for some.

    A line is the token alone, or the token, a space and ``run=PREFIX``; empty lines and those that begin with ``#``
    say nothing. The file is read again, at most once a second, when it changes.

    Args:
        path: the file.
        option: what the user calls it.

    Raises:
        ConfigurationError: there is no token to begin with; the message names the option.
    """

    def __init__(self, path: Path, option: str) -> None:
        self._file = TokenFile(path, option, _grants_in)

    def grant(self, authorization: str | None) -> Grant:
        """What the value of an ``authorization`` header allows. Takes as long for a wrong token as for a right one.

        Raises:
            Refused: nothing.
        """
        self._file.look()
        scheme, _, token = (authorization or "").partition(" ")
        given = _digest(token.strip().encode(errors="surrogateescape"))  # bytes that are not UTF-8 are no token
        found = None
        for known, grant in self._file.content:
            if hmac.compare_digest(known, given):
                found = grant
        if found is None or scheme.lower() != "bearer":
            raise Refused("a bearer token is missing, or it is not a known one")
        return found


def _grants_in(path: Path) -> list[tuple[bytes, Grant]]:
    """What each token allows, by the token's digest: no secret stays in memory."""
    return [
        (digest := _digest(text.encode()), Grant(prefix, f"run={prefix}" if prefix else digest.hex()))
        for text, prefix in read_tokens(path)
    ]


def _digest(token: bytes) -> bytes:
    # Of one length, whatever was given: comparing tells nothing of it.
    return hashlib.sha256(token).digest()


class Content(NamedTuple):
    """What is in the files of a TLS server, as PEM."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of a TLS server: its certificate with the chain, its key, and who must have signed the clients'."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes when one of the files does."""
        files = [path for path in (self.certificate, self.key, self.client_ca) if path is not None]
        stats = [path.stat() for path in files]
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in stats)

    def content(self) -> Content:
        """For a server of gRPC.

        Raises:
            OSError: they cannot be read.
        """
        client_ca = None if self.client_ca is None else self.client_ca.read_bytes()
        return Content(self.certificate.read_bytes(), self.key.read_bytes(), client_ca)

    def context(self) -> ssl.SSLContext:
        """For a server of HTTP.

        Raises:
            ConfigurationError: the files are no pair, or cannot be read.
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
    """Certificates as they are in force on every port: all files, or when one of them cannot be used, all as before.

    Threads: any.

    Args:
        files: which are followed.
        warnings: where it is said that they cannot be used.

    Raises:
        ConfigurationError: they cannot be used to begin with.
    """

    def __init__(self, files: Certificates, warnings: Warnings) -> None:
        self._files = files
        self._warnings = warnings
        self._lock = threading.Lock()
        self._stamp = files.stamp()
        self._context = files.context()
        self._content = files.content()

    def context(self) -> ssl.SSLContext:
        """For the next connection to the HTTP port."""
        with self._lock:
            self._look()
            return self._context

    def content(self) -> Content:
        """For the next connection to the gRPC port."""
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
                return  # in the middle of being replaced: the next connection looks again
        except (OSError, ConfigurationError) as error:
            self._warnings.say("tls", "%s; the certificates before stay in force on both ports", error)
            return
        self._stamp, self._context, self._content = stamp, context, content


def check_exposure(host: str, option: str, *, has_tls: bool, is_insecure: bool) -> None:
    """Refuses to listen where others can reach the port in plain text, unless they are meant to.

    Raises:
        ConfigurationError: no TLS, and not on loopback.
    """
    if has_tls or is_insecure or is_loopback(host):
        return
    raise ConfigurationError(
        f"{option} {host}: others could reach this in plain text; give --tls-cert and --tls-key, or --insecure when "
        "the network is trusted"
    )


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_senders(decoded: DecodedRequest, grant: Grant) -> None:
    """Refuses a request of which a part is for a run that the sender may not write to.

    Raises:
        NotAllowed: there is such a part.
    """
    senders = {block.sender for block in decoded.blocks}
    senders |= {marker.sender for marker in decoded.markers}
    senders |= {ended.sender for ended in decoded.ended}
    for sender in senders:
        if not grant.allows(sender.run.run_id):
            raise NotAllowed(f"this token is not for run {sender.run.run_id!r}")


def check_puller(run_id: str, grant: Grant | None) -> None:
    """Refuses a question about a run that the puller may not see.

    Raises:
        BadRequest, NotAllowed: it names no run, or not one of theirs.
    """
    if not run_id:
        raise BadRequest("run_id is empty")
    size = len(run_id.encode())
    if size > _MOST_ID_BYTES:
        raise BadRequest(f"run_id has {size} bytes; no run's has more than {_MOST_ID_BYTES}")
    if grant is not None and not grant.allows(run_id):
        raise NotAllowed(f"this token is not for run {run_id!r}")
