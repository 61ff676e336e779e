"""Token: the headers of each request, with a bearer token from a file that others may replace at any time."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.outcome import one_line
from esper_otel.log import Warnings

_VARIABLE = "ESPER_TOKEN_FILE"

_LOOK_EVERY_S = 1.0
_MOST_BYTES = 64 * 1024  # a file that is larger is another one
_TOKEN = re.compile(rb"[\x21-\x7e]+")
_SECRET_HEADER = re.compile("authorization|cookie|key|password|secret|token")
_SHORTEST_SECRET = 8  # a shorter one may well stand in an ordinary sentence


class TokenFile:
    """A bearer token in a file, which may be written again, renamed over, or be a link that moves, as in Kubernetes.

    The whole file is read at each look, 20 microseconds: its time and size alone miss a token that is replaced within
    a tick of the clock by one as long. A file that cannot be used for a while leaves the last token in force, and is
    warned about.

    Args:
        path: the file.
        clock: seconds that never go back.

    Raises:
        ConfigurationError: there is no token to begin with; the message names the setting.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._warnings = Warnings(clock)
        self._next_look_s = clock() + _LOOK_EVERY_S
        try:
            self.token = _token_in(path)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"setting token_file (or {_VARIABLE}) = {str(path)!r}: {_fault(error)}") from None

    def look(self) -> bool:
        """Reads the file, unless that is less than a second ago; says whether there is another token."""
        return self._clock() >= self._next_look_s and self.look_now()

    def look_now(self) -> bool:
        """Reads the file; says whether there is another token."""
        self._next_look_s = self._clock() + _LOOK_EVERY_S
        before = self.token
        try:
            self.token = _token_in(self._path)
        except (OSError, ValueError) as error:
            message = "token file %r: %s; the last token that it held goes on being sent"
            self._warnings.say("token", message, str(self._path), _fault(error))
        return self.token != before


def _token_in(path: Path) -> str:
    """Raises OSError, or ValueError with words that do not show what is in the file."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no ordinary file")
        content = file.read(_MOST_BYTES + 1).strip()
    if not content:
        raise ValueError("it is empty")
    if content[:7].lower() == b"bearer ":
        raise ValueError("it begins with the word Bearer, which is added here: write the token alone")
    if len(content) > _MOST_BYTES or not _TOKEN.fullmatch(content):
        raise ValueError("it holds something else than a token, which is one line of ASCII without spaces")
    return content.decode("ascii")


def _without_waiting(path: str, flags: int) -> int:
    """A named pipe would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def _fault(error: OSError | ValueError) -> str:
    return (error.strerror or type(error).__name__).lower() if isinstance(error, OSError) else str(error)


class Headers:
    """What goes with each request, and what must not be shown of it.

    A token file stands nearer than ``OTEL_EXPORTER_OTLP_HEADERS``, which a platform may set for all of its jobs: its
    token takes the place of an ``authorization`` there.

    Raises:
        ConfigurationError: there is no token in the file.
    """

    def __init__(self, endpoint: Endpoint, token_file: Path | None) -> None:
        self._file = None if token_file is None else TokenFile(token_file)
        self._fixed = tuple(each for each in endpoint.headers if token_file is None or each[0] != "authorization")
        self.variable = "OTEL_EXPORTER_OTLP_HEADERS" if token_file is None else _VARIABLE

    @property
    def has_secret(self) -> bool:
        """Whether something goes along that others must not read."""
        return self._file is not None or any(_SECRET_HEADER.search(name) for name, _ in self._fixed)

    def now(self) -> tuple[tuple[str, str], ...]:
        """The headers of a request that is sent now."""
        if self._file is None:
            return self._fixed
        self._file.look()
        return (*self._fixed, ("authorization", f"Bearer {self._file.token}"))

    def renewed(self) -> bool:
        """After they were refused: whether the file holds another token by now."""
        return self._file is not None and self._file.look_now()

    def said(self, text: str) -> str:
        """One line of what the endpoint says, which may repeat what it was sent, without secrets."""
        for secret in self._secrets():
            text = text.replace(secret, "<secret>")
        return one_line(text)

    def _secrets(self) -> Iterator[str]:
        secrets = [value.rpartition(" ")[2] for name, value in self._fixed if _SECRET_HEADER.search(name)]
        secrets += [] if self._file is None else [self._file.token]
        return (secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
