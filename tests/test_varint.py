"""Varints: as protobuf writes and reads them."""

from __future__ import annotations

import pytest
from google.protobuf.wrappers_pb2 import BytesValue, UInt64Value
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.varint import field_head, read_varint, varint

pytestmark = pytest.mark.own_code


@given(st.integers(1, 2**64 - 1), st.binary(max_size=3), st.binary(max_size=3))
def test_a_number_is_written_and_read_as_by_protobuf(number: int, before: bytes, after: bytes) -> None:
    content = UInt64Value(value=number).SerializeToString()[1:]
    assert varint(number) == content
    assert read_varint(before + content + after, len(before)) == (number, len(before) + len(content))


@pytest.mark.parametrize("content", [b"", b"\x80", b"\xff" * 9, b"\xff" * 20])
def test_what_ends_too_early_or_never_is_an_index_error(content: bytes) -> None:
    with pytest.raises(IndexError):
        read_varint(content, 0)


@pytest.mark.parametrize("size", [1, 127, 128, 20_000])
def test_the_head_of_a_field_is_protobufs(size: int) -> None:
    content = b"x" * size
    assert field_head(1, size) + content == BytesValue(value=content).SerializeToString()
