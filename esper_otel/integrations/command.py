"""The command ``esper-otel run``: a training script that is not to be edited."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_INJECTED = Path(__file__).resolve().parent / "inject"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``esper-otel run``."""
    parser.add_argument("--run-id", metavar="NAME", help="name of the run (ESPER_RUN_ID, the launcher's, or made up)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where the telemetry says what it does (nowhere)")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the script; processes that it starts are not followed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def main(options: argparse.Namespace) -> int:
    """Becomes Python with the script; comes back only if that cannot be started.

    Raises:
        ConfigurationError: a setting that cannot be used: said now, since the script's own streams are left alone.
    """
    from esper_otel.session.start import check_environment

    check_environment()
    environ = dict(os.environ)
    before = environ.get("PYTHONPATH")
    if before is not None:
        environ["ESPER_OTEL_PYTHONPATH"] = before
    # An empty part of a list is the current directory; a variable that is empty as a whole is no list.
    environ["PYTHONPATH"] = os.pathsep.join([str(_INJECTED), *([before] if before else [])])
    environ["ESPER_OTEL_RUN"] = f"{os.getpid()}:{'' if options.log is None else options.log.absolute()}"
    if options.run_id is not None:
        environ["ESPER_RUN_ID"] = options.run_id
    command = [sys.executable, *(["-m"] if options.is_module else []), options.script, *options.arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environ)  # noqa: S606 - it is what the user asked for
