"""Where the hours of a run went, as lines of text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from esper_otel.hours.bar import PRODUCTIVE, Bar, RunHours

_WIDTH = 30  # characters of the longest bar


def duration(milliseconds: float) -> str:
    """Returns a duration for people: ``350 ms``, ``12.3 s``, ``4 min 5 s``, ``3 h 20 min``."""
    seconds = milliseconds / 1e3
    if seconds < 1.0:
        return f"{milliseconds:.0f} ms"
    if seconds < 60.0:
        return f"{seconds:.1f} s"
    if seconds < 3600.0:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def title(part: str) -> str:
    """Returns a part's name for people."""
    return part.replace("_", " ")


def said(bar: Bar) -> str:
    """Returns the wall time and the productive share."""
    attempts = "1 attempt" if bar.attempts == 1 else f"{bar.attempts} attempts"
    return f"{duration(bar.wall_ms)} in {attempts}, {bar.share(PRODUCTIVE):.1%} productive"


def hours_lines(hours: RunHours) -> Iterator[str]:
    """Yields the bar of the run and, if there are several ranks, of each rank."""
    yield from bar_lines(hours.run)
    if len(hours.ranks) > 1:
        for rank, bar in hours.ranks.items():
            yield f"rank {rank}"
            yield from (f"  {line}" for line in bar_lines(bar))


def bar_lines(bar: Bar) -> Iterator[str]:
    """Yields the wall time and the productive share, then a line for each part."""
    yield said(bar)
    longest = max(map(len, bar.parts), default=0)
    for part, spent_ms in bar.parts.items():
        share = bar.share(part)
        yield f"{title(part):{longest}}  {share:6.1%}  {duration(spent_ms):>11}  {'#' * round(share * _WIDTH)}".rstrip()


def hours_as_json(hours: RunHours) -> dict[str, Any]:
    """Returns the bars and phases as plain values."""
    return {
        "run": bar_as_json(hours.run),
        "ranks": {str(rank): bar_as_json(bar) for rank, bar in hours.ranks.items()},
        "phases": [phase._asdict() for phase in hours.phases],
    }


def bar_as_json(bar: Bar) -> dict[str, Any]:
    """Returns a bar as plain values; ``parts`` are milliseconds, which add up to ``wall_ms``."""
    return {**bar._asdict(), "parts": dict(bar.parts), "wall_ms": bar.wall_ms, "goodput": bar.share(PRODUCTIVE)}
