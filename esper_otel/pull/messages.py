"""Messages: the classes of ``esper.gateway.v1``, built from the compiled ``pull.proto``."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from esper_otel.varint import varint

if TYPE_CHECKING:
    from esper_otel.leyline.packets import Packets

_compiled = resources.files(__package__).joinpath("pull.binpb").read_bytes()
_file = FileDescriptorSet.FromString(_compiled).file[0]
# The default pool is the one that gRPC reflection reads. No other package defines these names.
Default().AddSerializedFile(_file.SerializeToString())
_classes = {
    message.name: GetMessageClass(Default().FindMessageTypeByName(f"{_file.package}.{message.name}"))
    for message in _file.message_type
}

SERVICE = f"{_file.package}.{_file.service[0].name}"
Attribute = _classes["Attribute"]
Bar = _classes["Bar"]
Event = _classes["Event"]
EventsRequest = _classes["EventsRequest"]
EventsResponse = _classes["EventsResponse"]
HoursRequest = _classes["HoursRequest"]
HoursResponse = _classes["HoursResponse"]
PullRequest = _classes["PullRequest"]
PullResponse = _classes["PullResponse"]
Rank = _classes["Rank"]
RanksRequest = _classes["RanksRequest"]
RanksResponse = _classes["RanksResponse"]
Run = _classes["Run"]
RunsRequest = _classes["RunsRequest"]
RunsResponse = _classes["RunsResponse"]
Step = _classes["Step"]


# Field numbers of Step and PullResponse, as tags: numbers, and fields that hold bytes, texts or messages.
_STATE, _TELEMETRY, _ATTEMPT, _RANK, _STEP, _REVISION, _COMPLETE = 0x0A, 0x12, 0x18, 0x20, b"\x28", 0x30, 0x38
_NAME, _WRITER, _VALUE_NAME, _VALUES = 0x4A, 0x52, 0x62, 0x6A
_NUMBER = b"\x58"
_AGE_S, _AGE_BYTES = b"\x41", 9
_STEPS, _CURSOR, _GAP = b"\x0a", 0x12, 0x18
_DOUBLE = struct.Struct("<d")


def step_bytes(packets: Packets) -> bytes:
    """Returns a step of a page, serialized up to ``age_s``, its last field, which depends on when the step is read."""
    content = _step(packets) + _values(packets.values)
    return b"".join((_STEPS, varint(len(content) + _AGE_BYTES), content, _AGE_S))


def _step(packets: Packets) -> bytes:
    parts = [_field(_STATE, packets.state.SerializeToString())]
    parts += [_field(_TELEMETRY, packet.SerializeToString()) for packet in packets.telemetry]
    if packets.step:
        parts += (_STEP, varint(packets.step))
    if packets.number:
        parts += (_NUMBER, varint(packets.number))
    parts.append(
        _beside(packets.attempt, packets.rank, packets.revision, packets.complete, packets.names, packets.writer)
    )
    return b"".join(parts)


def _values(values: Mapping[str, float]) -> bytes:
    names = b"".join(_field(_VALUE_NAME, name.encode()) for name in values)
    return names + _field(_VALUES, struct.pack(f"<{len(values)}d", *values.values())) if values else b""


@lru_cache(maxsize=1024)
def _beside(attempt: int, rank: int, revision: int, complete: bool, names: frozenset[str], writer: str) -> bytes:
    """Returns the fields that most steps of a writer have in common."""
    numbers = ((_ATTEMPT, attempt), (_RANK, rank), (_REVISION, revision), (_COMPLETE, int(complete)))
    parts = [bytes((tag,)) + varint(number) for tag, number in numbers if number]
    parts += [_field(_NAME, name.encode()) for name in sorted(names)]
    if writer:
        parts.append(_field(_WRITER, writer.encode()))
    return b"".join(parts)


def page_bytes(steps: Iterable[tuple[bytes, float]], cursor: str, gap: int) -> bytes:
    """Returns a serialized ``PullResponse``.

    Args:
        steps: steps as ``step_bytes`` returns them, each with its age in seconds.
        cursor: the cursor for the next pull.
        gap: number of steps before the first one that were dropped or have not arrived.
    """
    parts: list[bytes] = []
    for step, age_s in steps:
        parts += (step, _DOUBLE.pack(age_s))
    parts.append(_field(_CURSOR, cursor.encode()))
    if gap:
        parts += (bytes((_GAP,)), varint(gap))
    return b"".join(parts)


def step_message(packets: Packets) -> Message:
    """Returns packets as the message that a gateway sends."""
    return Step.FromString(_step(packets) + _AGE_S + _DOUBLE.pack(packets.age_s))


def _field(tag: int, content: bytes) -> bytes:
    return bytes((tag,)) + varint(len(content)) + content
