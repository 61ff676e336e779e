"""The command ``esper-otel report``."""

from __future__ import annotations

import argparse
import errno
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.frames.black_box import SUFFIX
from esper_otel.local_ports import gateway_here
from esper_otel.pull.client import TamiyoClient
from esper_otel.pull.command import rank_number
from esper_otel.report.findings import Finding, compared, findings
from esper_otel.report.page import is_page, page
from esper_otel.report.recording import Recording, names_of, of_file, of_gateway
from esper_otel.report.table import is_table, write_csv, write_parquet
from esper_otel.text import printable

_MOST_OF_A_LINE = 2_000
_MOST_OF_A_NAME = 200  # bytes; file systems allow 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel report``."""
    parser.add_argument("what", metavar="FILE|RUN", help="a black box file, or the id of a run at the gateway")
    parser.add_argument("--vs", metavar="FILE|RUN", help="another file or run, to compare step by step")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="file for the page (NAME.html or NAME-rank-N.html in this folder)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the steps to this CSV file")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="also write the steps to this Parquet file")
    parser.add_argument(
        "--force", action="store_true", help="overwrite existing files even if no report has written them"
    )
    parser.add_argument("--rank", type=rank_number, default=0, metavar="N", help="rank of the run (%(default)s)")
    add_gateway_arguments(parser)


def add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which gateway is read."""
    parser.add_argument(
        "--target",
        metavar="ADDRESS",
        help="the gateway (127.0.0.1:4327; if nobody listens there, 127.0.0.1:4317, where esper-otel ui listens)",
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the gateway's bearer token")
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="use TLS; PEM file that signed its certificate")


def gateway_client(options: argparse.Namespace) -> TamiyoClient:
    """Connects with the gateway that the options name."""
    target = options.target or gateway_here()
    return TamiyoClient(target, token_file=options.token_file, ca_file=options.ca_file, timeout_s=5.0)


def main(options: argparse.Namespace) -> int:
    """Writes the page and the requested tables, and prints the findings."""
    recording = _recording(options.what, options)
    other = None if options.vs is None else _recording(options.vs, options)
    html = options.html or _html_path(recording, is_forced=options.force)
    tables = ((options.csv, write_csv), (options.parquet, write_parquet))
    if not options.force:
        _check_ours(html, is_page if options.html else partial(is_page, recording=recording))
        for path, _ in tables:
            _check_ours(path, is_table)
    for path, write in tables:
        if path is not None:
            _written(path, partial(write, recording))
            if recording.earlier:
                _say(f"{path} has the newest attempt; the page has all {len(recording.earlier) + 1}")
    for each in _found(recording, other):
        _say(each.question)
        for line in (each.answer, *each.lines):
            _say(f"  {line}")
    _written(html, lambda path: path.write_text(page(recording, other), encoding="utf-8"))
    _say(f"the page is {html} ({_size(html)}, works offline)")
    return 0


def _found(recording: Recording, other: Recording | None) -> list[Finding]:
    """Returns the findings; if there are two runs, with the name of the run in each question."""
    if other is None:
        return findings(recording)
    both = zip((recording, other), names_of(recording, other), strict=True)
    named = [each._replace(question=f"{name}: {each.question}") for run, name in both for each in findings(run)]
    return named + compared(recording, other)


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _say(text: str) -> None:
    """Prints a line without control characters, in the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    line = printable(text, _MOST_OF_A_LINE).encode(encoding, "backslashreplace").decode(encoding)
    sys.stdout.write(f"{line}\n")


def _recording(what: str, options: argparse.Namespace) -> Recording:
    path = Path(what)
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        kind = 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # too long for a file name, but it may be the id of a run
            raise ConfigurationError(f"{what} cannot be read: {error.strerror}") from None
        kind = 0
    if kind and not stat.S_ISDIR(kind):  # a folder's name may also be the id of a run
        return of_file(path)
    if path.name.endswith(SUFFIX):
        raise ConfigurationError(f"there is no file {what}")
    if not what.isprintable():
        raise ConfigurationError(f"there is no file {what}, and this cannot be the id of a run")
    with gateway_client(options) as client:
        return of_gateway(client, what, options.rank)


def _html_path(recording: Recording, *, is_forced: bool) -> Path:
    """Returns the default file for the page. Another recording's page, or any other file, is not overwritten."""
    name = Path(recording.name).name or "report"
    name = name if len(name.encode()) <= _MOST_OF_A_NAME else recording.source
    path = Path(f"{name}.html" if recording.rank == 0 else f"{name}-rank-{recording.rank}.html")
    is_ours = is_forced or _is_free(path, partial(is_page, recording=recording))
    return path if is_ours else Path(f"{recording.source}.html")


def _is_free(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether a file can be written without losing existing data."""
    try:
        found = path.stat()
        # Writing to a terminal, a pipe or an empty file loses nothing; writing to a folder fails later with a message.
        return not stat.S_ISREG(found.st_mode) or not found.st_size or is_ours(path)
    except FileNotFoundError:
        return not path.is_symlink()  # a broken link would create a file at its target
    except PermissionError:
        return False
    except OSError:
        return True  # writing fails later with a message


def _check_ours(path: Path | None, is_ours: Callable[[Path], bool]) -> None:
    if path is not None and not _is_free(path, is_ours):
        raise ConfigurationError(
            f"{path} is there, and esper-otel report did not write it: give another name, or --force to overwrite it"
        )


def _written(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror or error}") from None
