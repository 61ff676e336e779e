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
from esper_otel.pull.client import TamiyoClient
from esper_otel.report.findings import compared, findings
from esper_otel.report.page import is_page, page
from esper_otel.report.recording import Recording, of_file, of_gateway
from esper_otel.report.table import is_table, write_csv, write_parquet
from esper_otel.text import printable

_MOST_OF_A_LINE = 2_000
_MOST_OF_A_NAME = 200  # bytes: file systems take 255


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``esper-otel report``."""
    parser.add_argument("what", metavar="FILE|RUN", help="a black box, or a run that a gateway has")
    parser.add_argument("--vs", metavar="FILE|RUN", help="another one, to compare with step by step")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="where the page goes (NAME.html or NAME-rank-N.html in this folder)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the steps as a table")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="the same as Parquet")
    parser.add_argument(
        "--force", action="store_true", help="write these files even over others that no report has written"
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="of a run at a gateway (%(default)s)")
    parser.add_argument("--target", default="127.0.0.1:4327", metavar="ADDRESS", help="the gateway (%(default)s)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the gateway's bearer token")
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="who signed its certificate, PEM: TLS")


def main(options: argparse.Namespace) -> int:
    """Writes the page and the tables that are asked for, and says what was found."""
    recording = _recording(options.what, options)
    other = None if options.vs is None else _recording(options.vs, options)
    html = options.html or _html_path(recording, is_forced=options.force)
    tables = ((options.csv, write_csv), (options.parquet, write_parquet))
    if not options.force:
        _check_ours(html, is_page if options.html else partial(is_page, recording=recording))
        for path, _ in tables:
            _check_ours(path, is_table)
    _written(html, lambda path: path.write_text(page(recording, other), encoding="utf-8"))
    for path, write in tables:
        if path is not None:
            _written(path, partial(write, recording))
    found = findings(recording) + ([] if other is None else compared(recording, other))
    for each in found:
        _say(each.question)
        _say(f"  {each.answer}")
    _say(f"the page is {html}")
    return 0


def _say(text: str) -> None:
    """Prints a line as it is safe for the terminal, in the characters that it has."""
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
        if error.errno != errno.ENAMETOOLONG:  # a run may be called so
            raise ConfigurationError(f"{what} cannot be read: {error.strerror}") from None
        kind = 0
    if kind and not stat.S_ISDIR(kind):  # a run may be called as a folder is
        return of_file(path)
    if path.suffix == ".gz":
        raise ConfigurationError(f"there is no file {what}")
    if not what.isprintable():
        raise ConfigurationError(f"there is no file {what}, and no run can be called so")
    with TamiyoClient(options.target, token_file=options.token_file, ca_file=options.ca_file, timeout_s=5.0) as client:
        return of_gateway(client, what, options.rank)


def _html_path(recording: Recording, *, is_forced: bool) -> Path:
    """Where the page goes by default. The page of another recording there is left alone, and so is any other file."""
    name = Path(recording.name).name or "report"
    name = name if len(name.encode()) <= _MOST_OF_A_NAME else recording.source
    path = Path(f"{name}.html" if recording.rank == 0 else f"{name}-rank-{recording.rank}.html")
    is_ours = is_forced or _is_free(path, partial(is_page, recording=recording))
    return path if is_ours else Path(f"{recording.source}.html")


def _is_free(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Whether nothing of anybody is lost when a file is written."""
    try:
        found = path.stat()
        # A terminal, a pipe or an empty file has nothing to lose; why a folder cannot be written is said then.
        return not stat.S_ISREG(found.st_mode) or not found.st_size or is_ours(path)
    except FileNotFoundError:
        return not path.is_symlink()  # else a file would be made where the link leads to
    except PermissionError:
        return False
    except OSError:
        return True  # why it cannot be written is said when it is tried


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
