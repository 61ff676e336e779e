"""OTLP/JSON: the same request in JSON says the same; what is wrong is refused as a whole."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from frame_examples import TIME_UNIX_NS

from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.gateway.receive.request import Decoded, Malformed


def decode(*points: Any, **further: Any) -> Decoded:
    """A request with these points of ``loss``."""
    metric = {"name": "loss", "gauge": {"dataPoints": list(points)}, **further}
    resource = {"attributes": [{"key": "esper.run.id", "value": {"stringValue": "r"}}]}
    content = {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"metrics": [metric]}]}]}
    return Decoder().decode_json(json.dumps(content).encode())


def value_of(**fields: Any) -> float:
    (block,) = decode({"timeUnixNano": str(TIME_UNIX_NS), **fields}).blocks
    assert (block.sender.run_id, block.times.tolist()) == ("r", [TIME_UNIX_NS])
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
    ],
)
def test_a_value_is_read_in_each_of_its_spellings(fields: dict[str, Any], expected: float) -> None:
    """JavaScript and Go senders write numbers as strings; ids in hexadecimal and unknown fields do not matter."""
    assert value_of(**fields) == expected


def test_nan_is_a_value() -> None:
    """A loss that became NaN is what a controller must see."""
    assert math.isnan(value_of(asDouble="NaN"))


@pytest.mark.parametrize(
    "fields",
    [
        {"asDouble": True},
        {"asDouble": "inf"},
        {"asDouble": []},
        {"asDouble": 10**400},
        {"asDouble": "1e999"},
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
    "further", [{"name": 7}, {"gauge": 7}, {"gauge": []}, {"gauge": None, "sum": {"aggregationTemporality": 2**40}}]
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
        b"[]",
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
