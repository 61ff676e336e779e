"""Files of OTLP JSON lines, and how far each was delivered to which endpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.json_format import ParseDict, ParseError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from esper_otel.log import logger

NOTES = ".sent"
# Of no use here, and in OTLP's JSON not in the form that protobuf reads: their ids are hexadecimal.
_UNREAD = "exemplars"


class RequestLine(NamedTuple):
    """A line of a file.

    Attributes:
        end: the offset at which the next line begins.
        body: a serialized ExportMetricsServiceRequest; None if the line is not one.
    """

    end: int
    body: bytes | None


def lines_of(path: Path, start: int) -> Iterator[RequestLine]:
    """Yields the lines from an offset on. A last line without its end is left out: its writer has not finished it."""
    with path.open("rb") as file:
        file.seek(start)
        for text in file:
            if not text.endswith(b"\n"):
                return
            start += len(text)
            if text.strip():
                yield RequestLine(start, _body_of(text))


def has_more(path: Path, start: int) -> bool:
    """Whether the file goes on after an offset."""
    return path.stat().st_size > start


def _body_of(text: bytes) -> bytes | None:
    try:
        content: object = json.loads(text, object_hook=_without_exemplars)
        if not isinstance(content, dict) or "resourceMetrics" not in content:
            return None
        return ParseDict(content, ExportMetricsServiceRequest(), ignore_unknown_fields=True).SerializeToString()
    except (ParseError, ValueError, TypeError, RecursionError):
        return None


def _without_exemplars(found: dict[str, Any]) -> dict[str, Any]:
    found.pop(_UNREAD, None)
    return found


class Progress:
    """How far a file was delivered, by endpoint; kept in a file of its own next to it, replaced as a whole.

    Where that cannot be written, as on a medium that is read-only, the file is sent from its beginning next time. The
    gateway recognizes steps that it has.

    Args:
        path: the file.
        target: the endpoint.
    """

    def __init__(self, path: Path, target: str) -> None:
        self._notes = path.with_name(path.name + NOTES)
        self._target = target
        self._all = self._read()
        self._is_kept = True
        noted = self._all.get(target)
        self.offset: int = noted if type(noted) is int and 0 <= noted <= path.stat().st_size else 0

    def note(self, offset: int) -> None:
        """Records that the file was delivered up to this offset."""
        self.offset = offset
        if not self._is_kept:
            return
        self._all[self._target] = offset
        temporary = self._notes.with_name(f"{self._notes.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._all), encoding="utf-8")
            temporary.replace(self._notes)
        except OSError as error:
            self._is_kept = False
            logger.warning("%s cannot be written, so the next call begins anew: %s", self._notes, error)

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self._notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
