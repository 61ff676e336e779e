"""The black box and its report: a run that went wrong, read by someone who was not there."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import signal
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import warm
from gateways import RunningGateway
from hypothesis import given
from programs import until

import esper_otel
from esper_otel import ConfigurationError, EsperSettings, Stage
from esper_otel.cli import main
from esper_otel.frames import black_box
from esper_otel.report.findings import compared, findings
from esper_otel.report.page import page
from esper_otel.report.recording import Recording, StepRow, of_file

pytestmark = pytest.mark.lengthy

STEPS = 300


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("ESPER_BLACK_BOX_DIR", str(tmp_path / "box"))
    monkeypatch.delenv("ESPER_BLACK_BOX_FRAMES")
    return tmp_path / "box"


def diverging(run_id: str, *, steps: int = STEPS, nan_at: int | None = STEPS, raises: bool = False) -> None:
    """The gradient norm grows after a seed went to BLENDING, then the loss is NaN."""
    with esper_otel.start(run_id=run_id) as telemetry:
        for step in range(1, steps + 1):
            near = nan_at is not None and step >= nan_at - 5
            with telemetry.step(epoch=step // 100, samples=8) as now:
                loss = math.nan if nan_at is not None and step >= nan_at else 2.0 * 0.99**step
                now.put(loss=loss, gradient_norm=40.0 if near else 1.0, input_wait_ms=5.0, step_latency_ms=20.0)
                now.put(hook_latency_ms=2.0)
                stage = Stage.BLENDING if near else Stage.TRAINING
                now.seed("seed-3", stage=stage, alpha=0.5, isolation_violations=float(near))
                now.seed("seed-4", stage=Stage.TRAINING)
        if raises:
            raise KeyError(run_id)


def only(folder: Path) -> Path:
    [path] = until("it is written", lambda: list(folder.glob(f"*{black_box.SUFFIX}")))
    return Path(path)


def test_a_loss_that_is_nan_is_written_with_the_steps_before_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """256 of them, exactly as recorded; the log says where. Once for a session."""
    caplog.set_level("INFO")
    with esper_otel.start(run_id="a/b c") as telemetry:
        for step in range(1, STEPS + 1):
            with telemetry.step(epoch=0) as now:
                now.put(loss=math.nan if step == STEPS else 1.0, accuracy=math.inf)
                now.seed("seed-1", alpha=step / STEPS)
        path = only(folder)
        telemetry.record_step({"loss": math.nan}, epoch=0)
    assert only(folder) == path
    assert path.stat().st_mode & 0o777 == 0o600
    about, frames, damage, is_torn = black_box.read(path)
    assert (damage, is_torn) == ([], False)
    assert (about["run_id"], about["rank"], about["reason"]) == ("a/b c", 0, "loss not finite")
    assert [frame.global_step for frame in frames] == [*range(STEPS - 255, STEPS + 1)]
    assert math.isnan(frames[-1].values()["loss"])
    assert frames[0].values()["accuracy"] == math.inf
    assert "gradient_norm" not in frames[0].values()
    assert dict(frames[-1].seeds.rows()) == {"seed-1": {"alpha": 1.0}}
    assert {frame.values()["esper.seeds"] for frame in frames} == {1.0}
    assert json.loads(path.read_bytes().partition(b"\n")[0].partition(b"{")[2].join((b"{", b""))) == about
    assert str(path) in caplog.text


@pytest.mark.parametrize(("ends", "reason"), [("raise KeyError(1)", "KeyError"), ("kill", "SIGTERM"), ("pass", None)])
def test_an_exception_and_sigterm_are_written_and_a_good_end_is_not(
    folder: Path, ends: str, reason: str | None
) -> None:
    script = (
        "import os, signal, time, esper_otel\n"
        "telemetry = esper_otel.start(run_id='run')\n"
        "for step in range(300): telemetry.record_step({'loss': 1.0}, epoch=0)\n"
        + ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\n" if ends == "kill" else f"{ends}\n")
    )
    done = warm.run("-c", script, imported=warm.PACKAGE)
    assert done.returncode == {"KeyError": 1, "SIGTERM": -signal.SIGTERM, None: 0}[reason]
    if reason is None:
        assert not folder.exists()
        return
    path = only(folder)
    content = black_box.read(path)
    assert (content.about["reason"], len(content.frames)) == (reason, 256)
    assert f"esper_otel black box: {reason}; the last 256 steps are in {path}" in done.stderr


def test_it_can_be_switched_off_and_a_folder_that_cannot_be_written_harms_nobody(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for settings in (EsperSettings(black_box_frames=0), EsperSettings(black_box_dir=tmp_path / "file" / "sub")):
        with esper_otel.start(run_id="run", settings=settings) as telemetry:
            telemetry.record_step({"loss": math.nan}, epoch=0)
    until("it is said", lambda: "black box could not be written" in caplog.text)
    assert not folder.exists()


def test_the_folder_for_temporary_files_is_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else's folder under that name is not used."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.delenv("ESPER_BLACK_BOX_FRAMES")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ours = tmp_path / f"esper-otel-{os.getuid()}"
    with esper_otel.start(run_id="run") as telemetry:
        telemetry.record_step({"loss": math.nan}, epoch=0)
        only(ours)
    assert ours.stat().st_mode & 0o777 == 0o700
    ours.rename(tmp_path / "elsewhere")
    ours.symlink_to(tmp_path / "elsewhere")
    with esper_otel.start(run_id="other") as telemetry:
        telemetry.record_step({"loss": math.nan}, epoch=0)
        until("it is said", lambda: "is not ours" in caplog.text)


def answers(recording: Recording) -> dict[str, str]:
    return {finding.question: finding.answer for finding in findings(recording)}


def test_the_report_says_what_went_wrong_where_the_time_goes_and_which_seed(folder: Path) -> None:
    with pytest.raises(KeyError):
        diverging("wrong", raises=True)
    until("both are written", lambda: len(list(folder.glob(f"*{black_box.SUFFIX}"))) == 2)
    found = answers(of_file(next(folder.glob("*KeyError*"))))
    assert found["How did it end?"].endswith("The run ended: KeyError.")
    assert f"Step {STEPS} (epoch 3): the loss is nan." in found["Which step went wrong first?"]
    assert "gradient_norm was 40 in the step before, 40 times its usual value" in found["Which step went wrong first?"]
    assert (
        "Mostly into rest (72%). Means per step: input wait 5 ms, hook 2 ms, rest 18 ms."
        in found["Where does the time go?"]
    )
    seed = found["Which seed is in trouble?"]
    assert "seed-3 violated gradient isolation 1 times." in seed
    assert f"seed-3 changed to BLENDING in step {STEPS - 5}, 5 steps before the run went wrong." in seed
    assert "seed-4" not in seed


def test_the_command_writes_a_page_and_tables(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file that needs nothing else; NaN and missing apart, in CSV and in Parquet."""
    diverging("<one>")
    first = only(folder)
    diverging("two", nan_at=290)
    [second] = until("the other is written", lambda: list(folder.glob(f"*two*{black_box.SUFFIX}")))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(first), "--vs", str(second), "--csv", "t.csv", "--parquet", "t.parquet"]) == 0
    out = capsys.readouterr().out
    assert "How does it compare with two?" in out
    assert "Which step went wrong first?" in out
    page = (tmp_path / "<one>.html").read_text(encoding="utf-8")
    assert "&lt;one&gt;" in page
    assert "<one>" not in page
    written = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)  # their policy binds them
    assert not re.search(r"(src|href)=|@import|url\(", written)
    assert len(drawn(page)["metrics"]) >= 4
    table = pd.read_parquet("t.parquet")
    steps = table[table["seed_id"] == ""].set_index("step")
    assert len(steps) == 256
    assert bool(steps["loss"].isna().loc[STEPS])
    assert steps.loc[STEPS - 1, "loss"] == pytest.approx(2.0 * 0.99 ** (STEPS - 1))
    with Path("t.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["seed_id"]]
    assert rows[-1]["loss"] == "nan"
    assert rows[-1].get("accuracy", "") == ""
    assert len(table[table["seed_id"] == "seed-3"]) == 256


def test_a_run_at_a_gateway_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunningGateway() as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        for run_id in ("one", "two"):
            diverging(run_id, steps=60, nan_at=60 if run_id == "one" else None)
        assert main(["report", "one", "--vs", "two", "--target", gateway.grpc]) == 0
    out = capsys.readouterr().out
    assert "Step 60 (epoch 0): the loss is nan." in out
    assert "60 steps are in both runs, from 1 to 60." in out
    assert "The run ended: completed." in out
    assert (tmp_path / "one.html").is_file()


def test_a_report_from_a_gateway_tells_infinity_from_nan_and_one_rank_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A packet has no numbers that are not finite: its events say what they were."""
    monkeypatch.chdir(tmp_path)
    tokens = esper_otel.Metric("tokens_per_s", unit="rate")
    with RunningGateway() as gateway:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
        for rank in (0, 1):
            with esper_otel.start(run_id="wide", rank=rank, world_size=2, metrics=[tokens]) as telemetry:
                telemetry.record_step({"loss": 1.0 - rank}, epoch=0)
                with contextlib.suppress(KeyError), telemetry.step(epoch=0) as now:
                    now.put(loss=math.inf if rank else 0.5, accuracy=-math.inf, tokens_per_s=math.inf)
                    now.seed("seed-1", stage=Stage.TRAINING, alpha=-math.inf)
                    raise KeyError
            assert main(["report", "wide", f"--rank={rank}", "--target", gateway.grpc, "--csv", f"{rank}.csv"]) == 0
    said = capsys.readouterr().out
    assert "Step 2 (epoch 0): it raised an exception." in said
    assert "Step 2 (epoch 0): the loss is inf; not finite either: accuracy, tokens_per_s." in said
    assert (tmp_path / "wide.html").is_file()
    assert (tmp_path / "wide-rank-1.html").is_file()
    with Path("0.csv").open(encoding="utf-8") as file:
        *_, step, seed = csv.DictReader(file)
    assert (step["accuracy"], step["tokens_per_s"], seed["seed.alpha"]) == ("-inf", "inf", "-inf")


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xe5\x9e\x0f3 broken"])
def test_what_is_no_black_box_is_said(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"x{black_box.SUFFIX}"
    path.write_bytes(content)
    assert main(["report", str(path)]) == 2
    assert "is not a black box of esper_otel" in capsys.readouterr().err
    with pytest.raises(ConfigurationError):
        black_box.read(path)
    assert main(["report", str(tmp_path / "missing.esper.steps")]) == 2
    assert os.environ["ESPER_BLACK_BOX_FRAMES"] == "0"


def test_a_run_without_anything_wrong_says_so(tmp_path: Path) -> None:
    assert "No step was recorded." in answers(recorded([])).values()


# -- what the report says of runs that are made up -------------------------------------------------------


def recorded(steps: list[dict[str, float]], run_id: str = "run", **others: Any) -> Recording:
    """A recording of steps from 1 on, with these values."""
    rows = tuple(StepRow(step, 0, float(step), values, {}) for step, values in enumerate(steps, 1))
    return replace(Recording(run_id, 0, 1, "completed", rows, run_id), **others)


def noisy(steps: int, **values: float) -> list[dict[str, float]]:
    """Steps of a run that goes well: the loss falls, with the noise of small batches."""
    rng = np.random.default_rng(7)
    losses = 1.0 + 5.0 * np.exp(-np.arange(steps) / 30) + rng.normal(0, 0.3, steps)
    return [{"loss": float(loss), **values} for loss in losses]


def with_step(steps: list[dict[str, float]], number: int, **values: float) -> list[dict[str, float]]:
    """The steps, one of them with other values."""
    return [step | values if place == number else step for place, step in enumerate(steps, 1)]


HEALTHY = {
    "a busy CPU": noisy(300, cpu_util_percent=99.0),
    "a CPU that gets busy": noisy(100) + noisy(200, cpu_util_percent=99.0)[100:],
    "slow steps": noisy(300, step_latency_ms=800.0),
    "steps around the limit": [s | {"step_latency_ms": 110.0 + i % 20} for i, s in enumerate(noisy(300))],
    "a first step that compiles": with_step(noisy(300, step_latency_ms=50.0), 1, step_latency_ms=9000.0),
    "a controller that takes long": noisy(300, hook_latency_ms=75.0, step_latency_ms=90.0),
    "a device that is used up": noisy(300, gpu_util_percent=100.0, gpu_mem_free_gb=0.1),
    "losses with noise": noisy(3000),
}


@pytest.mark.parametrize("steps", HEALTHY.values(), ids=list(HEALTHY))
def test_what_a_healthy_run_does_all_along_is_not_what_went_wrong(steps: list[dict[str, float]]) -> None:
    assert answers(recorded(steps))["Which step went wrong first?"].startswith("None:")
    assert "went wrong" not in page(recorded(steps)).partition("</dl>")[2]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"loss": 20.0}, "loss_spike: loss step"),
        ({"loss": math.inf}, "the loss is inf"),
        ({"hook_latency_ms": 60.0}, "hook_budget: hook_latency_ms 60 above 50"),
        ({"step_latency_ms": 900.0}, "step_latency_high: step_latency_ms 900 above 120"),
        ({"esper.isolation.violations": 2.0}, "isolation_violations: kasmina.isolation.violations 2 above 0"),
        ({"kasmina.isolation.violations": 2.0}, "isolation_violations: kasmina.isolation.violations 2 above 0"),
        ({"gpu_mem_free_gb": 0.1}, "device_pressure_high: gpu_util_percent 99 from 95, gpu_mem_free_gb 0.1 up to 0.2"),
        ({"esper.step.failed": 1.0}, "it raised an exception"),
    ],
)
def test_the_first_step_that_is_unlike_those_before_went_wrong(values: dict[str, float], why: str) -> None:
    """In a black box, which has the catalogue's names, as in a recording from a gateway; a busy CPU hides nothing."""
    steps = noisy(
        300,
        hook_latency_ms=1.0,
        step_latency_ms=60.0,
        gpu_util_percent=99.0,
        gpu_mem_free_gb=4.0,
        cpu_util_percent=99.0,
    )
    found = answers(recorded(with_step(steps, 200, **values)))["Which step went wrong first?"]
    assert found.startswith(f"Step 200 (epoch 0): {why}")


def drawn(html: str) -> dict[str, Any]:
    """What the charts of a page draw."""
    [text] = re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_signal_is_one_line_of_the_report_and_a_busy_cpu_is_a_note_where_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The most serious ones first."""
    steps = noisy(400, cpu_util_percent=20.0)
    for step in range(12, 341):
        steps = with_step(steps, step, loss=1.0, cpu_util_percent=100.0)
    steps = [step | {"loss": 1.0} for step in with_step(steps, 350, hook_latency_ms=60.0)]
    cpu = "cpu_pressure_high, steps 12 to 340, worst 100"
    for others, cpu_line in (
        ({}, f"note: {cpu}"),
        ({"device": "cpu"}, f"note: {cpu}"),
        ({"device": "cuda"}, "high: " + cpu),
    ):
        recording = recorded(steps, **others)
        [lines] = [each.lines for each in findings(recording) if each.question == "Which risk signals were raised?"]
        assert sorted(lines) == sorted(["high: hook_budget, step 350, worst 60", cpu_line])
        assert lines[0].startswith("high")
        assert f"<br>{cpu_line}" in page(recording)
    monkeypatch.setattr("esper_otel.report.command._recording", lambda *_: recorded(steps))
    assert main(["report", "run", "--html", str(tmp_path / "run.html")]) == 0
    assert f"\n  note: {cpu}\n" in capsys.readouterr().out


def test_a_report_lists_few_of_very_many_episodes() -> None:
    steps = [{"loss": 1.0, "hook_latency_ms": 60.0 * (step % 20 == 0)} for step in range(1, 2001)]
    [found] = [each for each in findings(recorded(steps)) if each.question == "Which risk signals were raised?"]
    assert found.answer == "Episodes: 100 high."
    assert len(found.lines) == 21
    assert found.lines[-1] == "and 80 more"
    [none] = [each for each in findings(recorded(steps[:10])) if each.question == "Which risk signals were raised?"]
    assert none == ("Which risk signals were raised?", "None.", False, None, ())


def test_marks_of_what_is_not_finite_say_whose_they_are_and_where() -> None:
    """How often, and in which step first, also of so many steps that not all are drawn."""
    one = noisy(4000)
    for number in (*range(1001, 1006), 3000):
        one = with_step(one, number, loss=math.nan)
    two = with_step(noisy(4000), 2500, loss=math.inf)
    del one[2999 - 1]["loss"]  # a step without a loss beside one whose loss is NaN
    data = drawn(page(recorded(one, "one"), recorded(two, "two")))
    odd = {run["name"]: run["series"]["metrics"]["loss"]["odd"] for run in data["runs"]}
    assert sum(nan for _, nan, up, down, _ in odd["one"]) == 6
    assert {step for *_, step in odd["one"]} >= {1001, 3000}
    assert [(nan, up, down, step) for _, nan, up, down, step in odd["two"]] == [(0, 1, 0, 2500)]
    assert data["marks"] == [{"step": 1001, "text": "one: step 1001 went wrong"}]
    assert drawn(page(recorded(one, "one")))["marks"] == [{"step": 1001, "text": "step 1001 went wrong"}]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"rank": 1}, "run, rank 1"),
        ({"attempt": 2}, "run, attempt 2"),
        ({"ended": "KeyError"}, "run, KeyError"),
        ({}, "run, the second"),
    ],
)
def test_a_run_that_is_compared_with_itself_has_two_names(other: dict[str, Any], name: str) -> None:
    """Ranks, attempts and black boxes of one run."""
    html = page(recorded(noisy(20)), recorded(noisy(20), **other))
    assert [run["name"] for run in drawn(html)["runs"]][1] == name
    assert f"How does it compare with {name}?" in html


def answer(one: list[dict[str, float]], other: list[dict[str, float]]) -> str:
    """How the two compare, in words."""
    [found] = compared(recorded(one), recorded(other, name="other"))
    return found.answer


def test_what_is_not_finite_in_the_other_run_is_said() -> None:
    """Of each metric how often and where first; and no value is called one of the end that is not."""
    one, other = noisy(100), noisy(100)
    assert "not finite" not in answer(one, other)
    other[49]["loss"] = math.nan
    said = answer(one, other)
    assert "Values of other that are not finite: loss in step 50." in said
    assert re.search(r"The losses first differ in step 50: \S+, compared with nan\.", said)
    assert "loss at the end: " in said
    for step in other[89:]:
        step |= {"loss": math.nan, "gradient_norm": math.inf}
    said = answer(one, other)
    assert "not finite: loss in 12 steps, first in step 50, gradient_norm in 11 steps, first in step 90." in said
    assert "loss up to step 89, the last in which both are finite: " in said
    assert "loss at the end" not in said
    said = answer(other, one)
    assert "not finite:" not in said
    assert "loss up to step 89, the last in which both are finite: " in said
    later = recorded(other, name="other")
    [found] = compared(replace(recorded(one), rows=recorded(one).rows[:5]), replace(later, rows=later.rows[40:]))
    assert found.answer.startswith(
        "The two runs have no steps in common. Values of other that are not finite: loss in 12"
    )


def test_the_page_of_another_rank_attempt_or_black_box_is_never_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own page is, when it is made again."""
    diverging("run", raises=False)
    first = only(folder)
    with pytest.raises(KeyError):
        diverging("run", nan_at=None, raises=True)
    with esper_otel.start(run_id="run", rank=1, world_size=2) as telemetry:
        telemetry.record_step({"loss": math.nan}, epoch=0)
        boxes = until("all are written", lambda: len(found := list(folder.glob(f"*{black_box.SUFFIX}"))) == 3 and found)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        for path in (first, *sorted({*boxes} - {first})):
            assert main(["report", str(path)]) == 0
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert set(pages) >= {"run.html", "run-rank-1.html"}
    assert len(pages) == 3
    assert len({re.findall('esper-otel-report" content="([^"]*)"', page)[0] for page in pages.values()}) == 3


def test_a_long_run_id_leaves_room_for_rank_and_reason_in_the_files_name() -> None:
    """Else the black boxes of two ranks would be one file."""
    names = {black_box.file_stem("ü" * 250, rank, 1, "KeyError") for rank in (0, 1)}
    assert len(names) == 2
    assert all(len(name.encode()) < 220 and name.endswith("-1-KeyError") for name in names)


CELLS = st.dictionaries(st.text(max_size=3), st.floats(), max_size=4)


@given(CELLS, st.dictionaries(st.text(max_size=3), CELLS, max_size=4))
def test_a_row_gives_back_what_it_was_made_of(values: dict[str, float], seeds: dict[str, dict[str, float]]) -> None:
    """To the bit, NaN too, in their order."""
    row = StepRow(1, 0, 0.0, values, seeds)
    assert repr((row.values, row.seeds)) == repr((values, seeds))


def test_a_million_steps_fit_into_memory() -> None:
    """Of 21 metrics and 8 seeds x 10: little more than the bytes of their numbers."""
    names, fields = [f"metric-{n}" for n in range(21)], [f"field-{n}" for n in range(10)]
    tracemalloc.start()
    try:
        rows = [
            StepRow(
                step,
                0,
                step / 7,
                dict.fromkeys(names, step / 3),
                {f"s{i}": dict.fromkeys(fields, step / 9) for i in range(8)},
            )
            for step in range(1_000)
        ]
        assert tracemalloc.get_traced_memory()[0] / len(rows) < 1_400
    finally:
        tracemalloc.stop()
