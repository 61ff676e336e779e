"""Forks of a process that has PyTorch do what Python itself does: other tests rely on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

pytest.importorskip("torch")

pytestmark = pytest.mark.own_code

# What a program sees of the way in which it was started.
LOOKS = """
import os, sys
print(__name__, sys.argv, sys.path, os.getcwd(), sorted(os.environ.items()), "torch" in sys.modules, sep="\\n")
frame = sys._getframe()
while frame.f_back is not None:
    frame = frame.f_back
print(frame.f_globals["__name__"], frame.f_code.co_name)
"""
ENDS = {
    "nothing": "",
    "a status": "import sys; sys.exit(3)",
    "words": "raise SystemExit('in words')",
    "an exception": "def fails():\n    raise KeyError('no')\nfails()",
    "a callback": "import atexit; atexit.register(print, 'at the end'); print('before')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "an interrupt": "raise KeyboardInterrupt",
    "a kill": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


def by_python(*command: str | Path, cwd: Path, env: dict[str, str]) -> warm.Done:
    words = [sys.executable, *command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    return warm.Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("way", ["script", "module", "text"])
def test_a_program_sees_what_it_sees_under_python(tmp_path: Path, way: str) -> None:
    (tmp_path / "looks.py").write_text(LOOKS, encoding="utf-8")
    ways: dict[str, list[str | Path]] = {
        "script": [tmp_path / "looks.py"],
        "module": ["-m", "looks"],
        "text": ["-c", LOOKS],
    }
    begin = ways[way]
    environ = {**os.environ, "PYTHONPATH": f"/nowhere{os.pathsep}{tmp_path}", "OF_THE_TEST": "yes"}
    done = warm.run(*begin, "one", "two", cwd=tmp_path, env=environ)
    assert done == by_python(*begin, "one", "two", cwd=tmp_path, env=environ)
    assert done.stdout


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_under_python(tmp_path: Path, end: str) -> None:
    (tmp_path / "ends.py").write_text(ENDS[end], encoding="utf-8")
    environ = dict(os.environ)
    done = warm.run(tmp_path / "ends.py", cwd=tmp_path, env=environ)
    assert done == by_python(tmp_path / "ends.py", cwd=tmp_path, env=environ)


def test_pytorch_is_there_without_being_imported_again(tmp_path: Path) -> None:
    script = "import time; t = time.process_time(); import torch; print(torch.ones(2).sum().item())\n"
    script += "assert time.process_time() - t < 0.5; print(torch.optim.SGD([torch.ones(1)], lr=0.1).defaults['lr'])"
    assert warm.run("-c", script) == (0, "2.0\n0.1\n", "")


def test_a_signal_reaches_it() -> None:
    process = warm.started("-c", "import time; print('ready', flush=True); time.sleep(300)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
