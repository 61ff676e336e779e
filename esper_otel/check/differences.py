"""Describes differences between sent and received values in words, each with a possible cause."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from esper_otel.check.stages import Difference

_UNITS = {
    "whole seconds": 10**9,
    "tenths of a second": 10**8,
    "hundredths of a second": 10**7,
    "whole milliseconds": 10**6,
    "whole microseconds": 10**3,
}
_MOST = 4


def differences(sent: Mapping[str, float | str], came: Mapping[str, float | str], where: str) -> Iterator[Difference]:
    """Yields the differences between two sets of named values; the most informative first."""
    lost = sorted(sent.keys() - came.keys(), key=_rank)
    more = sorted(came.keys() - sent.keys(), key=_rank)
    changed = [name for name in sorted(sent.keys() & came.keys(), key=_rank) if not _is_same(sent[name], came[name])]
    renamed = next(((old, new) for old in lost for new in more if _is_same(sent[old], came[new])), None)
    if renamed is not None and not renamed[0].startswith("seed "):
        yield _of_renamed(*renamed, where)
    if {*more} and {*more} <= {"esper.isolation.violations", "esper.training.loss"}:
        yield Difference(
            f"esper.frame.sequence did not arrive, in {where}: the step looks like one of a program that does not "
            "number its steps",
            "a filter on the way drops it",
        )
    if lost:
        yield _of_lost(lost, sent, where)
    if changed:
        before, after = sent[changed[0]], came[changed[0]]
        is_replaced = isinstance(before, float) and not math.isfinite(before)
        fix = "replaces values that are not finite" if is_replaced else "changes values"
        yield Difference(f"{changed[0]} was {_compared(before, after)}, in {where}", f"a processor on the way {fix}")
    if more and more[0].startswith("seed "):
        yield Difference(
            f"{more[0]} is still alive in {where}, although it was retired", "a filter drops esper.seed.retired"
        )
    if more:
        what = f"{more[0]} was not recorded, and arrived as {came[more[0]]}, in {where}"
        yield Difference(what, "something on the way adds metrics, or fills gaps")


def _of_renamed(old: str, new: str, where: str) -> Difference:
    (metric, _, seed), (other_metric, _, other_seed) = old.partition(" of seed "), new.partition(" of seed ")
    if metric == other_metric:
        what = f"seed {seed} arrived as seed {other_seed}, in {where}"
        return Difference(what, "a transform on the way changes the attribute seed_id of the points")
    return Difference(f"{old} arrived as {new}, in {where}", "a transform on the way renames metrics")


def _of_lost(lost: Sequence[str], sent: Mapping[str, float | str], where: str) -> Difference:
    values = [sent[name] for name in lost]
    if all(isinstance(value, float) and not math.isfinite(value) for value in values):
        what = f"{lost[0]} was {values[0]} and did not arrive, in {where}"
        return Difference(what, "something on the way drops values that are not finite")
    fix = "a filter on the way drops it, or a limit of series"
    if all(" of seed " in name or name.startswith("seed ") for name in lost):
        fix += ", or a grouping takes the attribute seed_id from the points"
    return Difference(f"{_listed(lost)} did not arrive, in {where}", fix)


def of_times(sent: Collection[tuple[int, int]], came: Collection[tuple[int, int]]) -> Iterator[Difference]:
    """Yields differences for received times that were not sent. Times come as pairs with their ranks.

    It recognizes times that were cut to a unit, and times that were all shifted.
    """
    odd = sorted({*came} - {*sent})
    if not odd:
        return
    fix = "a transform on the way cuts or changes times"
    times = {time_ns for _, time_ns in sent}
    for unit, size in _UNITS.items():
        cut = {(time_ns + more) // size * size for time_ns in times for more in (0, size // 2)}
        if all(time_ns in cut for _, time_ns in odd):
            what = f"the times of steps were cut to {unit}, and were sent to the nanosecond"
            yield Difference(what, f"{fix}; steps within one such unit become one")
    away_ns = odd[0][1] - min(time_ns for rank, time_ns in sent if rank == odd[0][0])
    if {*came} == {(rank, time_ns + away_ns) for rank, time_ns in sent}:
        yield Difference(f"the times of all steps arrived {away_ns / 1e9:+.9f} s away from what was sent", fix)
    yield Difference(f"a step of rank {odd[0][0]} arrived with a time that no step was sent with: {odd[0][1]} ns", fix)


def of_end(others: Collection[str]) -> Difference:
    """Describes that the end of a run did not arrive, or arrived with another outcome than ``completed``."""
    if others:
        what = f"esper.run.ended had the outcome completed and arrived with {min(others) or 'none'}"
        return Difference(what, "a transform on the way changes the attribute outcome of the points, or deletes it")
    return Difference(
        "esper.run.ended did not arrive: readers see a run that has not ended",
        "a filter on the way drops it, or drops the scope esper_otel.health",
    )


def steps_in_words(steps: Sequence[int]) -> str:
    """Lists the first few step numbers."""
    return _listed([str(step) for step in sorted({*steps})])


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(names[:_MOST])
    return some if len(names) <= _MOST else f"{some} and {len(names) - _MOST} more"


def _is_same(one: float | str, other: float | str) -> bool:
    return one == other or (one != one and other != other)  # noqa: PLR0124 - NaN is NaN


def _rank(name: str) -> tuple[bool, str]:
    """Sorts values that a user recorded before those that this library adds."""
    return name.startswith(("esper.", "seed ")), name


def _compared(before: float | str, after: float | str) -> str:
    """Shows both values with few digits, or in full if they would look the same."""
    short = [f"{value:.6g}" if isinstance(value, float) else value for value in (before, after)]
    one, other = short if short[0] != short[1] else (before, after)
    return f"{one} and arrived as {other}"
