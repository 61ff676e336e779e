"""Heat map: how long the newest steps of each rank took, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Generator

import numpy as np
import numpy.typing as npt

from esper_otel.gateway.ranks import NO_STEP, RecentSteps, Steps, Times
from esper_otel.pull.messages import RanksResponse

_MOST_COLUMNS, _MOST_CELLS = 256, 2**16
_AT_ONCE = 8  # ranks


def heat_map(recent: RecentSteps, compared: RanksResponse) -> Generator[None, None, str]:
    """Returns what the page shows of a run's ranks, as JSON, made in parts.

    Args:
        recent: the newest steps of each rank.
        compared: the comparison over the steps that all ranks have.
    """
    steps = np.sort(recent.steps, axis=None)
    steps = steps[np.diff(steps, prepend=NO_STEP).astype(bool) & (steps != NO_STEP)]
    yield
    columns = max(min(len(steps), _MOST_COLUMNS, _MOST_CELLS // max(len(recent.ranks), 1)), 1)
    begins = np.arange(columns) * len(steps) // columns
    step_ms: list[str] = []
    wait_ms: list[str] = []
    for start in range(0, len(recent.ranks), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        place = np.searchsorted(steps, recent.steps[some])
        column = np.searchsorted(begins, place, side="right") - 1
        step_ms += map(json.dumps, _largest(column, recent.steps[some], recent.step_ms[some], columns))
        yield
        wait_ms += map(json.dumps, _largest(column, recent.steps[some], recent.wait_ms[some], columns))
        yield
    of_ranks = {row.rank: row for row in compared.ranks}
    has_slowest = compared.HasField("slowest_rank")
    slowest = compared.slowest_rank if has_slowest else None
    cycles = {rank: row.cycle_ms for rank, row in of_ranks.items()}
    others = [ms for rank, ms in cycles.items() if rank != slowest]
    excess = cycles.get(slowest, math.nan) - sum(others) / len(others) if slowest is not None and others else None
    ends = np.append(begins[1:], len(steps)) - 1
    head = {
        "attempt": recent.attempt,
        "world_size": recent.world_size,
        "steps": [[int(steps[first]), int(steps[last])] for first, last in zip(begins, ends, strict=True)]
        if len(steps)
        else [],
        "ranks": recent.ranks,
        "mean_ms": [cycles.get(rank) for rank in recent.ranks],
        "slowest": slowest,
        "slowest_by": compared.slowest_by,
        "slowest_ms": excess,
    }
    text = json.dumps(head, allow_nan=False)[:-1]
    return f'{text}, "step_ms": [{", ".join(step_ms)}], "wait_ms": [{", ".join(wait_ms)}]}}'


def _largest(column: npt.NDArray[np.intp], steps: Steps, times: Times, columns: int) -> list[list[float | None]]:
    """Returns the largest finite time of each rank in each column; None where there is none."""
    found = np.full((len(times), columns), -math.inf)
    rank, place = ((steps != NO_STEP) & np.isfinite(times)).nonzero()
    np.maximum.at(found, (rank, column[rank, place]), times[rank, place])
    return [[value if value > -math.inf else None for value in row] for row in found.tolist()]
