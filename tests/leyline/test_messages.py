"""The types that type checkers see against the messages that programs get."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet

from esper_otel import leyline

FILES = Path(leyline.__file__).parent
CONTRACT = FileDescriptorSet.FromString((FILES / "leyline.binpb").read_bytes()).file[0]
STUB = {
    node.name: node for node in ast.parse((FILES / "messages.pyi").read_text()).body if isinstance(node, ast.ClassDef)
}

SCALARS = {
    FieldDescriptorProto.TYPE_STRING: "str",
    FieldDescriptorProto.TYPE_BYTES: "bytes",
    FieldDescriptorProto.TYPE_FLOAT: "float",
    FieldDescriptorProto.TYPE_DOUBLE: "float",
    FieldDescriptorProto.TYPE_UINT32: "int",
    FieldDescriptorProto.TYPE_UINT64: "int",
}


def python_type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    name = field.type_name.rsplit(".", 1)[-1]
    for entry in message.nested_type:
        if entry.name == name:
            key, value = (python_type(message, part) for part in entry.field)
            return f"ScalarMap[{key}, {value}]"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"RepeatedCompositeFieldContainer[{name}]"
    return name or SCALARS[field.type]


def declared(node: ast.ClassDef) -> dict[str, str]:
    return {
        ast.unparse(part.target): ast.unparse(part.annotation) for part in node.body if isinstance(part, ast.AnnAssign)
    }


@pytest.mark.parametrize("message", CONTRACT.message_type, ids=lambda message: message.name)
def test_the_stub_of_a_message_has_its_fields_and_their_types(message: DescriptorProto) -> None:
    """A stub that lies is worse than none: mypy would bless a field that does not exist."""
    node = STUB[message.name]
    fields = {field.name: python_type(message, field) for field in message.field}
    assert declared(node) == fields
    (init,) = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    assert [argument.arg for argument in init.args.kwonlyargs] == list(fields)


def test_the_stub_of_each_enum_has_its_values() -> None:
    """As for messages."""
    for enum in CONTRACT.enum_type:
        names = {value.name: f"ClassVar[{enum.name}]" for value in enum.value}
        assert declared(STUB[enum.name]) == names
        assert dict(getattr(leyline, enum.name).items()) == {value.name: value.number for value in enum.value}


def test_the_stub_declares_nothing_else() -> None:
    """Each class of the stub exists."""
    assert set(STUB) == {m.name for m in CONTRACT.message_type} | {e.name for e in CONTRACT.enum_type}
