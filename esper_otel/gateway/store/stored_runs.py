"""What a store knows of its runs without reading steps, in memory and in a file alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from esper_otel.gateway.items import Origin
from esper_otel.gateway.store.base import Store, StoreLimits
from esper_otel.gateway.store.ledger import Ledger, use_of

# Approximate size of a run, of each of its writers and of each of its ranks, in addition to their frames.
_RUN_BYTES, _WRITER_BYTES, _RANK_BYTES = 4_096, 1_024, 256


class StoredRun:
    """What is known of one stored run.

    Attributes:
        life: the id of the run's store.
        tenant: the tenant whose share it uses.
        added_s: when it last received something, by the store's clock.
        frame_bytes: the approximate size of its frames.
        losses: the loss of each writer's newest step.
        counts: how many entries each writer has.
        outcomes: how its writers ended.
        ranks: what is known of each rank.
    """

    ranks: Mapping[int, object]

    def __init__(self, life: str, tenant: str) -> None:
        self.life = life
        self.tenant = tenant
        self.added_s: float = 0.0
        self.frame_bytes: int = 0
        self.losses: dict[Origin, float | None] = {}
        self.counts: Counter[Origin] = Counter()
        self.outcomes: dict[Origin, str] = {}

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        of_writers = _WRITER_BYTES * max(len(self.counts), len(self.outcomes)) + _RANK_BYTES * len(self.ranks)
        return _RUN_BYTES + of_writers + self.frame_bytes


Run = TypeVar("Run", bound=StoredRun)


class RunStore(Store, Generic[Run]):
    """A store within limits, which knows its runs. See ``Store``."""

    def __init__(self, limits: StoreLimits | None, clock: Callable[[], float]) -> None:
        super().__init__()
        self._limits = limits or StoreLimits()
        self._clock = clock
        self._runs: dict[str, Run] = {}
        self._ledger = Ledger()

    @property
    def size(self) -> int:
        """Approximate size of the entries in bytes."""
        return self._ledger.size

    def age_s(self) -> float:
        """Returns a time in seconds that never jumps. See ``Store``."""
        return self._clock()

    def holds(self, run_id: str) -> bool:
        """Whether a step of the run is stored. See ``Store``."""
        return run_id in self._runs

    def run_ids(self) -> list[str]:
        """Returns the ids of the stored runs."""
        return sorted(self._runs)

    def counts(self, run_id: str | None = None) -> dict[Origin, int]:
        """Returns how many entries each writer has. See ``Store``."""
        return {origin: count for run in self._of(run_id) for origin, count in run.counts.items() if count}

    def outcomes(self, run_id: str | None = None) -> dict[Origin, str]:
        """Returns how the stored runs ended. See ``Store``."""
        return {origin: outcome for run in self._of(run_id) for origin, outcome in run.outcomes.items()}

    def tenant(self, run_id: str) -> str:
        """Returns the tenant whose share a run uses. See ``Store``."""
        return self._ledger.tenant(run_id)

    def use(self) -> Mapping[str, tuple[float, float]]:
        """Returns how much of each limit is used. See ``Store``."""
        return use_of(self._ledger, self._limits)

    def _of(self, run_id: str | None) -> Iterable[Run]:
        if run_id is None:
            return self._runs.values()
        return [self._runs[run_id]] if run_id in self._runs else []
