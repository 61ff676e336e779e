"""What ``esper-otel send`` notes in files: how far it came, and what was refused, by endpoint."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from esper_otel import unix
from esper_otel.log import logger
from esper_otel.send.plain_file import opened
from esper_otel.text import printable

_MOST_NAMED = 100
_MOST_CHARACTERS = 300
_MOST_BYTES = 1024 * 1024
_KEYS = frozenset({"offset", "refused", "named"})


class Notes:
    """A file of JSON with an object for each endpoint, which is replaced as a whole.

    A file of that name that has something else, or a link, is left alone: nothing is noted then.

    Args:
        path: the file.
        target: the endpoint.
    """

    def __init__(self, path: Path, target: str) -> None:
        self.path = path
        self._target = target
        self._is_kept = True
        self._all = self._read()
        found = self._all.get(target)
        # Earlier versions noted only the offset.
        self.mine: Mapping[str, Any] = found if isinstance(found, dict) else {"offset": found}

    def write(self, mine: Mapping[str, Any]) -> None:
        """Writes the object of the endpoint; where that cannot be done, reports so once."""
        self.mine = mine
        if not self._is_kept:
            return
        self._all[self._target] = mine
        temporary = self.path.with_name(f"{self.path.name}-{secrets.token_hex(8)}")
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | unix.FILE, 0o600)
            try:
                with os.fdopen(file, "w", encoding="utf-8") as writing:
                    json.dump(self._all, writing)
                temporary.replace(self.path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            self._is_kept = False
            logger.warning("%s cannot be written, so the next call begins anew: %s", printable(self.path), error)

    def _read(self) -> dict[str, object]:
        try:
            with opened(self.path, follow=False) as file:
                content = file.read(_MOST_BYTES)
            found = json.loads(content) if content else {}
            if not isinstance(found, dict) or not all(map(_is_note, found.values())):
                raise ValueError("it has something else")  # noqa: TRY301 - ends as any other content
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self._is_kept = False
            message = "%s is not a note of esper-otel send and is left alone, so the next call begins anew: %s"
            logger.warning(message, printable(self.path), printable(error))
            return {}
        return found


def _is_note(said: object) -> bool:
    return type(said) is int or (isinstance(said, dict) and said.keys() <= _KEYS)


class RefusedItems:
    """What an endpoint has refused for good, or could not be given: counted by kind, and the first of it named.

    Args:
        noted: what earlier calls have noted.

    Attributes:
        counts: of this call and of earlier ones.
        earlier: of earlier calls.
    """

    def __init__(self, noted: Mapping[str, Any]) -> None:
        counts, named = noted.get("refused"), noted.get("named")
        self.earlier: Counter[str] = Counter()
        if isinstance(counts, dict):
            self.earlier.update({printable(kind): n for kind, n in counts.items() if type(n) is int and n > 0})
        self.counts: Counter[str] = self.earlier.copy()
        some = named[:_MOST_NAMED] if isinstance(named, list) else []
        self._named: list[str] = [printable(each, _MOST_CHARACTERS) for each in some]

    def add(self, kind: str, count: int, what: str) -> None:
        """Counts what was refused; the text names it and says why."""
        self.counts[kind] += count
        if len(self._named) < _MOST_NAMED:
            self._named.append(printable(what, _MOST_CHARACTERS))

    def noted(self) -> dict[str, Any]:
        """Returns what to note for the next call; empty if nothing was refused."""
        return {"refused": dict(self.counts), "named": self._named} if self.counts else {}

    def texts(self, notes: Path) -> list[str]:
        """Returns what to say of this call, and of earlier ones."""
        now = [f"{count} {kind}" for kind, count in (self.counts - self.earlier).items()]
        before = " and ".join(f"{count} {kind}" for kind, count in self.earlier.items())
        return now + [f"in earlier calls {before}: see {notes}, and remove it to hear no more of it"] * bool(before)
