"""What the page asks a gateway that has received real telemetry, by real requests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from gateways import RunningGateway

import esper_otel
from esper_otel import EsperSettings, Stage

pytestmark = pytest.mark.own_code

TIMEOUT_S = 20


def ask(gateway: RunningGateway, what: str, **query: Any) -> Any:
    """The answer in strict JSON."""
    query = {name.rstrip("_"): value for name, value in query.items()}
    answer = requests.get(f"http://{gateway.http}/page/{what}", params=query, timeout=TIMEOUT_S)
    answer.raise_for_status()
    return json.loads(answer.text, parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """A gateway with the page and three runs: one has ended and was resumed, one failed, one goes on."""
    with RunningGateway("--ui") as gateway, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        settings = EsperSettings(export_every_s=0, probe_period_s=3600)
        for attempt, first in ((1, 1), (2, 41)):
            environment.setenv("ESPER_RUN_ATTEMPT", str(attempt))
            telemetry = esper_otel.start(
                run_id="resumed", experiment="digits", settings=settings, metrics=[esper_otel.Metric("tokens_per_s")]
            )
            for step in range(first, first + 60):
                with telemetry.step(epoch=step // 20, global_step=step) as now:
                    now.put(loss=math.nan if step == 30 else 2 / step, hook_latency_ms=60.0 if step == 50 else 1.0)
                    now.put(tokens_per_s=100.0)
                    now.seed("seed-1", stage=Stage.TRAINING if step < 20 else Stage.BLENDING, alpha=step / 200)
                if step == 60:
                    telemetry.validation(loss=0.5)
            telemetry.close(outcome="SIGTERM" if attempt == 1 else "completed")
        environment.delenv("ESPER_RUN_ATTEMPT")
        failed = esper_otel.start(run_id="failed", settings=settings)
        failed.record_step({"loss": math.inf}, epoch=0)
        failed.close(outcome="ValueError")
        going_on = esper_otel.start(run_id="going on", settings=settings)
        going_on.record_step({"loss": 1.0}, epoch=0)
        while len(ask(gateway, "runs")["runs"]) < 3:
            pass
        while (answer := ask(gateway, "metrics", run="resumed"))["read"] < answer["stored"]:
            pass  # a slow machine reads it in several parts
        yield gateway
        going_on.close()


def test_a_run_has_a_row_with_all_that_is_known_of_it(gateway: RunningGateway) -> None:
    answer = ask(gateway, "runs")
    rows = {row["run_id"]: row for row in answer["runs"]}
    assert answer["is_all"]
    assert {name: row["state"] for name, row in rows.items()} == {
        "resumed": "completed",
        "failed": "failed",
        "going on": "live",
    }
    row = rows["resumed"]
    assert (row["first_step"], row["last_step"], row["steps_stored"]) == (1, 100, 120)
    assert row["last_loss"] == pytest.approx(0.02)
    assert (row["validation_loss"], row["validation_loss_is"]) == (0.5, "")
    assert [(each["state"], each["outcome"], each["resumed"]) for each in row["attempts"]] == [
        ("killed", "SIGTERM", False),
        ("completed", "completed", True),
    ]
    assert [(each["rank"], each["state"], each["last_step"]) for each in row["ranks"]] == [(0, "completed", 100)]
    assert row["experiment"] == "digits"
    assert row["host"]
    assert len(row["revision"]) in {40, 64}  # the tests run in a checkout
    assert row["start_ms"] < row["last_ms"]
    assert row["received_ms"] > row["start_ms"] - 60_000
    assert (rows["failed"]["last_loss"], rows["failed"]["last_loss_is"]) == (None, "+Inf")
    again = ask(gateway, "runs", since=answer["cursor"])
    assert (again["runs"], again["gone"], again["is_all"]) == ([], [], False)
    assert len(ask(gateway, "runs", since="x:1")["runs"]) == 3


def test_every_metric_that_was_recorded_is_listed_in_its_group(gateway: RunningGateway) -> None:
    answer = ask(gateway, "metrics", run="resumed")
    groups = {each["name"]: each["group"] for each in answer["metrics"]}
    assert groups["loss"] == groups["loss_ewma"] == groups["esper.validation.loss"] == "learning"
    assert groups["tokens_per_s"] == "throughput"
    assert groups["step_latency_ms"] == groups["hook_latency_ms"] == "time"
    assert groups["kasmina.seed.alpha"] == "seeds"
    assert not {"esper.frame.points", "esper.global_step", "accuracy"} & groups.keys()
    loss = next(each for each in answer["metrics"] if each["name"] == "loss")
    assert (loss["unit"], loss["source"], loss["level"]) == ("loss", "schema", "step")
    assert ask(gateway, "metrics", run="resumed", since=answer["cursor"])["is_same"]


def test_a_resumed_run_is_one_curve_with_a_seam(gateway: RunningGateway) -> None:
    answer = ask(gateway, "series", run="resumed", metrics="loss,esper.validation.loss")
    assert [(each["why"], each["first_step"], each["last_step"], each["number"]) for each in answer["segments"]] == [
        ("start", 1, 60, 1),
        ("resumed", 41, 100, 2),
    ]
    columns = answer["columns"]
    once = [step for step, again in zip(columns["step"], columns["is_again"], strict=True) if not again]
    assert once == [*range(1, 101)]
    assert (answer["width"], answer["is_thinned"], answer["read"], answer["stored"]) == (1, False, 120, 120)
    loss = answer["metrics"]["loss"]
    assert loss["odd"] == [[29, 1, 0, 0, 30]]
    assert loss["last"][29] is None
    assert "min" not in loss
    assert answer["metrics"]["esper.validation.loss"]["last"][:60] == [None] * 60
    assert columns["elapsed_s"][0] == 0
    again = ask(gateway, "series", run="resumed", metrics="loss,esper.validation.loss", since=answer["cursor"])
    assert (again["keep"], again["columns"]) == (120, {})


def test_few_rows_show_where_a_value_is_not_finite(gateway: RunningGateway) -> None:
    answer = ask(gateway, "series", run="resumed", buckets=10, metrics="loss")
    assert len(answer["columns"]["step"]) <= 10
    assert answer["is_thinned"]
    loss = answer["metrics"]["loss"]
    assert max(filter(None, loss["max"])) == 2.0
    assert [odd[1:] for odd in loss["odd"]] == [[1, 0, 0, 30]]
    some = ask(gateway, "series", run="resumed", buckets=10, metrics="loss", from_=28, to=32)
    assert some["columns"]["step"] == [28, 29, 30, 31, 32]
    assert (some["first_step"], some["last_step"]) == (1, 100)


def test_seeds_are_intervals_and_signals_are_episodes(gateway: RunningGateway) -> None:
    answer = ask(gateway, "seeds", run="resumed")
    first, second = answer["seeds"]
    assert first["stages"] == [[1, 19, int(Stage.TRAINING)], [20, 60, int(Stage.BLENDING)]]
    assert second["stages"] == [[41, None, int(Stage.BLENDING)]]
    assert first["alpha"][0] == [1, 0.005]
    assert ask(gateway, "seeds", run="resumed", since=answer["cursor"])["seeds"] == []
    signals = ask(gateway, "signals", run="resumed")
    hooks = [each for each in signals["episodes"] if each["name"] == "hook_budget"]
    assert [(each["attempt"], each["first_step"], each["times"], each["worst"]) for each in hooks] == [
        (1, 50, 1, 60.0),
        (2, 50, 1, 60.0),
    ]
    assert ask(gateway, "signals", run="resumed", since=signals["cursor"])["is_same"]


def test_ranks_are_compared_step_by_step(gateway: RunningGateway) -> None:
    answer = ask(gateway, "ranks", run="resumed")
    assert (answer["attempt"], answer["ranks"], answer["slowest"]) == (2, [0], None)
    assert answer["steps"][0] == [41, 41]
    assert len(answer["step_ms"][0]) == 60
    assert all(value > 0 for value in answer["step_ms"][0])


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("series", 400),
        ("series?run=nobody", 404),
        ("series?run=resumed&rank=7", 404),
        ("series?run=resumed&rank=-1", 400),
        ("series?run=resumed&buckets=9", 400),
        ("series?run=resumed&buckets=4001", 400),
        ("series?run=resumed&from=5&to=4", 400),
        ("series?run=resumed&from=1e3", 400),
        ("series?run=resumed&to=99999999999999999999", 400),
        ("series?run=resumed&since=%00:1:2:3", 200),
        ("series?run=resumed&metrics=nothing,%2C", 200),
        ("metrics?run=", 400),
        ("seeds?run=resumed&since=::", 200),
        ("ranks?run=nobody", 404),
        ("steps?run=resumed", 404),
    ],
)
def test_a_wrong_question_is_refused(gateway: RunningGateway, what: str, status: int) -> None:
    assert requests.get(f"http://{gateway.http}/page/{what}", timeout=TIMEOUT_S).status_code == status


def test_only_this_machine_is_answered(gateway: RunningGateway) -> None:
    for what in ("runs", "series?run=resumed", "metrics?run=resumed", "seeds?run=resumed", "ranks?run=resumed"):
        url = f"http://{gateway.http}/page/{what}"
        assert requests.get(url, headers={"host": "evil.example"}, timeout=TIMEOUT_S).status_code == 403
        answer = requests.get(url, timeout=TIMEOUT_S)
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
