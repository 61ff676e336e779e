"""Bearer: files of bearer tokens, which others may replace at any time."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from esper_otel.errors import ConfigurationError
from esper_otel.log import Warnings

_LOOK_EVERY_S = 1.0
_MOST_BYTES = 1024 * 1024  # a file that is larger is another one
_TOKEN = re.compile(rb"[\x21-\x7e]{1,65536}")
_PREFIX = b"run="

_Content = TypeVar("_Content")


class Token(NamedTuple):
    """A token, and the prefix of the run ids that it is for; an empty one for every run."""

    text: str
    prefix: str

    def __repr__(self) -> str:
        return f"Token(prefix={self.prefix!r})"


def read_tokens(path: Path) -> list[Token]:
    """The tokens of a file, one a line: ``TOKEN`` or ``TOKEN run=PREFIX``; at least one. ``#`` begins a comment.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is something else; the words do not show what is in it.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not an ordinary file")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    lines = ((number, line.split()) for number, line in enumerate(content.splitlines(), 1))
    tokens = [_token(number, words) for number, words in lines if words and not words[0].startswith(b"#")]
    if not tokens:
        raise ValueError("it holds no token")
    return tokens


def _token(number: int, words: list[bytes]) -> Token:
    if words[0].lower() == b"bearer":
        raise ValueError(f"line {number} begins with the word Bearer, which is added here: write the token alone")
    prefix = words[1] if len(words) == 2 else b""
    if len(words) > 2 or not _TOKEN.fullmatch(words[0]) or (prefix and not prefix.startswith(_PREFIX)):
        raise ValueError(f"line {number} is neither a token, which is ASCII without spaces, nor a token and run=PREFIX")
    if prefix == _PREFIX:
        raise ValueError(f"line {number}: run= without a prefix; leave it out if the token is for every run")
    return Token(words[0].decode("ascii"), prefix.decode(errors="replace").removeprefix("run="))


def _without_waiting(path: str, flags: int) -> int:
    """A named pipe would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def reason_of(error: OSError | ValueError) -> str:
    """Why a file of tokens cannot be used, in words for the user."""
    return (error.strerror or type(error).__name__).lower() if isinstance(error, OSError) else str(error)


class TokenFile(Generic[_Content]):
    """What is in a file of tokens, which may be written again, renamed over, or be a link that moves, as in Kubernetes.

    The whole file is read at each look, 20 microseconds for one token: its time and size alone miss a token that is
    replaced within a tick of the clock by one as long. A file that cannot be used for a while leaves the tokens
    before in force, and is warned about.

    Args:
        path: the file.
        name: what the user calls it.
        read: what is kept of it, from ``read_tokens``; raises as that does.
        clock: seconds that never go back.

    Attributes:
        content: what was read, and is in force.

    Raises:
        ConfigurationError: there is no token to begin with; the message has the name.
    """

    def __init__(
        self, path: Path, name: str, read: Callable[[Path], _Content], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._name = name
        self._read = read
        self._clock = clock
        self._warnings = Warnings(clock)
        self._next_look_s = clock() + _LOOK_EVERY_S
        try:
            self.content = read(path)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{name} {str(path)!r}: {reason_of(error)}") from None

    def look(self) -> bool:
        """Reads the file, unless that is less than a second ago; returns whether there is something else in it."""
        return self._clock() >= self._next_look_s and self.look_now()

    def look_now(self) -> bool:
        """Reads the file; returns whether there is something else in it."""
        self._next_look_s = self._clock() + _LOOK_EVERY_S
        before = self.content
        try:
            self.content = self._read(self._path)
        except (OSError, ValueError) as error:
            message = "%s %r: %s; what it held before stays in force"
            self._warnings.say("tokens", message, self._name, str(self._path), reason_of(error))
        return self.content != before
