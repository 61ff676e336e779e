"""Bounds: what a request may cost follows from its bytes, whatever is in it, and is known before it is paid."""

from __future__ import annotations

import gzip
import json
import os
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from backports import zstd
from frame_examples import RUN, TIME_UNIX_NS, frames, histories, make_frame
from gateways import RunningGateway
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from patience import cpu_patience
from properties import examples
from wire import bodies, encoder, said

from esper_otel.frames.frame import Frame
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.rebuild.shapes import PartShapes
from esper_otel.gateway.receive import bounds, inflate
from esper_otel.gateway.receive.bounds import check_json, check_parts, pieces
from esper_otel.gateway.receive.decoder import Decoder, decode_plain
from esper_otel.gateway.receive.envelope import field
from esper_otel.gateway.receive.inflate import check_encoding, encoding_of, inflated
from esper_otel.gateway.receive.request import Malformed, TooLarge, Unsupported
from esper_otel.parts.part import Part, PartShape, merged

pytestmark = pytest.mark.lengthy

MIB = 1024 * 1024
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def within(content: bytes, *numbers: int) -> bytes:
    """Fields around a content, the outermost first."""
    for number in reversed(numbers):
        content = field(number, content)
    return content


# What is empty and there very often, and in which fields of the request.
METRIC, GAUGE, POINT = (1, 2, 2), (1, 2, 2, 5), (1, 2, 2, 5, 1)
BOMBS: dict[str, Callable[[int], bytes]] = {
    "resources": lambda size: b"\x0a\x00" * (size // 2),
    "scopes": lambda size: within(b"\x12\x00" * (size // 2), 1),
    "metrics": lambda size: within(b"\x12\x00" * (size // 2), 1, 2),
    "metrics of many resources": lambda size: within(b"\x12\x00" * 500, 1, 2) * (size // 1006),
    "points": lambda size: within(b"\x0a\x00" * (size // 2), *GAUGE),
    "points of two lengths": lambda size: within(b"\x0a\x00\x0a\x02\x40\x00" * (size // 6), *GAUGE),
    "points of many metrics": lambda size: within(within(b"\x0a\x00\x0a\x02\x40\x00" * 80, 2, 5) * (size // 486), 1, 2),
    "points of a histogram": lambda size: within(b"\x0a\x00" * (size // 2), *METRIC, 9),
    "points of a summary": lambda size: within(b"\x0a\x00" * (size // 2), *METRIC, 11),
    "attributes of a resource": lambda size: within(b"\x0a\x00" * (size // 2), 1, 1),
    "values of an attribute": lambda size: within(b"\x0a\x00" * (size // 2), 1, 1, 1, 2, 5),
    "attributes of a scope": lambda size: within(b"\x1a\x00" * (size // 2), 1, 2, 1),
    "attributes of a point": lambda size: within(b"\x3a\x00" * (size // 2), *POINT),
    "exemplars": lambda size: within(b"\x2a\x00" * (size // 2), *POINT),
    "metadata": lambda size: within(b"\x62\x00" * (size // 2), *METRIC),
    "packed numbers": lambda size: within(field(2, b"\x00" * (8 * size)), *METRIC, 10, 1, 8),
    "fields of others": lambda size: b"\x78\x00" * (size // 2),
    "a group before": lambda size: b"\x7b\x7c" + b"\x0a\x00" * (size // 2),
    "what is malformed behind": lambda size: within(b"\x12\x00" * (size // 2), 1) + b"\x0f",
}


@pytest.mark.parametrize("decode", [Decoder().decode, decode_plain])
@pytest.mark.parametrize("what", BOMBS)
def test_what_is_too_much_is_counted_before_it_is_built(
    what: str, decode: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bounds of a tenth, so that it is soon done. The answer names the bound, and says what to do."""
    monkeypatch.setattr(bounds, "_MOST", 250_000)
    monkeypatch.setattr(bounds, "_MOST_METRICS", 40_000)
    monkeypatch.setattr(bounds, "_MOST_POINTS", 60_000)
    with pytest.raises(TooLarge, match=r"^more than \d+ .* in one request: send smaller requests"):
        decode(BOMBS[what](MIB // 2))


def test_a_bomb_costs_a_gateway_neither_memory_nor_time() -> None:
    """65 KB on the wire, 64 MiB of histogram points when unpacked: they would be 7 GB of objects."""
    bomb = BOMBS["points of a histogram"](64 * MIB - 100)
    with RunningGateway() as gateway, gateway.channel() as channel:
        call = channel.unary_unary(EXPORT, None, None)
        with pytest.raises(grpc.RpcError) as refused:
            call(bomb, compression=grpc.Compression.Gzip, timeout=300)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "send smaller requests" in (refused.value.details() or "")
        call(bodies([make_frame()])[0], timeout=300)
        with open(f"/proc/{gateway.process.pid}/status", encoding="ascii") as file:  # noqa: PTH123 - of the kernel
            (peak,) = (int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))
    assert peak < 500


def weight(message: Message) -> int:
    """How much a message counts: the oracle."""
    count = 0
    for descriptor, value in message.ListFields():
        many = value if isinstance(value, list) or hasattr(value, "append") or hasattr(value, "add") else [value]
        if descriptor.message_type is not None:
            count += sum(1 + bounds._MESSAGE + weight(each) for each in many)
        elif many is value and not isinstance(value, str | bytes) and descriptor.type not in (9, 12):
            packed = type(message)()
            getattr(packed, descriptor.name).extend(value)
            count += 1 + (packed.ByteSize() - 2) // bounds._PACKED_BYTES
        else:
            count += len(many)
    return count


@examples(25)
@given(histories(max_size=3), st.lists(st.integers(0, 2**63), max_size=12))
def test_the_walk_counts_what_protobuf_builds(history: list[Frame], counts: list[int]) -> None:
    request = ExportMetricsServiceRequest()
    for body in bodies(history):
        request.MergeFromString(body)
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="other")
    point = metric.exponential_histogram.data_points.add(count=3)
    point.positive.bucket_counts.extend(counts)
    point.exemplars.add().filtered_attributes.add(key="of others").value.array_value.values.add(int_value=7)
    body, most = request.SerializeToString(), weight(request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "_SMALL", 0)
        patch.setattr(bounds, "_MOST", most)
        check_parts(body, ExportMetricsServiceRequest)
        patch.setattr(bounds, "_MOST", most - 1)
        with pytest.raises(TooLarge):
            check_parts(body, ExportMetricsServiceRequest)


@examples(10)
@given(st.lists(histories(max_size=3), max_size=3), st.integers(1, 400), st.binary(max_size=6))
def test_a_request_in_pieces_says_what_the_whole_says(of_runs: list[list[Frame]], small: int, rest: bytes) -> None:
    body = b"".join(body for history in of_runs for body in bodies(history)) + rest
    whole = said(decode_plain, body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "_SMALL", small)
        assert b"".join(pieces(body, ExportMetricsServiceRequest)) == body
        assert said(decode_plain, body) == whole
        assert said(Decoder().decode, body) == whole


@examples(12)
@given(st.lists(frames(), min_size=1, max_size=4), st.booleans())
def test_values_that_come_twice_are_told_as_one_by_one(some: list[Frame], is_same: bool) -> None:
    """By numpy as by ``merged``, the simple way."""
    body = b"".join(
        bodies([each._replace(run=RUN, time_unix_ns=TIME_UNIX_NS, sequence=1 if is_same else 1 + number)])[0]
        for number, each in enumerate(some)
    )
    for block in decode_plain(body).blocks:
        words = [(name, seed) for seed in ("", *block.seeds) for name in block.names]
        ((_, found),) = PartShapes().parts(block)
        numbers: dict[tuple[str, str], list[float]] = {}
        for stream, value in zip(block.streams.tolist(), block.values.tolist(), strict=True):
            numbers.setdefault(words[stream], []).append(value)
        one_by_one = merged(
            [
                _part_of({stream: each[place] for stream, each in numbers.items() if place < len(each)})
                for place in range(max(map(len, numbers.values())))
            ]
        )
        assert found.differing == one_by_one.differing
        assert _told(found.part) == _told(one_by_one.part)


def _part_of(numbers: dict[tuple[str, str], float]) -> Part:
    return Part(PartShape.of(list(numbers)), np.array(list(numbers.values())))


def _told(part: Part) -> dict[tuple[str, str], str]:
    return dict(zip(part.shape.streams, map(repr, part.numbers.tolist()), strict=True))


# -- JSON ------------------------------------------------------------------------------------------------


def test_json_is_counted_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_MOST_WORDS", 30_000)
    for body in (b'{"resourceMetrics":[' + b"{}," * 20_000 + b"{}]}", b"[" * 40_000, b"[0" + b",0" * 40_000 + b"]"):
        with pytest.raises(TooLarge, match="more than 30000 values in one request in JSON: send smaller"):
            Decoder().decode_json(body)


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
def test_json_nested_too_deep_is_refused(bracket: bytes) -> None:
    with pytest.raises(Malformed, match="nested deeper than 200"):
        Decoder().decode_json(bracket * 5_000)
    with pytest.raises(Malformed, match="nested deeper than 200"):
        check_json(bracket * 201 + b"]" * 201)


def test_brackets_in_texts_are_no_nesting() -> None:
    points = [{"asDouble": 1.0, "timeUnixNano": "1790000000000000000", "attributes": []}] * 3
    metrics = [{"name": '[{\\"[', "gauge": {"dataPoints": points}}] * 300
    content = {"resourceMetrics": [{"scopeMetrics": [{"metrics": metrics}]}]}
    assert Decoder().decode_json(json.dumps(content).encode()).points == 900


def test_an_error_of_json_is_short() -> None:
    """Whatever stands where a number is to be."""
    content = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "loss", "gauge": {"dataPoints": [{}]}}]}]}]}
    for wrong in ("x" * 100_000, [["y"] * 10_000], {"z" * 10_000: 1}):
        content["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["gauge"]["dataPoints"][0] = {"asDouble": wrong}  # type: ignore[index]
        with pytest.raises(Malformed) as refused:
            Decoder().decode_json(json.dumps(content).encode())
        assert len(str(refused.value)) < 300


# -- compression ------------------------------------------------------------------------------------------------


def test_many_members_cost_no_more_than_their_bytes() -> None:
    """They cost the square of their number once: 1.3 s for 1 MiB, 40 s for 4."""
    start = time.process_time()
    with pytest.raises(TooLarge, match="more than 1000 gzip members"):
        inflated(gzip.compress(b"") * 200_000)
    assert inflated(gzip.compress(b"") * 900 + gzip.compress(b"x" * MIB)) == b"x" * MIB
    assert time.process_time() - start < cpu_patience(1.0)


@examples(25)
@given(st.lists(st.binary(max_size=50) | st.binary(min_size=9, max_size=9).map(lambda each: each * 9_000), max_size=8))
def test_members_are_unpacked_one_after_the_other(contents: list[bytes]) -> None:
    """As Python's own does it, also those that reach over a piece."""
    body = b"".join(gzip.compress(content + os.urandom(70_000)) for content in contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inflate, "_PIECE", 1_000)
        assert inflated(body) == gzip.decompress(body)
        if body:
            with pytest.raises(Malformed, match="cut short"):
                inflated(body[:-1])
            with pytest.raises(Malformed, match="not gzip"):
                inflated(body + b"xx")


def test_a_bomb_is_unpacked_as_far_as_its_bytes_go() -> None:
    bomb = gzip.compress(bytes(64 * MIB))
    with pytest.raises(TooLarge, match=rf"more than {MIB + 200 * len(bomb)} bytes when unpacked, from {len(bomb)}"):
        inflated(bomb)


def test_steps_that_are_all_the_same_can_be_unpacked() -> None:
    """Nothing honest is packed better."""
    (body,) = bodies([make_frame()])
    many = body * (16 * MIB // len(body))
    assert inflated(gzip.compress(many, 9)) == many


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}


@pytest.mark.parametrize("encoding", PACKED)
def test_every_compression_is_unpacked_within_the_same_bounds(encoding: str) -> None:
    packed = PACKED[encoding]
    content = os.urandom(200_000) + b"x" * MIB
    assert inflated(packed(content), encoding=encoding) == content
    assert inflated(packed(content) + packed(b"y"), encoding=encoding) == content + b"y"
    assert inflated(b"", encoding=encoding) == b""
    assert encoding_of(packed(content)) == encoding
    with pytest.raises(Malformed, match="cut short"):
        inflated(packed(content)[:-1], encoding=encoding)
    with pytest.raises(Malformed, match=f"not {encoding}"):
        inflated(b"xxxxxxxxxx", encoding=encoding)
    bomb = packed(bytes(64 * MIB))
    tracemalloc.start()
    with pytest.raises(TooLarge, match=rf"more than {MIB + 200 * len(bomb)} bytes when unpacked, from {len(bomb)}"):
        inflated(bomb, encoding=encoding)
    assert tracemalloc.get_traced_memory()[1] < 2 * (MIB + 200 * len(bomb)) + MIB
    tracemalloc.stop()
    steps = [make_frame(sequence=number, time_unix_ns=number * 10**6) for number in range(1, 4_001)]
    for request in encoder("").requests(blocks_of(steps)):  # values all the same: nothing honest is packed better
        assert inflated(packed(request.body), encoding=encoding) == request.body


def test_zstd_with_a_huge_window_is_refused_before_it_has_memory() -> None:
    """A frame that wants 1 GiB of memory, which its sender need not have."""
    huge, far = zstd.CompressionParameter.window_log, zstd.CompressionParameter.enable_long_distance_matching
    options = {int(huge): 30, int(far): 1}
    compressor = zstd.ZstdCompressor(options=options)
    body = compressor.compress(os.urandom(1_000)) + compressor.flush()
    with pytest.raises(Malformed, match="not zstd"):
        inflated(body, encoding="zstd")


def test_compressions_that_are_not_supported_are_named() -> None:
    assert encoding_of(b"\xff\x06\x00\x00sNaPpY....") == "snappy"
    with pytest.raises(Unsupported, match="compression snappy is not supported: set it to zstd, gzip, deflate or none"):
        check_encoding("snappy")
