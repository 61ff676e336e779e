"""What OpenTelemetry's own tools start: ``opentelemetry-instrument``, the Operator's injection, resource detectors."""

from __future__ import annotations

import importlib.util
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import warm

import esper_otel
from esper_otel.export.place import attributes_of
from esper_otel.schema.attribute_catalogue import SLURM
from esper_otel.session.detector import EsperResourceDetector
from esper_otel.testing import MemoryCollector

pytest.importorskip("torch")

TRAIN = """
import os, subprocess, sys, torch
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for inputs, targets in DataLoader(data, batch_size=8):
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(repr(loss.item()), flush=True)
if "child" in sys.argv:
    subprocess.run([sys.executable, __file__], check=True)
"""
OWN_SESSION = TRAIN.replace("import os,", "import esper_otel, os,").replace(
    "for inputs", "telemetry = esper_otel.start(run_id='own')\nfor inputs"
)
LIGHTNING = """
import lightning, torch
from torch.utils.data import DataLoader, TensorDataset
class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
    def training_step(self, batch, number):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model(), DataLoader(data, batch_size=8))
"""


def environ(collector: MemoryCollector, **more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    ours = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint, "ESPER_RUN_ID": "untouched"}
    return {**kept, **ours, "PYTHONWARNINGS": "ignore", **more}


def run(collector: MemoryCollector, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ(collector, **more))


def instrument(*command: str | Path) -> list[str | Path]:
    return [Path(sys.executable).with_name("opentelemetry-instrument"), *command]


def injected() -> str:
    """What ``opentelemetry-instrument`` puts in front of PYTHONPATH, before it starts the program."""
    found = importlib.util.find_spec("opentelemetry.instrumentation.auto_instrumentation")
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parent)


def run_injected(collector: MemoryCollector, script: Path, **more: str) -> warm.Done:
    """By a fork of a process that has PyTorch."""
    return warm.run(script, env=environ(collector, PYTHONPATH=injected(), **more))


def steps(collector: MemoryCollector, rank: int = 0) -> list[float | None]:
    points = [point for point in collector.points() if point.name == "esper.global_step" and not point.flags]
    return [point.value for point in points if point.resource["esper.rank"] == rank]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(TRAIN, encoding="utf-8")
    return path


def test_a_script_is_recorded_and_its_output_is_its_own(script: Path, tmp_path: Path) -> None:
    """The script that it starts is not recorded as a second attempt of the run."""
    python = warm.executable(tmp_path)
    with MemoryCollector() as collector:
        done = run(collector, *instrument(python, script, "child"), PYTHON_EXEC=str(python))
        assert (done.stdout.count("\n"), done.stderr, done.returncode) == (8, "", 0)
        assert steps(collector) == [1, 2, 3, 4]
        assert {point.resource["esper.run.id"] for point in collector.points()} == {"untouched"}


@pytest.mark.parametrize(
    ("more", "follows"),
    [
        ({}, True),
        ({"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "requests, esper_otel"}, False),
        ({"OTEL_SDK_DISABLED": "true"}, False),
        ({"ESPER_OTEL_FOLLOWED": "1"}, False),  # a process of one that is recorded
    ],
)
def test_it_can_be_disabled_as_every_instrumentation(more: dict[str, str], follows: bool) -> None:
    code = "from esper_otel.integrations import script; print(bool(script._following))"
    with MemoryCollector() as collector:
        done = warm.run("-c", code, env=environ(collector, PYTHONPATH=injected(), **more), imported=warm.PACKAGE)
    assert done.stdout == f"{follows}\n", done.stderr


def test_a_script_with_a_session_of_its_own_is_recorded_once(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        OWN_SESSION + "telemetry.record_step({'loss': 1.0}, epoch=0)\ntelemetry.close()\n", encoding="utf-8"
    )
    with MemoryCollector() as collector:
        done = run_injected(collector, tmp_path / "train.py")
        assert done.returncode == 0, done.stderr
        assert {point.resource["esper.run.id"] for point in collector.points()} == {"own"}
        assert steps(collector) == [1]


def test_a_wrong_setting_is_a_warning_and_the_script_goes_on(script: Path) -> None:
    with MemoryCollector() as collector:
        done = run_injected(collector, script, ESPER_EXPORT_EVERY_S="often")
        assert (done.stdout.count("\n"), done.returncode) == (4, 0)
        assert done.stderr.count("ESPER_EXPORT_EVERY_S") == 1


@pytest.mark.lengthy
def test_every_worker_of_torchrun_is_a_rank(script: Path, tmp_path: Path) -> None:
    python = warm.executable(tmp_path)
    torchrun: list[str | Path] = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with MemoryCollector() as collector:
        done = run(collector, *instrument(*torchrun, script), PYTHON_EXEC=str(python))
        assert done.returncode == 0, done.stderr
        assert steps(collector, 0) == steps(collector, 1) == [1, 2, 3, 4]
        assert {point.resource["esper.world_size"] for point in collector.points()} == {2}


@pytest.mark.lengthy
def test_a_script_of_lightning_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    (tmp_path / "train.py").write_text(LIGHTNING, encoding="utf-8")
    with MemoryCollector() as collector:
        python = warm.executable(tmp_path, warm.FRAMEWORKS)
        done = run(collector, *instrument(python, tmp_path / "train.py"))
        assert done.returncode == 0, done.stderr
        assert steps(collector) == [1, 2, 3, 4]


def test_injection_by_pythonpath_is_enough(script: Path) -> None:
    """As the Operator does: the packages come by PYTHONPATH alone, into an interpreter that has none of them."""
    [packages] = [path for path in site.getsitepackages() if Path(path, "torch").is_dir()]
    paths = [injected(), packages, str(Path(esper_otel.__file__).parents[1])]
    with MemoryCollector() as collector:
        done = run(
            collector,
            getattr(sys, "_base_executable", sys.executable),
            script,
            PYTHONPATH=os.pathsep.join(paths),
            OTEL_METRICS_EXPORTER="otlp",
            OTEL_TRACES_EXPORTER="otlp",
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.http_endpoint,
            OTEL_RESOURCE_ATTRIBUTES="k8s.pod.name=train-0",
        )
        assert (done.stdout.count("\n"), done.returncode) == (4, 0), done.stderr
        assert steps(collector) == [1, 2, 3, 4]
        assert {point.resource["k8s.pod.name"] for point in collector.points()} == {"train-0"}


# -- the resource detector -------------------------------------------------------------------------------


def test_the_sdk_finds_run_and_slurm_job_by_the_detector() -> None:
    code = (
        "from opentelemetry.sdk.resources import Resource; import json; "
        "print(json.dumps(dict(Resource.create().attributes)))"
    )
    named = {
        "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "otel,esper_otel",
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURMD_NODENAME": "node-7",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **named}
    )
    for text in ('"esper.run.id": "1234"', '"esper.rank": 3', '"slurm.job.id": "1234"', '"slurm.node.name": "node-7"'):
        assert text in done.stdout


def test_a_detector_generates_no_run_id_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESPER_RUN_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    found = EsperResourceDetector().detect().attributes
    assert "esper.run.id" not in found
    assert found["esper.rank"] == 0
    monkeypatch.setenv("RANK", "first")
    assert "esper.rank" not in EsperResourceDetector().detect().attributes
    assert attributes_of(SLURM, {}) == {}
