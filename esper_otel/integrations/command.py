"""The command ``esper-otel run``, which records a training script without changes to it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_INJECTED = Path(__file__).resolve().parent / "inject"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel run``."""
    parser.add_argument("--run-id", metavar="NAME", help="name of the run (ESPER_RUN_ID, the launcher's, or generated)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="file for the telemetry's log (none)")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the script; processes that it starts are not recorded")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def main(options: argparse.Namespace) -> int:
    """Replaces this process by Python running the script. Returns only if Python cannot be started.

    Raises:
        ConfigurationError: a setting is invalid. This is checked here because telemetry later leaves the script's
            output streams alone.
    """
    from esper_otel.session.environment import check_environment

    environ = dict(os.environ)
    # gRPC reads this variable when it is loaded. Without it, it may complain that this process is replaced while it
    # starts a thread.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    check_environment()
    # The page, if one is asked for, is open now.
    environ = {name: text for name, text in environ.items() if name.upper() != "ESPER_UI"}
    before = environ.get("PYTHONPATH")
    if before is not None:
        environ["ESPER_OTEL_PYTHONPATH"] = before
    # An empty entry in PYTHONPATH means the current directory; an empty variable has no entries.
    environ["PYTHONPATH"] = os.pathsep.join([str(_INJECTED), *([before] if before else [])])
    environ["ESPER_OTEL_RUN"] = f"{os.getpid()}:{'' if options.log is None else options.log.absolute()}"
    if options.run_id is not None:
        environ["ESPER_RUN_ID"] = options.run_id
    command = [sys.executable, *(["-m"] if options.is_module else []), options.script, *options.arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environ)  # noqa: S606 - the user asked for it
