"""Limits: how much of the gateway's resources one sender may use."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from esper_otel.errors import EsperOtelError
from esper_otel.parts.senders import MOST_ATTRIBUTES, MOST_SEEDS, MOST_TEXT_BYTES


class Crowded(EsperOtelError):
    """There is no room for another writer now. There may be room once one of them has been silent for a while."""


class SharedPlaces:
    """A pool shared by all tenants. A tenant can take a place while it has fewer places than are still free.

    Args:
        most: number of places.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: int = 0
        self._of_tenant: Counter[str] = Counter()

    def take(self, tenant: str) -> bool:
        """Takes a place; returns False if there is none for this tenant."""
        if self._of_tenant[tenant] >= self.most - self.used:
            return False
        self._of_tenant[tenant] += 1
        self.used += 1
        return True

    def left(self, tenant: str) -> int:
        """Returns how many places a tenant can still take."""
        return max((self.most - self.used - self._of_tenant[tenant] + 1) // 2, 0)

    def restore(self, tenant: str, count: int) -> None:
        """Takes ``count`` places that a tenant had before a restart."""
        self._of_tenant[tenant] += count
        self.used += count

    def give_back(self, tenant: str, count: int) -> None:
        """Returns ``count`` places of a tenant."""
        self.used -= count
        self._of_tenant[tenant] -= count
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on senders. Anything beyond them is refused or released early, and counted.

    Attributes:
        points: points of one request.
        attributes: attributes of one point, or of one Resource.
        text_bytes: length of an id or a name, in UTF-8.
        metrics: metrics of one step, without those of seeds.
        seeds: live seeds of one rank at a time.
        runs: ranks known at a time, over all runs; a further rank is asked to retry. More take more memory, and time of
            the event loop: about 10 kB and 20 us each.
        patient_s: how long a whole request is refused, to be retried, because there is no room for one of several ranks
            in it; after that, only the points of that rank are refused, for good.
        waiting: frames of one rank that wait for points, or for frames before them.
        waiting_points: points in waiting frames, over all runs.
        kept_bytes: memory for released frames that late points may still correct, over all runs.
        ends: stored ends of seeds' streams that lie in the future, over all runs.
        events: stored events of one run.
        all_events: stored events of all runs; a sender has no more of them than are still free.
        all_phases: stored phases of all runs; likewise.
        accounts: ranks and attempts, over all runs, whose hours are summed up; likewise.
        silent_s: a rank that has sent nothing for this long is forgotten.
    """

    points: int = 200_000
    attributes: int = MOST_ATTRIBUTES
    text_bytes: int = MOST_TEXT_BYTES
    metrics: int = 20_000
    seeds: int = MOST_SEEDS
    runs: int = 1_000
    patient_s: float = 60.0
    waiting: int = 20_000
    waiting_points: int = 2_000_000
    kept_bytes: int = 128 * 1024 * 1024
    ends: int = 200_000
    events: int = 10_000
    all_events: int = 100_000
    all_phases: int = 400_000
    accounts: int = 20_000
    silent_s: float = 6 * 3600.0
