"""The command, run for real: argv in, screen, table or JSON out."""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import requests
import warm
from later import needs
from programs import until

from esper_otel.demo.command import add_arguments, main
from esper_otel.schema import SEED_METRICS, STEP_METRICS
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

torch = pytest.importorskip("torch")
needs("sklearn")

STEP_NAMES = {metric.name for metric in STEP_METRICS}
SEED_NAMES = {metric.name for metric in SEED_METRICS}
GATED = {metric.name for metric in STEP_METRICS if metric.gated}
HARDWARE = {"h2d_copy_ms", "gpu_mem_used_gb", "gpu_mem_free_gb", "gpu_util_percent", "cpu_util_percent"}

Run = Callable[..., tuple[int, str, str]]


def _parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="esper-otel demo")
    add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def demo(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(_parsed(*argv))
        out, err = capsys.readouterr()
        return status, out, err

    return run


def _json(demo: Run, *argv: str) -> dict[str, Any]:
    status, out, _ = demo("--json", *argv)
    assert status == 0
    result: dict[str, Any] = json.loads(out)
    return result


def test_the_json_object_is_whole_and_every_frame_arrived(demo: Run) -> None:
    """A program that reads it finds each of the 31 metrics once, and counts that agree."""
    result = _json(demo, "--steps", "40")
    assert list(result) == ["run_id", "steps", "frames", "packets", "metrics", "absent"]
    assert result["steps"] == 40
    assert result["frames"] == {"recorded": 40, "exported": 40, "received": 40, "dropped": 0}
    assert result["packets"] == {"states": 40, "telemetry": 120}
    metrics, absent = result["metrics"], result["absent"]
    assert metrics.keys() | absent.keys() == STEP_NAMES | SEED_NAMES
    assert not metrics.keys() & absent.keys()
    assert absent.keys() <= HARDWARE
    assert all(reason for reason in absent.values())
    for name in SEED_NAMES:
        assert metrics[name].keys() <= {"seed-1", "seed-2", "seed-3"}
    assert metrics["kasmina.seed.isolation_violations"] == {"seed-1": 0.0, "seed-2": 0.0, "seed-3": 0.0}
    assert all(latency > 0 for latency in metrics["kasmina.seed.last_kernel_latency_ms"].values())
    assert 0.0 <= metrics["grad_conflict_rate"] <= 1.0


def test_without_enrichment_the_core_and_seed_metrics_stay(demo: Run) -> None:
    """The flag takes away exactly what the schema gates, and the reason says so."""
    result = _json(demo, "--steps", "40", "--no-enrichment")
    assert result["metrics"].keys() == (STEP_NAMES - GATED) | SEED_NAMES
    assert result["absent"].keys() == GATED
    assert set(result["absent"].values()) == {"gated: tolaria_step_enrichment_enabled is False"}


def test_one_step_without_seeds_is_a_run_too(demo: Run) -> None:
    result = _json(demo, "--steps", "1", "--seeds", "0")
    assert result["frames"] == {"recorded": 1, "exported": 1, "received": 1, "dropped": 0}
    assert result["packets"] == {"states": 1, "telemetry": 0}
    assert {name: result["absent"][name] for name in SEED_NAMES} == dict.fromkeys(SEED_NAMES, "no live seed")


def test_without_a_terminal_there_is_a_plain_table_and_a_few_lines(demo: Run) -> None:
    """In a log or a pipe control codes are noise."""
    status, out, err = demo("--steps", "30")
    assert status == 0
    assert "\x1b" not in out + err
    for metric in (*STEP_METRICS, *SEED_METRICS):
        assert f"\n{metric.name} " in out
    assert "training runs on cpu" in out or torch.cuda.is_available()
    assert "frames: recorded 30, exported 30, received 30, dropped 0" in out
    assert re.search(r"requests: 0 retried, the last took [0-9.]+ ms, last error: none; buffer 0\.\d MB", out)
    assert "set OTEL_EXPORTER_OTLP_ENDPOINT to send it to your stack" in out
    assert not any(line.endswith(" ") for line in out.splitlines())
    progress = [line for line in err.splitlines() if line.startswith("step ")]
    assert len(progress) == 10
    assert progress[-1].startswith("step 30 of 30, loss ")


def test_the_same_random_seed_gives_the_same_run(demo: Run) -> None:
    """Losses and lives do not depend on timings, nor on the enrichment."""
    first, again, bare = (_json(demo, "--steps", "30", *more) for more in ((), (), ("--no-enrichment",)))
    other = _json(demo, "--steps", "30", "--random-seed", "8")
    for name in ("loss", "accuracy", "gradient_norm", "kasmina.seed.stage", "kasmina.seed.isolation.dot"):
        assert first["metrics"][name] == again["metrics"][name] == bare["metrics"][name]
    assert first["metrics"]["loss"] != other["metrics"]["loss"]


def test_the_process_keeps_its_threads_and_random_numbers(demo: Run) -> None:
    """Whoever calls the command from a program of their own finds torch as it was."""
    torch.manual_seed(1)
    threads, expected = torch.get_num_threads(), torch.rand(3)
    torch.manual_seed(1)
    demo("--steps", "5")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), expected)


def test_an_endpoint_of_the_users_gets_the_frames(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives elsewhere is not ours to count."""
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        status, out, _ = demo("--steps", "5")
        assert status == 0
        assert collector.frames_received == 5
        assert f"went to {collector.grpc_endpoint}" in out
        assert "received" not in out
        assert _json(demo, "--steps", "5")["frames"] == {"recorded": 5, "exported": 5, "received": None, "dropped": 0}


def test_a_dead_endpoint_harms_no_training_and_is_told(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is what was asked for; what was lost is counted, with the way to find out why."""
    with socket.socket() as listener:  # bound and never listening: nobody else gets the port
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        status, out, err = demo("--steps", "3", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["frames"] == {"recorded": 3, "exported": 0, "received": None, "dropped": 3}
    assert result["metrics"]["loss"] > 0
    assert "not everything arrived: 3 frames dropped, last error: " in err
    assert "esper-otel check finds the cause" in err


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (("--steps", "0"), "argument --steps: 0 is too small; the minimum is 1"),
        (("--seeds", "-1"), "argument --seeds: -1 is too small; the minimum is 0"),
        (("--steps", "many"), "argument --steps: 'many' is not a whole number"),
        (("--random-seed", "-3"), "argument --random-seed: -3 is too small; the minimum is 0"),
    ],
)
def test_a_number_that_cannot_be_is_explained(
    argv: tuple[str, ...], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parsed(*argv)
    assert fault in capsys.readouterr().err


def test_ctrl_c_ends_the_run_with_the_table_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was trained until then is shown and was sent."""
    write = sys.stderr.write

    def interrupted(text: str) -> int:
        if text.startswith("step 9 "):
            raise KeyboardInterrupt
        return write(text)

    monkeypatch.setattr(sys.stderr, "write", interrupted)
    caplog.set_level("INFO", "esper_otel")
    status = main(_parsed("--steps", "30"))
    out, _ = capsys.readouterr()
    assert status == 130
    assert "interrupted after 9 steps" in out
    assert "frames: recorded 9, exported 9, received 9, dropped 0" in out
    assert "interrupted, frames recorded 9, exported 9" in caplog.text


def test_a_loss_that_is_not_finite_is_null_in_json() -> None:
    """JSON has no NaN."""
    from esper_otel.demo.result import DemoResult

    result = DemoResult(
        run_id="run",
        steps=1,
        is_interrupted=False,
        losses=(math.nan,),
        validation=None,
        frames={},
        packets={},
        metrics={"loss": math.nan, "kasmina.seed.alpha": {"seed-1": math.inf, "seed-2": 0.5}},
        absent={},
    )
    assert result.as_json()["metrics"] == {"loss": None, "kasmina.seed.alpha": {"seed-1": None, "seed-2": 0.5}}


def test_the_arguments_are_known_without_torch() -> None:
    """``--help`` answers at once, on a machine without torch too."""
    program = "import sys; import esper_otel.demo.command; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_live_page_shows_the_run_until_ctrl_c() -> None:
    """Every step is there, when the training is over and while the page stays."""
    process = warm.started("-m", "esper_otel", "demo", "--ui", "--steps", "30")
    try:
        said = iter(process.stderr.readline, "")
        page = next(line for line in said if line.startswith("the live page stays")).split()[-1]

        def run() -> tuple[int, int, str]:
            [shown] = json.loads(requests.get(f"{page}page/runs", timeout=300).text)["runs"]
            return shown["steps_stored"], shown["last_step"], shown["state"]

        until("the table, which is made anew now and then, shows the end", lambda: run() == (30, 30, "completed"))
        assert "<title>" in requests.get(page, timeout=300).text
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 0
    assert page in out
    with pytest.raises(requests.ConnectionError):
        requests.get(page, timeout=300)
