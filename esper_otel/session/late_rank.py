"""The rank of a process whose group of ``torch.distributed`` was made after the session had begun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from esper_otel.frames.frame import Run
from esper_otel.log import Warnings
from esper_otel.session.agreement import Agreement
from esper_otel.session.identity import is_told, joined, of_group
from esper_otel.session.launcher import run_id_of_environment
from esper_otel.settings import EsperSettings

_LATE = (
    "torch.distributed says at the first step that this process is rank %d of %d, but %s: call init_process_group "
    "before start(), or give start(rank=..., world_size=..., run_id=...)"
)


class LateRank:
    """Looks for a group at the first step, before which nothing is sent that names the rank.

    Args:
        identity: the arguments that name the run and the rank.
        settings: the settings.
        warnings: where what comes too late is reported.
        has_readers: whether there are readers of a MeterProvider, which have been told who they are of.

    Attributes:
        has_readers: the same; it may become true later.
    """

    def __init__(
        self, identity: Mapping[str, Any], settings: EsperSettings, warnings: Warnings, *, has_readers: bool
    ) -> None:
        self._is_told = is_told((identity["rank"], identity["world_size"]))
        self._is_named = identity["run_id"] is not None or run_id_of_environment(os.environ) is not None
        self.has_readers: bool = has_readers
        self._is_for_rank_0 = settings.export_ranks == "rank0"
        self._warnings = warnings

    def of(self, run: Run) -> tuple[Run, Agreement | None] | None:
        """Returns the run with the rank in the group, and how its ranks agree on the rest; None without news."""
        group = None if self._is_told else of_group(run.world_size)
        if group is None:
            return None
        rank, world_size = group
        if self.has_readers:
            self._warn(rank, world_size, f"the readers of its MeterProvider know it as rank {run.rank} since the start")
        if self._is_for_rank_0 and rank:
            self._warn(rank, world_size, "it sends already, in spite of ESPER_EXPORT_RANKS=rank0")
        return joined(run, rank, world_size, is_named=self._is_named)

    def _warn(self, rank: int, world_size: int, what: str) -> None:
        self._warnings.say(what, _LATE, rank, world_size, what)
