"""SessionRun: which run a session belongs to, from its start until its ranks agree at the first step."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from esper_otel.errors import ConfigurationError, EsperOtelError, InvalidName
from esper_otel.frames.frame import UNKNOWN_ATTEMPT, Run
from esper_otel.log import Warnings, announce
from esper_otel.session.agreement import Agreement, agreement_for
from esper_otel.session.ending import is_interactive, live_sessions
from esper_otel.session.environment import spared
from esper_otel.session.identity import identify, new_run_id
from esper_otel.session.late_rank import LateRank
from esper_otel.session.telemetry import Telemetry
from esper_otel.settings import EsperSettings

_NO_RUN_ID = (
    "the %d ranks have no common run id, so each is a run of its own, this one %s: call "
    "torch.distributed.init_process_group before the first step, give start(run_id=...), or set ESPER_RUN_ID on every "
    "rank"
)
_NO_ATTEMPT = (
    "the %d ranks of run %s have no means to agree on one attempt, so each uses its own: call "
    "torch.distributed.init_process_group before the first step, or set ESPER_RUN_ATTEMPT to the same whole number on "
    "every rank, and to a larger one at each launch"
)


class SessionRun:
    """Finds out which run a session belongs to: at the start, and at the first step what its ranks agree on.

    Args:
        settings: the settings.
        identity: the arguments that name the run and the rank.
        warnings: where is reported what the ranks could not agree on.
        has_readers: whether readers of a MeterProvider learn of the run at the start.

    Attributes:
        first: the run as it is known at the start.
    """

    def __init__(
        self, settings: EsperSettings, identity: Mapping[str, Any], warnings: Warnings, *, has_readers: bool
    ) -> None:
        self._warnings = warnings
        first, self._agreement = _identified_or_spared(settings, identity)
        self.first: Run = first
        self._late_rank = LateRank(identity, settings, warnings, has_readers=has_readers)

    @property
    def lacks_run_id(self) -> bool:
        """Whether the ranks have not agreed on the run id yet."""
        return self._agreement is not None and self._agreement.lacks_run_id

    @property
    def is_certain(self) -> bool:
        """Whether the run will not be another one at the first step.

        A process that ``multiprocessing`` has started may be a rank, which is named at the first step only.
        """
        module = sys.modules.get("multiprocessing.process")
        return self._agreement is None and (module is None or module.parent_process() is None)

    def note_readers(self) -> None:
        """Notes that there are readers, which learn of the run at the start.

        Raises:
            ConfigurationError: the run id is not known yet.
        """
        if self.lacks_run_id:
            raise ConfigurationError(
                f"{self.first.world_size} ranks without a common run id, which readers need from the start: give "
                "start(run_id=...) or set ESPER_RUN_ID on every rank, or call "
                "torch.distributed.init_process_group before start()"
            )
        self._late_rank.has_readers = True

    def certain(self, run: Run) -> Run:
        """Returns the run for a Resource, which cannot change: without the attempt if the ranks have not agreed yet."""
        return run if self._agreement is None else replace(run, attempt=UNKNOWN_ATTEMPT)

    def settled(self, run: Run) -> Run:
        """Returns the run with its rank, and what its ranks agree on. Called at the first step: the last opportunity.

        Nothing that names the run has been sent before.
        """
        found = self._late_rank.of(run)
        if found is None:
            return self._with_agreed_attempt(run)
        run, self._agreement = found
        run = self._with_agreed_attempt(run)
        announce("rank", f"run {run.run_id}, rank {run.rank} of {run.world_size}, as torch.distributed says")
        return run

    def _with_agreed_attempt(self, run: Run) -> Run:
        """Returns the run with what its ranks agree on."""
        agreement = self._agreement
        if agreement is None:
            return run
        if agreement.lacks_torch:
            with suppress(ImportError):
                importlib.import_module(
                    "esper_otel.derive.gradients"
                )  # imports torch, which contains the store's client
        if agreement.lacks_run_id:
            run_id = agreement.run_id_by_store(run.run_id)
            if run_id is None:
                self._warnings.say("run id", _NO_RUN_ID, run.world_size, run.run_id)
                return run
            run = replace(run, run_id=run_id)
            announce("agreed", f"run {run_id}, rank {run.rank} of {run.world_size}")
        attempt = agreement.by_store()
        attempt = agreement.without_store() if attempt is None else attempt
        if attempt is None:
            self._warnings.say("attempt", _NO_ATTEMPT, run.world_size, run.run_id)
            return run
        return replace(run, attempt=attempt)


def _identified_or_spared(settings: EsperSettings, identity: Mapping[str, Any]) -> tuple[Run, Agreement | None]:
    faults = _of_identity(identity)
    return spared(settings, lambda: _identified(identity), lambda _: _identified_anyhow(identity), faults=faults)


def _of_identity(identity: Mapping[str, Any]) -> tuple[type[EsperOtelError], ...]:
    """Returns what a wrong variable raises: an invalid name, too, if none is an argument."""
    is_of_variable = identity["run_id"] is None and identity["experiment"] is None
    return (ConfigurationError, InvalidName) if is_of_variable else (ConfigurationError,)


def _identified_anyhow(identity: Mapping[str, Any]) -> tuple[Run, Agreement | None]:
    """Returns an identity without variables that cannot be used: a run of its own, if need be with a single rank."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("ESPER_RUN_")}
    own = {**identity, "run_id": identity["run_id"] or new_run_id()}
    for each in (identity, own):
        with suppress(ConfigurationError):
            return _identified(each, environ)
    return _identified({**own, "rank": 0, "world_size": 1}, environ)


def _identified(identity: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> tuple[Run, Agreement | None]:
    """Returns this process's identity and, if the ranks cannot agree on all of it yet, how to agree later."""
    run = identify(**identity, environ=environ)
    if is_interactive():
        _close_earlier(run.rank)
    agreement = agreement_for(run, environ)
    if agreement is not None and agreement.lacks_run_id:
        return replace(run, run_id=new_run_id()), agreement
    attempt = None if agreement is None else agreement.by_store()
    return (run, agreement) if attempt is None else (replace(run, attempt=attempt), None)


def _close_earlier(rank: int) -> None:
    """In a notebook, ends the sessions that an earlier run of a cell has left open: nobody would close them."""
    for session in live_sessions():
        if isinstance(session, Telemetry) and session.is_of_this_thread() and session.run.rank == rank:
            run_id = session.run_id
            session.close(outcome="exit")
            announce("notebook", f"run {run_id} was still open and is closed now, because a new session starts")
