"""The command line: ``esper-otel COMMAND``. The module of a command is imported only when the command is used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from esper_otel._version import __version__
from esper_otel.errors import EsperOtelError
from esper_otel.text import printable

_PROGRAM = "esper-otel"
_EXIT_MISTAKE = 2
# The statuses that a shell reports for a process ended by SIGPIPE or SIGINT.
_EXIT_BROKEN_PIPE = 141
_EXIT_INTERRUPTED = 130
_MOST_OF_A_MESSAGE = 2_000


class _Subcommand(NamedTuple):
    """A subcommand.

    Its module defines ``add_arguments(parser)`` and ``main(options)``, which returns the exit status. ``extra`` names
    the optional packages that it needs.
    """

    module: str
    summary: str
    example: str
    extra: str = ""


_COMMANDS = {
    "demo": _Subcommand(
        "esper_otel.demo.command",
        "train a network that grows, controlled by its own telemetry",
        "esper-otel demo --steps 200",
        extra="demo",
    ),
    "check": _Subcommand(
        "esper_otel.check.command",
        "send one frame to the endpoint set in the environment, and report problems",
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 esper-otel check --seeds 100 --steps-per-second 5",
    ),
    "gateway": _Subcommand(
        "esper_otel.gateway.command",
        "receive OTLP from training runs, and let controllers pull Leyline packets",
        "esper-otel gateway --store ./steps",
        extra="gateway",
    ),
    "serve": _Subcommand(
        "esper_otel.gateway.kafka.command",
        "let controllers pull Leyline packets from a tier on Kafka; any number of these may run",
        "esper-otel serve --kafka kafka-1:9092,kafka-2:9092",
        extra="kafka",
    ),
    "ui": _Subcommand(
        "esper_otel.gateway.ui",
        "show the runs of this machine on a live page in the browser; nothing needs to be set",
        "esper-otel ui",
        extra="ui",
    ),
    "pull": _Subcommand(
        "esper_otel.pull.command",
        "print the packets of a run from a gateway, or list its runs",
        "esper-otel pull digits-7 --follow --json",
    ),
    "replay": _Subcommand(
        "esper_otel.gateway.replay",
        "serve a stored run again, unchanged or with the faults a controller must withstand",
        "esper-otel replay ./steps digits-7 --speed 10 --inject gap,nan",
        extra="gateway",
    ),
    "report": _Subcommand(
        "esper_otel.report.command",
        "show what happened in a run: one page and tables, from a black box or a gateway",
        "esper-otel report /tmp/esper-otel-1000/digits-7-0-1790000000000-KeyError.esper.steps",
    ),
    "compare": _Subcommand(
        "esper_otel.compare.command",
        "compare two runs, and fail if one has become worse: a gate for continuous integration",
        'esper-otel compare digits-8 digits-7 --fail-if "step_latency_ms.p50 > 1.05x"',
    ),
    "files": _Subcommand(
        "esper_otel.files.command",
        "write rules, dashboards and collector configurations of this version, with thresholds of your own",
        "esper-otel files ./monitoring --threshold hook_budget=80",
    ),
    "run": _Subcommand(
        "esper_otel.integrations.command",
        "run an unmodified training script and send the metrics that can be measured from outside",
        "esper-otel run --run-id digits-7 train.py --epochs 3",
    ),
    "send": _Subcommand(
        "esper_otel.send.command",
        "deliver what sessions have left in a spool, or in files, to the endpoint set in the environment",
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 esper-otel send ./steps",
    ),
    "schema": _Subcommand(
        "esper_otel.schema.command",
        "list every metric: name, unit, gate, needs and meaning",
        "esper-otel schema --json",
    ),
}
# For each extra: the module to import, and the name of its package.
_PACKAGES = {
    "demo": {"torch": "torch", "sklearn": "scikit-learn"},
    "gateway": {
        "aiohttp": "aiohttp",
        "grpc_health": "grpcio-health-checking",
        "grpc_reflection": "grpcio-reflection",
    },
    "kafka": {
        "confluent_kafka": "confluent-kafka",
        "aiohttp": "aiohttp",
        "grpc_health": "grpcio-health-checking",
        "grpc_reflection": "grpcio-reflection",
    },
}


class _MissingExtra(EsperOtelError):
    """The optional packages of a command are not installed; the message contains the command that installs them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 for success, 1 for a negative result, 2 for a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            options = build_parser(arguments).parse_args(arguments)
            with _hint_when_missing(_COMMANDS[options.command].extra):
                status: int = _module(options.command).main(options)
            return status
        finally:
            sys.stdout.flush()
    except EsperOtelError as error:
        sys.stderr.write(f"{_PROGRAM}: {printable(' '.join(str(error).split()), _MOST_OF_A_MESSAGE)}\n")
        return _EXIT_MISTAKE
    except BrokenPipeError:  # as in `esper-otel schema | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit does not fail
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser for all commands, with the arguments of the command in ``arguments``."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="OpenTelemetry for training runs, built so that a controller can act on it.",
        epilog="example:\n  esper-otel check --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_CommandParser)
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
            with _hint_when_missing(command.extra):
                _module(name).add_arguments(of_command)
    return parser


class _CommandParser(argparse.ArgumentParser):
    """The parser of a command: for an option that the command does not have, it prints the usage of the command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def _module(name: str) -> Any:
    command = _COMMANDS[name]
    if command.extra in {"gateway", "kafka"}:
        # gRPC reads this variable when it is loaded. Without it, a server logs every failed handshake of any client.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return import_module(command.module)


@contextmanager
def _hint_when_missing(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(extra, {}).get((error.name or "").partition(".")[0])
        if package is None:
            raise
        what = "Kafka" if extra == "kafka" else f"the {extra}"
        raise _MissingExtra(f'{what} needs {package}: pip install "esper-otel[{extra}]"') from None


if __name__ == "__main__":
    sys.exit(main())
