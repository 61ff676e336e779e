"""Table: a recording's steps for a notebook, as CSV or Parquet."""

from __future__ import annotations

import csv
from pathlib import Path

from esper_otel.errors import ConfigurationError
from esper_otel.report.recording import Recording

_KEYS = ("step", "epoch", "unix_s", "seed_id")


def columns(recording: Recording) -> dict[str, list[object]]:
    """A row for each step, with an empty ``seed_id``, and one for each row of a seed; None where nothing is."""
    steps = sorted({name for row in recording.rows for name in row.values})
    fields = sorted({field for row in recording.rows for cells in row.seeds.values() for field in cells})
    found: dict[str, list[object]] = {name: [] for name in (*_KEYS, *steps, *(f"seed.{field}" for field in fields))}
    for row in recording.rows:
        for seed_id in ("", *row.seeds):
            values = row.values if not seed_id else {f"seed.{field}": v for field, v in row.seeds[seed_id].items()}
            key = {"step": row.step, "epoch": row.epoch, "unix_s": row.unix_s, "seed_id": seed_id}
            for name, column in found.items():
                column.append(key.get(name, values.get(name)))
    return found


def write_csv(recording: Recording, path: Path) -> None:
    """An empty cell is missing; NaN is ``nan``."""
    table = columns(recording)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


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
    parquet.write_table(pa.table(columns(recording)), path)
