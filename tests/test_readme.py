"""The README keeps its word: its programs run as they stand, and its commands exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from gateways import RunningGateway
from programs import Redis

from esper_otel.cli import build_parser
from esper_otel.testing import MemoryCollector, Point

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))
COMMANDS = [
    re.sub(r"\s+#.*", "", line.removeprefix("$ "))
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def run_example(name: str, collector: MemoryCollector, folder: Path) -> str:
    """What the example prints, with its telemetry sent to the collector."""
    environ = os.environ | {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "ESPER_RISK_THRESHOLDS": '{"cpu_pressure_high": Infinity}',  # this machine may be busy
    }
    script = folder / f"{name}.py"
    script.write_text(EXAMPLES[name], encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=110, env=environ, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def values_in(collector: MemoryCollector) -> list[Point]:
    """What has arrived, without the markers that end the series."""
    return [point for point in collector.points() if point.value is not None]


def test_every_program_of_the_readme_is_run_here() -> None:
    """A block without a marker would be one that nobody tries."""
    assert README.count("```python") == len(EXAMPLES)
    assert set(EXAMPLES) == {"loop", "own", "tamiyo", "gateway", "oona"}


def test_the_training_loop_sends_every_step(tmp_path: Path) -> None:
    """Two epochs of 640 samples in batches of 32 are 40 steps, with the metrics that the comments name."""
    with MemoryCollector() as collector:
        run_example("loop", collector, tmp_path)
    assert collector.frames_received == 40
    names = [point.name for point in values_in(collector)]
    for name in ("loss", "accuracy", "gradient_norm", "input_wait_ms", "samples_per_s", "loss_ewma"):
        assert names.count(name) == 40, name


def test_own_metrics_and_processors_arrive_like_ours(tmp_path: Path) -> None:
    """exp(2) is 7.389."""
    with MemoryCollector() as collector:
        run_example("own", collector, tmp_path)
    points = {point.name: point for point in values_in(collector)}
    assert (points["tokens_per_s"].value, points["tokens_per_s"].unit) == (51_000.0, "rate")
    assert points["perplexity"].value == pytest.approx(7.389, abs=1e-3)
    assert points["perplexity"].unit == "1"


def test_the_packets_are_printed_as_the_readme_says(tmp_path: Path) -> None:
    """Tamiyo's side of the story."""
    with MemoryCollector() as collector:
        printed = run_example("tamiyo", collector, tmp_path).splitlines()
    inside, pulled, lost = printed
    assert inside.startswith("digits-7-step-1 {")
    assert "'loss': 0.41999998688697815" in inside  # float32
    assert pulled == "1 digits-7-step-1 ['kasmina-seed-seed-3-1']"
    assert lost == "lost before these: 0"


def test_the_packets_of_another_machine_are_printed_as_the_readme_says(tmp_path: Path) -> None:
    """A trainer, a gateway, a controller."""
    with RunningGateway() as gateway:
        environ = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}"}
        script = tmp_path / "trainer.py"
        script.write_text(EXAMPLES["tamiyo"], encoding="utf-8")
        subprocess.run([sys.executable, str(script)], check=True, timeout=110, env=environ, capture_output=True)
        script.write_text(EXAMPLES["gateway"].replace("127.0.0.1:4327", gateway.grpc), encoding="utf-8")
        ran = subprocess.run([sys.executable, str(script)], check=True, timeout=110, capture_output=True, text=True)
    assert ran.stdout.splitlines() == ["[('digits-7', 1, 'completed')]", "1 1 True 0.41999998688697815"]


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="Redis is not installed")
def test_the_steps_are_on_the_bus_as_the_readme_says(tmp_path: Path) -> None:
    """A trainer without a gateway."""
    with Redis(tmp_path / "redis") as server, MemoryCollector() as collector:
        EXAMPLES["bus"] = EXAMPLES["oona"].replace("redis://127.0.0.1:6379/0", server.url)
        run_example("bus", collector, tmp_path)
        del EXAMPLES["bus"]
        with server.client() as client:
            assert client.xlen("oona.normal") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists(command: str) -> None:
    """Each is one that this checkout understands."""
    program, *arguments = shlex.split(command)
    if program == "make":
        assert set(arguments) <= TARGETS
    elif program == "esper-otel":
        build_parser(arguments).parse_args(arguments)
    elif program == "pip":
        [extras] = re.fullmatch(r"install esper-otel\[([a-z,]+)\]", " ".join(arguments)).groups()  # type: ignore[union-attr]
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras.split(",")) <= declared["optional-dependencies"].keys()
    else:
        assert program == "export"
        assert all(re.fullmatch(r"(OTEL|ESPER)_[A-Z_]+=\S+", argument) for argument in arguments)


def test_every_make_target_and_command_that_the_text_names_exists() -> None:
    """In running text too."""
    for text in (README, *((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "SECURITY.md"))):
        assert set(re.findall(r"`make ([a-z-]+)", text)) <= TARGETS
        for arguments in re.findall(r"`esper-otel ([a-z][^`]*)`", text):
            build_parser(shlex.split(arguments)).parse_args(shlex.split(arguments))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    """The picture, too."""
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_shows_each_metric_and_setting_it_names_as_it_is_spelt() -> None:
    """`esper.*` names in running text are the catalogue's."""
    from esper_otel.schema import METRICS

    known = {metric.name for metric in METRICS} | {
        "esper.run.id",
        "esper.run.attempt",
        "esper.rank",
        "esper.leyline.v1",
    }
    named = set(re.findall(r"`(esper\.[a-z0-9_.]+)`", README))
    assert named <= known
