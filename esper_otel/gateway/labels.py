"""Attributes: what those of a point and of a Resource mean to us."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from esper_otel.gateway.decoded import INVALID_TEXT, TOO_MANY_ATTRIBUTES, Sender
from esper_otel.gateway.limits import Limits

# Where a run's id is looked for in a Resource, best first.
_RUN_ID_SOURCES = ("esper.run.id", "service.instance.id", "service.name")
_PROCESS = ("service.instance.id", "host.name", "process.pid")
_LARGEST_RANK = 2**31


class Label(NamedTuple):
    """What the attributes of a point mean.

    Attributes:
        seed: the seed's id; empty when there is none.
        run_id: the run, where the point itself says it; else empty.
        rank: the rank, where the point itself says it; else -1.
        outcome: how a run ended.
        further: how many attributes nobody here knows.
        fault: why no such point is taken; empty when it is.
    """

    seed: str = ""
    run_id: str = ""
    rank: int = -1
    outcome: str = ""
    further: int = 0
    fault: str = ""


PLAIN = Label()


def label_of(attributes: Sequence[KeyValue], limits: Limits) -> Label:
    """The meaning of a point's attributes; of a key that comes twice the last one counts."""
    if not attributes:
        return PLAIN
    if len(attributes) > limits.attributes:
        return Label(fault=TOO_MANY_ATTRIBUTES)
    texts = _texts(attributes)
    seed, run_id, outcome = texts.pop("seed_id", ""), texts.pop("esper.run.id", ""), texts.pop("outcome", "")
    rank = texts.pop("esper.rank", "")
    if not all(is_valid(text, limits) for text in (seed, run_id, outcome)):
        return Label(fault=INVALID_TEXT)
    return Label(seed, run_id, _whole(rank, -1, _LARGEST_RANK), outcome, len(texts))


def sender_of(attributes: Sequence[KeyValue], limits: Limits) -> Sender | str:
    """Who a Resource's attributes say it is; a reason when its points cannot be taken."""
    if len(attributes) > limits.attributes:
        return TOO_MANY_ATTRIBUTES
    texts = _texts(attributes)
    sender = Sender(
        run_id=next(filter(None, map(texts.get, _RUN_ID_SOURCES)), "unknown"),
        attempt=_whole(texts.get("esper.run.attempt"), 0, 2**63),
        rank=_whole(texts.get("esper.rank"), 0, _LARGEST_RANK),
        world_size=_whole(texts.get("esper.world_size"), 1, _LARGEST_RANK),
        experiment=texts.get("esper.experiment.name", ""),
        device_type=texts.get("esper.device.type", ""),
        device_id=texts.get("esper.device.id", ""),
        compute_capability=_whole(texts.get("esper.device.compute_capability"), 0, 2**31),
        process=" ".join(filter(None, map(texts.get, _PROCESS)))[: 3 * limits.text_bytes],
    )
    ours = (sender.run_id, sender.experiment, sender.device_type, sender.device_id)
    return sender if all(is_valid(text, limits) for text in ours) else INVALID_TEXT


def is_valid(text: str, limits: Limits) -> bool:
    """Whether a text is as short and as printable as those that a session accepts."""
    if text.isprintable() and len(text) * 4 <= limits.text_bytes:
        return True
    return len(text.encode()) <= limits.text_bytes and not any(
        character < " " or "\x7f" <= character <= "\x9f" for character in text
    )


def _texts(attributes: Iterable[KeyValue]) -> dict[str, str]:
    return {attribute.key: _text(attribute.value) for attribute in attributes}


def _text(value: AnyValue) -> str:
    """Text and plain numbers; empty for anything else."""
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "int_value":
            return str(value.int_value)
        case "double_value":
            return f"{value.double_value:.17g}"
        case _:
            return ""


def _whole(text: str | None, default: int, limit: int) -> int:
    """The text as an integer from 0 to below ``limit``."""
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 20:
        return default
    number = int(text)
    return number if number < limit else default
