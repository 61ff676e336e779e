"""Reads ``OTEL_*`` variables as specified: an empty one counts as not set, and an unusable value causes a warning.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping

from esper_otel.export.config_file import configured
from esper_otel.log import announce


def warn(message: str) -> None:
    """Logs a warning about a value that is ignored."""
    announce("setting ignored", message, logging.WARNING)


class Variables:
    """Reads variables of the environment and reports values that cannot be used.

    Where several names are given, the first one with a usable value counts.

    Args:
        environ: the environment.
        ignored: called with a message for each ignored value: variable, value, fault, and the default.

    Raises:
        ConfigurationError: ``OTEL_CONFIG_FILE`` names a file that cannot be used. The variables are those that it
            stands for; see ``export/config_file.py``.
    """

    def __init__(self, environ: Mapping[str, str], ignored: Callable[[str], None] = warn) -> None:
        self._environ = configured(environ)
        self.ignored = ignored

    def text(self, *names: str) -> tuple[str, str]:
        """Returns the name and stripped text of the first variable set, or the last name and an empty text."""
        found = ((name, self._environ.get(name, "").strip()) for name in names)
        return next((each for each in found if each[1]), (names[-1], ""))

    def boolean(self, *names: str, default: bool) -> bool:
        """Returns a switch, which must be "true" or "false" as specified; the default when it is not set."""
        for name, text in self._set(names):
            if text.lower() in {"true", "false"}:
                return text.lower() == "true"
            self.ignore(name, text, "is neither true nor false", default=str(default).lower())
        return default

    def number(
        self,
        *names: str,
        default: float,
        lowest: float,
        highest: float,
        unit: str,
        of: Callable[[str], float] = float,
    ) -> float:
        """Returns a number within the range; the default when it is not set."""
        for name, text in self._set(names):
            try:
                number = of(text)
            except ValueError:
                number = math.nan
            if lowest <= number <= highest:
                return number
            self.ignore(name, text, f"is not {unit}", default=f"{default:g}")
        return default

    def choice(self, *names: str, known: Iterable[str], default: str, scope: str) -> str:
        """Returns one of the known words, in lower case; the default if not set."""
        for name, text in self._set(names):
            word = text.lower()
            if word in known:
                return word
            fault = f"is not supported{scope}: set it to one of {', '.join(known)}"
            self.ignore(name, text, fault, default=default)
        return default

    def ignore(self, name: str, text: str, fault: str, *, default: str) -> None:
        """Reports that a value cannot be used."""
        self.ignored(f"{name}={text!r} {fault}; it counts as not set, the default is {default}")

    def _set(self, names: tuple[str, ...]) -> list[tuple[str, str]]:
        return [(name, text) for name in names if (text := self._environ.get(name, "").strip())]
