"""Records how much of a store each run and tenant uses, and chooses the run that loses steps when it is full."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from esper_otel.gateway.store.base import StoreLimits


class _RunUse(NamedTuple):
    """What a run uses of the store."""

    tenant: str
    size: int
    writers: int


class _Tenant:
    """What one tenant's runs use; the runs are ordered by the time they last received a step, and grouped by size."""

    def __init__(self) -> None:
        self.size = 0
        self.writers = 0
        self.runs: OrderedDict[str, None] = OrderedDict()
        self.of_size: dict[int, OrderedDict[str, None]] = {}  # by the number of bits of the size


class Ledger:
    """Keeps the sums over all runs up to date, and finds the next run to lose steps.

    When the store is full, the tenant that uses the most loses steps; a tenant that uses less than an equal share loses
    nothing to other tenants. The cost of an operation does not grow with the number of runs.

    Attributes:
        size: total size of all runs in bytes.
        writers: total number of writers of all runs.
    """

    def __init__(self) -> None:
        self.size: int = 0
        self.writers: int = 0
        self._runs: dict[str, _RunUse] = {}
        self._tenants: dict[str, _Tenant] = {}

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def tenants(self) -> int:
        """How many tenants have runs."""
        return len(self._tenants)

    def note(self, run_id: str, tenant: str, size: int, writers: int, *, has_news: bool = True) -> None:
        """Records what a run uses now. With ``has_news`` it becomes the run that received a step most recently."""
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
        self._runs[run_id] = _RunUse(tenant, size, writers)
        self._add(of_tenant, size - size_before, writers - writers_before)

    def forget(self, run_id: str) -> None:
        """Removes a run."""
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
        """Returns the tenant of a run; empty for an unknown run."""
        use = self._runs.get(run_id)
        return "" if use is None else use.tenant

    def largest(self) -> str:
        """Returns the largest run, within a factor of two, of the tenant with the most bytes.

        Of several runs it returns the one that has received nothing for longest.
        """
        of_size = max(self._tenants.values(), key=lambda tenant: tenant.size).of_size
        return next(iter(of_size[max(of_size)]))

    def longest_silent(self) -> tuple[str, bool]:
        """Returns the longest silent run of the tenant with the most writers, and whether that tenant has no other."""
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
    """Returns, for each limit of a store by name, how much of it is used, and the limit."""
    return {"stored bytes": (ledger.size, limits.all_bytes), "stored writers": (ledger.writers, limits.writers)}
