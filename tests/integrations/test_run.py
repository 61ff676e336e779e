"""``esper-otel run``: a script that nobody edits behaves as before, and its steps are sent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.lengthy

pytest.importorskip("torch")

SCRIPT = """
import os, sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
workers = int(os.environ.get("WORKERS", "0"))
for epoch in range(2):
    for number, (inputs, targets) in enumerate(DataLoader(data, batch_size=16, shuffle=True, num_workers=workers)):
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        if (epoch, number) == (1, 2) and "fail" in sys.argv:
            raise KeyError("in the middle")
        optimizer.step()
        print(repr(loss.item()), flush=True)
    with torch.no_grad():
        for inputs, targets in DataLoader(data, batch_size=32):
            model(inputs)
print(__name__, sys.argv[1:], sys.path[0] == os.path.dirname(os.path.abspath(__file__)), file=sys.stderr)
print(os.environ.get("PYTHONPATH"), [name for name in os.environ if name.startswith("ESPER_OTEL")], file=sys.stderr)
if "wait" in sys.argv:
    time.sleep(30)
sys.exit(3 if "three" in sys.argv else 0)
"""
FULL_BATCHES = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.ones(8, 4)).mean().backward()
    optimizer.step()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def environ(collector: MemoryCollector, **more: str) -> dict[str, str]:
    return {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint, **more}


def run(collector: MemoryCollector, *command: str | Path, **more: str) -> warm.Done:
    return warm.run(*command, env=environ(collector, **more))


def run_by_python(collector: MemoryCollector, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """By the interpreter itself: nothing is imported before the script."""
    words = [sys.executable, *command]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environ(collector, **more))


FOLLOWED = ("-m", "esper_otel", "run", "--run-id", "scripted")


def values(collector: MemoryCollector, name: str) -> list[float]:
    return [point.value for point in collector.points() if point.name == name and point.value is not None]


def outcomes(collector: MemoryCollector) -> list[str]:
    ended = [point for point in collector.points() if point.name == "esper.run.ended" and not point.flags]
    return [point.attributes["outcome"] for point in ended]


def check(collector: MemoryCollector, steps: int, failed: int, outcome: str) -> None:
    """What has arrived of a script."""
    assert outcomes(collector) == [outcome]
    assert values(collector, "esper.global_step") == [*range(1, steps + failed + 1)]
    assert len(values(collector, "gradient_norm")) == steps
    assert values(collector, "esper.step.failed") == [1.0] * failed
    assert min(values(collector, "input_wait_ms")) > 0
    assert min(values(collector, "samples_per_s")) > 0
    assert values(collector, "loss") == []


def test_output_traceback_and_exit_status_of_one_that_fails_are_the_same(script: Path) -> None:
    with MemoryCollector() as collector:
        without = run(collector, script, "fail", PYTHONPATH="/nowhere")
        ours = run_by_python(collector, *FOLLOWED, script, "fail", PYTHONPATH="/nowhere")
        assert (ours.stdout, ours.stderr, ours.returncode) == (without.stdout, without.stderr, 1)
        check(collector, steps=6, failed=1, outcome="KeyError")


def test_a_module_whose_loaders_have_workers_exits_as_without_us(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log, where one is asked for, says what was done."""
    monkeypatch.chdir(script.parent)
    log = tmp_path / "log"
    with MemoryCollector() as collector:
        without = run(collector, "-m", "train", "three", "--epochs", WORKERS="2")
        ours = run(
            *(collector, "-m", "esper_otel", "run", "--log", log, "-m", "train", "three", "--epochs"), WORKERS="2"
        )
        assert (ours.stdout, ours.stderr, ours.returncode) == (without.stdout, without.stderr, 3)
        check(collector, steps=8, failed=0, outcome="SystemExit")
    assert "frames recorded 8, exported 8, dropped 0" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("end", ["sys.exit(main())", "raise SystemExit(main())"])
@pytest.mark.parametrize(("status", "outcome"), [(0, "completed"), (3, "SystemExit")])
def test_the_status_of_a_main_function_is_known(tmp_path: Path, status: int, outcome: str, end: str) -> None:
    """``sys.exit(main())`` looks ``sys.exit`` up before the training begins; a raise leaves no trace."""
    body = FULL_BATCHES.replace("\n", "\n    ").rstrip()
    text = f"import sys\ndef main():{body}\n    return {status}\nif __name__ == '__main__':\n    {end}\n"
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    with MemoryCollector() as collector:
        done = run(collector, "-m", "esper_otel", "run", tmp_path / "train.py")
        assert done.returncode == status, done.stderr
        assert [p.attributes["outcome"] for p in collector.points() if p.name == "esper.run.ended"][-1:] == [outcome]


def test_a_script_without_loaders_has_the_time_from_step_to_step(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FULL_BATCHES, encoding="utf-8")
    with MemoryCollector() as collector:
        ours = run(collector, *FOLLOWED, tmp_path / "train.py")
        assert (ours.stdout, ours.stderr, ours.returncode) == ("", "", 0)
        assert len(values(collector, "gradient_norm")) == 5
        assert len(values(collector, "step_latency_ms")) == 4
        assert values(collector, "input_wait_ms") == []
        assert outcomes(collector) == ["completed"]


FOREIGN = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
for (inputs,) in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(120, 4))):
    model.zero_grad()
    model(inputs).square().mean().backward()
    with torch.no_grad():
        torch._foreach_add_([*model.parameters()], [each.grad for each in model.parameters()], alpha=-0.1)
print([each.tolist() for each in model.parameters()])
"""


def test_steps_without_torch_optim_are_explained_once_in_the_log(tmp_path: Path) -> None:
    """As those of Keras and of fastai's own optimizers."""
    path, log = tmp_path / "train.py", tmp_path / "log"
    path.write_text(FOREIGN, encoding="utf-8")
    with MemoryCollector() as collector:
        without = run(collector, path)
        ours = run(collector, "-m", "esper_otel", "run", "--log", log, path)
        assert (ours.stdout, ours.stderr, ours.returncode) == (without.stdout, "", 0)
        assert values(collector, "esper.global_step") == []
    assert log.read_text(encoding="utf-8").count("steps made without torch.optim (Keras") == 1


def test_a_signal_ends_it_as_before_and_the_steps_are_there(script: Path) -> None:
    with MemoryCollector() as collector:
        process = warm.started("-m", "esper_otel", "run", script, "wait", env=environ(collector))
        process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == -signal.SIGTERM
        assert values(collector, "esper.global_step") == [*range(1, 9)]


def test_a_script_that_is_not_there_is_said_by_python(tmp_path: Path) -> None:
    with MemoryCollector() as collector:
        without = run_by_python(collector, tmp_path / "nothing.py")
        ours = run_by_python(collector, *FOLLOWED, tmp_path / "nothing.py")
        assert (ours.stderr, ours.returncode) == (without.stderr, 2)


REPLACED = """
import os, sys
from esper_otel.cli import main
def execve(path, command, environ):
    sys.exit(f"{os.environ.get('GRPC_VERBOSITY')} {environ.get('GRPC_VERBOSITY')}")
os.execve = execve
main(["run", "train.py"])
"""


@pytest.mark.parametrize(("given", "said"), [({}, "NONE None"), ({"GRPC_VERBOSITY": "ERROR"}, "ERROR ERROR")])
def test_grpc_says_nothing_of_the_process_that_is_replaced(given: dict[str, str], said: str) -> None:
    """Its threads end in the middle of their start. The script has the variable that it would have."""
    with MemoryCollector() as collector:
        done = warm.run("-c", REPLACED, env=environ(collector, **given), imported=warm.PACKAGE)
    assert done.stderr == f"{said}\n"


def test_a_script_in_which_nothing_steps_is_explained_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text("print('hello')", encoding="utf-8")
    log = tmp_path / "log"
    with MemoryCollector() as collector:
        done = run_by_python(collector, "-m", "esper_otel", "run", "--log", log, tmp_path / "launcher.py")
    assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)
    assert "torchrun --no-python esper-otel run SCRIPT" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("paths", ["", ":/nowhere", "/nowhere::"])
def test_the_script_and_its_children_have_the_paths_that_they_would_have(tmp_path: Path, paths: str) -> None:
    """To the letter: an empty part of PYTHONPATH is the current directory, and an empty variable is still set."""
    child = "import os, sys; print(sys.path, os.environ['PYTHONPATH'], [n for n in os.environ if 'ESPER_OTEL' in n])"
    script = f"import subprocess\n{child}\nsys.stdout.flush()\nsubprocess.run([sys.executable, '-c', {child!r}])\n"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": paths, "OTEL_METRICS_EXPORTER": "none"}
    said = [
        subprocess.run(
            [sys.executable, *command, "script.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in ([], ["-m", "esper_otel", "run"])
    ]
    assert said[0] == said[1]
    assert said[0].count("\n") == 2
