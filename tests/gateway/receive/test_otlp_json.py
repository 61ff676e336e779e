"""OTLP/JSON: the same request in JSON says the same; what is wrong is refused as a whole."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import pytest
from frame_examples import TIME_UNIX_NS

from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.request import DecodedRequest, Malformed


def decode(*points: Any, **further: Any) -> DecodedRequest:
    """A request with these points of ``loss``."""
    metric = {"name": "loss", "gauge": {"dataPoints": list(points)}, **further}
    resource = {"attributes": [{"key": "esper.run.id", "value": {"stringValue": "r"}}]}
    content = {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"metrics": [metric]}]}]}
    return Decoder().decode_json(json.dumps(content).encode())


def value_of(**fields: Any) -> float:
    (block,) = decode({"timeUnixNano": str(TIME_UNIX_NS), **fields}).blocks
    assert (block.sender.run.run_id, block.times.tolist()) == ("r", [TIME_UNIX_NS])
    return float(block.values[0])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"asDouble": 1.5}, 1.5),
        ({"asDouble": "1.5"}, 1.5),
        ({"asInt": "-7"}, -7.0),
        ({"asInt": 7}, 7.0),
        ({"asDouble": "Infinity"}, math.inf),
        ({"asDouble": "-Infinity"}, -math.inf),
        ({"asDouble": 2.0, "exemplars": [{"traceId": "5B8EFFF798038103D269B633813FC60C"}], "new": {}}, 2.0),
        ({"asDouble": 2.0, "exemplars": [{"traceId": "no hexadecimal number"}, 7]}, 2.0),
        ({"as_double": 1.5}, 1.5),
    ],
)
def test_a_value_is_read_in_each_of_its_spellings(fields: dict[str, Any], expected: float) -> None:
    """JavaScript and Go senders write numbers as strings; ids in hexadecimal and unknown fields do not matter."""
    assert value_of(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"asDouble": True}, 1.0), ({"asDouble": "inf"}, math.inf), ({"asDouble": "1e999"}, math.inf)],
)
def test_what_protobuf_tolerates_is_taken(fields: dict[str, Any], expected: float) -> None:
    """Its reader of JSON decides, so that there is one opinion less."""
    assert value_of(**fields) == expected


@pytest.mark.parametrize("temporality", [1, "AGGREGATION_TEMPORALITY_DELTA"])
def test_an_enum_is_a_number_or_a_name(temporality: int | str) -> None:
    """OTLP wants numbers, protobuf writes names."""
    point = {"timeUnixNano": str(TIME_UNIX_NS), "asDouble": 1.0}
    decoded = decode(gauge=None, sum={"aggregationTemporality": temporality, "dataPoints": [point]})
    assert decoded.rejected == {"delta sum": 1}


def test_nan_is_a_value() -> None:
    """A loss that became NaN is what a controller must see."""
    assert math.isnan(value_of(asDouble="NaN"))


@pytest.mark.parametrize(
    "fields",
    [
        {"asDouble": []},
        {"asDouble": "one"},
        {"asDouble": 10**400},
        {"asInt": "x"},
        {"asInt": 1.5},
        {"asInt": str(2**63)},
        {"asInt": "9" * 5_000},
        {"timeUnixNano": -1},
        {"timeUnixNano": 2**64},
        {"timeUnixNano": 1e400},
        {"flags": 2**40},
        {"attributes": {}},
        {"attributes": [7]},
        {"attributes": [{"key": 7}]},
        {"attributes": [{"key": "\ud800"}]},
        {"attributes": [{"key": "a", "value": {"intValue": 2**64}}]},
    ],
)
def test_a_field_of_the_wrong_type_is_malformed(fields: dict[str, Any]) -> None:
    """A sender's mistake must become an answer to it, not an error in the server."""
    with pytest.raises(Malformed):
        decode({"timeUnixNano": str(TIME_UNIX_NS), **fields})


@pytest.mark.parametrize(
    "further", [{"name": 7}, {"gauge": 7}, {"gauge": [7]}, {"gauge": None, "sum": {"aggregationTemporality": {}}}]
)
def test_a_metric_of_the_wrong_type_is_malformed(further: dict[str, Any]) -> None:
    """As for points."""
    with pytest.raises(Malformed):
        decode(**further)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[7]",
        b"7",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"resourceMetrics": 7}',
        b'{"resourceMetrics": [{"scopeMetrics": [7]}]}',
        b'{"resourceMetrics": [{"scopeMetrics": [{"metrics": [7]}]}]}',
        b'{"a": NaN}',
        b'{"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"gauge": {"dataPoints": [{"asDouble": 1e999}]}}]}]}]}',
    ],
)
def test_what_is_no_request_is_malformed(body: bytes) -> None:
    """Bytes of strangers must not raise what no server expects."""
    with pytest.raises(Malformed):
        Decoder().decode_json(body)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"asDouble": "one"}, r"Couldn't parse float: one at .*\.dataPoints\[0\]\.asDouble"),
        ({"asDouble": [1]}, "Failed to parse asDouble field"),
        ({"asInt": 2**63}, "Failed to parse asInt field"),
        ({"timeUnixNano": -1}, "Failed to parse timeUnixNano field"),
        ({"attributes": {}}, "Failed to parse attributes field"),
        ({"attributes": [{"key": 7}]}, "Failed to parse key field"),
    ],
)
def test_an_error_names_the_field(fields: dict[str, Any], name: str) -> None:
    """Whoever wrote the sender finds the mistake by it."""
    with pytest.raises(Malformed, match=f"^not an OTLP request in JSON: .*{name}"):
        decode({"timeUnixNano": str(TIME_UNIX_NS), **fields})


@pytest.mark.parametrize("value", [{"doubleValue": "x" * 500_000}, {"kvlistValue": {"values": {"x" * 500_000: 1}}}])
def test_an_error_does_not_repeat_a_large_value_at_each_level(value: dict[str, Any]) -> None:
    """Protobuf puts it into the error of each level around it: a gateway would need a hundred times its size."""
    for _ in range(20):
        value = {"arrayValue": {"values": [value]}}
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="xxx"):
            decode({"attributes": [{"value": value}]})
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
