"""The command ``esper-otel report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from esper_otel.client import TamiyoClient
from esper_otel.errors import ConfigurationError
from esper_otel.report.findings import compared, findings
from esper_otel.report.page import made_of, page
from esper_otel.report.recording import Recording, of_file, of_gateway
from esper_otel.report.table import write_csv, write_parquet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``esper-otel report``."""
    parser.add_argument("what", metavar="FILE|RUN", help="a black box, or a run that a gateway has")
    parser.add_argument("--vs", metavar="FILE|RUN", help="another one, to compare with step by step")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="where the page goes (NAME.html or NAME-rank-N.html in this folder)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the steps as a table")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="the same as Parquet")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="of a run at a gateway (%(default)s)")
    parser.add_argument("--target", default="127.0.0.1:4327", metavar="ADDRESS", help="the gateway (%(default)s)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the gateway's bearer token")
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="who signed its certificate, PEM: TLS")


def main(options: argparse.Namespace) -> int:
    """Writes the page and the tables that are asked for, and says what was found."""
    recording = _recording(options.what, options)
    other = None if options.vs is None else _recording(options.vs, options)
    html = options.html or _html_path(recording)
    _written(html, lambda path: path.write_text(page(recording, other), encoding="utf-8"))
    if options.csv is not None:
        _written(options.csv, lambda path: write_csv(recording, path))
    if options.parquet is not None:
        _written(options.parquet, lambda path: write_parquet(recording, path))
    found = findings(recording) + ([] if other is None else compared(recording, other))
    sys.stdout.writelines(f"{each.question}\n  {each.answer}\n" for each in found)
    sys.stdout.write(f"the page is {html}\n")
    return 0


def _recording(what: str, options: argparse.Namespace) -> Recording:
    path = Path(what)
    if path.is_file():
        return of_file(path)
    if path.suffix == ".gz":
        raise ConfigurationError(f"there is no file {what}")
    with TamiyoClient(options.target, token_file=options.token_file, ca_file=options.ca_file, timeout_s=5.0) as client:
        return of_gateway(client, what, options.rank)


def _html_path(recording: Recording) -> Path:
    """Where the page goes by default. The page of another recording there is left alone, and so is any other file."""
    name = Path(recording.name).name or "report"
    path = Path(f"{name}.html" if recording.rank == 0 else f"{name}-rank-{recording.rank}.html")
    try:
        is_free = made_of(recording) in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        is_free = True
    return path if is_free else Path(f"{recording.source}.html")


def _written(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from None
