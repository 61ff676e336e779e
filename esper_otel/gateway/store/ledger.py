"""Ledger: who takes how much of a store, and whose run has to give something up when there is no more room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from esper_otel.gateway.store.base import StoreLimits


class _Use(NamedTuple):
    """What a run takes."""

    tenant: str
    size: int
    writers: int


class _Tenant:
    """What one tenant's runs take; they are in order of their last news, and again by size."""

    def __init__(self) -> None:
        self.size = 0
        self.writers = 0
        self.runs: OrderedDict[str, None] = OrderedDict()
        self.of_size: dict[int, OrderedDict[str, None]] = {}  # by the number of bits of the size


class Ledger:
    """Sums over all runs, kept up to date, and the next run to give something up.

    When there is no more room, the tenant that takes most gives up something: whoever takes less than an equal share
    loses nothing to the others. What each operation costs does not grow with the number of runs.

    Attributes:
        size: bytes of all runs.
        writers: writers of all runs.
    """

    def __init__(self) -> None:
        self.size = 0
        self.writers = 0
        self._runs: dict[str, _Use] = {}
        self._tenants: dict[str, _Tenant] = {}

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def tenants(self) -> int:
        """How many tenants have runs."""
        return len(self._tenants)

    def note(self, run_id: str, tenant: str, size: int, writers: int, *, has_news: bool = True) -> None:
        """Notes what a run takes now; with news it is the one that was silent for the shortest time."""
        before = self._runs.get(run_id)
        if before is not None and before.tenant != tenant:
            self.forget(run_id)
            before = None
        of_tenant = self._tenants.setdefault(tenant, _Tenant())
        size_before, writers_before = (0, 0) if before is None else before[1:]
        if before is None or before.size.bit_length() != size.bit_length():
            if before is not None:
                _remove(of_tenant.of_size, before.size.bit_length(), run_id)
            of_tenant.of_size.setdefault(size.bit_length(), OrderedDict())[run_id] = None
        of_tenant.runs[run_id] = None
        if has_news:
            of_tenant.runs.move_to_end(run_id)
            of_tenant.of_size[size.bit_length()].move_to_end(run_id)
        self._runs[run_id] = _Use(tenant, size, writers)
        self._add(of_tenant, size - size_before, writers - writers_before)

    def forget(self, run_id: str) -> None:
        """The run takes nothing any more."""
        use = self._runs.pop(run_id, None)
        if use is None:
            return
        of_tenant = self._tenants[use.tenant]
        _remove(of_tenant.of_size, use.size.bit_length(), run_id)
        del of_tenant.runs[run_id]
        self._add(of_tenant, -use.size, -use.writers)
        if not of_tenant.runs:
            del self._tenants[use.tenant]

    def tenant(self, run_id: str) -> str:
        """Whose the run is; empty when it is not known."""
        use = self._runs.get(run_id)
        return "" if use is None else use.tenant

    def largest(self) -> str:
        """Of the tenant with most bytes the largest run, within a factor of two; of several the one longest silent."""
        of_size = max(self._tenants.values(), key=lambda tenant: tenant.size).of_size
        return next(iter(of_size[max(of_size)]))

    def longest_silent(self) -> tuple[str, bool]:
        """Of the tenant with most writers the run that was silent for longest, and whether it is the only one."""
        runs = max(self._tenants.values(), key=lambda tenant: tenant.writers).runs
        return next(iter(runs)), len(runs) == 1

    def _add(self, of_tenant: _Tenant, size: int, writers: int) -> None:
        of_tenant.size += size
        of_tenant.writers += writers
        self.size += size
        self.writers += writers


def _remove(of_size: dict[int, OrderedDict[str, None]], bits: int, run_id: str) -> None:
    del of_size[bits][run_id]
    if not of_size[bits]:
        del of_size[bits]


def use_of(ledger: Ledger, limits: StoreLimits) -> Mapping[str, tuple[float, float]]:
    """How much of each bound of a store is used, and the bound."""
    return {"stored bytes": (ledger.size, limits.all_bytes), "stored writers": (ledger.writers, limits.writers)}
