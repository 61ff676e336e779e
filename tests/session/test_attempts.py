"""Attempts: ranks that any launcher starts are one attempt, each launch is a later one, and a run ends once."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import warm
from gateways import RunningGateway
from programs import ROOT, free_port, until

from esper_otel import TamiyoClient

pytestmark = pytest.mark.lengthy

# One process makes all the launches that it is given: it forks the ranks, since importing torch is most of the time.
# Ranks wait for each other at files, as they would in a collective. Those that are to be killed are, when their steps
# have arrived; under torchrun those of the first start.
PROGRAM = """
import json, os, signal, subprocess, sys, time
import esper_otel.export.grpc_sender, esper_otel.session.start

def train(run_id, how, meeting, is_killed):
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    spawned = os.environ.get("SPAWNED")
    rank = int(spawned or os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    given = {"init_method": os.environ["AT"], "rank": rank, "world_size": 2} if spawned else {}

    def wait(is_so):
        until_s = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < until_s
            time.sleep(0.01)

    def meet(where):
        open(f"{meeting}-{start}-{where}-{rank}", "w").close()
        wait(lambda: all(os.path.exists(f"{meeting}-{start}-{where}-{other}") for other in (0, 1)))

    if how == "group first":
        torch.distributed.init_process_group("gloo", **given)
    settings = esper_otel.EsperSettings(export_every_s=0, probe_period_s=3600)
    telemetry = esper_otel.start(run_id=run_id, settings=settings)
    if how == "group later":
        torch.distributed.init_process_group("gloo", **given)
    meet("begin")
    for _ in range(5):
        telemetry.record_step({"loss": 1.0, "step_latency_ms": 5.0}, epoch=0)
        time.sleep(0.02)
    wait(lambda: not telemetry.health()["queue"])
    meet("end")
    if is_killed and start == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    telemetry.close()

def forked(work):
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid

def ranks(environs, *arguments):
    def work(environ):
        os.environ.update(environ)
        train(*arguments)
    return [forked(lambda: work(environ)) for environ in environs]

def ranks_of_a_group(*arguments):
    global torch
    import torch.distributed
    return ranks(*arguments)

def torchrun(port, *arguments):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    place = {"rdzv_backend": "static", "rdzv_endpoint": f"127.0.0.1:{port}", "rdzv_configs": {"rank": 0, "timeout": 60}}
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork", monitor_interval=0.1, **place
    )
    return [forked(lambda: elastic_launch(config, train)(*arguments))]

def one_without_torch(common, *arguments):
    global store
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, __file__, json.dumps([["alone", None, *arguments]])]
    without = subprocess.Popen(command, env=os.environ | common | {"RANK": "1"}, stdout=subprocess.DEVNULL)
    return [*ranks([common | {"RANK": "0"}], *arguments), without.pid]

def alone(_, *arguments):
    assert "torch" not in sys.modules
    train(*arguments)
    assert "torch" in sys.modules
    return []

for name, *arguments in json.loads(sys.argv[1]):
    pids = globals()[name](*arguments)
    print(name, *(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
"""


class Launches:
    """Launches of two ranks each, which one process makes one after the other.

    Attributes:
        ends: for each launch its kind and the exit statuses of its processes.
        said: what all of them wrote to standard error.
    """

    def __init__(self, gateway: RunningGateway, folder: Path) -> None:
        self._folder = folder
        self._environ = {
            **os.environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}",
            "OMP_NUM_THREADS": "1",
            "TORCH_LOGS_FORMAT": "short",  # its own formatter imports sympy and half of torch for an exception
        }
        self._launches: list[Any] = []

    def add(self, kind: str, what: object, how: str, *, of_run: str | None, is_killed: bool = False) -> None:
        """One more; ``kind`` and ``what`` are the function of the program that makes it, and its first argument."""
        meeting = str(self._folder / f"{len(self._launches)}")
        self._launches.append((kind, what, of_run, how, meeting, is_killed))

    def make(self) -> None:
        """Waits for all of them."""
        (self._folder / "program.py").write_text(PROGRAM, encoding="utf-8")
        done = warm.run(self._folder / "program.py", json.dumps(self._launches), env=self._environ)
        assert done.returncode == 0, done.stderr[-3000:]
        self.said = done.stderr
        self.ends = done.stdout.splitlines()


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway() as gateway:
        yield gateway


@pytest.fixture(scope="module")
def with_torch(gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Launches whose ranks meet at a store."""
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    launches = Launches(gateway, tmp_path_factory.mktemp("launches"))
    launches.add("ranks_of_a_group", plain(free_port()), "group first", of_run="groups", is_killed=True)
    launches.add("ranks_of_a_group", plain(free_port()), "group later", of_run="groups")
    launches.add("ranks_of_a_group", plain(free_port()), "group later", of_run=None)
    launches.add("ranks_of_a_group", spawned(free_port()), "group first", of_run="spawned", is_killed=True)
    launches.add("ranks_of_a_group", spawned(free_port()), "group later", of_run="spawned")
    launches.add("ranks_of_a_group", spawned(free_port()), "group first", of_run=None)
    launches.add("ranks_of_a_group", spawned(free_port()), "group later", of_run=None)
    launches.add("torchrun", free_port(), "no group", of_run="torchrun", is_killed=True)
    launches.add("one_without_torch", {}, "no group", of_run="one without torch")
    launches.make()
    groups = ["ranks_of_a_group -9 -9", *["ranks_of_a_group 0 0"] * 2] * 2
    kinds = [*groups, "ranks_of_a_group 0 0", "torchrun 0", "one_without_torch 0 0"]
    assert launches.ends == kinds, launches.said[-3000:]
    assert "no means to agree" not in launches.said
    assert launches.said.count("its ranks agree on the run id at the first step, rank ") == 2


def plain(port: int) -> list[dict[str, str]]:
    """As Kubernetes' training operator, and whoever reads its documentation, sets them."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank)} | common for rank in (0, 1)]


def spawned(port: int) -> list[dict[str, str]]:
    """As a script that starts its ranks itself: nothing but its own arguments says which is which."""
    return [{"SPAWNED": str(rank), "AT": f"tcp://127.0.0.1:{port}"} for rank in (0, 1)]


def slurm(restarts: int) -> list[dict[str, str]]:
    """As srun sets them; the count is not there before the first requeue."""
    common = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    common |= {"SLURM_JOB_START_TIME": str(1_790_000_000 + 60 * restarts)}
    common |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    return [{"SLURM_PROCID": str(rank)} | common for rank in (0, 1)]


def check_two_attempts(gateway: RunningGateway, run_id: str) -> None:
    """Of two ranks each, the second of which resumed the run and ended."""
    with TamiyoClient(gateway.grpc) as client:
        until("the run has ended", lambda: client.ended(run_id))
        assert client.ended(run_id) == "completed"
        runs = [run for run in client.runs() if run.run_id == run_id]
        attempts = sorted({run.attempt for run in runs})
        assert [(run.attempt, run.rank, run.resumed, run.ended) for run in runs] == [
            (attempts[0], 0, False, None),
            (attempts[0], 1, False, None),
            (attempts[1], 0, True, "completed"),
            (attempts[1], 1, True, "completed"),
        ]
        ranks = client.ranks(run_id)
        assert (ranks.attempt, len(ranks.ranks), ranks.world_size) == (attempts[1], 2, 2)


def test_a_requeued_job_of_slurm(gateway: RunningGateway, tmp_path: Path) -> None:
    launches = Launches(gateway, tmp_path)
    launches.add("ranks", slurm(0), "no group", of_run="slurm", is_killed=True)
    launches.add("ranks", slurm(1), "no group", of_run="slurm")
    launches.make()
    assert launches.ends == ["ranks -9 -9", "ranks 0 0"]
    check_two_attempts(gateway, "slurm")
    controller = ROOT / "examples" / "controller.py"
    said = warm.run(controller, "--target", gateway.grpc, "slurm", imported=warm.PACKAGE).stdout.splitlines()
    assert len(said) == 21  # the killed ranks' steps, too
    assert said[-1] == "the run has ended: completed"


def test_ranks_that_cannot_agree_say_so_and_are_shown_side_by_side(gateway: RunningGateway, tmp_path: Path) -> None:
    """Nothing is there that all know. What is shown is still right: neither rank resumed the other."""
    launches = Launches(gateway, tmp_path)
    launches.add("ranks", plain(free_port()), "no group", of_run="alone")
    launches.add("ranks", plain(free_port()), "no group", of_run=None)
    launches.make()
    assert launches.said.count("the 2 ranks have no common run id, so each is a run of its own, this one ") == 2
    assert launches.said.count("no means to agree on one attempt") == 2
    assert "ESPER_RUN_ATTEMPT" in launches.said
    with TamiyoClient(gateway.grpc) as client:
        until("the run has ended", lambda: client.ended("alone"))
        runs = [run for run in client.runs() if run.run_id == "alone"]
        assert [(run.resumed, run.ended) for run in runs] == [(False, "completed")] * 2
        assert len(client.ranks("alone").ranks) == 2


@pytest.mark.usefixtures("with_torch")
def test_ranks_of_a_process_group(gateway: RunningGateway) -> None:
    """Whether the session starts before ``init_process_group`` or after it."""
    check_two_attempts(gateway, "groups")


@pytest.mark.usefixtures("with_torch")
def test_ranks_that_a_script_has_spawned(gateway: RunningGateway) -> None:
    """No variable says which rank a process is, only ``init_process_group`` does, maybe after ``start``."""
    check_two_attempts(gateway, "spawned")


@pytest.mark.usefixtures("with_torch")
def test_ranks_without_a_run_id_that_start_before_their_process_group(gateway: RunningGateway) -> None:
    """As Kubernetes' training operator starts them, or a script: they agree on the id, too; each launch is a run."""
    with TamiyoClient(gateway.grpc) as client:
        runs = [run for run in client.runs() if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run.run_id)]
        ranks = Counter((run.run_id, run.attempt) for run in runs if not run.resumed)
        found = [run_id for run_id, attempt in ranks if ranks[run_id, attempt] == 2]
        assert len(found) == 3
        for run_id in found:
            until("the run has ended", lambda: client.ended(run_id))  # noqa: B023
        assert {(run.rank, run.world_size) for run in runs if run.run_id in found} == {(0, 2), (1, 2)}


@pytest.mark.usefixtures("with_torch")
def test_torchrun_restarts_its_workers(gateway: RunningGateway) -> None:
    """They meet at its agent's store, without a process group."""
    check_two_attempts(gateway, "torchrun")


@pytest.mark.usefixtures("with_torch")
def test_a_rank_that_has_not_imported_torch_meets_the_others_at_the_agents_store(gateway: RunningGateway) -> None:
    with TamiyoClient(gateway.grpc) as client:
        until("the run has ended", lambda: client.ended("one without torch"))
        runs = [run for run in client.runs() if run.run_id == "one without torch"]
    assert [(run.rank, run.resumed, run.ended) for run in runs] == [(0, False, "completed"), (1, False, "completed")]
    assert len({run.attempt for run in runs}) == 1
