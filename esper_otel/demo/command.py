"""The command ``esper-otel demo``: its arguments, and its output as a screen, a table or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from esper_otel.demo.receiver import Receiver
    from esper_otel.demo.result import DemoResult
    from esper_otel.demo.screen import Screen

STEPS = 400
SEEDS = 3
RANDOM_SEED = 7

_EXIT_INTERRUPTED = 130
_PIPE_WIDTH = 120
_MAX_RANDOM_SEED = 2**31 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--steps", type=_whole(1), default=STEPS, metavar="N", help=f"training steps (default: {STEPS})"
    )
    parser.add_argument(
        "--seeds", type=_whole(0), default=SEEDS, metavar="N", help=f"seeds that may grow (default: {SEEDS})"
    )
    parser.add_argument(
        "--random-seed",
        type=_whole(0, _MAX_RANDOM_SEED),
        default=RANDOM_SEED,
        metavar="N",
        help=f"random seed for the weights and the order of the images (default: {RANDOM_SEED})",
    )
    parser.add_argument("--no-enrichment", action="store_true", help="leave out every gated metric and the probes")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print one JSON object at the end and nothing else")
    shape.add_argument("--ui", action="store_true", help="show the run on a live page in your browser, until Ctrl-C")


def main(arguments: argparse.Namespace) -> int:
    """Trains and prints. Returns 0 if the training has finished, even if telemetry failed; 130 after Ctrl-C."""
    from esper_otel.demo.receiver import PageReceiver, Receiver

    if not arguments.ui:
        return _trained(arguments, Receiver())
    receiver = PageReceiver()
    try:
        sys.stderr.write(f"the live page: {receiver.page}\n")
        status = _trained(arguments, receiver)
        if status == 0:
            sys.stderr.write(f"the live page stays until Ctrl-C: {receiver.page}\n")
            with suppress(KeyboardInterrupt):
                receiver.wait()
        return status
    finally:
        receiver.close()


def _trained(arguments: argparse.Namespace, receiver: Receiver) -> int:
    import torch

    from esper_otel.demo.training import Plan, run

    plan = Plan(
        steps=arguments.steps,
        seeds=arguments.seeds,
        random_seed=arguments.random_seed,
        has_enrichment=False if arguments.no_enrichment else None,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small for a second thread to help
    try:
        with _screen(sys.stderr, plan.steps) as screen:
            result = run(plan, receiver, screen.show)
    finally:
        torch.set_num_threads(threads)
    if arguments.json:
        print(json.dumps(result.as_json(), allow_nan=False))
    else:
        _print_table(result)
    _report_loss(result)
    return _EXIT_INTERRUPTED if result.is_interrupted else 0


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is too small; the minimum is {least}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"{number} is too large; the maximum is {most}")
        return number

    return parse


@contextmanager
def _screen(out: TextIO, steps: int) -> Iterator[Screen]:
    from esper_otel.demo.screen import LiveScreen, PlainScreen

    console = _console(out)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainScreen(out, steps)
        return
    with LiveScreen(steps).on(console) as screen:
        yield screen


def _console(out: TextIO) -> Console:
    from rich.console import Console

    if out.isatty():
        return Console(file=out, highlight=False)
    # Without a terminal, output has no fixed width and no control codes, even if FORCE_COLOR is set.
    return Console(file=out, highlight=False, force_terminal=False, no_color=True, width=_PIPE_WIDTH)


def _print_table(result: DemoResult) -> None:
    from esper_otel.demo.summary import draw

    draw(_console(sys.stdout), result)


def _report_loss(result: DemoResult) -> None:
    frames = result.frames
    if result.last_error is None and not frames["dropped"]:
        return
    sys.stderr.write(
        f"not everything arrived: {frames['dropped']} frames dropped, "
        f"last error: {result.last_error or 'none'}; esper-otel check finds the cause\n"
    )
