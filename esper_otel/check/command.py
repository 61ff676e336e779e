"""The command ``esper-otel check``: sends a frame, and optionally a short run, to the configured endpoint."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from esper_otel.errors import ConfigurationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel check``."""
    parser.add_argument("--seeds", type=_count, default=0, metavar="N", help="seeds to plan for (default: none)")
    parser.add_argument(
        "--steps-per-second", type=_rate, default=1.0, metavar="RATE", help="steps to plan for (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    through = parser.add_argument_group("end to end", "send a short run and compare it with what arrives downstream")
    through.add_argument("--through", action="store_true", help="send a short run and read it back")
    through.add_argument("--prometheus", metavar="URL", help="read from this Prometheus, such as http://127.0.0.1:9090")
    through.add_argument("--gateway", metavar="ADDRESS", help="read from this gateway, such as 127.0.0.1:4327")
    through.add_argument("--gateway-token-file", type=Path, metavar="FILE", help="file with the gateway's token")
    through.add_argument("--gateway-ca-file", type=Path, metavar="FILE", help="PEM file that signed its certificate")
    through.add_argument("--within", type=_rate, default=30.0, metavar="S", help="seconds to wait (default: 30)")


def main(options: argparse.Namespace) -> int:
    """Runs the check and prints the findings; returns 1 if there is a fault, or --through cannot be done, else 0."""
    from esper_otel.check.one_frame import report_json, report_text, run_check

    for option in ("prometheus", "gateway"):
        if getattr(options, option) is not None and not options.through:
            raise ConfigurationError(f"--{option} is only used with --through: give that, too")
    result = run_check(seeds=options.seeds, steps_per_second=options.steps_per_second)
    if options.through:
        from esper_otel.check.in_folder import NOT_THROUGH
        from esper_otel.check.through import ReadBack, run_through

        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _leave)
        files = (options.gateway_token_file, options.gateway_ca_file)
        back = ReadBack(options.prometheus, options.gateway, *files, timeout_s=options.within)
        more = (NOT_THROUGH,) if result.protocol == "file" else run_through(back) if result.ok else ()
        stages = (*result.stages, *more)
        result = replace(result, stages=stages, ok=all(stage.ok is not False for stage in stages))
    sys.stdout.write(f"{report_json(result) if options.json else report_text(result)}\n")
    return 0 if result.ok else 1


def _leave(number: int, _frame: object) -> None:
    """Ends the process so that what is open is closed: a run that was sent for a check must end too."""
    sys.exit(128 + number)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return rate
