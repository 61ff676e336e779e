"""Attributes: interprets the attributes of points and Resources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from esper_otel.gateway.limits import Limits
from esper_otel.gateway.receive.request import INVALID_TEXT, TOO_MANY_ATTRIBUTES, PointSender
from esper_otel.parts.senders import Label, label_of_texts, run_of_texts, text_of
from esper_otel.schema.who import location_in_words
from esper_otel.text import printable

_HOST, _REVISION, _SETTINGS = "host.name", "vcs.ref.head.revision", "esper.settings"
_MOST_SETTINGS, _MOST_LOCATION = 1_000, 500  # characters
_PROCESS = ("service.instance.id", _HOST, "process.pid")

PLAIN = Label()


def label_of(attributes: Sequence[KeyValue], limits: Limits) -> Label:
    """Interprets a point's attributes. If a key occurs twice, the last value counts."""
    if not attributes:
        return PLAIN
    if len(attributes) > limits.attributes:
        return Label(fault=TOO_MANY_ATTRIBUTES)
    return label_of_texts(_texts(attributes), limits.text_bytes)


def sender_of(attributes: Sequence[KeyValue], limits: Limits) -> PointSender | str:
    """Returns the sender that a Resource's attributes describe, or the reason why its points cannot be accepted."""
    if len(attributes) > limits.attributes:
        return TOO_MANY_ATTRIBUTES
    texts = _texts(attributes)
    run = run_of_texts(texts, limits.text_bytes)
    if run is None:
        return INVALID_TEXT
    process = printable(" ".join(filter(None, map(texts.get, _PROCESS))), 3 * limits.text_bytes)
    host, revision = (printable(texts.get(name, ""), limits.text_bytes) for name in (_HOST, _REVISION))
    settings = printable(texts.get(_SETTINGS, ""), _MOST_SETTINGS)
    return PointSender(run, process, host, revision, settings, printable(location_in_words(texts), _MOST_LOCATION))


def _texts(attributes: Iterable[KeyValue]) -> dict[str, str]:
    return {attribute.key: _text(attribute.value) for attribute in attributes}


def _text(value: AnyValue) -> str:
    """Returns text and plain numbers as text; empty for other values."""
    kind = value.WhichOneof("value")
    return text_of(getattr(value, kind)) if kind in ("string_value", "int_value", "double_value") else ""
