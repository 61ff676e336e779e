"""Changes the core in one place at a time and has its tests run; says what none of them noticed.

``make mutants`` or ``make mutants ARGS="--seconds 60 record/names.py"``. Works in a copy of the tree. Which change is
worth a test is for people to say: some make no difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

# The core's modules, each with the tests that are to notice.
CORE = {
    "record/names.py": ["record/test_tally.py", "record/test_step.py", "test_errors.py"],
    "record/seed_columns.py": ["record/test_columns.py", "record/test_seeds.py"],
    "record/clock.py": ["record/test_clock.py"],
    "frames/digest.py": ["gateway/rebuild/test_lives.py", "frames/test_live_seeds.py"],
    "frames/live_seeds.py": ["frames/test_live_seeds.py", "frames/test_frame.py"],
    "frames/ring.py": ["frames/test_ring.py"],
    "derive/dynamics.py": ["derive/test_dynamics.py", "derive/test_deriver.py"],
    "gateway/ranks.py": ["gateway/test_ranks.py"],
    "varint.py": ["test_varint.py"],
}
_MOST_S = 60.0  # for the tests of one change: one that never ends has been noticed


class Found(NamedTuple):
    """What became of the changes of one module."""

    tried: int
    left: int  # for lack of time
    unnoticed: list[str]  # as diffs


def main() -> None:
    """Prints the changes that no test noticed, as diffs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=[*CORE], help="below esper_otel; all of the core by default")
    parser.add_argument("--seconds", type=float, default=1800.0, help="time for all of them together")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has what the tests need")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("esper_otel", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for module in options.modules:
            found = changed(module, tree, options.python, options.seconds / len(options.modules))
            for diff in found.unnoticed:
                print(diff)
            left = f", {found.left} not tried for lack of time" if found.left else ""
            print(f"{module}: {len(found.unnoticed)} of {found.tried} changes unnoticed{left}", flush=True)


def changed(module: str, tree: Path, python: str, seconds: float) -> Found:
    """Tries the changes of a module, in a copy of the tree, for so long."""
    tests = " ".join(f"tests/{path}" for path in CORE[module])
    config, session = tree / "mutants.toml", tree / "mutants.sqlite"
    session.unlink(missing_ok=True)
    # The current directory comes first among those that Python imports from: before the tree that is installed.
    config.write_text(
        "[cosmic-ray]\n"
        f'module-path = "esper_otel/{module}"\n'
        f"timeout = {_MOST_S}\n"
        "excluded-modules = []\n"
        f'test-command = "{python} -m pytest -n 0 -x -q -p no:cacheprovider {tests}"\n'
        'distributor = {name = "local"}\n',
        encoding="utf-8",
    )
    tool = str(Path(sys.executable).with_name("cosmic-ray"))
    subprocess.run([tool, "init", config, session], cwd=tree, check=True)
    subprocess.run([tool, "baseline", config], cwd=tree, check=True)
    original = (tree / "esper_otel" / module).read_bytes()
    running = subprocess.Popen([tool, "exec", config, session], cwd=tree)
    try:
        running.wait(seconds)
    except subprocess.TimeoutExpired:
        running.terminate()
        running.wait()
    (tree / "esper_otel" / module).write_bytes(original)
    dumped = subprocess.run([tool, "dump", session], cwd=tree, check=True, capture_output=True, text=True).stdout
    results = [json.loads(line)[1] for line in dumped.splitlines()]
    done = [result for result in results if result is not None]
    unnoticed = [result["diff"] for result in done if result["test_outcome"] == "survived"]
    return Found(len(done), len(results) - len(done), unnoticed)


if __name__ == "__main__":
    main()
