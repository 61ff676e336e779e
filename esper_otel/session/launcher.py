"""Variables of the environment that name a run, an attempt or a rank: the user's, and those of launchers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

from esper_otel.errors import ConfigurationError, InvalidName, InvalidValue
from esper_otel.session.mpi import launch as launch_of_mpi
from esper_otel.session.mpi import variables as variables_of_mpi

_MAX_BYTES = 256
_MOST_ATTEMPT = 2**63
RUN_ID = "%Y%m%d-%H%M%S-"
_OF_SLURM = ("SLURM_PROCID", "SLURM_NTASKS")
# From here on, Slurm's step ids do not mean numbered steps: a batch script, an interactive shell, a login by ssh.
_SLURM_NO_STEP = 0xFFFF_FFF0
# Higher than Unix milliseconds until the year 2109, and with a job number (26 bits) still exact in JavaScript.
_ABOVE_MS = 2**42


def run_id_of_environment(environ: Mapping[str, str]) -> str | None:
    """Returns the run id that the user or the launcher has set; None if there is none."""
    if environ.get("ESPER_RUN_ID") is not None:
        return environ["ESPER_RUN_ID"]
    torchelastic = environ.get("TORCHELASTIC_RUN_ID", "")
    if torchelastic and torchelastic != "none":
        return torchelastic
    return environ.get("SLURM_JOB_ID") or None


def given_attempt(environ: Mapping[str, str]) -> int | None:
    """Returns the attempt that the user has set; None if there is none."""
    attempt = whole_number("attempt", None, environ, ("ESPER_RUN_ATTEMPT",), -1)
    if environ.get("ESPER_RUN_ATTEMPT") and not 0 <= attempt < _MOST_ATTEMPT:
        raise ConfigurationError(f"ESPER_RUN_ATTEMPT={attempt} is not between 0 and 2**63 - 1")
    return None if attempt < 0 else attempt


def variables_of_launcher(environ: Mapping[str, str]) -> tuple[str, str]:
    """Returns the names of the variables for rank and world size; empty if no known launcher has set them.

    Where ``mpirun`` starts its own servers by ``srun``, Slurm numbers these and not the ranks.
    """
    of_mpi = variables_of_mpi(environ)
    if of_mpi is not None:
        return of_mpi.rank, of_mpi.size
    return _OF_SLURM if _is_slurm_task(environ) else ("", "")


def launch_number(environ: Mapping[str, str]) -> int | None:
    """Returns a number that the ranks of one launch share and that grows with each; None if there is none."""
    of_mpi = variables_of_mpi(environ)
    if of_mpi is None:
        return _slurm_launch(environ)
    rank, size = environ[of_mpi.rank], environ[of_mpi.size]
    if of_mpi.rank == "PMI_RANK" and (rank, size) == tuple(map(environ.get, _OF_SLURM)):
        return _slurm_launch(environ)  # srun sets the variables of PMI, too
    if "TORCHELASTIC_RUN_ID" in environ or any(
        environ.get(name, "") not in {"", value} for name, value in (("RANK", rank), ("WORLD_SIZE", size))
    ):
        return None  # something that mpirun started has started several ranks
    launch = launch_of_mpi(environ)
    return None if launch is None else launch.time_ms


def run_id_of_mpi(number: int, environ: Mapping[str, str]) -> str | None:
    """Returns the id that all ranks generate that ``mpirun`` started on one host; None for others."""
    launch = launch_of_mpi(environ) if launch_number(environ) else None
    if launch is None:
        return None
    digest = hashlib.sha256(f"{launch.time_ms}-{launch.pid}-{number}".encode()).hexdigest()
    return time.strftime(RUN_ID, time.gmtime(launch.time_ms // 1000)) + digest[:6]


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether this may be a task of ``srun``. Batch scripts and shells have a task count too, but are not tasks."""
    return whole_number("rank", None, environ, ("SLURM_STEP_ID",), 0) < _SLURM_NO_STEP


def _slurm_launch(environ: Mapping[str, str]) -> int | None:
    """Returns a number that all tasks of one ``srun`` share and that grows with each launch; None for other launchers.

    It is the job's start time, in milliseconds like every attempt, plus one second for each restart and for each
    earlier step of the job. A requeued job has a new start time. Versions of Slurm that do not report the start time
    lead to a number made of the job, its restarts and the step, which is higher than any number of milliseconds.
    """
    if "SLURM_PROCID" not in environ or "TORCHELASTIC_RUN_ID" in environ:
        return None
    job, started_s, restarts, step = (
        whole_number("attempt", None, environ, (variable,), default)
        for variable, default in (
            ("SLURM_JOB_ID", -1),
            ("SLURM_JOB_START_TIME", -1),
            ("SLURM_RESTART_COUNT", 0),  # not set before the first requeue
            ("SLURM_STEP_ID", -1),
        )
    )
    if step >= _SLURM_NO_STEP or (step < 0 and environ.get("RANK")):
        return None  # a batch script or a shell: Slurm does not number the processes that it starts
    step = max(step, 0)
    if started_s > 0:
        return (started_s + restarts + step) * 1000
    return None if job < 0 else _ABOVE_MS + (job << 27 | min(restarts, 0x7F) << 20 | min(step, 0xFFF) << 8)


def whole_number(
    name: str, given: int | None, environ: Mapping[str, str], variables: tuple[str, ...], default: int
) -> int:
    """Returns the argument, or the first of these variables that is set, or the default."""
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


def checked_text(name: str, value: object) -> str:
    """Returns a name that may be sent; raises InvalidName or InvalidValue for others."""
    if not isinstance(value, str):
        raise InvalidValue(name, f"{value!r} is a {type(value).__name__}; give a string")
    if not value.strip():
        raise InvalidName(f"{name} is empty: omit it to have one generated, or give a name")
    if len(value.encode(errors="replace")) > _MAX_BYTES:
        raise InvalidName(f"{name} {value[:40]!r}... is longer than {_MAX_BYTES} bytes")
    if any(
        character < " " or "\x7f" <= character <= "\x9f" or "\ud800" <= character <= "\udfff" for character in value
    ):
        raise InvalidName(f"{name} {value[:80]!r} has a control character or a lone surrogate")
    return value
