"""What stands in the page of a report besides its findings."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gateways import RunningGateway
from programs import until

import esper_otel
from esper_otel import EsperSettings
from esper_otel.pull.client import TamiyoClient
from esper_otel.pull.views import RankInfo, RunRanks
from esper_otel.report.findings import compared, findings
from esper_otel.report.page import is_page, page
from esper_otel.report.recording import Recording, StepRow, of_file, of_gateway

pytestmark = pytest.mark.own_code


def data_of(html: str) -> dict[str, Any]:
    """What the charts draw."""
    [text] = re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def recording(name: str, **values: float) -> Recording:
    rows = tuple(StepRow(step, 0, 1.7e9 + step, {"loss": 1.0 / step, **values}, {}) for step in range(1, 5_001))
    return Recording(name, 0, 1, "completed", rows, name)


def test_host_settings_and_date_of_a_black_box_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    settings = EsperSettings(black_box_dir=tmp_path, black_box_frames=8, probe_period_s=77.0)
    with contextlib.suppress(KeyError), esper_otel.start(run_id="run", settings=settings) as telemetry:
        with telemetry.step(epoch=0) as now:
            now.put(loss=1.0)
        raise KeyError
    deadline_s = time.monotonic() + 20
    while not (boxes := list(tmp_path.glob("*.esper.steps"))):  # close() waits for it for a second only
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    [box] = boxes
    html = page(of_file(box))
    assert f"host {socket.gethostname()}" in html
    assert "settings black_box_frames = 8, probe_period_s = 77.0" in html
    assert str(tmp_path) not in html
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d to", html)


def test_only_what_was_recorded_is_drawn_and_the_other_run_is_named() -> None:
    """Both runs in each chart, thinned; what only the other has is there too."""
    html = page(recording("one"), recording("two", accuracy=0.5))
    data = data_of(html)
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    assert [metric["name"] for metric in data["metrics"]] == ["loss", "accuracy"]
    assert "accuracy" not in data["runs"][0]["series"]["metrics"]
    assert len(data["runs"][0]["series"]["columns"]["step"]) <= 2_000
    for words in ("<h2>one</h2>", "<h2>two</h2>", "The last steps of one", "The last steps of two"):
        assert words in html


def test_a_page_of_an_older_version_is_still_ours(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        'content="x"><meta name="esper-otel-report" content="box"><title>run</title>',
        encoding="utf-8",
    )
    assert is_page(tmp_path / "old.html")
    (tmp_path / "new.html").write_text(page(recording("one")), encoding="utf-8")
    assert is_page(tmp_path / "new.html", recording("one"))
    assert not is_page(tmp_path / "new.html", recording("two"))


def test_a_run_from_a_gateway_has_the_names_of_the_live_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets have other keys for some values, and repeat the loss. The validation loss says which run is better."""
    with RunningGateway() as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        for run_id, attempt, loss in (("one", 1, 0.5), ("two", 1, 0.125), ("two", 2, 0.25)):
            settings = EsperSettings(probe_period_s=3600)
            monkeypatch.setenv("ESPER_RUN_ATTEMPT", str(attempt))
            with esper_otel.start(run_id=run_id, world_size=2, rank=1, settings=settings) as telemetry:
                for _ in range(4):
                    telemetry.validation(loss=loss)
                    with telemetry.step(epoch=0) as now:
                        now.put(loss=1.0, optimizer_lr=0.1)
        with TamiyoClient(gateway.grpc) as client:
            one, two = (of_gateway(client, run_id, 1) for run_id in ("one", "two"))
    resumed = page(two)
    [run] = data_of(resumed)["runs"]
    assert [(each["number"], each["why"]) for each in run["series"]["segments"]] == [(1, "start"), (2, "resumed")]
    assert run["series"]["columns"]["step"] == [1, 2, 3, 4] * 2
    assert run["series"]["columns"]["is_again"] == [1] * 4 + [0] * 4
    assert run["series"]["metrics"]["esper.validation.loss"]["last"] == [0.125] * 4 + [0.25] * 4
    for words in (
        f"host {socket.gethostname()}",
        "settings black_box_frames = 0, probe_period_s = 3600.0",
        "revision ",
    ):
        assert words in resumed
    assert "attempt 2, the newest of 2, rank 1 of 2" in resumed
    assert "this is attempt 2, and the charts have those before. Steps 1 to 4 of rank 1 of 2 were" in resumed
    drawn = {metric["name"] for metric in data_of(page(one, two))["metrics"]}
    assert {"loss", "esper.validation.loss", "esper.optimizer.lr"} <= drawn
    assert not drawn & {"training_loss", "esper.training.loss", "validation_loss", "optimizer_lr"}
    [found] = compared(one, two)
    assert "esper.validation.loss at the end: 0.5, compared with 0.25 (worse)" in found.answer


def test_a_run_from_a_gateway_has_what_its_black_box_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, throughput and the parts of a step have no place in packets; controllers are not sent them either.

    Both say on which device it ran, in which units its own metrics are, and what happened.
    """
    names = {"esper.memory.process_gb", "esper.tokens_per_s", "esper.forward_ms", "esper.validation.accuracy"}
    settings = EsperSettings(black_box_dir=tmp_path, black_box_frames=8, export_every_s=0)

    def step() -> bool:
        with telemetry.step(epoch=0, samples=4, tokens=100) as now, now.part("forward"):
            now.put({"loss": 1.0, "my.speed": 2.0})
        return "esper.memory.process_gb" in telemetry.pull()[-1].names

    with RunningGateway() as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
        monkeypatch.setenv("LOCAL_RANK", "0")
        own = [esper_otel.Metric("my.speed", unit="m/s")]
        telemetry = esper_otel.start(run_id="boxed", settings=settings, metrics=own, device="cpu")
        telemetry.validation(loss=1.0, accuracy=0.5)
        with telemetry.phase("checkpoint"):
            pass
        until("the memory is known", step)
        telemetry.close(outcome="KeyError")
        [box] = until("the black box is written", lambda: list(tmp_path.glob("*.esper.steps")))
        with TamiyoClient(gateway.grpc) as client:
            assert not any(packets.values for packets in client.pull("boxed"))
            until("the device is described", lambda: client.runs("boxed")[0].device.endswith(", cpu"))
            from_gateway = of_gateway(client, "boxed", 0)
            with_values = client.pull("boxed", values=True)
            assert list(with_values) == list(client.pull("boxed"))
    from_box = of_file(box)
    for name in ("device", "host", "location"):
        assert dict(from_box.about)[name] == dict(from_gateway.about)[name]
    assert dict(from_box.about)["location"] == "local rank 0"
    assert dict(from_box.units) == dict(from_gateway.units) == {"my.speed": "m/s"}
    units = {metric["name"]: metric["unit"] for metric in data_of(page(from_box))["metrics"]}
    assert units["my.speed"] == "m/s"
    assert [event.name for event in from_box.events] == ["esper.run.started", "esper.checkpoint"]
    assert from_gateway.events[:2] == from_box.events
    boxed = from_box.rows
    for row, mine in zip(boxed, from_gateway.rows[-len(boxed) :], strict=True):
        known = {name: value for name, value in row.values.items() if name not in {"esper.global_step", "esper.epoch"}}
        assert mine.values == pytest.approx(known, rel=1e-6)
    assert names <= {name for row in from_gateway.rows for name in row.values}
    assert names <= {name for packets in with_values for name in packets.values}


def test_a_loss_that_is_too_large_for_a_packet_has_gone_wrong() -> None:
    """It is a signal, too: nothing says that every loss is finite."""
    [first_bad] = [each for each in findings(recording("large", loss=1e308)) if "wrong first" in each.question]
    assert first_bad.answer == "Step 1 (epoch 0): the loss is 1e+308, which is too large for a packet."


def test_the_slow_rank_is_named_with_the_ranks_that_wait_for_it() -> None:
    ranks = tuple(RankInfo(rank, 20.0, 2.0, 22.0 + 8 * (rank == 3), 4.0) for rank in range(4))
    compared_ranks = RunRanks(1, 4, 50, 1, 50, ranks, 8.0, 8.0, 3, "input_wait_ms")
    [found] = [each for each in findings(replace(recording("ranks"), ranks=compared_ranks)) if "rank" in each.question]
    assert found.answer == (
        "Rank 3, most of all in input_wait_ms: a step and its wait take 30 ms, and 22 ms on the others, over steps "
        "1 to 50 of all ranks that are known (4)."
    )


def test_a_few_very_quick_steps_do_not_outweigh_the_others() -> None:
    """As where a busy machine lets some steps through at once: the mean of the rates would be 30 times too high."""

    def with_rates(name: str, rates: list[float]) -> Recording:
        rows = (StepRow(step, 0, float(step), {"samples_per_s": rate}, {}) for step, rate in enumerate(rates, 1))
        return Recording(name, 0, 1, "completed", tuple(rows), name)

    one, two = with_rates("one", ([1000.0] * 9 + [300_000.0]) * 10), with_rates("two", [1200.0] * 100)
    [found] = compared(one, two)
    assert "samples_per_s at the end: 1111, compared with 1200 (worse)" in found.answer
