"""The command ``esper-otel send``, which delivers spools and files of OTLP JSON lines to the configured endpoint."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.errors import ConfigurationError
from esper_otel.log import Warnings
from esper_otel.settings import EsperSettings
from esper_otel.text import printable

if TYPE_CHECKING:
    from esper_otel.export.endpoint import Endpoint
    from esper_otel.export.transport import Sender


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel send``."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="DIR|FILE", help="a spool, a directory of files, or files (.jsonl)"
    )
    parser.add_argument(
        "--within", type=_seconds, default=float("inf"), metavar="S", help="seconds to try for (default: no limit)"
    )


def main(options: argparse.Namespace) -> int:
    """Delivers everything; returns 1 if something is left, was ever refused or could not be read, else 0.

    Raises:
        ConfigurationError: a path does not exist or holds only other files, or the endpoint cannot be used.
    """
    from esper_otel.export.endpoint import endpoint_from_environment
    from esper_otel.export.folder import EVENTS, MARKER
    from esper_otel.export.opening import token_for
    from esper_otel.export.provider import events_exporter, exporters_from_environment
    from esper_otel.export.transport import open_sender
    from esper_otel.send.delivery import REFUSED, Delivery, send_spool
    from esper_otel.send.lines import signal_of

    endpoint = endpoint_from_environment(protocol=exporters_from_environment().protocol)
    settings, warnings = EsperSettings(), Warnings()
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _leave)
    deadline_s = time.monotonic() + options.within
    is_whole = True
    spools = [path for path in options.paths if (path / REFUSED).exists() or any(path.glob(f"*/{MARKER}"))]
    files = list(_files_of([path for path in options.paths if path not in spools]))

    def opened(signal: str) -> tuple[Sender, Endpoint]:
        if signal == "metrics":
            return open_sender(endpoint, settings.token_file), endpoint
        logs = endpoint_from_environment(protocol=events_exporter().protocol, signal="logs")
        return open_sender(logs, token_for(logs, endpoint, settings.token_file)), logs

    with ExitStack() as closing:
        deliveries: dict[str, Delivery] = {}
        for file in files:
            signal_there = signal_of(file)
            if signal_there not in deliveries:
                sender, there = opened(signal_there)
                closing.callback(sender.close)
                deliveries[signal_there] = Delivery(sender, there, deadline_s)
            is_whole &= deliveries[signal_there].deliver(file)
    for path in spools:  # these are newer than what was written to files
        logs = opened("logs") if any(path.glob(f"*/{EVENTS}")) else None
        is_whole &= send_spool(path, *opened("metrics"), deadline_s, warnings, logs)
    return 0 if is_whole else 1


def _files_of(paths: Iterable[Path]) -> Iterable[Path]:
    """Yields the files, oldest first in a directory. Says which directory is empty, as a spool is after a clean run."""
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if not any(path.iterdir()):
                sys.stdout.write(f"{printable(path)}: nothing to send\n")
            elif not found:
                raise ConfigurationError(f"{path} holds neither a spool nor files *.jsonl")
            yield from found
        elif path.exists():
            yield path
        else:
            raise ConfigurationError(f"{path}: there is no such file or directory")


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return seconds
