"""Python runs this before a script started by ``esper-otel run``. It then runs the user's own sitecustomize, if any."""

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
    """Restores the import paths, so that the script and its child processes see them unchanged."""
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
_told, _colon, _log = os.environ.pop(_variable, "").partition(":")
if _told == str(os.getpid()):  # this process, not its children
    from esper_otel.integrations.script import attach

    attach(_log)
_load_the_other()
