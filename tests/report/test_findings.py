"""What the report says of the steps, from their values."""

from __future__ import annotations

import pytest

from esper_otel.report.findings import phases
from esper_otel.report.recording import StepRow

pytestmark = pytest.mark.own_code

STEP = {"input_wait_ms": 5.0, "step_latency_ms": 20.0, "hook_latency_ms": 2.0}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, {"rest": 18.0}),
        ({"forward": 6.0, "backward": 9.0}, {"forward": 6.0, "backward": 9.0, "rest": 3.0}),
        ({"forward": 6.0, "backward": 11.0, "optimizer": 1.5}, {"rest": 18.0}),  # a GPU that is behind
    ],
)
def test_the_time_of_a_step_is_the_sum_of_its_phases(parts: dict[str, float], expected: dict[str, float]) -> None:
    row = StepRow(1, 0, 0.0, STEP | {f"esper.{part}_ms": ms for part, ms in parts.items()}, {})
    assert phases(row) == {"input wait": 5.0, "hook": 2.0, **expected}
