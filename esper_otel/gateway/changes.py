"""Changes: which runs have received something since the live page last asked."""

from __future__ import annotations

from collections.abc import Iterable

_MOST = 20_000


class ChangedRuns:
    """The runs that have changed. If they are too many, all count as changed."""

    def __init__(self) -> None:
        self._runs: set[str] = set()
        self._are_all = False

    def note(self, run_ids: Iterable[str]) -> None:
        """Records that these runs have changed."""
        self._runs.update(run_ids)
        if len(self._runs) > _MOST:
            self._runs.clear()
            self._are_all = True

    def taken(self) -> set[str] | None:
        """Returns the runs that have changed since the last call; None for all."""
        runs, are_all = self._runs, self._are_all
        self._runs, self._are_all = set(), False
        return None if are_all else runs
