"""Table: a recording's steps for a notebook, as CSV or Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.report.recording import Recording

_KEYS = ("step", "epoch", "unix_s", "seed_id")
_AT_ONCE = 10_000

Cell = int | float | str | None


def header(recording: Recording) -> list[str]:
    """The names of the columns."""
    steps = sorted({name for row in recording.rows for name in row.values})
    fields = sorted({field for row in recording.rows for cells in row.seeds.values() for field in cells})
    return [*_KEYS, *steps, *(f"seed.{field}" for field in fields)]


def lines(recording: Recording, names: list[str]) -> Iterator[list[Cell]]:
    """A line for each step, with an empty ``seed_id``, and one for each row of a seed; None where nothing is."""
    for row in recording.rows:
        key: dict[str, Cell] = {"step": row.step, "epoch": row.epoch, "unix_s": row.unix_s, "seed_id": ""}
        yield [*map((key | row.values).get, names)]
        for seed_id, cells in row.seeds.items():
            found = key | {"seed_id": seed_id} | {f"seed.{field}": cell for field, cell in cells.items()}
            yield [*map(found.get, names)]


def write_csv(recording: Recording, path: Path) -> None:
    """An empty cell is missing; NaN is ``nan``."""
    names = header(recording)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(lines(recording, names))


def write_parquet(recording: Recording, path: Path) -> None:
    """A null is missing; NaN is NaN.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ConfigurationError("--parquet needs pyarrow: pip install 'esper-otel[parquet]'") from None
    names = header(recording)
    kinds = {"step": pa.int64(), "epoch": pa.int64(), "seed_id": pa.string()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    left = lines(recording, names)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(left, _AT_ONCE)):
            columns = dict(zip(names, zip(*some, strict=True), strict=True))
            writer.write_table(pa.table(columns, schema))
