"""Identity: which run, attempt and rank this process is, from arguments or from the launcher."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from esper_otel.errors import ConfigurationError, InvalidName, InvalidValue
from esper_otel.frame import Run

_MAX_BYTES = 256
_RANK_ZERO_TIMEOUT = timedelta(seconds=5)


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
      with several ranks by rank 0, when ``torch.distributed`` is initialised.
    - rank and world size: the argument, ``RANK`` and ``WORLD_SIZE``, ``SLURM_PROCID`` and ``SLURM_NTASKS``, else
      0 of 1.
    - attempt: Unix milliseconds now; with several ranks rank 0's milliseconds when ``torch.distributed`` is
      initialised (waits up to 5 s for them), else the launcher's restart count.

    Raises:
        InvalidName: a run id or experiment name that cannot be one.
        ConfigurationError: a variable that is not a whole number, or several ranks without a common run id.
    """
    rank = _whole("rank", rank, environ, ("RANK", "SLURM_PROCID"), 0)
    world_size = _whole("world_size", world_size, environ, ("WORLD_SIZE", "SLURM_NTASKS"), 1)
    if not 0 <= rank < max(world_size, 1):
        raise ConfigurationError(f"rank {rank} is not below world_size {world_size}: give start(rank=, world_size=)")
    if run_id is None:
        run_id = _run_id_of_launcher(environ)
    if run_id is None:
        run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(3)
        if world_size > 1:
            run_id = _of_rank_zero("run_id", rank, run_id)
        if run_id is None:
            raise ConfigurationError(
                f"{world_size} ranks without a common run id: give start(run_id=...) or set ESPER_RUN_ID on every rank"
            )
    run_id = _text("run_id", run_id)
    return Run(
        run_id=run_id,
        attempt=_attempt(run_id, rank, world_size, environ),
        rank=rank,
        world_size=world_size,
        experiment="" if experiment is None else _text("experiment", experiment),
    )


def _run_id_of_launcher(environ: Mapping[str, str]) -> str | None:
    if environ.get("ESPER_RUN_ID") is not None:
        return environ["ESPER_RUN_ID"]
    torchelastic = environ.get("TORCHELASTIC_RUN_ID", "")
    if torchelastic and torchelastic != "none":
        return torchelastic
    return environ.get("SLURM_JOB_ID") or None


def _attempt(run_id: str, rank: int, world_size: int, environ: Mapping[str, str]) -> int:
    now_ms = time.time_ns() // 1_000_000
    if world_size == 1:
        return now_ms
    shared_ms = _of_rank_zero(f"attempt/{run_id}", rank, str(now_ms))
    if shared_ms is not None:
        return int(shared_ms)
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if variable in environ:
            return _whole("attempt", None, environ, (variable,), 0)
    return now_ms


def _of_rank_zero(what: str, rank: int, mine: str) -> str | None:
    """Rank 0's text, by the key-value store of ``torch.distributed`` where that is initialised.

    A broadcast would wait for ever for ranks that start no session; the store is asked for a few seconds only.
    """
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    number = _asked[what] = _asked.get(what, 0) + 1
    key = f"esper_otel/{what}/{number}"
    try:
        store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
        if rank == 0:
            store.set(key, mine)
            return mine
        store.wait([key], _RANK_ZERO_TIMEOUT)
        return str(store.get(key).decode())
    except Exception:  # noqa: BLE001 - rank 0 starts no session, or the store is gone
        return None


# How often each thing was asked for in this process; the same on every rank.
_asked: dict[str, int] = {}


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
