"""Agreement: how the ranks of a run get one run id and one attempt, by a store that they share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from esper_otel.frames.frame import Run
from esper_otel.native import threads
from esper_otel.session.launcher import given_attempt, launch_number

_AGREEING_S = 5.0
_HAS_AGENT = "TORCHELASTIC_USE_AGENT_STORE"


class Agreement:
    """Lets the ranks of a run agree on one attempt: each proposes the current time, and the first proposal counts.

    The ranks use the store of torchrun's agents or that of ``torch.distributed``. Before ``init_process_group`` there
    may be no store; then the first step tries again, since by then a data-parallel script has made that call. Without
    a store, ranks started by ``srun``, or by ``mpirun`` on one host, use a number of the launch that they can all read.

    Where the run id is empty, the ranks agree on it in the same way, and before the attempt.

    Args:
        run: the run, as identified by one of its several ranks.
        environ: the launcher's variables.
    """

    def __init__(self, run: Run, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        self._of_run_id = "" if run.run_id else f"run_id/{_numbers['run_id']}"
        self._of_run(run.run_id)

    def _of_run(self, run_id: str) -> None:
        self._number = number_of(f"attempt/{run_id}") if run_id else 1
        self._key = f"attempt/{run_id}/{self._number}"

    @property
    def lacks_run_id(self) -> bool:
        """Whether the ranks have not agreed on the run id yet."""
        return bool(self._of_run_id)

    def run_id_by_store(self, mine: str) -> str | None:
        """Returns the run id that all ranks find in a store: the first proposal. None without a store, as below."""
        run_id = agreed(self._of_run_id, mine, self._environ)
        if run_id is not None:
            self._of_run_id = ""
            self._of_run(run_id)
        return run_id

    @property
    def lacks_torch(self) -> bool:
        """Whether torchrun has a store that cannot be reached because the script has not imported torch."""
        return self._environ.get(_HAS_AGENT) == "True" and "torch" not in sys.modules

    def by_store(self) -> int | None:
        """Returns the attempt that all ranks find in a store; None without a store, or if it does not answer in 5 s.

        It is the proposed time, unless the number of the launch is higher. Launches of the same job without a store
        use such numbers, and attempts must keep their order among those.
        """
        given = given_attempt(self._environ)
        if given is not None:
            return given
        mine = max(now_ms(), self.without_store() or 0)
        text = agreed(self._key, str(mine), self._environ)
        return None if text is None else int(text)

    def without_store(self) -> int | None:
        """Returns the attempt given by the launcher's variables; None if they hold no number that all ranks share."""
        launch = launch_number(self._environ)
        return None if launch is None else launch + self._number - 1


def agreement_for(run: Run, environ: Mapping[str, str] = os.environ) -> Agreement | None:
    """Returns how the ranks of the run can agree; None if run id and attempt are already certain."""
    is_certain = run.world_size == 1 or given_attempt(environ) is not None
    return None if is_certain and run.run_id else Agreement(run, environ)


def agreed(what: str, mine: str, environ: Mapping[str, str]) -> str | None:
    """Returns the proposal of the first rank that asked; None without a store, or if it does not answer in time.

    No rank waits for another: the other may never start a session, or may be waiting in a collective for this rank.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available():
        return None
    answers: list[str] = []

    def ask() -> None:
        for reach in (_store_of_torchrun, _store_of_group):
            with suppress(Exception):  # there is no store, or the process that serves it is gone
                prefix, store = reach(distributed, environ)
                answers.append(store.compare_set(f"esper_otel/{prefix}{what}", "", mine).decode())
                return

    with suppress(RuntimeError):  # no thread can be started while the interpreter ends
        thread = threads().Thread(target=ask, name="esper-otel-agreement", daemon=True)
        thread.start()
        thread.join(_AGREEING_S)
    return answers[0] if answers else None


def _store_of_torchrun(distributed: Any, environ: Mapping[str, str]) -> tuple[str, Any]:
    """Returns the store that torchrun's agents keep for their workers, and a key prefix for this (re)start of them."""
    if environ[_HAS_AGENT] != "True":
        raise LookupError("the store is served by rank 0, not by the agent")
    store = distributed.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_AGREEING_S / 2),
        wait_for_workers=False,
    )
    return f"restart-{environ['TORCHELASTIC_RESTART_COUNT']}/", store


def _store_of_group(distributed: Any, _environ: Mapping[str, str]) -> tuple[str, Any]:
    """Returns the store of the default process group, if ``init_process_group`` has been called."""
    return "", distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public function


def number_of(what: str) -> int:
    """Counts the calls for ``what`` in this process. The count is the same on every rank."""
    number = _numbers[what] = _numbers.get(what, 0) + 1
    return number


_numbers: dict[str, int] = {}


def now_ms() -> int:
    """Returns the time in Unix milliseconds."""
    return time.time_ns() // 1_000_000
