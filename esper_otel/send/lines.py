"""Files of OTLP JSON lines, and how far each was delivered to which endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from google.protobuf.json_format import ParseDict, ParseError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from esper_otel.errors import ConfigurationError
from esper_otel.send.notes import Notes, RefusedItems
from esper_otel.send.plain_file import opened

NOTES = ".sent"
_MOST_BYTES = 64 * 1024 * 1024
_MOST_WORDS = 4_000_000  # values, keys and brackets of a line: about 800 MB
_TOO_LONG = b"too long: "
# Of no use here, and in OTLP's JSON not in the form that protobuf reads: their ids are hexadecimal.
_UNREAD = ("exemplars", "traceId", "spanId")
_KEYS = {"metrics": "resourceMetrics", "logs": "resourceLogs"}

Signal = Literal["metrics", "logs"]


class RequestLine(NamedTuple):
    """A line of a file.

    Attributes:
        start: the offset at which it begins.
        end: the offset at which the next line begins.
        body: a serialized request of the file's signal; None if the line is not one.
    """

    start: int
    end: int
    body: bytes | None


def signal_of(path: Path) -> Signal:
    """Returns what a file has, as its first good line says: metrics, or logs, which are the events of runs.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    try:
        with opened(path) as file:
            for content in map(_content_of, _texts_in(file)):
                if isinstance(content, dict) and content.get(_KEYS["logs"]):
                    return "logs"
                if isinstance(content, dict) and content.get(_KEYS["metrics"]):
                    return "metrics"
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from None
    return "metrics"


def lines_of(path: Path, start: int, signal: Signal = "metrics") -> Iterator[RequestLine]:
    """Yields the lines from an offset on. A last line without its end is left out: its writer has not finished it."""
    with opened(path) as file:
        file.seek(start)
        for text in _texts_in(file):
            if not text.endswith(b"\n"):
                return
            begin, start = start, file.tell()
            if text.strip():
                yield RequestLine(begin, start, _body_of(text, signal))


def _texts_in(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file. Of one that is longer than any of ours, only a part and its end are there."""
    while text := file.readline(_MOST_BYTES):
        part = text
        while part and not part.endswith(b"\n"):
            part = file.readline(_MOST_BYTES)
            if part:
                text = _TOO_LONG + part[-1:]
        yield text


def has_more(path: Path, start: int) -> bool:
    """Whether the file goes on after an offset."""
    return path.stat().st_size > start


def _body_of(text: bytes, signal: Signal) -> bytes | None:
    content = _content_of(text)
    if not isinstance(content, dict) or _KEYS[signal] not in content:
        return None
    request = ExportLogsServiceRequest() if signal == "logs" else ExportMetricsServiceRequest()
    try:
        return ParseDict(content, request, ignore_unknown_fields=True).SerializeToString()
    except (ParseError, ValueError, TypeError, RecursionError):
        return None


def _content_of(text: bytes) -> object:
    """Returns what a line says; None if it is not JSON, or has more values than any of ours."""
    if sum(map(text.count, (b"{", b"[", b",", b":"))) > _MOST_WORDS:
        return None
    try:
        content: object = json.loads(text, object_hook=_readable)
    except (ValueError, RecursionError):
        return None
    return content


def _readable(found: dict[str, Any]) -> dict[str, Any]:
    for name in _UNREAD:
        found.pop(name, None)
    return found


class Progress:
    """How far a file was delivered, and what of it was refused, by endpoint; kept in a file of its own next to it.

    Where that cannot be written, as on a medium that is read-only, the file is sent from its beginning next time. The
    gateway recognizes steps that it has.

    Args:
        path: the file.
        target: the endpoint.

    Attributes:
        offset: up to where the file was delivered.
        refusals: what was refused of it.
        notes: the file next to it.
    """

    def __init__(self, path: Path, target: str) -> None:
        self._notes = Notes(path.with_name(path.name + NOTES), target)
        noted = self._notes.mine.get("offset")
        self.offset: int = noted if type(noted) is int and 0 <= noted <= path.stat().st_size else 0
        self.refusals: RefusedItems = RefusedItems(self._notes.mine if self.offset else {})
        self.notes: Path = self._notes.path

    def note(self, offset: int) -> None:
        """Records that the file was delivered up to this offset."""
        self.offset = offset
        self._notes.write({"offset": offset, **self.refusals.noted()})
