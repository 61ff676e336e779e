"""Changes: which runs have received something since a reader last asked."""

from __future__ import annotations

from collections.abc import Iterable

_MOST = 20_000


class ChangedRuns:
    """The runs that have changed. If they are too many, all count as changed."""

    def __init__(self) -> None:
        self._runs: set[str] = set()
        self._are_all = False
        self._followers: list[ChangedRuns] = []

    def follower(self) -> ChangedRuns:
        """Returns an object for a further reader, which hears of the same changes."""
        made = ChangedRuns()
        self._followers.append(made)
        return made

    def note(self, run_ids: Iterable[str]) -> None:
        """Records that these runs have changed."""
        run_ids = tuple(run_ids) if self._followers else run_ids
        for follower in self._followers:
            follower.note(run_ids)
        self._runs.update(run_ids)
        if len(self._runs) > _MOST:
            self._runs.clear()
            self._are_all = True

    def taken(self) -> set[str] | None:
        """Returns the runs that have changed since the last call; None for all."""
        runs, are_all = self._runs, self._are_all
        self._runs, self._are_all = set(), False
        return None if are_all else runs
