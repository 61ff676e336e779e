"""The values of a run by metric, from a gateway, a gateway's store, a black box, or a table that ``report`` wrote."""

from __future__ import annotations

import csv
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esper_otel.compare.statistic import Values
from esper_otel.errors import ConfigurationError, UnknownRun
from esper_otel.frames.frame import Frame
from esper_otel.gateway.store.database import FILE
from esper_otel.gateway.store.sqlite import FileStore
from esper_otel.pull.client import TamiyoClient
from esper_otel.report.recording import StepRow, of_file, of_gateway
from esper_otel.report.table import KEYS, SEED_PREFIX

_PAGE = 256
_MOST_NAMED = 20
_TABLES = (".parquet", ".csv")
_MOST_NUMBERS = 50_000_000  # of a table, as of a run at a gateway


@dataclass(frozen=True, slots=True)
class Readings:
    """The values of one rank of a run.

    Attributes:
        name: of the run, or the file.
        steps: number of steps.
        series: by metric, its values in the order of the steps; steps without the metric are left out, and NaN is kept.
    """

    name: str
    steps: int
    series: Mapping[str, Values]


def read(what: str, rank: int, client: Callable[[], TamiyoClient]) -> Readings:
    """Reads a run.

    Args:
        what: a black box, a ``.parquet`` or ``.csv`` file of ``esper-otel report``, ``STORE:RUN`` with the ``--store``
            directory of a gateway, or else the id of a run at the gateway.
        rank: the rank. Files hold one only.
        client: connects with the gateway.

    Raises:
        ConfigurationError: there is no such run, or the file cannot be read.
        GatewayError: the gateway cannot be asked.
    """
    path = Path(what)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a path; it may be the id of a run
        is_file = False
    if is_file:
        return _of_table(path) if path.suffix in _TABLES else _of_rows(what, of_file(path).rows)
    folder, _, run_id = what.rpartition(":")
    if folder and run_id and os.path.lexists(Path(folder) / FILE):
        return _of_store(Path(folder), run_id, rank)
    if path.suffix in {*_TABLES, ".gz"}:
        raise ConfigurationError(f"there is no file {what}")
    if folder and Path(folder).is_dir():
        raise ConfigurationError(f"{folder} is not the --store directory of a gateway: it has no {FILE}")
    with client() as asked:
        return _of_rows(what, of_gateway(asked, what, rank).rows)


class _StepValues:
    """Collects the values of steps."""

    def __init__(self) -> None:
        self.count = 0
        self._series: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))

    def add(self, values: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in values.items():
            self._series[name].append(value)

    def readings(self, name: str) -> Readings:
        return Readings(name, self.count, {each: np.array(values) for each, values in self._series.items()})


def _of_rows(name: str, rows: Iterable[StepRow]) -> Readings:
    steps = _StepValues()
    for row in rows:
        steps.add(row.values)
    return steps.readings(name)


def _of_store(folder: Path, run_id: str, rank: int) -> Readings:
    source = FileStore(folder, read_only=True)
    try:
        found: dict[int, Frame] = {}
        cursor = ""
        while entries := (page := source.after(run_id, cursor, rank, _PAGE)).entries:
            found |= {entry.item.frame.time_unix_ns: entry.item.frame for entry in entries}  # the newest revision
            cursor = page.cursor
        known = source.run_ids()
    except UnknownRun:
        found, known = {}, source.run_ids()
    finally:
        source.close()
    if not found:
        there = ", ".join(known[:_MOST_NAMED]) or "none"
        raise ConfigurationError(f"no step of rank {rank} of run {run_id!r} is in {folder}; runs there: {there}")
    newest = max(frame.run.attempt for frame in found.values())  # as from a gateway
    steps = _StepValues()
    for _, frame in sorted(found.items()):
        if frame.run.attempt == newest:
            steps.add(frame.values())
    return steps.readings(f"{folder}:{run_id}")


def _of_table(path: Path) -> Readings:
    try:
        columns = _of_parquet(path) if path.suffix == ".parquet" else _of_csv(path)
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - anybody may have written it, and pyarrow raises errors of any type
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    if columns is None:
        raise ConfigurationError(f"{path} is not a table of esper-otel report: its first columns are not {KEYS}")
    steps, series = columns
    return Readings(str(path), steps, series)


def _of_parquet(path: Path) -> tuple[int, dict[str, Values]] | None:
    try:
        from pyarrow import compute, parquet
    except ImportError:
        raise ConfigurationError(f"{path} needs pyarrow: pip install 'esper-otel[parquet]'") from None
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if tuple(names[: len(KEYS)]) != KEYS:
            return None
        wanted = [name for name in names if name not in KEYS and not name.startswith(SEED_PREFIX)]
        if file.metadata.num_rows * (len(wanted) + 1) > _MOST_NUMBERS or _unpacked_bytes(file) > 16 * _MOST_NUMBERS:
            raise ConfigurationError(f"{path} has more than {_MOST_NUMBERS} numbers")
        table = file.read(["seed_id", *wanted])
    table = table.filter(compute.equal(table["seed_id"], ""))
    series = {name: table[name].drop_null().to_numpy().astype(np.float64) for name in wanted}
    return table.num_rows, {name: values for name, values in series.items() if len(values)}


def _unpacked_bytes(file: Any) -> int:
    """Returns how large a Parquet file says that it is when unpacked."""
    return sum(file.metadata.row_group(place).total_byte_size for place in range(file.metadata.num_row_groups))


def _of_csv(path: Path) -> tuple[int, dict[str, Values]] | None:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        names = next(lines, [])
        if tuple(names[: len(KEYS)]) != KEYS:
            return None
        steps, numbers = _StepValues(), 0
        wanted = [(at, name) for at, name in enumerate(names) if name not in KEYS and not name.startswith(SEED_PREFIX)]
        for line in lines:
            if len(line) == len(names) and not line[3]:
                values = {name: float(line[at]) for at, name in wanted if line[at]}
                numbers += len(values) + 1
                if numbers > _MOST_NUMBERS:
                    raise ConfigurationError(f"{path} has more than {_MOST_NUMBERS} numbers")
                steps.add(values)
    of_all = steps.readings(str(path))
    return of_all.steps, dict(of_all.series)
