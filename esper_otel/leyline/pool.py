"""The classes of the Leyline messages: Esper's own if this process has them, otherwise those of this package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

from google.protobuf import timestamp_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import Default, DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

from esper_otel.log import logger


def _contract() -> FileDescriptor:
    """Registers this package's ``leyline.proto`` in a separate pool, so that other registrations cannot conflict."""
    compiled = resources.files(__package__).joinpath("leyline.binpb").read_bytes()
    file = FileDescriptorSet.FromString(compiled).file[0]
    pool = DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(file.name)


def _registered(find: Any, name: str) -> Any:
    """Returns the descriptor that a pool has under a name, or None."""
    try:
        return find(name)
    except KeyError:
        return None


def _field_facts(field: FieldDescriptor) -> dict[str, object]:
    """Returns the facts of a field that both sides must agree on, worded as in reports of differences."""
    kind = field.message_type or field.enum_type
    return {
        "number": field.number,
        "type": FieldDescriptorProto.Type.Name(field.type),  # type: ignore[arg-type] # an enum number
        "type name": None if kind is None else kind.full_name,
        "repeated": field.is_repeated,
        "required": field.is_required,
        "presence": field.has_presence,
        "oneof": None if field.containing_oneof is None else field.containing_oneof.name,
        "default": None if field.is_repeated or field.message_type else field.default_value,
    }


def _message_differences(ours: Descriptor, theirs: Descriptor, name: str) -> Iterator[str]:
    if ours.GetOptions().map_entry != theirs.GetOptions().map_entry:
        yield f"only one of the two {name} is a map"
    for field in ours.fields:
        their_field = theirs.fields_by_name.get(field.name)
        if their_field is None:
            yield f"{name} lacks the field {field.name}"
            continue
        their_facts = _field_facts(their_field)
        for fact, value in _field_facts(field).items():
            if their_facts[fact] != value:
                yield f"{name}.{field.name} has {fact} {their_facts[fact]}, not {value}"
        entry, their_entry = field.message_type, their_field.message_type
        if entry is not None and their_entry is not None and entry.GetOptions().map_entry:
            yield from _message_differences(entry, their_entry, f"{name}.{field.name}")
    for field in theirs.fields:
        if field.is_required and field.name not in ours.fields_by_name:
            yield f"{name} requires the field {field.name}"


def _enum_differences(ours: EnumDescriptor, theirs: EnumDescriptor) -> Iterator[str]:
    if ours.is_closed != theirs.is_closed:
        yield f"only one of the two {ours.name} is a closed enum"
    for value in ours.values:
        their_value = theirs.values_by_name.get(value.name)
        if their_value is None:
            yield f"{ours.name} lacks the value {value.name}"
        elif their_value.number != value.number:
            yield f"{value.name} has number {their_value.number}, not {value.number}"
        elif theirs.values_by_number[value.number].name != value.name:
            yield f"{value.number} in {ours.name} is {theirs.values_by_number[value.number].name}, not {value.name}"


def _differences(contract: FileDescriptor, pool: DescriptorPool) -> Iterator[str]:
    """Yields what the pool lacks of the contract and where it contradicts it. Additions are not differences."""
    for name, message in contract.message_types_by_name.items():
        their_message = _registered(pool.FindMessageTypeByName, message.full_name)
        if their_message is None:
            yield f"there is no message {name}"
        else:
            yield from _message_differences(message, their_message, name)
    for name, enum in contract.enum_types_by_name.items():
        their_enum = _registered(pool.FindEnumTypeByName, enum.full_name)
        if their_enum is None:
            yield f"there is no enum {name}"
        else:
            yield from _enum_differences(enum, their_enum)


def _is_registered(contract: FileDescriptor, pool: DescriptorPool) -> bool:
    """Whether the pool has any part of the contract."""
    messages, enums = contract.message_types_by_name.values(), contract.enum_types_by_name.values()
    return any(_registered(pool.FindMessageTypeByName, message.full_name) for message in messages) or any(
        _registered(pool.FindEnumTypeByName, enum.full_name) for enum in enums
    )


def leyline_types(module: str) -> dict[str, Any]:
    """Returns message classes and enums by name.

    If other code has registered the whole contract in the default pool, with the same names, numbers and types, its
    classes are returned, and both sides can exchange objects. Additional fields, enum values and messages do not
    matter. Otherwise the classes live in a separate pool. Code that registers the contract in the default pool later
    then causes no conflict, and both sides can still exchange bytes.

    Args:
        module: the module that will contain the classes, where pickle looks them up.
    """
    contract, pool = _contract(), Default()
    difference = next(_differences(contract, pool), None)
    if difference is not None and _is_registered(contract, pool):
        logger.warning(
            "this process has message classes of %s that differ from the contract (%s): esper_otel uses its own, so "
            "packets can be passed to the others only as bytes (SerializeToString, ParseFromString)",
            contract.package,
            difference,
        )
    types: dict[str, Any] = {}
    for name, ours in contract.message_types_by_name.items():
        message = ours if difference else pool.FindMessageTypeByName(ours.full_name)
        types[name] = GetMessageClass(message)
        if difference:
            types[name].__module__ = module
    for name, our_enum in contract.enum_types_by_name.items():
        types[name] = EnumTypeWrapper(our_enum if difference else pool.FindEnumTypeByName(our_enum.full_name))
    return types
