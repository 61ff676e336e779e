"""Identity: which run, attempt and rank this process is, from arguments or from the launcher."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from esper_otel.errors import ConfigurationError, InvalidName, InvalidValue
from esper_otel.frames.frame import Run
from esper_otel.native import threads

_MAX_BYTES = 256
_MOST_ATTEMPT = 2**63
_AGREEING_S = 5.0
_HAS_AGENT = "TORCHELASTIC_USE_AGENT_STORE"
# Slurm's numbers for what is not a numbered step: the batch script, an interactive shell, a login by ssh.
_SLURM_NO_STEP = 0xFFFF_FFF0
# Above Unix milliseconds until the year 2109; with a job's number (26 bits) added it is still exact in JavaScript.
_ABOVE_MS = 2**42


def identify(
    *,
    run_id: str | None,
    experiment: str | None,
    rank: int | None,
    world_size: int | None,
    environ: Mapping[str, str] = os.environ,
) -> Run:
    """Who this process is.

    - run id: the argument, ``ESPER_RUN_ID``, ``TORCHELASTIC_RUN_ID`` unless ``none``, ``SLURM_JOB_ID``, else made up;
      with several ranks by the first of them, where they share a store (see ``Agreement``).
    - rank and world size: the argument, ``RANK`` and ``WORLD_SIZE``, ``SLURM_PROCID`` and ``SLURM_NTASKS`` in a task
      of ``srun``, else 0 of 1.
    - attempt: ``ESPER_RUN_ATTEMPT``, else Unix milliseconds now. Several ranks have different ones until they have
      agreed (see ``Agreement``); under Slurm's ``srun`` they have its number of the launch until then.

    Raises:
        InvalidName: a run id or experiment name that cannot be one.
        ConfigurationError: a variable that is not a whole number, or several ranks without a common run id.
    """
    of_slurm = ("SLURM_PROCID", "SLURM_NTASKS") if _is_slurm_task(environ) else ("", "")
    rank = _whole("rank", rank, environ, ("RANK", of_slurm[0]), 0)
    world_size = _whole("world_size", world_size, environ, ("WORLD_SIZE", of_slurm[1]), 1)
    if not 0 <= rank < max(world_size, 1):
        raise ConfigurationError(f"rank {rank} is not below world_size {world_size}: give start(rank=, world_size=)")
    if run_id is None:
        run_id = _run_id_of_launcher(environ)
    if run_id is None:
        run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)
        if world_size > 1:
            run_id = _agreed(f"run_id/{_number_of('run_id')}", run_id, environ)
        if run_id is None:
            raise ConfigurationError(
                f"{world_size} ranks without a common run id: give start(run_id=...) or set ESPER_RUN_ID on every rank"
            )
    attempt = _given_attempt(environ)
    if attempt is None and world_size > 1:
        attempt = _slurm_launch(environ)
    return Run(
        run_id=_text("run_id", run_id),
        attempt=_now_ms() if attempt is None else attempt,
        rank=rank,
        world_size=world_size,
        experiment="" if experiment is None else _text("experiment", experiment),
    )


class Agreement:
    """How the ranks of a run come to one attempt: each proposes the time, and the proposal that comes first counts.

    They meet at the store of torchrun's agents, or at that of ``torch.distributed``. Before ``init_process_group``
    there may be no store; then the first step asks again, and by then a data-parallel script has called it. Without
    a store, ranks that Slurm's ``srun`` has started take the number of the launch, which they can all read.

    Args:
        run: one of several ranks.
        environ: the launcher's variables.
    """

    def __init__(self, run: Run, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._number = _number_of(f"attempt/{run.run_id}")
        self._key = f"attempt/{run.run_id}/{self._number}"

    @property
    def lacks_torch(self) -> bool:
        """Whether torchrun's store is there, and cannot be reached because the script has not imported torch."""
        return self._environ.get(_HAS_AGENT) == "True" and "torch" not in sys.modules

    def by_store(self) -> int | None:
        """The attempt that a store has for all ranks; None when there is none, or it does not answer within 5 s.

        It is the time, unless Slurm's number of the launch is higher: a launch of the same job that had no store has
        such a number, and this one comes after it or before it.
        """
        mine = max(_now_ms(), self.without_store() or 0)
        text = _agreed(self._key, str(mine), self._environ)
        return None if text is None else int(text)

    def without_store(self) -> int | None:
        """The attempt that the launcher's variables say; None when they say nothing that all ranks share."""
        launch = _slurm_launch(self._environ)
        return None if launch is None else launch + self._number - 1


def agreement_for(run: Run, environ: Mapping[str, str] = os.environ) -> Agreement | None:
    """How the ranks of the run agree; None when its attempt is certain already."""
    return None if run.world_size == 1 or _given_attempt(environ) is not None else Agreement(run, environ)


def _run_id_of_launcher(environ: Mapping[str, str]) -> str | None:
    if environ.get("ESPER_RUN_ID") is not None:
        return environ["ESPER_RUN_ID"]
    torchelastic = environ.get("TORCHELASTIC_RUN_ID", "")
    if torchelastic and torchelastic != "none":
        return torchelastic
    return environ.get("SLURM_JOB_ID") or None


def _given_attempt(environ: Mapping[str, str]) -> int | None:
    attempt = _whole("attempt", None, environ, ("ESPER_RUN_ATTEMPT",), -1)
    if environ.get("ESPER_RUN_ATTEMPT") and not 0 <= attempt < _MOST_ATTEMPT:
        raise ConfigurationError(f"ESPER_RUN_ATTEMPT={attempt} is not between 0 and 2**63 - 1")
    return None if attempt < 0 else attempt


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether this may be a task of an ``srun``: a batch script and a shell are told of tasks that they do not have."""
    return _whole("rank", None, environ, ("SLURM_STEP_ID",), 0) < _SLURM_NO_STEP


def _slurm_launch(environ: Mapping[str, str]) -> int | None:
    """A number that all tasks of one ``srun`` share, and that grows with each launch; None for other launchers.

    It is the job's start, which a requeued job has anew, in milliseconds like every attempt, and a second more for each
    restart, and for each step of the job before this one. Versions of Slurm that do not say when the job started give
    the job, how often it was requeued, and the step, as one number that is above any of milliseconds.
    """
    if "SLURM_PROCID" not in environ or "TORCHELASTIC_RUN_ID" in environ:
        return None
    job, started_s, restarts, step = (
        _whole("attempt", None, environ, (variable,), default)
        for variable, default in (
            ("SLURM_JOB_ID", -1),
            ("SLURM_JOB_START_TIME", -1),
            ("SLURM_RESTART_COUNT", 0),  # not set before the first requeue
            ("SLURM_STEP_ID", -1),
        )
    )
    if step >= _SLURM_NO_STEP or (step < 0 and environ.get("RANK")):
        return None  # the batch script, or a shell: what it starts is not numbered by Slurm
    step = max(step, 0)
    if started_s > 0:
        return (started_s + restarts + step) * 1000
    return None if job < 0 else _ABOVE_MS + (job << 27 | min(restarts, 0x7F) << 20 | min(step, 0xFFF) << 8)


def _agreed(what: str, mine: str, environ: Mapping[str, str]) -> str | None:
    """What the first rank to ask proposed; None when no store is there, or it does not answer in time.

    Nobody waits for another rank: one may start no session, or may wait in a collective for this one.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available():
        return None
    answers: list[str] = []

    def ask() -> None:
        for reach in (_store_of_torchrun, _store_of_group):
            with suppress(Exception):  # it is not there, or the process that serves it is gone
                prefix, store = reach(distributed, environ)
                answers.append(store.compare_set(f"esper_otel/{prefix}{what}", "", mine).decode())
                return

    with suppress(RuntimeError):  # no thread can be started any more: the interpreter ends
        thread = threads().Thread(target=ask, name="esper-otel-agreement", daemon=True)
        thread.start()
        thread.join(_AGREEING_S)
    return answers[0] if answers else None


def _store_of_torchrun(distributed: Any, environ: Mapping[str, str]) -> tuple[str, Any]:
    """The store that torchrun's agents keep for their workers, and a prefix for keys of this start of the workers."""
    if environ[_HAS_AGENT] != "True":
        raise LookupError("rank 0 serves the store, and not the agent")
    store = distributed.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_AGREEING_S / 2),
        wait_for_workers=False,
    )
    return f"restart-{environ['TORCHELASTIC_RESTART_COUNT']}/", store


def _store_of_group(distributed: Any, _environ: Mapping[str, str]) -> tuple[str, Any]:
    """The store of the default process group, once ``init_process_group`` has been called."""
    return "", distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it


def _number_of(what: str) -> int:
    """How often this was called for it in this process; the same on every rank."""
    number = _numbers[what] = _numbers.get(what, 0) + 1
    return number


_numbers: dict[str, int] = {}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _whole(name: str, given: int | None, environ: Mapping[str, str], variables: tuple[str, ...], default: int) -> int:
    if given is not None:
        if type(given) is not int:
            raise InvalidValue(name, f"{given!r} is not a whole number")
        return given
    for variable in variables:
        text = environ.get(variable)
        if text:
            try:
                return int(text)
            except ValueError:
                raise ConfigurationError(f"{variable}={text!r} is not a whole number") from None
    return default


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValue(name, f"{value!r} is a {type(value).__name__}; give a string")
    if not value.strip():
        raise InvalidName(f"{name} is empty: leave it out to have one made up, or give a name")
    if len(value.encode(errors="replace")) > _MAX_BYTES:
        raise InvalidName(f"{name} {value[:40]!r}... is longer than {_MAX_BYTES} bytes")
    if any(
        character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff" for character in value
    ):
        raise InvalidName(f"{name} {value[:80]!r} has a control character or a lone surrogate")
    return value
