"""The shipped dashboards: every query of every panel returns what a real run has put there."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gateways import RunningGateway
from patience import patience
from programs import ROOT, Collector, Prometheus, until

import esper_otel
from esper_otel import EsperSettings, Stage, TamiyoClient
from esper_otel.schema import SEED_METRICS, STEP_METRICS

sys.path.insert(0, str(ROOT / "deploy" / "rendering"))

from esper_otel.files.selectors import OURS, STOCK, Naming

pytestmark = pytest.mark.collector

RUN = "seen"
STEPS = 100


class Stack(NamedTuple):
    """A Prometheus that holds a run, and how its metrics are asked for."""

    prometheus: Prometheus
    naming: Naming


def train(run_id: str) -> None:
    """Every metric of the schema, several seeds through several stages, one NaN; two ranks. Left open by nobody."""
    sessions = [
        esper_otel.start(
            run_id=run_id,
            experiment="digits",
            rank=rank,
            world_size=2,
            parallel={"dp": rank},
            device="cpu",
            settings=EsperSettings(export_every_s=0.2),
        )
        for rank in (0, 1)
    ]
    values = {metric.name: 0.5 for metric in STEP_METRICS if metric.name not in {"loss", "accuracy"}}
    cells = {metric.field: 0.5 for metric in SEED_METRICS if metric.field not in {"stage", "alpha_steps"}}
    for step in range(STEPS):
        for telemetry in sessions:
            with telemetry.step(epoch=0) as now:
                now.put(values, loss=math.nan if step == 30 else 1 / (step + 1), accuracy=step / STEPS)
                now.put({"step_latency_ms": 20.0, "input_wait_ms": 5.0})
                now.put({f"esper.{part}_ms": 4.0 for part in ("forward", "backward", "optimizer")})
                for number in range(3):
                    stage = Stage.TRAINING if step < 40 + number else Stage.BLENDING
                    now.seed(f"seed-{number}", stage=stage, alpha_steps=3, **cells)
        if step == 50:
            for telemetry in sessions:
                telemetry.validation(loss=0.25, accuracy=0.75)
                with telemetry.phase("checkpoint"):
                    time.sleep(0.2)
        time.sleep(0.05)
    SESSIONS.extend(sessions)


SESSIONS: list[Any] = []


def _lively(folder: Path, text: str) -> Path:
    """A configuration that scrapes each second."""
    path = folder / "lively.yml"
    path.write_text(text.replace("scrape_interval: 15s", "scrape_interval: 1s"), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[OURS, STOCK], ids=["ours", "stock"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Ours: trainer, collector, Prometheus and gateway as shipped. Stock: a Prometheus that knows nothing of us."""
    folder = tmp_path_factory.mktemp("stack")
    with pytest.MonkeyPatch.context() as environment, RunningGateway() as gateway:
        if request.param is OURS:
            agent = Collector(folder / "agent", ESPER_GATEWAY=gateway.grpc)
            targets = {8888: f"127.0.0.1:{agent.metrics_port}", 4328: gateway.http}
            text = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
            prometheus = Prometheus(folder / "prometheus", _lively(folder, text), targets)
            agent.variables["ESPER_PROMETHEUS_OTLP"] = prometheus.otlp
            environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{agent.grpc}")
        else:
            agent = None
            prometheus = Prometheus(folder / "prometheus", _lively(folder, "global: {scrape_interval: 15s}\n"))
            environment.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{prometheus.otlp}/v1/metrics")
            environment.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        with prometheus:
            if agent is not None:
                agent.start()
            try:
                train(RUN)
                if agent is not None:
                    with TamiyoClient(gateway.grpc) as client:
                        until("the gateway has it", lambda: client.pull(RUN))
                name = request.param.name("esper.global_step")
                until("the last step is there", lambda: _newest(prometheus, name) == {str(STEPS)})
                counted = request.param.name("esper.values.nonfinite")
                until("the health metrics are there", lambda: _newest(prometheus, counted) == {"1"})
                time.sleep(3)  # a few scrapes
                yield Stack(prometheus, request.param)
            finally:
                for telemetry in SESSIONS:
                    telemetry.close(timeout_s=1)
                SESSIONS.clear()
                if agent is not None:
                    agent.end()


def _newest(prometheus: Prometheus, name: str) -> set[str]:
    return {series["value"][1] for series in prometheus.query(name)}


def panels(naming: Naming) -> list[tuple[str, dict[str, Any]]]:
    """Every panel of every dashboard, with the dashboard's name."""
    found = []
    folder = ROOT / "deploy" / "grafana" / naming.folder / "dashboards"
    for file in sorted(folder.glob("*.json")):
        board = json.loads(file.read_text(encoding="utf-8"))
        found += [(board["title"], panel) for panel in board["panels"] if panel["type"] != "row"]
    return found


def filled(expression: str) -> str:
    """An expression as Grafana sends it, with everything chosen."""
    values = {"run": RUN, "rank": ".*", "seed": ".*", "__range_ms": "600000", "__range": "600s", "__interval": "5s"}
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    assert not re.search(r"\$[a-z_]", expression), expression
    return expression


# What a healthy run does not have, and one without a GPU.
NOT_HERE = {"Steps dropped", "Temperature"}
NEEDS_THE_STACK = ("otelcol_", "esper_gateway_")


def test_every_panel_returns_what_was_recorded(stack: Stack) -> None:
    """No error, a series for each rank, numbers among them, and every label that a legend names."""
    now_s = time.time()
    checked = 0
    for title, panel in panels(stack.naming):
        for target in panel["targets"]:
            expression = filled(target["expr"])
            if stack.naming is STOCK and any(name in expression for name in NEEDS_THE_STACK):
                continue
            found = stack.prometheus.get("query_range", query=expression, start=now_s - 30, end=now_s, step=1)["result"]
            where = f"{title} / {panel['title']}: {expression}"
            if panel["title"] in NOT_HERE or "esper_gateway_kafka" in expression:  # of a tier on Kafka
                continue
            if "send_failed" in expression:
                continue  # there when it has failed
            assert found, where
            numbers = [float(value) for series in found for _, value in series["values"]]
            assert any(math.isfinite(number) for number in numbers), where
            for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
                assert all(label in series["metric"] for series in found), f"{where}: {label}"
            if "{{rank}}" in target.get("legendFormat", "") and "topk" not in expression:
                assert {series["metric"]["rank"] for series in found} == {"0", "1"}, where
            checked += 1
    assert checked > 40


def test_values_are_right_and_not_only_there(stack: Stack) -> None:
    """Some panels whose answer is known."""
    by_title = {panel["title"]: panel for _, panel in panels(stack.naming)}

    def last(title: str, target: int = 0) -> set[float]:
        found = stack.prometheus.query(filled(by_title[title]["targets"][target]["expr"]))
        return {round(float(series["value"][1]), 6) for series in found}

    assert last("Step") == {STEPS}
    assert last("Loss") == {1 / STEPS}
    assert last("Live seeds") == {3}
    assert last("NaN and infinite values") == {1}
    assert last("Validation") == {0.25}
    assert last("Stages") == {float(Stage.BLENDING)}
    assert last("Where a step's time goes", 0) == {5.0}
    assert [last("Where a step's time goes", place) for place in (1, 2, 3, 4, 5)] == [{4.0}] * 3 + [{0.5}] * 2
    assert last("Where a step's time goes", 6) == {20.0 - 3 * 4.0 - 2 * 0.5}
    assert all(0 <= age_s < patience(60) for age_s in last("Age of the last step"))


def test_each_rank_is_joined_with_its_experiment_its_host_and_its_device(stack: Stack) -> None:
    """On every dashboard, once."""
    found = [panel for _, panel in panels(stack.naming) if panel["title"] == "Who is it?"]
    assert len(found) == 5
    assert len({panel["targets"][0]["expr"] for panel in found}) == 1
    rows = stack.prometheus.query(filled(found[0]["targets"][0]["expr"]))
    said = {series["metric"]["esper_rank"]: series["metric"] for series in rows}
    assert len(rows) == len(said) == 2
    for rank, labels in said.items():
        assert labels["esper_run_id"] == RUN
        assert labels["esper_experiment_name"] == "digits"
        assert labels["host_name"] == socket.gethostname()
        assert labels["esper_parallel_dp"] == rank
        assert labels["esper_device_id"] == "cpu"
        assert labels["hw_model"]


def test_the_hours_add_up_to_the_time_range(stack: Stack) -> None:
    """Of each rank: its steps, its phases, and what lies between them."""
    (panel,) = [panel for _, panel in panels(stack.naming) if panel["title"] == "Where the hours went"]
    names = panel["transformations"][1]["options"]["renameByName"]
    parts: dict[str, dict[str, float]] = {"0": {}, "1": {}}
    for target in panel["targets"]:
        for series in stack.prometheus.query(filled(target["expr"])):
            parts[series["metric"]["rank"]][names[f"Value #{target['refId']}"]] = float(series["value"][1])
    for of_rank in parts.values():
        assert sum(of_rank.values()) == pytest.approx(600_000.0)
        assert of_rank["input wait"] == pytest.approx(STEPS * 5.0)
        assert of_rank["hooks"] == pytest.approx(STEPS * 2 * 0.5)
        assert of_rank["productive"] == pytest.approx(STEPS * (20.0 - 2 * 0.5))
        assert 200.0 <= of_rank["checkpoint"] < 1_000.0
        assert of_rank["evaluation"] == of_rank["other phases"] == 0.0
        assert of_rank["start up"] > 0.0


def test_variables_find_the_run_its_ranks_and_seeds(stack: Stack) -> None:
    """``label_values`` as Grafana asks it, with the expression that it takes the values from."""
    for file in (ROOT / "deploy" / "grafana" / stack.naming.folder / "dashboards").glob("*.json"):
        for variable in json.loads(file.read_text(encoding="utf-8"))["templating"]["list"]:
            if variable["type"] != "query":
                continue
            matched = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert matched is not None
            found = {s["metric"][matched[2]] for s in stack.prometheus.query(filled(matched[1]))}
            pattern = variable.get("regex") or "(.*)"
            found = {part[1] for part in (re.fullmatch(pattern, value) for value in found) if part}
            expected = {"run": {RUN}, "rank": {"0", "1"}, "seed": {"seed-0", "seed-1", "seed-2"}}
            assert found == expected[variable["name"]], variable["query"]


def test_stage_changes_are_marked(stack: Stack) -> None:
    """Three seeds of two ranks changed once, in the past minute or so."""
    board = json.loads((ROOT / "deploy" / "grafana" / stack.naming.folder / "dashboards" / "seeds.json").read_text())
    [annotation] = [each for each in board["annotations"]["list"] if each.get("name") == "stage"]
    now_s = time.time()
    query = filled(annotation["expr"])
    found = stack.prometheus.get("query_range", query=query, start=now_s - 120, end=now_s, step=1)["result"]
    assert {(s["metric"]["seed_id"], s["metric"]["rank"]) for s in found} == {
        (f"seed-{number}", rank) for number in range(3) for rank in ("0", "1")
    }


def test_events_of_the_run_are_marked_from_metrics(stack: Stack) -> None:
    """Without a store of logs: each rank has begun, and saved one checkpoint."""
    board = json.loads((ROOT / "deploy" / "grafana" / stack.naming.folder / "dashboards" / "run.json").read_text())
    queries = {each["name"]: filled(each["expr"]) for each in board["annotations"]["list"] if each.get("expr")}
    assert queries.keys() == {"started", "ended", "checkpoint", "signal", "stage"}
    now_s = time.time()

    def marked(name: str) -> list[str]:
        found = stack.prometheus.get("query_range", query=queries[name], start=now_s - 180, end=now_s, step=1)
        return sorted(series["metric"]["rank"] for series in found["result"])

    assert marked("started") == marked("checkpoint") == ["0", "1"]
    assert marked("signal") == [], "a Prometheus without our rules has no alerts"
    marked("ended")


@pytest.mark.parametrize("naming", [OURS, STOCK], ids=["ours", "stock"])
def test_each_panel_says_how_to_read_it_and_each_metric_has_one(naming: Naming) -> None:
    """Every metric of the schema stands on some panel."""
    asked = " ".join(target["expr"] for _, panel in panels(naming) for target in panel["targets"])
    for _, panel in panels(naming):
        assert len(panel.get("description", "")) > 10, panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    missing = [m.name for m in (*STEP_METRICS, *SEED_METRICS) if not re.search(rf"\b{naming.name(m.name)}\b", asked)]
    assert missing == []
