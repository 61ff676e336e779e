"""Who a process is: from arguments, from the launcher, or made up and shown."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from esper_otel import ConfigurationError, InvalidName, InvalidValue
from esper_otel.frames.frame import Run
from esper_otel.session.agreement import agreement_for
from esper_otel.session.identity import identify


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
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, 2, 4),
        ({"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4"}, 2, 4),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, 2, 4),
        ({"PMI_RANK": "2"}, 0, 1),
        # mpirun in a job of Slurm starts a server on each node by srun, and Slurm's rank is the server's.
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 5, 8),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 5, 8),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "RANK": "9", "WORLD_SIZE": "16"}, 9, 16),
    ],
)
def test_rank_and_world_size_come_from_the_launcher(environ: dict[str, str], rank: int, world_size: int) -> None:
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
        "2 ranks without a common run id: give start(run_id=...) or set ESPER_RUN_ID on every rank, "
        "or call torch.distributed.init_process_group before start()"
    )
    will_have_a_store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert who({"RANK": "1", "WORLD_SIZE": "2"} | will_have_a_store).run_id == ""


def test_an_attempt_is_the_milliseconds_of_its_start() -> None:
    """A run resumed from a checkpoint is told from its first try."""
    before_ms = time.time_ns() // 1_000_000
    attempt = who(run_id="run").attempt
    assert before_ms <= attempt <= time.time_ns() // 1_000_000


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_count_is_never_the_attempt(variable: str) -> None:
    """The first launch had milliseconds: a count of 1 after it would be an attempt before it."""
    assert who({variable: "2", "RANK": "1", "WORLD_SIZE": "2"}, run_id="run").attempt > 1_700_000_000_000


def slurm(rank: int, **more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "77", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"} | more


@pytest.mark.parametrize("started", [{}, {"SLURM_JOB_START_TIME": "1790000000"}])
def test_the_tasks_of_an_srun_have_one_attempt_that_grows(started: dict[str, str]) -> None:
    """Two steps of the job, a requeue, another job with the same run id; with an old version of Slurm too."""
    launches = [
        slurm(0, **started),
        slurm(0, SLURM_STEP_ID="1", **started),
        slurm(0, SLURM_RESTART_COUNT="1", SLURM_STEP_ID="0", **dict.fromkeys(started, "1790000060")),
        slurm(0, SLURM_RESTART_COUNT="2", SLURM_STEP_ID="0", **dict.fromkeys(started, "1790000120")),
        slurm(0, SLURM_JOB_ID="78", SLURM_STEP_ID="0", **dict.fromkeys(started, "1790000999")),
    ]
    attempts: list[int] = []
    for environ in launches:
        of_ranks = {who(environ | {"SLURM_PROCID": rank}, run_id="run").attempt for rank in ("0", "1")}
        assert len(of_ranks) == 1
        attempts += of_ranks
    assert attempts == sorted(set(attempts))
    assert all(1_700_000_000_000 < attempt < 2**53 for attempt in attempts)


@pytest.mark.parametrize(
    "environ",
    [
        slurm(0, SLURM_STEP_ID="4294967294", RANK="0", WORLD_SIZE="2"),  # the batch script
        slurm(0, SLURM_JOB_START_TIME="1790000000", SLURM_STEP_ID="0", TORCHELASTIC_RUN_ID="none", RANK="0"),
        slurm(0, SLURM_JOB_START_TIME="1790000000", RANK="0", WORLD_SIZE="2"),  # started by the batch script
    ],
)
def test_what_slurm_did_not_launch_does_not_have_its_number(environ: dict[str, str]) -> None:
    """It may start several times in one step, with one number for all."""
    agreement = agreement_for(who(environ, run_id="run"), environ)
    assert agreement is not None
    assert agreement.without_store() is None


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967294"])
def test_a_process_of_a_shell_or_batch_script_is_alone_though_slurm_names_tasks(step: str) -> None:
    """``salloc -n 2``, then ``python train.py``: the other rank would be missed for ever."""
    environ = slurm(0, SLURM_STEP_ID=step)
    run = who(environ)
    assert (run.run_id, run.rank, run.world_size) == ("77", 0, 1)
    assert agreement_for(run, environ) is None
    run = who(environ | {"RANK": "1", "WORLD_SIZE": "4"})
    assert (run.rank, run.world_size) == (1, 4)


def test_srun_with_pmi_is_a_launch_of_slurm() -> None:
    """It sets the variables of PMI, too; those of Open MPI are set by ``mpirun``, in a batch script for instance."""
    environ = slurm(1, SLURM_JOB_START_TIME="1790000000", SLURM_STEP_ID="0")
    assert who(environ | {"PMI_RANK": "1", "PMI_SIZE": "2"}, run_id="run").attempt == 1_790_000_000_000
    environ |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert who(environ, run_id="run").attempt > 1_790_000_000_000


def test_one_process_has_its_own_milliseconds_under_slurm_too() -> None:
    """In a shell of ``srun --pty`` everything that is started has the same step."""
    environ = slurm(0, SLURM_JOB_START_TIME="1790000000", SLURM_STEP_ID="0") | {"SLURM_NTASKS": "1"}
    before_ms = time.time_ns() // 1_000_000
    run = who(environ, run_id="run")
    assert run.attempt >= before_ms
    assert agreement_for(run, environ) is None


def test_sessions_of_one_process_are_attempts_of_their_own() -> None:
    """The same number of the launch, and how many sessions of the run there were before."""
    environ = slurm(1, SLURM_JOB_START_TIME="1790000000", SLURM_STEP_ID="0")
    found = []
    for _ in range(2):
        agreement = agreement_for(who(environ, run_id="folds"), environ)
        assert agreement is not None
        found.append(agreement.without_store())
    assert found == [1_790_000_000_000, 1_790_000_000_001]


def test_a_launch_with_a_store_comes_after_one_without() -> None:
    """Old versions of Slurm do not say when a job started, so that its numbers of launches are above all times."""
    distributed = pytest.importorskip("torch.distributed")
    without, with_store = (slurm(0, SLURM_STEP_ID=step) for step in ("0", "1"))
    first = who(without, run_id="mixed").attempt
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        agreement = agreement_for(who(with_store, run_id="mixed"), with_store)
        assert agreement is not None
        second = agreement.by_store()
    finally:
        distributed.destroy_process_group()
    assert second is not None
    assert first < second < who(slurm(0, SLURM_STEP_ID="2"), run_id="mixed").attempt


def test_an_attempt_can_be_given() -> None:
    """Where ranks have nothing in common but what their launcher sets."""
    environ = {"ESPER_RUN_ATTEMPT": "7", "RANK": "1", "WORLD_SIZE": "2"}
    assert who(environ, run_id="run").attempt == 7
    assert agreement_for(who(environ, run_id="run"), environ) is None
    for text in ("seven", "-1", str(2**63)):
        with pytest.raises(ConfigurationError, match="ESPER_RUN_ATTEMPT"):
            who({"ESPER_RUN_ATTEMPT": text}, run_id="run")


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
        ("", "run_id is empty: omit it to have one generated, or give a name"),
        ("  ", "run_id is empty: omit it to have one generated, or give a name"),
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
