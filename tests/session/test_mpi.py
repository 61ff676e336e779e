"""``mpirun``: the ranks that it starts on one host have one attempt, and one run id if none is given."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.own_code

# It starts ranks as mpirun does, each by a shell, and names them as one of its makers does.
LAUNCHER = """
import json, os, subprocess, sys
rank, size, local_size, count, local_count, name = sys.argv[1:7]
open("/proc/self/comm", "w").write(name)
ranks = [
    subprocess.Popen(
        ["sh", "-c", '"$0" "$@"; true', sys.executable, "-c", sys.argv[7]],
        env={**os.environ, rank: str(number), size: count, local_size: local_count},
        stdout=subprocess.PIPE,
        text=True,
    )
    for number in range(int(local_count))
]
print(json.dumps([json.loads(rank.communicate()[0]) for rank in ranks]))
"""
RANK = """
import json, os
from esper_otel.session.agreement import agreement_for
from esper_otel.session.identity import identify
def who():
    run = identify(run_id=os.environ.get("ESPER_RUN_ID"), experiment=None, rank=None, world_size=None)
    agreement = agreement_for(run)
    return run.run_id, run.attempt, agreement.without_store(), run.rank, run.world_size
print(json.dumps([who(), who()]))
"""
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
MVAPICH2 = ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")


def launched(*names: str, size: int = 2, local_size: int = 2, name: str = "mpirun") -> list[list[list[object]]]:
    """What each rank finds out at each of its two starts: run id, attempt, that for a later agreement, rank, size."""
    command = [sys.executable, "-c", LAUNCHER, *names, str(size), str(local_size), name, RANK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found: list[list[list[object]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("names", [OPEN_MPI, MVAPICH2, HYDRA])
def test_the_ranks_of_a_launch_have_one_run_id_and_one_attempt_that_grows(names: tuple[str, ...]) -> None:
    """Each session has its own; a later launch has a later one."""
    before_ms = time.time_ns() // 1_000_000
    first, second = launched(*names), launched(*names)
    assert [rank[0][3:] for rank in first] == [[0, 2], [1, 2]]
    for ranks in first, second:
        assert [start[:3] for start in ranks[0]] == [start[:3] for start in ranks[1]]
        assert ranks[0][0][0] != ranks[0][1][0]
    assert first[0][0][0] != second[0][0][0]
    attempts = [ranks[0][0][1] for ranks in (first, second)]
    assert before_ms - 1000 < attempts[0] < attempts[1] < time.time_ns() // 1_000_000 + 1000  # type: ignore[operator]


def test_the_starts_of_one_process_have_attempts_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RUN_ID", "folds")
    ranks = launched(*OPEN_MPI)
    assert ranks[0][0][2] == ranks[1][0][2]
    assert ranks[0][1][2] == ranks[1][1][2] == ranks[0][0][2] + 1  # type: ignore[operator]


def test_ranks_on_several_hosts_have_nothing_of_the_launch_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host has a server of its own, which started at a time of its own."""
    monkeypatch.setenv("ESPER_RUN_ID", "hosts")
    assert launched(*OPEN_MPI, size=4)[0][0][2] is None


def test_a_server_that_starts_many_jobs_is_not_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI's ``prte``, from which ``prun`` starts jobs: all would have the time of the server."""
    monkeypatch.setenv("ESPER_RUN_ID", "jobs")
    assert launched(*OPEN_MPI, name="prte")[0][0][2] is None


@pytest.mark.parametrize("more", [{"RANK": "5"}, {"WORLD_SIZE": "16"}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_what_starts_ranks_of_its_own_is_not_a_launch_of_mpirun(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
) -> None:
    """``mpirun torchrun``, one on each host."""
    for name, value in {"ESPER_RUN_ID": "torchrun", "WORLD_SIZE": "16", **more}.items():
        monkeypatch.setenv(name, value)
    assert launched(*OPEN_MPI)[0][0][2] is None
