"""Messages: the classes of ``esper.gateway.v1``, built from the compiled ``pull.proto``."""

from __future__ import annotations

import struct
from collections.abc import Iterable
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
_STATE, _TELEMETRY, _ATTEMPT, _RANK, _STEP, _REVISION, _COMPLETE = 0x0A, 0x12, 0x18, 0x20, 0x28, 0x30, 0x38
_AGE_S, _NAME, _WRITER = 0x41, 0x4A, 0x52
_STEPS, _CURSOR, _GAP = 0x0A, 0x12, 0x18
_AGE = struct.Struct("<Bd")


def step_bytes(packets: Packets) -> bytes:
    """Returns a serialized ``Step`` without the field that depends on when it is read, ``age_s``."""
    parts = [_field(_STATE, packets.state.SerializeToString())]
    parts += [_field(_TELEMETRY, packet.SerializeToString()) for packet in packets.telemetry]
    for tag, number in (
        (_ATTEMPT, packets.attempt),
        (_RANK, packets.rank),
        (_STEP, packets.step),
        (_REVISION, packets.revision),
        (_COMPLETE, packets.complete),
    ):
        if number:
            parts += (bytes((tag,)), varint(number))
    parts.append(_names(packets.names))
    if packets.writer:
        parts.append(_field(_WRITER, packets.writer.encode()))
    return b"".join(parts)


def page_bytes(steps: Iterable[tuple[bytes, float]], cursor: str, gap: int) -> bytes:
    """Returns a serialized ``PullResponse``.

    Args:
        steps: serialized steps without their age, each with its age in seconds.
        cursor: the cursor for the next pull.
        gap: number of steps that were dropped before the first one.
    """
    parts = []
    for step, age_s in steps:
        parts += (bytes((_STEPS,)), varint(len(step) + _AGE.size), step, _AGE.pack(_AGE_S, age_s))
    parts.append(_field(_CURSOR, cursor.encode()))
    if gap:
        parts += (bytes((_GAP,)), varint(gap))
    return b"".join(parts)


def step_message(packets: Packets) -> Message:
    """Returns packets as the message that a gateway sends."""
    return Step.FromString(step_bytes(packets) + _AGE.pack(_AGE_S, packets.age_s))


def _field(tag: int, content: bytes) -> bytes:
    return bytes((tag,)) + varint(len(content)) + content


@lru_cache(maxsize=64)
def _names(names: frozenset[str]) -> bytes:
    return b"".join(_field(_NAME, name.encode()) for name in sorted(names))
