"""The command ``esper-otel check``: sends a frame, and optionally a short run, to the configured endpoint."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.errors import ConfigurationError

if TYPE_CHECKING:
    from esper_otel.check.one_frame import CheckResult


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
    from esper_otel.check.one_frame import report_json, report_text

    for option in ("prometheus", "gateway"):
        if getattr(options, option) is not None and not options.through:
            raise ConfigurationError(f"--{option} is only used with --through: give that, too")
    with _leaving_in_order():
        result = _checked(options)
    sys.stdout.write(f"{report_json(result) if options.json else report_text(result)}\n")
    return 0 if result.ok else 1


def _checked(options: argparse.Namespace) -> CheckResult:
    from esper_otel.check.one_frame import run_check

    result = run_check(seeds=options.seeds, steps_per_second=options.steps_per_second)
    if not options.through:
        return result
    from esper_otel.check.in_folder import NOT_THROUGH
    from esper_otel.check.through import ReadBack, run_through

    files = (options.gateway_token_file, options.gateway_ca_file)
    back = ReadBack(options.prometheus, options.gateway, *files, timeout_s=options.within)
    more = (NOT_THROUGH,) if result.protocol == "file" else run_through(back) if result.ok else ()
    stages = (*result.stages, *more)
    return replace(result, stages=stages, ok=all(stage.ok is not False for stage in stages))


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Lets a signal that ends the process close what is open: a run that was sent for a check must end too."""
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    before = {}
    with suppress(ValueError):  # not the main thread
        for number in numbers:
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one of them
                before[number] = signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: object) -> None:
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
