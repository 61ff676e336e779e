"""Limits: what one sender may cost the gateway."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from esper_otel.errors import EsperOtelError
from esper_otel.leyline.senders import MOST_ATTRIBUTES, MOST_SEEDS, MOST_TEXT_BYTES


class Crowded(EsperOtelError):
    """There is no room for a further writer now; there may be when another has been silent for a while."""


class SharedPlaces:
    """Places for all tenants: nobody takes more of them than are still free for the others.

    Args:
        most: how many there are.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._of_tenant: Counter[str] = Counter()

    def take(self, tenant: str) -> bool:
        """Takes one; False if there is none for this tenant."""
        if self._of_tenant[tenant] >= self.most - self.used:
            return False
        self._of_tenant[tenant] += 1
        self.used += 1
        return True

    def give_back(self, tenant: str, count: int) -> None:
        """Frees some."""
        self.used -= count
        self._of_tenant[tenant] -= count
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sender may cost the gateway; what goes beyond is refused or released early, and counted.

    Attributes:
        points: points of one request.
        attributes: attributes of one point, or of one Resource.
        text_bytes: length of an id or a name, in UTF-8.
        seeds: seeds of one run's rank that are alive at once.
        runs: ranks of runs that are known at once; a further one is asked to come again.
        patient_s: for how long a request with the points of others too is refused because of such a one; from then on
            only its own points are, for good.
        waiting: frames of one rank that wait for points or for frames before them.
        waiting_points: points in waiting frames, over all runs.
        kept_bytes: memory for released frames that a late point may still correct, over all runs.
        ends: ends of seeds' streams that are to come, over all runs.
        silent_s: a run from which nothing came for so long is forgotten.
    """

    points: int = 200_000
    attributes: int = MOST_ATTRIBUTES
    text_bytes: int = MOST_TEXT_BYTES
    seeds: int = MOST_SEEDS
    runs: int = 1_000
    patient_s: float = 60.0
    waiting: int = 20_000
    waiting_points: int = 2_000_000
    kept_bytes: int = 128 * 1024 * 1024
    ends: int = 200_000
    silent_s: float = 6 * 3600.0
