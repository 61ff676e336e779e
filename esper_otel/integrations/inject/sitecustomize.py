"""Found by Python before a script that ``esper-otel run`` has started; steps aside for the one that was there."""

import os
import sys
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_here = str(Path(__file__).resolve().parent)
_variable = "ESPER_OTEL_RUN"
_before = "ESPER_OTEL_PYTHONPATH"


def _step_aside() -> None:
    """The script, and what it starts, sees the paths that it would have seen without us."""
    with suppress(ValueError):
        sys.path.remove(_here)
    before = os.environ.pop(_before, None)
    os.environ.pop("PYTHONPATH", None)
    if before is not None:
        os.environ["PYTHONPATH"] = before


def _load_the_other() -> None:
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_step_aside()
_told, _, _log = os.environ.pop(_variable, "").partition(":")
if _told == str(os.getpid()):  # of this process, not of those that it starts
    from esper_otel.integrations.script import attach

    attach(_log)
_load_the_other()
