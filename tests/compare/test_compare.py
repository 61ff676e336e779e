"""``esper-otel compare`` over a gateway, its store, and the tables of ``report``: one answer from all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from gateways import RunningGateway
from pyarrow import parquet

import esper_otel
from esper_otel.cli import main
from esper_otel.compare import readings
from esper_otel.report.table import KEYS
from esper_otel.settings import EsperSettings

STEPS = 120


def record(run_id: str, factor: float) -> None:
    with esper_otel.start(run_id=run_id, settings=EsperSettings(export_every_s=0)) as telemetry:
        for step in range(STEPS):
            values = {"step_latency_ms": factor * (10 + step % 7), "loss": factor / (step + 1), "hook_latency_ms": 1.0}
            telemetry.record_step(values, epoch=0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of two runs, and a Parquet and a CSV file of the first."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with RunningGateway("--store", "steps") as gateway:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{gateway.grpc}")
            record("before", 1.0)
            record("after", 1.3)
            target = ("--target", gateway.grpc)
            assert main(["report", "before", *target, "--csv", "t.csv", "--parquet", "t.parquet"]) == 0
            assert (
                main(["compare", "after", "before", *target, "--json", "--fail-if", "step_latency_ms.p50 > 1.05x"]) == 1
            )
            assert main(["compare", "after", "before", *target, "--fail-if", "step_latency_ms.p50 < 1.05x"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)


@pytest.mark.parametrize("baseline", ["steps:before", "t.parquet", "t.csv"])
def test_every_source_gives_the_same(baseline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "steps:after", baseline, "--json", "--fail-if", "step_latency_ms.p50 > 1.05x"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "failed"
    first = found["lines"][0]
    assert (first["metric"], first["statistic"], first["unit"]) == ("step_latency_ms", "p50", "ms")
    assert first["ratio"] == pytest.approx(1.3)
    assert first["steps"] == {"run": STEPS, "baseline": STEPS}
    assert {"loss", "hook_latency_ms"} <= {line["metric"] for line in found["lines"]}


def test_the_table_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    conditions = ["--fail-if", "step_latency_ms.p50 > 1.05x", "--fail-if", "loss.p99 > 1.02x"]
    assert main(["compare", "steps:after", "steps:before", *conditions]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "failed: step_latency_ms.p50 > 1.05x"
    assert "no verdict: 120 steps, needs 1000 (> 1.02x)" in out
    assert main(["compare", "steps:after", "steps:before", "--markdown", *conditions]) == 1
    assert "| step\\_latency\\_ms.p50 | 16.9 ms | 13 ms | 1.3000 |" in capsys.readouterr().out
    assert main(["compare", "steps:after", "steps:before"]) == 0
    assert "nothing was judged" in capsys.readouterr().out


def test_steps_of_the_warm_up_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "steps:after", "t.csv", "--skip", "21", "--fail-if", "step_latency_ms.p50 > 1.05x"]) == 0
    assert "99 steps, needs 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["steps:after", "steps:before", "--fail-if", "step_latncy_ms.p50 > 1x"], "did you mean 'step_latency_ms'?"),
        (["steps:after", "steps:nobody"], "runs there: after, before"),
        (["steps:after", "nothing.parquet"], "there is no file nothing.parquet"),
        (["steps:after", ".:before"], "is not the --store directory of a gateway"),
        (["steps:after", "other.csv"], "is not a table of esper-otel report"),
        (["steps:after", "broken.parquet"], "broken.parquet cannot be read"),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    Path("broken.parquet").write_bytes(b"PAR1 and nothing else")
    assert main(["compare", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_metric_that_one_run_lacks_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    table = "step,epoch,unix_s,seed_id,loss\n" + "".join(f"{step},0,{step},,1.0\n" for step in range(200))
    Path("few.csv").write_text(table, encoding="utf-8")
    assert main(["compare", "steps:after", "few.csv", "--fail-if", "step_latency_ms.p50 > 1.05x"]) == 2
    assert "few.csv has no value of 'step_latency_ms' in 200 steps" in capsys.readouterr().err
    assert main(["compare", "steps:after", "few.csv", "--fail-if", "step_latency_ms.p50 > 100"]) == 0


@pytest.mark.parametrize("kind", ["csv", "parquet", "text in a column", "a list in a column"])
def test_tables_of_others_are_bounded_and_end_in_words(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Parquet file of a few kilobytes can say a number a billion times."""
    monkeypatch.setattr(readings, "_MOST_NUMBERS", 50_000)
    path = tmp_path / ("t.csv" if kind == "csv" else "t.parquet")
    count = 10 if "column" in kind else 100_000
    columns = {name: pa.array([0] * count) for name in KEYS if name != "seed_id"}
    columns["seed_id"] = pa.array([""] * count)
    values = {"text in a column": ["x"] * count, "a list in a column": [[1.0, 2.0]] * count}.get(kind, [1.0] * count)
    table = pa.table({**{name: columns[name] for name in KEYS}, "loss": pa.array(values)})
    if kind == "csv":
        path.write_text(f"{','.join(KEYS)},loss\n" + f"{','.join('' for _ in KEYS)},1\n" * count)
    else:
        parquet.write_table(table, path)
    assert main(["compare", str(path), "t.csv"]) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said if "column" in kind else "more than 50000 numbers" in said
