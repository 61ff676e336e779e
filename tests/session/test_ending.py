"""The end of a process: what was recorded arrives, and the process ends as it would have without us."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from patience import patience

from esper_otel.session.raised import status_of
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

BEGIN = """
import os, signal, sys, time
import esper_otel
telemetry = esper_otel.start(run_id="run")
for _ in range(200):
    telemetry.record_step({"loss": 1.0}, epoch=0)
"""
BRIEFLY = BEGIN.replace("200", "3")  # where the outcome alone is looked at


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "60")
        yield collector


def ended(script: str) -> warm.Done:
    return warm.run("-c", BEGIN + script, imported=warm.PACKAGE)


def outcomes(collector: MemoryCollector) -> list[str]:
    return [p.attributes["outcome"] for p in collector.points() if p.name == "esper.run.ended" and not p.flags]


def test_a_script_that_just_ends_loses_nothing(collector: MemoryCollector) -> None:
    """Not everybody calls close()."""
    assert ended("").returncode == 0
    assert collector.frames_received == 200
    assert outcomes(collector) == ["completed"]


LEFT = {
    "sys.exit()": (0, "completed"),
    "exit(0)": (0, "completed"),
    "sys.exit(256)": (0, "completed"),  # the status is a byte
    "sys.exit(2**70)": (255, "SystemExit"),  # Python makes -1 of what has more than 64 bits
    "with telemetry:\n    sys.exit(-(2**70))": (255, "SystemExit"),
    "def main():\n    sys.exit(0)\nmain()": (0, "completed"),
    "try:\n    sys.exit(3)\nexcept SystemExit:\n    pass": (0, "completed"),
    "with telemetry:\n    sys.exit(0)": (0, "completed"),
    "import threading\nthreading.Thread(target=lambda: 1 / 0).start()": (0, "completed"),
    "import argparse\nargparse.ArgumentParser().parse_args(['--help'])": (0, "completed"),
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nos.kill(os.getpid(), signal.SIGTERM)": (0, "completed"),
    "sys.exit(3)": (3, "SystemExit"),
    "sys.exit('no such file')": (1, "SystemExit"),
    "exit(code=3)": (3, "SystemExit"),
    "with telemetry:\n    sys.exit(['no'])": (1, "SystemExit"),
    "raise KeyboardInterrupt": (-signal.SIGINT, "KeyboardInterrupt"),
    "def main():\n    try:\n        sys.exit(0)\n    except SystemExit:\n        pass\n    raise KeyError\nmain()": (
        1,
        "KeyError",
    ),
    "raise SystemExit": (0, "completed"),
    "raise SystemExit(0)": (0, "completed"),
    "status = 3\nraise SystemExit(status)": (3, "SystemExit"),
    "raise SystemExit('no such file')": (1, "SystemExit"),
    "def main():\n    raise SystemExit(0)\nmain()": (0, "completed"),
    "def main():\n    raise SystemExit(3)\nmain()": (3, "SystemExit"),
    "def main():\n    raise SystemExit('no')\ntry:\n    main()\nfinally:\n    status = 3": (1, "SystemExit"),
    "def main():\n    raise SystemExit(3)\ntry:\n    main()\nexcept SystemExit as error:\n    kept = error\n1 / 0": (
        1,
        "ZeroDivisionError",
    ),
    "import io\nsys.stdout = io.StringIO()\ndef main():\n    raise SystemExit(3)\nmain()": (3, "SystemExit"),
    "try:\n    raise SystemExit(0)\nfinally:\n    status = 3": (0, "completed"),
    "class SystemExit(SystemExit):\n    code = 3\nraise SystemExit(0)": (3, "SystemExit"),
    "telemetry.close()\nassert sys.exit.__module__ == 'sys' and not hasattr(sys.exit, '__wrapped__')": (0, "completed"),
}


GIVEN = """
class Odd(int):
    __and__ = __index__ = __int__ = __eq__ = __lt__ = bit_length = lambda *_: 0
GIVEN = [
    *(None, 0, 1, 255, 256, -1, True, False, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64),
    *(2**70, -(2**70), Odd(3), Odd(2**70), 0.0, "", "no", (), (0,), [], object(), ValueError(0)),
]
"""
STATUSES = """
import os, sys
for given in GIVEN:
    child = os.fork()
    if not child:
        sys.exit(given)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_the_status_is_what_python_makes_of_the_argument() -> None:
    """Python itself says which: a number beyond a byte, or beyond 64 bits, and what is no number."""
    found: dict[str, Any] = {}
    exec(GIVEN, found)
    done = subprocess.run(
        [sys.executable, "-c", GIVEN + STATUSES], capture_output=True, text=True, timeout=300, check=True
    )
    assert [status_of(given) for given in found["GIVEN"]] == [*map(int, done.stdout.split())]


# A child for each case goes on in the main program: importing it all once is most of the time. What is frozen is not
# looked through, nor copied.
FORKS = """
import concurrent.futures.thread, gc, json, os, sys
import esper_otel.export.grpc_sender, esper_otel.probes.machine, esper_otel.session.start
gc.collect()
gc.freeze()
children = []
for case in range(int(sys.argv[1])):
    pid = os.fork()
    if not pid:
        break
    children.append(pid)
else:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print(json.dumps(list(zip(children, statuses))), flush=True)
    os._exit(0)
"""


def cases(texts: Iterable[str]) -> str:
    return "".join(f"if case == {number}:\n{textwrap.indent(text, '    ')}\n" for number, text in enumerate(texts))


def forked(
    collector: MemoryCollector, texts: Iterable[str], command: list[str], folder: Path
) -> tuple[dict[str, tuple[int, str | None]], list[str]]:
    """The exit status and the outcome of each case, and what they wrote."""
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    *output, last = done.stdout.splitlines()
    found = {
        point.resource["process.pid"]: point.attributes["outcome"]
        for point in collector.points()
        if point.name == "esper.run.ended" and not point.flags
    }
    ends = zip(texts, json.loads(last), strict=True)
    return {text: (status, found.get(pid)) for text, (pid, status) in ends}, output


def test_a_script_that_ends_with_status_0_has_completed(collector: MemoryCollector, tmp_path: Path) -> None:
    """Whichever way it leaves, the outcome is what its exit status says, and the exit status is what it would be."""
    (tmp_path / "train.py").write_text(FORKS + cases(BRIEFLY + text for text in LEFT), encoding="utf-8")
    assert forked(collector, LEFT, ["train.py", str(len(LEFT))], tmp_path)[0] == LEFT


def test_a_module_that_raises_in_a_function_hides_its_status(collector: MemoryCollector, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(BEGIN + "def main():\n    raise SystemExit(0)\nmain()", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "train"], cwd=tmp_path, timeout=300, check=True)
    assert outcomes(collector) == ["exit"]


def test_a_module_that_ends_with_status_0_has_completed(collector: MemoryCollector, tmp_path: Path) -> None:
    """``python -m``: the main program is then Python's own."""
    (tmp_path / "train.py").write_text(BEGIN + "sys.exit(int(sys.argv[1]))", encoding="utf-8")
    for status in (0, 3):
        done = subprocess.run([sys.executable, "-m", "train", str(status)], cwd=tmp_path, timeout=300, check=False)
        assert done.returncode == status
    assert outcomes(collector) == ["completed", "SystemExit"]


# The session starts in the main function, in the module of the program.
MAIN = f"""
import sys
def cleaned(status):
    return status
def main(case):
{textwrap.indent(BRIEFLY, "    ")}
    return case
"""
RETURNED = {
    "raise SystemExit(main(0))": (0, "completed"),
    "raise SystemExit(main(None))": (0, "completed"),
    "raise SystemExit(main(3))": (3, "SystemExit"),
    "raise SystemExit(\n    main('no such file')\n)": (1, "SystemExit"),
    "raise SystemExit(main(None) or 0)": (0, "completed"),
    "raise SystemExit(0 if main(True) else 1)": (0, "completed"),
    "if main(3):\n    raise SystemExit(2)": (2, "SystemExit"),
    "if main(0):\n    raise SystemExit(2)": (0, "completed"),
    "raise SystemExit(int(main(0)))": (0, "completed"),
    "raise SystemExit(cleaned(main(0)))": (0, "completed"),
    "try:\n    raise SystemExit(main(0))\nexcept SystemExit:\n    pass": (0, "completed"),
    "try:\n    raise SystemExit(main(0))\nexcept SystemExit:\n    pass\ncleaned(1 / 0)": (1, "ZeroDivisionError"),
    "try:\n    raise SystemExit(main(0))\nfinally:\n    cleaned(0)": (0, "completed"),
    "import asyncio\nasync def work():\n    return main(0)\nraise SystemExit(asyncio.run(work()))": (0, "completed"),
    "raise KeyError(main(0))": (1, "KeyError"),
}


@pytest.mark.parametrize("is_module", [False, True])
def test_the_status_that_main_returns_is_known(collector: MemoryCollector, tmp_path: Path, *, is_module: bool) -> None:
    """Of a program that raises ``SystemExit`` itself; and nothing is left traced."""
    traced = "import atexit\natexit.register(lambda: print(sys.gettrace(), flush=True))\n"
    (tmp_path / "train.py").write_text(FORKS + traced + MAIN + cases(RETURNED), encoding="utf-8")
    command = [*(["-m", "train"] if is_module else ["train.py"]), str(len(RETURNED))]
    said, output = forked(collector, RETURNED, command, tmp_path)
    hidden = dict.fromkeys((text for text in RETURNED if "cleaned" in text and "1 / 0" not in text), (0, "exit"))
    assert said == {**RETURNED, **(hidden if is_module else {})}  # traced no further than the main function's return
    assert output == ["None"] * len(RETURNED)


def test_nothing_of_the_main_function_is_held_after_its_return(collector: MemoryCollector, tmp_path: Path) -> None:
    """Its model and its loaders with their processes go away when they would have, and a tracer stays in place."""
    program = """
import sys, weakref
class Model: pass
def main():
    global model
    mine = Model()
    model = weakref.ref(mine)
    start()
    return 0
def trace(*_): return None
for tracer in (None, trace):
    sys.settrace(tracer)
    try:
        raise SystemExit(main())
    except SystemExit as error:
        sys.stdout.write(f"{error.code} {model()} {sys.gettrace() is tracer}\\n")
"""
    begin = f"def start():\n{textwrap.indent(BRIEFLY, '    ')}    telemetry.close()\n"
    (tmp_path / "train.py").write_text(begin + program, encoding="utf-8")
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "0 None True\n" * 2, done.stderr


IPYTHON = """
import sys, types

class TerminalIPythonApp:  # what there is of IPython when it runs a script
    interact = "-i" in sys.argv
    file_to_run = "train.py"

def start():
    sys.ps1 = "In : "
    try:
        exec(sys.argv[1], {})
    except Exception as error:
        sys.last_type, sys.last_value = type(error), error
        if not TerminalIPythonApp.interact:
            sys.exit(1)

TerminalIPythonApp._instance = TerminalIPythonApp()
sys.modules["IPython.terminal.ipapp"] = types.ModuleType("ipapp")
sys.modules["IPython.terminal.ipapp"].TerminalIPythonApp = TerminalIPythonApp
sys.exit(start())
"""


@pytest.mark.parametrize(
    ("script", "more", "status", "outcome"),
    [
        ("", [], 0, "completed"),
        ("raise KeyError", [], 1, "KeyError"),
        ("sys.exit(3)", [], 3, "SystemExit"),
        ("", ["-i"], 0, "exit"),
        ("raise KeyError", ["-i"], 0, "exit"),  # of an earlier cell, as far as can be known
    ],
)
def test_a_script_of_ipython_ends_as_one_of_python(
    collector: MemoryCollector, script: str, more: list[str], status: int, outcome: str
) -> None:
    """Unless a prompt follows, with cells of which any may have been the run's end."""
    done = warm.run("-c", IPYTHON, BRIEFLY + script, *more, imported=warm.PACKAGE)
    assert (done.returncode, outcomes(collector)) == (status, [outcome])


def test_an_exception_that_nobody_caught_is_the_outcome(collector: MemoryCollector) -> None:
    """With the context manager and without."""
    done = ended("raise ValueError('no')")
    assert (done.returncode, "ValueError: no" in done.stderr) == (1, True)
    done = ended("with telemetry:\n    raise KeyError('no')")
    assert done.returncode == 1
    assert collector.frames_received == 400
    assert outcomes(collector) == ["ValueError", "KeyError"]


def test_a_run_that_is_closed_is_completed(collector: MemoryCollector) -> None:
    """And what the caller says wins."""
    ended("telemetry.close()")
    ended("telemetry.close(outcome='early stopping')")
    assert outcomes(collector) == ["completed", "early stopping"]


def test_sigterm_flushes_and_the_process_dies_of_it(collector: MemoryCollector) -> None:
    """The launcher's ordinary way to end a job: it must look killed, with nothing lost."""
    done = ended("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)")
    assert done.returncode == -signal.SIGTERM
    assert collector.frames_received == 200
    assert outcomes(collector) == ["SIGTERM"]


def test_a_handler_that_was_there_is_called_and_decides(collector: MemoryCollector) -> None:
    """Checkpoint on SIGTERM is what many trainers do."""
    handler = BEGIN.replace(
        "telemetry = ",
        "signal.signal(signal.SIGTERM, lambda number, frame: (print('checkpoint'), sys.exit(3)))\ntelemetry = ",
    )
    done = warm.run("-c", handler + "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)", imported=warm.PACKAGE)
    assert (done.returncode, done.stdout) == (3, "checkpoint\n")
    assert collector.frames_received == 200


def test_sigterm_against_a_hanging_endpoint_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds; a grace period is thirty."""
    with MemoryCollector(hang=True) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        started_s = time.monotonic()
        done = ended("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)")
        assert done.returncode == -signal.SIGTERM
        assert time.monotonic() - started_s < patience(15.0)
        assert "dropped 200" in done.stderr


def test_sigterm_while_the_end_is_under_way_waits_for_it(collector: MemoryCollector) -> None:
    """A job that is told to end just as it ends."""

    def slowly(_request: object) -> None:
        time.sleep(1.0)

    collector.answer = slowly
    script = (
        "import threading\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "telemetry.close()\ntime.sleep(30)\n"
    )
    assert ended(script).returncode == -signal.SIGTERM
    assert collector.frames_received == 200


def test_a_forked_worker_dies_of_sigterm_without_a_word(collector: MemoryCollector) -> None:
    """PyTorch ends DataLoader workers with it."""
    script = (
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(30)\n"
        "time.sleep(0.2)\nos.kill(child, signal.SIGTERM)\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(os.waitstatus_to_exitcode(status))\n"
    )
    done = ended(script)
    assert done.stdout == f"{-signal.SIGTERM}\n"
    assert collector.frames_received == 200
    assert outcomes(collector) == ["completed"]
