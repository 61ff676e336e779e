"""Files with bearer tokens, which other programs may replace at any time."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.log import Warnings

_LOOK_EVERY_S = 1.0
_MOST_BYTES = 1024 * 1024  # a larger file is not a file of tokens
_TOKEN = re.compile(rb"[\x21-\x7e]{1,65536}")
_PREFIX = b"run="

_Content = TypeVar("_Content")


class Token(NamedTuple):
    """A token, and the prefix of the run ids that it is valid for; an empty prefix means all runs."""

    text: str
    prefix: str

    def __repr__(self) -> str:
        return f"Token(prefix={self.prefix!r})"


def read_tokens(path: Path) -> list[Token]:
    """Reads the tokens of a file, at least one. A line is ``TOKEN`` or ``TOKEN run=PREFIX``; ``#`` begins a comment.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line has another form; the message does not show its content.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    lines = ((number, line.split()) for number, line in enumerate(content.splitlines(), 1))
    tokens = [_token(number, words) for number, words in lines if words and not words[0].startswith(b"#")]
    if not tokens:
        raise ValueError("it contains no token")
    return tokens


def _token(number: int, words: list[bytes]) -> Token:
    if words[0].lower() == b"bearer":
        raise ValueError(
            f"line {number} begins with the word Bearer, which is added automatically: write only the token"
        )
    if words[0].startswith(_PREFIX):  # a template whose variable was empty; the rest of the line is no secret
        raise ValueError(f"line {number} begins with run=, where the token has to be")
    prefix = words[1] if len(words) == 2 else b""
    if len(words) > 2 or not _TOKEN.fullmatch(words[0]) or (prefix and not prefix.startswith(_PREFIX)):
        raise ValueError(f"line {number} must contain a token (ASCII without spaces), or a token and run=PREFIX")
    if prefix == _PREFIX:
        raise ValueError(f"line {number}: run= without a prefix; omit it if the token is for every run")
    return Token(words[0].decode("ascii"), prefix.decode(errors="replace").removeprefix("run="))


def _without_waiting(path: str, flags: int) -> int:
    """Opens without blocking: opening a named pipe would wait for a writer."""
    return os.open(path, flags | unix.AT_ONCE)


def reason_of(error: OSError | ValueError) -> str:
    """Returns why a file of tokens cannot be used, worded for the user."""
    return (error.strerror or type(error).__name__).lower() if isinstance(error, OSError) else str(error)


class TokenFile(Generic[_Content]):
    """The content of a file of tokens that may change: rewritten, replaced, or linked elsewhere, as in Kubernetes.

    Each check reads the whole file, because its time and size would not reveal a token replaced within one tick of
    the file system's clock by another of the same length. While the file cannot be used, the earlier tokens stay
    valid, and a warning is logged.

    Args:
        path: the file.
        name: the user's name for it, such as that of a setting.
        read: reads the content, with the exceptions of ``read_tokens``.
        clock: returns the seconds of a clock that never goes back.

    Attributes:
        content: the content that is valid now.

    Raises:
        ConfigurationError: the file cannot be used at the start; the message contains the name.
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
            self.content: _Content = read(path)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{name} {str(path)!r}: {reason_of(error)}") from None

    def look(self) -> bool:
        """Reads the file unless it was read less than a second ago. Returns whether its content has changed."""
        return self._clock() >= self._next_look_s and self.look_now()

    def look_now(self) -> bool:
        """Reads the file. Returns whether its content has changed."""
        self._next_look_s = self._clock() + _LOOK_EVERY_S
        before = self.content
        try:
            self.content = self._read(self._path)
        except (OSError, ValueError) as error:
            message = "%s %r: %s; its earlier content stays valid"
            self._warnings.say("tokens", message, self._name, str(self._path), reason_of(error))
        return self.content != before
