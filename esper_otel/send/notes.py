"""What ``esper-otel send`` notes in files: how far it came, and what was refused, by endpoint."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_otel.log import logger
from esper_otel.text import printable

_MOST_NAMED = 100
_MOST_CHARACTERS = 300


class Notes:
    """A file of JSON with an object for each endpoint, which is replaced as a whole. What is damaged counts as nothing.

    Args:
        path: the file.
        target: the endpoint.
    """

    def __init__(self, path: Path, target: str) -> None:
        self.path = path
        self._target = target
        self._all = self._read()
        self._is_kept = True
        found = self._all.get(target)
        # Earlier versions noted only the offset.
        self.mine: Mapping[str, Any] = found if isinstance(found, dict) else {"offset": found}

    def write(self, mine: Mapping[str, Any]) -> None:
        """Writes the object of the endpoint; where that cannot be done, reports so once."""
        self.mine = mine
        if not self._is_kept:
            return
        self._all[self._target] = mine
        temporary = self.path.with_name(f"{self.path.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._all), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            self._is_kept = False
            logger.warning("%s cannot be written, so the next call begins anew: %s", self.path, error)

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


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
            self.earlier.update({str(kind): n for kind, n in counts.items() if type(n) is int and n > 0})
        self.counts: Counter[str] = self.earlier.copy()
        self._named: list[str] = [str(each) for each in named] if isinstance(named, list) else []

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
