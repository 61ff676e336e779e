"""Writes a recording's steps as a CSV or Parquet table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.report.recording import Recording

KEYS: tuple[str, ...] = ("step", "epoch", "unix_s", "seed_id")
SEED_PREFIX: str = "seed."  # of the columns with the fields of seeds
_AT_ONCE = 10_000
_FEW_CELLS = 10_000_000
_MOST_EMPTY = 100  # empty cells for each cell with a value
_CSV_BEGINS = ",".join(KEYS).encode()
# Spreadsheets read text with one of these prefixes as a formula; the last four are full-width forms of the first four.
_FORMULAS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")

Cell = int | float | str | None


class _TableColumns:
    """The columns of a table, with unique names: the keys, the step metrics, and the fields of seeds."""

    def __init__(self, recording: Recording) -> None:
        steps = sorted({name for row in recording.rows for name in row.values})
        fields = sorted({field for row in recording.rows for cells in row.seeds.values() for field in cells})
        self.of_seeds = {field: f"{SEED_PREFIX}{field}" for field in fields}
        taken = {*KEYS, *self.of_seeds.values()}
        self.of_steps: dict[str, str] = {}
        for name in steps:
            column = name
            while column in taken:
                column = f"metric.{column}"
            taken.add(column)
            self.of_steps[name] = column
        self.names = [*KEYS, *self.of_steps.values(), *self.of_seeds.values()]
        rows = sum(1 + len(row.seeds) for row in recording.rows)
        there = sum(len(row.values) + sum(map(len, row.seeds.values())) for row in recording.rows)
        if rows * len(self.names) > _FEW_CELLS + _MOST_EMPTY * there:
            raise ConfigurationError(
                f"a table of this recording would have {rows} lines of {len(self.names)} columns, nearly all empty"
            )

    def lines(self, recording: Recording) -> Iterator[list[Cell]]:
        """Yields a line for each step, with an empty ``seed_id``, and one for each seed; missing values are None."""
        for row in recording.rows:
            key: dict[str, Cell] = {"step": row.step, "epoch": row.epoch, "unix_s": row.unix_s}
            values = {self.of_steps[name]: value for name, value in row.values.items()}
            yield [*map((key | {"seed_id": ""} | values).get, self.names)]
            for seed_id, cells in row.seeds.items():
                found = key | {"seed_id": seed_id} | {self.of_seeds[field]: cell for field, cell in cells.items()}
                yield [*map(found.get, self.names)]


def is_table(path: Path) -> bool:
    """Whether a file is a table that this module wrote."""
    with path.open("rb") as file:
        beginning = file.read(len(_CSV_BEGINS))
    if beginning == _CSV_BEGINS:
        return True
    if not beginning.startswith(b"PAR1"):
        return False
    try:
        from pyarrow import parquet

        return tuple(parquet.read_schema(path).names[: len(KEYS)]) == KEYS
    except Exception:  # noqa: BLE001 - a file that pyarrow cannot read was not written by this module
        return False


def write_csv(recording: Recording, path: Path) -> None:
    """Writes a CSV file. Missing values are empty cells, NaN is ``nan``, and formula-like text gets a ``'`` prefix."""
    columns = _TableColumns(recording)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(_not_a_formula, columns.names))
        writer.writerows(map(_not_a_formula, line) for line in columns.lines(recording))


def _not_a_formula(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) else cell


def write_parquet(recording: Recording, path: Path) -> None:
    """Writes a Parquet file. Missing values are null, and NaN stays NaN.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ConfigurationError("--parquet needs pyarrow: pip install 'esper-otel[parquet]'") from None
    columns = _TableColumns(recording)
    names = columns.names
    # A step without a number from its sender has a placeholder that only fits an unsigned integer.
    step = pa.uint64() if any(row.step >= 2**63 for row in recording.rows) else pa.int64()
    kinds = {"step": step, "epoch": pa.int64(), "seed_id": pa.string()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    left = columns.lines(recording)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(left, _AT_ONCE)):
            content = dict(zip(names, zip(*some, strict=True), strict=True))
            writer.write_table(pa.table(content, schema))
