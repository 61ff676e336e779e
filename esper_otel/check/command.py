"""``esper-otel check``: one frame, and a little run, on the way to the endpoint that the environment names."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from esper_otel.errors import ConfigurationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``esper-otel check``."""
    parser.add_argument("--seeds", type=_count, default=0, metavar="N", help="seeds to plan for (default: none)")
    parser.add_argument(
        "--steps-per-second", type=_rate, default=1.0, metavar="RATE", help="steps to plan for (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="the findings as one JSON object")
    through = parser.add_argument_group("the way through", "a little run, and what became of it behind the endpoint")
    through.add_argument("--through", action="store_true", help="send one, and look for it")
    through.add_argument("--prometheus", metavar="URL", help="in this Prometheus, such as http://127.0.0.1:9090")
    through.add_argument("--gateway", metavar="ADDRESS", help="at this gateway, such as 127.0.0.1:4327")
    through.add_argument("--gateway-token-file", type=Path, metavar="FILE", help="file with the gateway's token")
    through.add_argument("--gateway-ca-file", type=Path, metavar="FILE", help="who signed its certificate, PEM")
    through.add_argument("--within", type=_rate, default=30.0, metavar="S", help="how long it may take (default: 30)")


def main(options: argparse.Namespace) -> int:
    """Checks, and prints what was found; 1 where something is wrong."""
    from esper_otel.check.one_frame import report_json, report_text, run_check

    for option in ("prometheus", "gateway"):
        if getattr(options, option) is not None and not options.through:
            raise ConfigurationError(f"--{option} is where a run is looked for that went through: give --through too")
    result = run_check(seeds=options.seeds, steps_per_second=options.steps_per_second)
    if options.through:
        from esper_otel.check.through import ReadBack, run_through

        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _leave)
        files = (options.gateway_token_file, options.gateway_ca_file)
        back = ReadBack(options.prometheus, options.gateway, *files, timeout_s=options.within)
        stages = (*result.stages, *(run_through(back) if result.ok else ()))
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
