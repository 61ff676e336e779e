"""The command line: ``esper-otel COMMAND``. A command's own imports happen when it is chosen."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from esper_otel._version import __version__
from esper_otel.errors import ConfigurationError, EsperOtelError
from esper_otel.text import printable

_PROGRAM = "esper-otel"
_EXIT_MISTAKE = 2
# What a shell reports for a process that SIGPIPE or SIGINT ended.
_EXIT_BROKEN_PIPE = 141
_EXIT_INTERRUPTED = 130
_NO_WIDTH = 10_000
_MOST_OF_A_MESSAGE = 2_000
_DEMO_PACKAGES = {"torch": "torch", "sklearn": "scikit-learn"}
_GATEWAY_PACKAGES = {
    "aiohttp": "aiohttp",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
}


class _MissingExtra(EsperOtelError):
    """A command whose optional packages are not installed; the message is the command that installs them."""


class _Command(NamedTuple):
    """A subcommand: ``add_arguments`` is called when it is chosen, ``run`` gives the exit status."""

    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 the answer is no, 2 a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            options = build_parser(arguments).parse_args(arguments)
            return _COMMANDS[options.command].run(options)
        finally:
            sys.stdout.flush()
    except EsperOtelError as error:
        sys.stderr.write(f"{_PROGRAM}: {printable(' '.join(str(error).split()), _MOST_OF_A_MESSAGE)}\n")
        return _EXIT_MISTAKE
    except BrokenPipeError:  # as in `esper-otel schema | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to say at exit either
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the one that ``arguments`` chooses."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="OpenTelemetry for training runs that a controller can steer by.",
        epilog="example:\n  esper-otel check --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in _COMMANDS.items():
        of_command = parsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            command.add_arguments(of_command)
    return parser


# -- run -------------------------------------------------------------------------------------------------


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    from esper_otel.integrations.run import add_arguments

    add_arguments(parser)


def _run_script(options: argparse.Namespace) -> int:
    from esper_otel.integrations.run import main as run

    return run(options)


# -- report ----------------------------------------------------------------------------------------------


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    from esper_otel.report.command import add_arguments

    add_arguments(parser)


def _run_report(options: argparse.Namespace) -> int:
    from esper_otel.report.command import main as report

    return report(options)


# -- schema ----------------------------------------------------------------------------------------------


def _add_schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="a list of objects, one per metric, with its whole contract"
    )


def _run_schema(options: argparse.Namespace) -> int:
    from esper_otel.schema.render import schema_json

    print(schema_json() if options.json else _schema_text())
    return 0


def _schema_text() -> str:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from esper_otel.schema import METRICS

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("metric", "unit", "level", "gated", "needs"):
        table.add_column(head, no_wrap=True)
    table.add_column("description", overflow="fold")
    for metric in METRICS:
        gated = "gated" if metric.gated else ""
        table.add_row(
            metric.name, metric.unit, metric.level, gated, ", ".join(metric.needs), escape(metric.description)
        )
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: one line per metric, nothing cut
        console = Console(width=_NO_WIDTH)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


# -- demo ------------------------------------------------------------------------------------------------


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    with _hint_when_missing("demo", _DEMO_PACKAGES):
        from esper_otel.demo.command import add_arguments
    add_arguments(parser)


def _run_demo(options: argparse.Namespace) -> int:
    with _hint_when_missing("demo", _DEMO_PACKAGES):
        from esper_otel.demo.command import main as run_demo

        return run_demo(options)


@contextmanager
def _hint_when_missing(extra: str, packages: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = packages.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise _MissingExtra(f'the {extra} needs {package}: pip install "esper-otel[{extra}]"') from None


# -- gateway ---------------------------------------------------------------------------------------------


def _add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    # gRPC reads it when it is loaded. Without it a server logs each handshake that fails, as often as a stranger likes.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with _hint_when_missing("gateway", _GATEWAY_PACKAGES):
        from esper_otel.gateway.command import add_arguments
    add_arguments(parser)


def _run_gateway(options: argparse.Namespace) -> int:
    from esper_otel.gateway.command import main as run_gateway

    return run_gateway(options)


def _add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    from esper_otel.gateway.follow import add_arguments

    add_arguments(parser)


def _run_pull(options: argparse.Namespace) -> int:
    from esper_otel.gateway.follow import main as run_pull

    return run_pull(options)


def _add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    with _hint_when_missing("gateway", _GATEWAY_PACKAGES):
        from esper_otel.gateway.replay import add_arguments
    add_arguments(parser)


def _run_replay(options: argparse.Namespace) -> int:
    from esper_otel.gateway.replay import main as run_replay

    return run_replay(options)


# -- check -----------------------------------------------------------------------------------------------


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
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


def _leave(number: int, _frame: object) -> None:
    """Ends the process so that what is open is closed: a run that was sent for a check must end too."""
    sys.exit(128 + number)


def _run_check(options: argparse.Namespace) -> int:
    from esper_otel.check import report_json, report_text, run_check

    for option in ("prometheus", "gateway"):
        if getattr(options, option) is not None and not options.through:
            raise ConfigurationError(f"--{option} is where a run is looked for that went through: give --through too")
    result = run_check(seeds=options.seeds, steps_per_second=options.steps_per_second)
    if options.through:
        from esper_otel.through import Back, run_through

        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _leave)
        files = (options.gateway_token_file, options.gateway_ca_file)
        back = Back(options.prometheus, options.gateway, *files, timeout_s=options.within)
        stages = (*result.stages, *(run_through(back) if result.ok else ()))
        result = replace(result, stages=stages, ok=all(stage.ok is not False for stage in stages))
    print(report_json(result) if options.json else report_text(result))
    return 0 if result.ok else 1


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


_COMMANDS = {
    "demo": _Command(
        "train a network that grows, steered by its own telemetry",
        "esper-otel demo --steps 200",
        _add_demo_arguments,
        _run_demo,
    ),
    "check": _Command(
        "send one frame to the endpoint that the environment names, and say what is wrong, if anything is",
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 esper-otel check --seeds 100 --steps-per-second 5",
        _add_check_arguments,
        _run_check,
    ),
    "gateway": _Command(
        "receive OTLP from training runs, and let controllers pull Leyline packets",
        "esper-otel gateway --store ./steps",
        _add_gateway_arguments,
        _run_gateway,
    ),
    "pull": _Command(
        "print the packets of a run, or the runs, that a gateway has",
        "esper-otel pull digits-7 --follow --json",
        _add_pull_arguments,
        _run_pull,
    ),
    "replay": _Command(
        "serve a stored run again, as it came or with what a controller must stand",
        "esper-otel replay ./steps digits-7 --speed 10 --inject gap,nan",
        _add_replay_arguments,
        _run_replay,
    ),
    "report": _Command(
        "what happened in a run: one page from a black box or from a gateway, and tables",
        "esper-otel report /tmp/esper-otel-1000/digits-7-0-1790000000000-KeyError.esper.jsonl.gz",
        _add_report_arguments,
        _run_report,
    ),
    "run": _Command(
        "run a training script as it is, and send what can be measured of it from outside",
        "esper-otel run --run-id digits-7 train.py --epochs 3",
        _add_run_arguments,
        _run_script,
    ),
    "schema": _Command(
        "list every metric: name, unit, gate, needs and meaning",
        "esper-otel schema --json",
        _add_schema_arguments,
        _run_schema,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
