"""``esper-otel ui``: the live page, with a receiver on the ports that training runs send to by default."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.gateway import command
from esper_otel.local_ports import GRPC_PORT, HTTP_PORT, page_at
from esper_otel.log import announce

_GRPC, _HTTP = f"127.0.0.1:{GRPC_PORT}", f"127.0.0.1:{HTTP_PORT}"
_NICENESS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel ui``."""
    parser.add_argument(
        "--grpc", default=_GRPC, metavar="HOST:PORT", help="where OTLP over gRPC is received (%(default)s)"
    )
    parser.add_argument(
        "--http", default=_HTTP, metavar="HOST:PORT", help="where the page is, and OTLP over HTTP (%(default)s)"
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="keep the steps in files, so that they survive a restart"
    )
    parser.add_argument(
        "--idle-minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="end after so many minutes without a request (never); start(ui=True) uses it",
    )


def main(options: argparse.Namespace) -> int:
    """Serves like ``esper-otel gateway --ui`` until SIGTERM or SIGINT. If the page is already open, says where.

    Raises:
        ConfigurationError: another program listens on a port, or an option cannot be used.
    """
    if not options.idle_minutes > 0:
        raise ConfigurationError(f"--idle-minutes {options.idle_minutes}: give a number above 0")
    page = page_at(options.http)
    if page is not None:
        announce("live page", f"open {page} in a browser; the page was already there")
        return 0
    if math.isfinite(options.idle_minutes):  # a training on this machine has started it, and goes first
        unix.be_nice(_NICENESS)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    store = [] if options.store is None else ["--store", str(options.store)]
    given = parser.parse_args(["--ui", "--grpc", options.grpc, "--http", options.http, *store])
    given.idle_s = options.idle_minutes * 60
    try:
        return command.main(given)
    except ConfigurationError as error:
        if (options.grpc, options.http) != (_GRPC, _HTTP):
            raise
        raise ConfigurationError(
            f"{error}; if another program needs it, type esper-otel ui --grpc 127.0.0.1:4327 --http 127.0.0.1:4328, "
            "and train with OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4327"
        ) from None
