"""With telemetry a loop does what it does without; what is recorded is what the loop counts itself."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm

from esper_otel.testing import MemoryCollector

pytest.importorskip("torch")

TWINS = Path(__file__).parent / "step_twins.py"
CASES = ("plain", "closures", "several", "accumulated", "skipped")


class Done(NamedTuple):
    output: str
    errors: list[str]  # without our own
    status: int | None
    counted: dict[str, dict[str, Any]]


def started(folder: Path, way: str, **environment: str) -> warm.Process:
    command = [*(["-m", "esper_otel", "run"] if way == "run" else []), str(TWINS), str(folder / f"{way}.json"), way]
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "none", "ESPER_BLACK_BOX_FRAMES": "0", **environment}
    return warm.started(*command, env=environment)


def ended(process: warm.Process, folder: Path, way: str) -> Done:
    output, errors = process.communicate()
    others = [line for line in errors.splitlines() if not line.startswith("esper_otel ")]
    return Done(output, others, process.wait(), json.loads((folder / f"{way}.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def all_ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """The script alone; with ``watch``; and as it is, under ``esper-otel run``, whose rows a collector has."""
    folder = tmp_path_factory.mktemp("twins")
    with MemoryCollector() as collector:
        export = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint}
        running = {way: started(folder, way, **(export if way == "run" else {})) for way in ("without", "watch", "run")}
        done = {way: ended(process, folder, way) for way, process in running.items()}
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for point in collector.points():
            if point.value is not None and not point.attributes.get("seed_id"):
                rows[point.time_unix_ns][point.name] = point.value
    all_rows = iter([row for _, row in sorted(rows.items()) if "gradient_norm" in row])
    for name in CASES:
        found = done["run"].counted[name]
        found["rows"] = list(islice(all_rows, len(found["norms"])))
    assert next(all_rows, None) is None
    return done


@pytest.mark.parametrize("way", ["watch", "run"])
def test_the_script_does_what_it_does_without(all_ways: dict[str, Done], way: str) -> None:
    """Its output, losses and weights to the last bit, random numbers, errors and exit status."""
    without, ours = all_ways["without"], all_ways[way]
    assert len(without.output.splitlines()) == len(CASES)
    assert (ours.output, ours.errors, ours.status) == (without.output, without.errors, 0)
    assert [ours.counted[name]["norms"] for name in CASES] == [without.counted[name]["norms"] for name in CASES]


@pytest.mark.parametrize("way", ["watch", "run"])
@pytest.mark.parametrize("name", CASES)
def test_each_step_of_an_optimizer_is_a_row_with_what_belongs_to_it(
    all_ways: dict[str, Done], way: str, name: str
) -> None:
    found = all_ways[way].counted[name]
    rows = found["rows"]
    assert len(rows) == len(found["norms"])
    assert [row["gradient_norm"] for row in rows] == pytest.approx(found["norms"], rel=1e-5)
    waits = [row.get("input_wait_ms", 0.0) + row["step_latency_ms"] for row in rows]
    samples = [
        round(row["samples_per_s"] * spent_ms / 1e3) if "samples_per_s" in row else None
        for row, spent_ms in zip(rows, waits, strict=True)
    ]
    assert samples == found["samples"]
