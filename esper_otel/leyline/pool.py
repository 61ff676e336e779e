"""The classes of the Leyline messages: Esper's own where this process has them, else ours, never both."""

from __future__ import annotations

from importlib import resources
from typing import Any, TypeAlias

from google.protobuf import timestamp_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.descriptor_pool import Default, DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

_Shape: TypeAlias = frozenset[Any]


def _contract() -> FileDescriptorProto:
    """Our ``leyline.proto``, compiled."""
    compiled = resources.files(__package__).joinpath("leyline.binpb").read_bytes()
    return FileDescriptorSet.FromString(compiled).file[0]


def _message_shape(message: DescriptorProto) -> _Shape:
    fields = {(f.number, f.name, f.type, f.label, f.type_name, f.proto3_optional) for f in message.field}
    nested = {(nested.name, _message_shape(nested)) for nested in message.nested_type}
    return frozenset(fields | nested)


def _enum_shape(enum: EnumDescriptorProto) -> _Shape:
    return frozenset((value.name, value.number) for value in enum.value)


def _has_equal(pool: DescriptorPool, contract: FileDescriptorProto) -> bool:
    """Whether the pool knows every message and enum of the contract, with equal fields and numbers."""
    try:
        for message in contract.message_type:
            theirs = DescriptorProto()
            pool.FindMessageTypeByName(f"{contract.package}.{message.name}").CopyToProto(theirs)
            if _message_shape(theirs) != _message_shape(message):
                return False
        for enum in contract.enum_type:
            their_enum = EnumDescriptorProto()
            pool.FindEnumTypeByName(f"{contract.package}.{enum.name}").CopyToProto(their_enum)
            if _enum_shape(their_enum) != _enum_shape(enum):
                return False
    except KeyError:
        return False
    return True


def _private(contract: FileDescriptorProto) -> DescriptorPool:
    pool = DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(contract.SerializeToString())
    return pool


def leyline_types(module: str) -> dict[str, Any]:
    """Message classes and enums by name.

    They are those of the default pool if somebody has registered the contract there with equal fields, so
    that both sides pass one kind of object around. Else they live in a pool of their own: whoever registers the
    contract in the default pool later meets no conflict, and both sides understand each other's bytes.

    Args:
        module: the module that will hold the classes, under which pickle finds them.
    """
    contract = _contract()
    is_shared = _has_equal(Default(), contract)
    pool = Default() if is_shared else _private(contract)
    types: dict[str, Any] = {}
    for message in contract.message_type:
        types[message.name] = GetMessageClass(pool.FindMessageTypeByName(f"{contract.package}.{message.name}"))
        if not is_shared:
            types[message.name].__module__ = module
    for enum in contract.enum_type:
        types[enum.name] = EnumTypeWrapper(pool.FindEnumTypeByName(f"{contract.package}.{enum.name}"))
    return types
