"""The command ``esper-otel files``: writes rules, dashboards and collector configurations of the installed version."""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from esper_otel._version import __version__
from esper_otel.errors import ConfigurationError
from esper_otel.files.rules import rendered
from esper_otel.files.selectors import OURS, STOCK
from esper_otel.leyline.risk import configured, threshold_of
from esper_otel.text import printable

# In a wheel they are below this folder, in a source tree in their own places.
_PACKED = Path(__file__).with_name("packed")
_SOURCES = {"collector-config": "collector-config", "prometheus": "deploy/prometheus", "grafana": "deploy/grafana"}
_RECORD = ".esper-otel-files"
_MOST_OF_A_RECORD = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel files``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write; it is created if it is not there")
    parser.add_argument(
        *("--threshold",),
        action="append",
        default=[],
        metavar="SIGNAL=VALUE",
        help="threshold of a risk signal in the rules; inf leaves its alert out; by default those of the last call",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that have been changed or are not ours")


def main(options: argparse.Namespace) -> int:
    """Writes the files. Returns 1 if some were left alone because somebody has changed them."""
    given = dict(map(threshold_of, options.threshold))
    folder: Path = options.folder
    try:
        before, thresholds = _recorded(folder)
        thresholds = given or thresholds
        wanted = contents(thresholds)
        folder.mkdir(parents=True, exist_ok=True)
        beyond = [name for name in wanted if _is_beyond_a_link(folder, name)]
        left = beyond + [
            name
            for name in wanted
            if name not in beyond and not options.force and not _is_ours(folder / name, before.get(name))
        ]
        for name, content in wanted.items():
            if name not in left:
                _write(folder / name, content)
        record = {name: _digest(content) for name, content in wanted.items() if name not in left}
        said = {"version": __version__, "thresholds": thresholds, "files": {**before, **record}}
        text = json.dumps(said, indent=1, sort_keys=True)
        _write(folder / _RECORD, f"{text}\n".encode())
    except OSError as error:
        raise ConfigurationError(f"{error.filename or folder} cannot be written: {error.strerror}") from None
    sys.stdout.write(f"{len(wanted) - len(left)} files of esper_otel {__version__} are in {printable(folder)}\n")
    if thresholds:
        listed = ", ".join(f"{name} = {value:g}" for name, value in sorted(thresholds.items()))
        sys.stdout.write(f"thresholds in the rules: {listed}\n")
    for name in left:
        why = "a folder on its way is a link" if name in beyond else "it was changed or is not from this command"
        sys.stdout.write(f"left alone, because {why}: {name}{'' if name in beyond else ' (--force)'}\n")
    return 1 if left else 0


def contents(thresholds: Mapping[str, float]) -> dict[str, bytes]:
    """Returns the content of each file by its path.

    Args:
        thresholds: thresholds of risk signals that differ from the table, by name of the signal.

    Raises:
        ConfigurationError: no signal has this name.
    """
    found = dict(_shipped())
    rules = configured(thresholds)
    for naming in (OURS, STOCK):
        path = Path("prometheus", naming.folder, "rules", "esper.yml").as_posix()
        found[path] = rendered(naming, rules).encode()
    return found


def _shipped() -> Iterator[tuple[str, bytes]]:
    root = Path(__file__).parents[2]
    for name, source in _SOURCES.items():
        folder = _PACKED / name if _PACKED.is_dir() else root / source
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def _recorded(folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Returns the digests of the files that this command has written before, and the thresholds in them."""
    path = folder / _RECORD
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigurationError(f"{path} is a link, a pipe or a folder: remove it, or give another folder")
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MOST_OF_A_RECORD))
        thresholds = {str(name): float(value) for name, value in said["thresholds"].items()}
        return {str(name): str(digest) for name, digest in said["files"].items()}, thresholds
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConfigurationError(f"{folder / _RECORD} is damaged: remove it, or give another folder") from None


def _is_ours(path: Path, digest: str | None) -> bool:
    """Whether a file may be written: it is not there, or is as this command has left it."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return False
    try:
        return _digest(path.read_bytes()) == digest
    except FileNotFoundError:
        return True


def _is_beyond_a_link(folder: Path, name: str) -> bool:
    """Whether a folder on the way to a file is a link: what is written there would be outside of ``folder``."""
    return any((folder / each).is_symlink() for each in list(Path(name).parents)[:-1])


def _write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: where a link leads, nothing is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
