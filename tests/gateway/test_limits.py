"""Limits: each one is an option, and what is refused for one says so, is counted, and can be sent again."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from frame_examples import RUN, make_frame, seed_table
from gateways import RunningGateway, post
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # has .pyi, no py.typed
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from wire import bodies, body_of

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.limits import Limits
from esper_otel.gateway.options import limit_names, limits_of
from esper_otel.gateway.receive.request import OF_REASONS, REASONS

pytestmark = pytest.mark.own_code

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "limits.md"


def test_every_limit_is_an_option() -> None:
    assert limits_of([])[0] == Limits()
    given = [f"{name}={number}" for number, name in enumerate(asdict(Limits()), 1)]
    limits, others = limits_of([*given, "stored_writers=7", "http_connections=8", "grpc_connections=9"])
    assert [*asdict(limits).values()] == [*range(1, len(given) + 1)]
    assert others == {"stored_writers": 7, "http_connections": 8, "grpc_connections": 9}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("run=5", "did you mean 'runs'"),
        ("runs", "whole number"),
        ("runs=many", "whole number"),
        ("runs=1.5", "whole number"),
        ("patient_s=nan", "from 1"),
        ("runs=0", "from 1"),
        ("=3", "there is no limit"),
    ],
)
def test_a_limit_that_is_none_is_a_mistake(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        limits_of([text])


def test_the_reference_has_each_limit_with_its_default() -> None:
    said = re.findall(r"^\| `(\w+)` \| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [f"{name}={value}" for name, value in said] == limit_names()


def test_a_rank_for_which_there_is_no_room_is_to_be_sent_again() -> None:
    """And what is refused for good is counted by its reason; the log names the limit that can be raised."""
    assert OF_REASONS.keys() <= {*REASONS}
    with RunningGateway("--limit", "runs=2", "--limit", "seeds=3") as gateway:
        assert post(gateway.http, body_of("first", "second")) == (200, b"")
        status, answer = post(gateway.http, body_of("third"))
        assert (status, "--limit runs=" in Status.FromString(answer).message) == (503, True)
        run = replace(RUN, run_id="first")
        table = seed_table({f"seed-{seed}": {"alpha": 0.5} for seed in range(5)})
        many = make_frame(run=run, sequence=2, global_step=2, seeds=table, live=table)
        status, answer = post(gateway.http, bodies([many])[0])
        rejected = ExportMetricsServiceResponse.FromString(answer).partial_success
        with urllib.request.urlopen(f"http://{gateway.http}/metrics", timeout=60) as response:
            metrics = response.read().decode()
    assert 'esper_gateway_deferred_requests_total{reason="too many runs"} 1' in metrics
    assert (status, rejected.rejected_data_points > 0) == (200, True)
    assert 'esper_gateway_rejected_points_total{reason="too many seeds"} ' in metrics
    assert "--limit seeds=3" in gateway.said
