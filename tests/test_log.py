"""What a user must see is seen once, however the program has set up logging."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.own_code

SAID = """
from esper_otel.log import announce
announce("started", "run digits-7")
announce("closed", "run digits-7, dropped 3", logging.WARNING)
"""
BY_US = ["esper_otel started: run digits-7", "esper_otel closed: run digits-7, dropped 3"]
BY_LOGGING = ["started: run digits-7", "closed: run digits-7, dropped 3"]

SEEN = {
    "nothing is set up": "",
    "basicConfig() shows warnings alone": "logging.basicConfig()",
    "basicConfig for errors": "logging.basicConfig(level=logging.ERROR)",
    "basicConfig for all": "logging.basicConfig(level=logging.INFO)",
    "a handler that takes warnings": "logging.basicConfig(level=1); logging.root.handlers[0].setLevel('WARNING')",
    "a handler that takes errors": "logging.basicConfig(level=1); logging.root.handlers[0].setLevel('ERROR')",
    "another library's NullHandler": "logging.getLogger().addHandler(logging.NullHandler())",
    "a NullHandler and all levels": "logging.basicConfig(level=1, handlers=[logging.NullHandler()])",
    "logging.disable": "logging.basicConfig(level=1); logging.disable()",
    "logging.disable without handlers": "logging.disable()",
    "logging.disable up to INFO": "logging.basicConfig(level=1); logging.disable(logging.INFO)",
    "our handler, at the root's level": "ours.addHandler(logging.StreamHandler())",
    "our handler and level": "ours.addHandler(logging.StreamHandler()); ours.setLevel('INFO')",
    "our handler for errors, which propagates": (
        "logging.basicConfig(level=1); ours.addHandler(logging.StreamHandler()); ours.handlers[0].setLevel('ERROR')"
    ),
    "our handler for errors, which does not": (
        "logging.basicConfig(level=1); ours.addHandler(logging.StreamHandler()); ours.handlers[0].setLevel('ERROR'); "
        "ours.propagate = False"
    ),
    "a level without handlers": "ours.setLevel('DEBUG')",
    "nothing propagates": "logging.basicConfig(level=1); ours.propagate = False",
    "dictConfig, which disables other loggers": (
        "import esper_otel.log, logging.config; logging.config.dictConfig({'version': 1, 'root': {'level': 'INFO'}})"
    ),
    "a level of all loggers": "logging.getLogger().setLevel(logging.CRITICAL)",
}
SILENCED = {
    "a level": ("ours.setLevel('CRITICAL')", []),
    "a level below the root's": ("logging.basicConfig(level=1); ours.setLevel('ERROR')", []),
    "a level for losses alone": ("logging.basicConfig(level=1); ours.setLevel('WARNING')", BY_LOGGING[1:]),
    "a level for losses alone, without handlers": ("ours.setLevel('WARNING')", BY_US[1:]),
    "a NullHandler": ("ours.addHandler(logging.NullHandler()); ours.propagate = False", []),
    "a NullHandler, where the root shows all": (
        "logging.basicConfig(level=1); ours.addHandler(logging.NullHandler())",
        BY_LOGGING,
    ),
}


def said(set_up: str, script: str = SAID) -> list[str]:
    """The lines on standard error of a program that logs like this; a line of logging without what comes before."""
    code = f"import logging, sys\nours = logging.getLogger('esper_otel')\n{set_up}\n{script}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == ""
    return [line.partition(":esper_otel:")[2] or line for line in done.stderr.splitlines()]


@pytest.mark.parametrize("set_up", SEEN.values(), ids=SEEN)
def test_start_end_and_losses_are_seen_once(set_up: str) -> None:
    """By logging or by us, never by both and never by none."""
    lines = said(set_up)
    assert [line.removeprefix("esper_otel ") for line in lines] == BY_LOGGING


def test_they_go_through_logging_where_that_shows_them() -> None:
    """What the program does with its log, it does with ours."""
    assert said("logging.basicConfig(level=logging.INFO)") == BY_LOGGING
    assert said("logging.basicConfig()") == [BY_US[0], BY_LOGGING[1]]
    assert said("") == BY_US


@pytest.mark.parametrize(("set_up", "lines"), SILENCED.values(), ids=SILENCED)
def test_who_turns_our_logger_down_is_obeyed(set_up: str, lines: list[str]) -> None:
    """By its name, which can only be on purpose."""
    assert said(set_up) == lines


@pytest.mark.parametrize("gone", ["sys.stderr = None", "sys.stderr.close()", "import os; os.close(2)"])
def test_a_program_without_standard_error_goes_on(gone: str) -> None:
    """A daemon has none."""
    assert (
        said(f"logging.basicConfig()\n{gone}", "from esper_otel.log import announce\nannounce('started', 'run')") == []
    )


def test_a_whole_session_under_basic_config_says_its_run_its_losses_and_its_end(tmp_path: Path) -> None:
    """The commonest first line of a training script."""
    script = (
        "import logging, esper_otel\n"
        "logging.basicConfig()\n"
        "telemetry = esper_otel.start(run_id='digits-7')\n"
        "telemetry.record_step({'loss': float('nan')}, epoch=0)\n"
        "telemetry.close(timeout_s=0.2, outcome='KeyError')\n"
    )
    environ = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "ESPER_BLACK_BOX_FRAMES": "16",
        "ESPER_BLACK_BOX_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    for words in ("started: run digits-7", "KeyError; the last step is in", "closed: run digits-7 KeyError"):
        assert done.stderr.count(words) == 1, done.stderr
    assert "WARNING:esper_otel:closed: run digits-7 KeyError, frames recorded 1, exported 0, dropped 1" in done.stderr
