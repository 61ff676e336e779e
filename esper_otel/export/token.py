"""The headers of each request, with a bearer token from a file that may be replaced at any time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from esper_otel.bearer import TokenFile, read_tokens
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.outcome import one_line

_VARIABLE = "ESPER_TOKEN_FILE"
NAME = f"setting token_file (or {_VARIABLE}) ="

_SECRET_HEADER = re.compile("authorization|cookie|key|password|secret|token")
_SHORTEST_SECRET = 8  # a shorter text may occur in an ordinary sentence by chance


def read_one(path: Path) -> str:
    """Reads a file that must contain exactly one token; raises the same errors as ``read_tokens``."""
    tokens = read_tokens(path)
    if len(tokens) > 1:
        raise ValueError(f"it holds {len(tokens)} tokens; keep only the one to send")
    return tokens[0].text


class Headers:
    """The headers of each request, and the secrets in them that messages must not show.

    A token file takes precedence over ``OTEL_EXPORTER_OTLP_HEADERS``, which a platform may set for all of its jobs: the
    token replaces an ``authorization`` header given there.

    Raises:
        ConfigurationError: the token file does not contain a token.
    """

    def __init__(self, endpoint: Endpoint, token_file: Path | None) -> None:
        self._file = None if token_file is None else TokenFile(token_file, NAME, read_one)
        self._fixed = tuple(each for each in endpoint.headers if token_file is None or each[0] != "authorization")
        self.variable: str = "OTEL_EXPORTER_OTLP_HEADERS" if token_file is None else _VARIABLE

    @property
    def has_secret(self) -> bool:
        """Whether the headers contain a secret."""
        return self._file is not None or any(_SECRET_HEADER.search(name) for name, _ in self._fixed)

    def now(self) -> tuple[tuple[str, str], ...]:
        """Returns the headers for a request that is sent now."""
        if self._file is None:
            return self._fixed
        self._file.look()
        return (*self._fixed, ("authorization", f"Bearer {self._file.content}"))

    def renewed(self) -> bool:
        """Checks, after the credentials were refused, whether the file contains another token by now."""
        return self._file is not None and self._file.look_now()

    def said(self, text: str) -> str:
        """Returns one line of the endpoint's text, with secrets removed, since the text may quote the request."""
        for secret in self._secrets():
            text = text.replace(secret, "<secret>")
        return one_line(text)

    def _secrets(self) -> Iterator[str]:
        secrets = [value.rpartition(" ")[2] for name, value in self._fixed if _SECRET_HEADER.search(name)]
        secrets += [] if self._file is None else [self._file.content]
        return (secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
