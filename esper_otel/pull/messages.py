"""Messages: the classes of ``esper.gateway.v1``, built from the compiled ``pull.proto``."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

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


def step_message(packets: Packets) -> Message:
    """Returns packets as the message that a gateway sends."""
    return Step(
        state=packets.state.SerializeToString(),
        telemetry=[packet.SerializeToString() for packet in packets.telemetry],
        attempt=packets.attempt,
        rank=packets.rank,
        step=packets.step,
        revision=packets.revision,
        complete=packets.complete,
        age_s=packets.age_s,
        names=sorted(packets.names),
        writer=packets.writer,
    )
