"""Seeds that are recorded with few fields in one step and with many in the next, against plain dicts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from properties import examples

import esper_otel
from esper_otel import EsperSettings, Stage, Telemetry
from esper_otel.export.encode import FRAME_SCOPE
from esper_otel.frames.frame import NARROW
from esper_otel.gateway.rebuild.assembler import Assembler
from esper_otel.gateway.receive.decoder import Decoder
from esper_otel.leyline import Packets, packets
from esper_otel.schema import SEED_CELLS, SEED_FIELDS
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

NAMES = {field: metric.name for field, metric in zip(SEED_FIELDS, SEED_CELLS, strict=True)}
Row = Mapping[str, float]


class Call(NamedTuple):
    """Rows that are recorded by one call: ``seed()`` for each, or ``seeds()`` for all."""

    rows: Mapping[str, Row]
    at_once: bool


class Plan(NamedTuple):
    """What one step does."""

    calls: tuple[Call, ...] = ()
    raises: bool = False
    retired: tuple[str, ...] = ()  # after it
    is_sent_alone: bool = False


def row(draw: st.DrawFn, fields: st.SearchStrategy[str]) -> dict[str, float]:
    # Few fields, so that a seed has one now and then only; every value is one that float32 keeps.
    cells = draw(st.dictionaries(fields, st.integers(0, 64).map(lambda number: number / 64), max_size=4))
    if "stage" in cells:
        cells["stage"] = float(draw(st.sampled_from([Stage.TRAINING, Stage.BLENDING])))
    return {field: float(math.floor(cell)) if field in COUNTS else cell for field, cell in cells.items()}


COUNTS = {"layer_depth", "age_epochs"}


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    """Steps in which seeds and their fields come and go."""
    few, all_fields = st.sampled_from(["stage", "alpha", "alpha_steps"]), st.sampled_from(SEED_FIELDS)
    ids = st.sampled_from(["a", "b", "c"])
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        calls = []
        for _ in range(draw(st.integers(0, 3))):
            fields = draw(st.sampled_from([few, all_fields]))
            calls.append(Call({seed: row(draw, fields) for seed in draw(st.sets(ids))}, draw(st.booleans())))
        retired = tuple(sorted(draw(st.sets(ids)))) if draw(st.integers(0, 3)) == 0 else ()
        steps.append(Plan(tuple(calls), draw(st.integers(0, 4)) == 0, retired, draw(st.booleans())))
    return steps


class Expected:
    """What is to come of the steps, kept in dicts."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Row]] = []
        self.live: list[dict[str, Row]] = []
        self.series: dict[tuple[str, str], list[float | None]] = {}
        self._now: dict[str, dict[str, float]] = {}
        self._open: dict[str, set[str]] = {}
        self._ending: tuple[str, ...] = ()

    def step(self, plan: Plan) -> None:
        recorded: dict[str, dict[str, float]] = {}
        for call in plan.calls:
            for seed, cells in call.rows.items():
                recorded.setdefault(seed, {}).update(cells)
        over = {seed: self._open.pop(seed) for seed in self._ending if self._now.pop(seed, None) is not None}
        for seed, cells in list(recorded.items()):
            known = {**self._now.get(seed, {}), **cells}
            if known.get("stage") != Stage.BLENDING:
                known.pop("alpha_steps", None)
                cells.pop("alpha_steps", None)
            if cells:
                self._now[seed] = known
            else:  # a row that says nothing is none
                del recorded[seed]
        for seed, fields in over.items():
            for field in fields - recorded.get(seed, {}).keys():
                self.series[seed, field].append(None)
        for seed, cells in recorded.items():
            self._open.setdefault(seed, set()).update(cells)
            for field, cell in cells.items():
                self.series.setdefault((seed, field), []).append(cell)
        self.rows.append({seed: dict(cells) for seed, cells in recorded.items()})
        self.live.append({seed: dict(cells) for seed, cells in self._now.items()})
        self._ending = plan.retired

    def end(self) -> None:
        for seed, fields in self._open.items():
            for field in fields:
                self.series[seed, field].append(None)


@pytest.fixture(scope="module")
def collector() -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        yield collector


def run(telemetry: Telemetry, plan: Plan) -> None:
    """One step as planned."""
    try:
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
            for call in plan.calls:
                if call.at_once and call.rows:
                    fields = sorted({field for cells in call.rows.values() for field in cells})
                    columns = {
                        field: np.array([cells.get(field, math.nan) for cells in call.rows.values()])
                        for field in fields
                    }
                    telemetry.seeds(list(call.rows), **columns)
                else:
                    for seed, cells in call.rows.items():
                        now.seed(seed, **cells)
            if plan.raises:
                raise KeyError("planned")
    except KeyError:
        pass
    for seed in plan.retired:
        telemetry.retire_seed(seed)
    if plan.is_sent_alone:
        while telemetry.health()["queue"]:
            time.sleep(0.0002)


IN_STATES = ("alpha", "alpha_steps", "alpha_total_steps", "alpha_temperature", "risk_tolerance")


def seeds_of(step: Packets) -> tuple[Mapping[str, Row], Mapping[str, Row]]:
    """The rows and the live seeds of a step's packets, as far as packets have them."""
    fields = {name: field for field, name in NAMES.items()}
    rows = {
        packet.system_health.indicators["seed_id"]: {fields[point.name]: point.value for point in packet.metrics}
        for packet in step.telemetry
        if not packet.packet_id.endswith("-events")
    }
    live = {
        state.seed_id: {
            "learning_rate": state.learning_rate,
            **{field: cell for field, cell in state.metrics.items() if field in IN_STATES},
        }
        for state in step.state.seed_states
    }
    return rows, live


def only(rows: Mapping[str, Row], fields: tuple[str, ...]) -> dict[str, Row]:
    return {seed: {field: cell for field, cell in cells.items() if field in fields} for seed, cells in rows.items()}


NARROW_STEP = Plan((Call({"a": {"stage": 3.0, "alpha": 0.5}}, False),))
WIDE_STEP = Plan((Call({"a": {"stage": 3.0, "alpha": 0.5, "learning_rate": 0.25}}, False),))


@examples(12)
@example([NARROW_STEP] * 3 + [NARROW_STEP._replace(is_sent_alone=True)] + [WIDE_STEP] * 3)
@example([WIDE_STEP, NARROW_STEP._replace(is_sent_alone=True, retired=("a",)), NARROW_STEP, WIDE_STEP])
@example([NARROW_STEP, Plan(WIDE_STEP.calls[:1], True), NARROW_STEP])
@given(plans())
def test_every_cell_is_sent_pulled_and_rebuilt_whatever_the_widths(
    collector: MemoryCollector, steps: list[Plan]
) -> None:
    """Each cell once, each series ended once, in process and elsewhere."""
    before = len(collector.requests)
    expected = Expected()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        quick = EsperSettings(export_every_s=0.0, probe_period_s=60.0)
        with esper_otel.start(run_id=f"widths-{before}", settings=quick) as telemetry:
            for plan in steps:
                run(telemetry, plan)
                expected.step(plan)
    expected.end()
    requests = collector.requests[before:]
    health = telemetry.health()
    assert (health["exported"], health["dropped"], health["faults"]) == (len(steps), 0, 0)

    points = [point for point in collector.points() if point.resource["esper.run.id"] == telemetry.run_id]
    sent = [p.value for p in points if p.name == "esper.global_step" and p.scope == FRAME_SCOPE and p.value is not None]
    assert sent == [number + 1 for number in range(len(steps))]
    series: dict[tuple[str, str], list[float | None]] = {}
    for point in sorted(points, key=lambda point: point.time_unix_ns):
        if "seed_id" in point.attributes and point.name != "esper.seed.retired":
            series.setdefault((point.attributes["seed_id"], point.name), []).append(point.value)
    assert series == {(seed, NAMES[field]): values for (seed, field), values in expected.series.items()}
    assert sum(point.attributes.get("outcome") == "completed" for point in points) == 1

    pulled = list(telemetry.pull(max_packets=100))
    for step, rows, live in zip(pulled, expected.rows, expected.live, strict=True):
        assert seeds_of(step)[0] == only(rows, SEED_FIELDS[:NARROW])
        rates = {seed: cells.get("learning_rate", 0.0) for seed, cells in live.items()}
        in_states = only(live, IN_STATES)
        assert seeds_of(step)[1] == {seed: {"learning_rate": rates[seed], **in_states[seed]} for seed in live}

    decoder, assembler = Decoder(), Assembler()
    items = []
    for request in requests:
        assembler.take(decoder.decode(request.SerializeToString()), now_s=0.0, received_unix_ns=1)
        items += assembler.release(0.0)
    rebuilt = {item.frame.sequence: packets(item.frame) for item in items}
    assert [seeds_of(rebuilt[number + 1]) for number in range(len(steps))] == [seeds_of(step) for step in pulled]
