"""Who a process is: from arguments, from the launcher, or made up and shown."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from esper_otel import ConfigurationError, InvalidName, InvalidValue
from esper_otel.frame import Run
from esper_otel.identity import identify


def who(environ: dict[str, str] | None = None, **given: Any) -> Run:
    arguments = {"run_id": None, "experiment": None, "rank": None, "world_size": None} | given
    return identify(**arguments, environ=environ or {})


@pytest.mark.parametrize(
    ("environ", "run_id"),
    [
        ({"ESPER_RUN_ID": "ours", "TORCHELASTIC_RUN_ID": "elastic", "SLURM_JOB_ID": "77"}, "ours"),
        ({"TORCHELASTIC_RUN_ID": "elastic", "SLURM_JOB_ID": "77"}, "elastic"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "77"}, "77"),
        ({"SLURM_JOB_ID": "77"}, "77"),
    ],
)
def test_the_run_id_comes_from_the_nearest_variable(environ: dict[str, str], run_id: str) -> None:
    """torchrun without a rendezvous says ``none``, which names no run."""
    assert who(environ).run_id == run_id
    assert who(environ, run_id="argument").run_id == "argument"


def test_without_any_the_run_id_is_made_up_from_the_time() -> None:
    """It sorts by time, and two starts in one second differ."""
    first, second = who().run_id, who().run_id
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", first)
    assert first != second


@pytest.mark.parametrize(
    ("environ", "rank", "world_size"),
    [
        ({}, 0, 1),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 3, 8),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, 2, 4),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 3, 8),
        ({"RANK": "", "WORLD_SIZE": ""}, 0, 1),
    ],
)
def test_rank_and_world_size_come_from_torchrun_or_slurm(environ: dict[str, str], rank: int, world_size: int) -> None:
    """torchrun under Slurm sets both; its own numbers are the finer ones."""
    run = who({"ESPER_RUN_ID": "run"} | environ)
    assert (run.rank, run.world_size) == (rank, world_size)


def test_arguments_win_over_the_launcher() -> None:
    """Whoever says it in the program means it."""
    run = who({"RANK": "3", "WORLD_SIZE": "8"}, run_id="run", rank=1, world_size=2, experiment="digits")
    assert (run.rank, run.world_size, run.experiment) == (1, 2, "digits")


def test_several_ranks_without_a_common_run_id_raise_with_the_fix() -> None:
    """Each would make up its own, and the run would fall to pieces in the backend."""
    with pytest.raises(ConfigurationError) as raised:
        who({"RANK": "1", "WORLD_SIZE": "2"})
    assert str(raised.value) == (
        "2 ranks without a common run id: give start(run_id=...) or set ESPER_RUN_ID on every rank"
    )


def test_an_attempt_is_the_milliseconds_of_its_start() -> None:
    """A run resumed from a checkpoint is told from its first try."""
    before_ms = time.time_ns() // 1_000_000
    attempt = who(run_id="run").attempt
    assert before_ms <= attempt <= time.time_ns() // 1_000_000


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_with_several_ranks_the_attempt_is_the_launchers_restart_count(variable: str) -> None:
    """Clocks of ranks differ; the launcher's count is the same on all."""
    assert who({variable: "2", "WORLD_SIZE": "2"}, run_id="run").attempt == 2


@pytest.mark.parametrize(
    ("environ", "given", "message"),
    [
        ({"RANK": "one"}, {}, "RANK='one' is not a whole number"),
        ({"WORLD_SIZE": "2.0"}, {}, "WORLD_SIZE='2.0' is not a whole number"),
        ({"SLURM_NTASKS": "four"}, {}, "SLURM_NTASKS='four' is not a whole number"),
        ({}, {"rank": 2, "world_size": 2}, "rank 2 is not below world_size 2: give start(rank=, world_size=)"),
        ({}, {"rank": -1}, "rank -1 is not below world_size 1: give start(rank=, world_size=)"),
    ],
)
def test_numbers_that_cannot_be_say_where_they_came_from(
    environ: dict[str, str], given: dict[str, Any], message: str
) -> None:
    """The variable's name is what one has to look for."""
    with pytest.raises(ConfigurationError) as raised:
        who(environ, **{"run_id": "run"} | given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run_id": 7}, "run_id: 7 is a int; give a string"),
        ({"experiment": b"digits"}, "experiment: b'digits' is a bytes; give a string"),
        ({"run_id": "run", "rank": "0"}, "rank: '0' is not a whole number"),
        ({"run_id": "run", "rank": True}, "rank: True is not a whole number"),
        ({"run_id": "run", "world_size": 2.0}, "world_size: 2.0 is not a whole number"),
    ],
)
def test_an_argument_of_the_wrong_type_raises(given: dict[str, Any], message: str) -> None:
    """It is a mistake in the program, whatever the environment says."""
    with pytest.raises(InvalidValue) as raised:
        who(**given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("run_id", "message"),
    [
        ("", "run_id is empty: leave it out to have one made up, or give a name"),
        ("  ", "run_id is empty: leave it out to have one made up, or give a name"),
        ("x" * 257, "run_id 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'... is longer than 256 bytes"),
        ("ä" * 129, "run_id 'ääääääääääääääääääääääääääääääääääääääää'... is longer than 256 bytes"),
        ("a\nb", r"run_id 'a\nb' has a control character or a lone surrogate"),
        ("a\x7f", r"run_id 'a\x7f' has a control character or a lone surrogate"),
        ("a\udc80", r"run_id 'a\udc80' has a control character or a lone surrogate"),
    ],
)
def test_a_run_id_that_cannot_be_one_raises(run_id: str, message: str) -> None:
    """It names files, series and packets for as long as they are kept."""
    with pytest.raises(InvalidName) as raised:
        who(run_id=run_id)
    assert str(raised.value) == message
    with pytest.raises(InvalidName) as raised:
        who({"ESPER_RUN_ID": run_id})
    assert str(raised.value) == message


def test_a_run_id_may_be_any_text_of_256_bytes() -> None:
    """Umlauts, slashes, emoji: they are only text to us."""
    for run_id in ("x" * 256, "digits/7 ж", "läufe-🌱"):
        assert who(run_id=run_id).run_id == run_id
