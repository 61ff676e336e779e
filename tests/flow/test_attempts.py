"""Attempts: ranks that any launcher starts are one attempt, each launch is a later one, and a run ends once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways import RunningGateway
from programs import ROOT, free_port, until

from esper_otel import TamiyoClient

pytest.importorskip("torch")

# Ranks wait for each other at files, as they would in a collective. Those that are to be killed are, when their steps
# have arrived; under torchrun those of the first start.
TRAIN = """
import os, signal, sys, time
import esper_otel

how, meeting, is_killed = sys.argv[1:]
start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])

def meet(where):
    open(f"{meeting}-{start}-{where}-{rank}", "w").close()
    while not all(os.path.exists(f"{meeting}-{start}-{where}-{other}") for other in (0, 1)):
        time.sleep(0.01)

if how != "nothing":
    import torch.distributed as dist
if how == "group first":
    dist.init_process_group("gloo")
settings = esper_otel.EsperSettings(export_every_s=0, probe_period_s=3600)
telemetry = esper_otel.start(run_id=RUN, settings=settings)
if how == "group later":
    dist.init_process_group("gloo")
meet("begin")
for _ in range(5):
    telemetry.record_step({"loss": 1.0, "step_latency_ms": 5.0}, epoch=0)
    time.sleep(0.02)
while telemetry.health()["queue"]:
    time.sleep(0.01)
meet("end")
if is_killed == "True" and start == "0":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway() as gateway:
        yield gateway


class Launches:
    """Launches of one run, each of two ranks."""

    def __init__(self, gateway: RunningGateway, folder: Path, how: str) -> None:
        self.how = how
        self._folder = folder
        self._count = 0
        self.environ = {
            **os.environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}",
            "OMP_NUM_THREADS": "1",
        }
        (folder / "train.py").write_text(TRAIN.replace("RUN", repr(folder.name)), encoding="utf-8")

    def arguments(self, *, is_killed: bool) -> list[str]:
        self._count += 1
        return [str(self._folder / "train.py"), self.how, str(self._folder / f"{self._count}"), str(is_killed)]

    def launch(self, *of_ranks: dict[str, str], is_killed: bool = False) -> str:
        """Waits for all of them; returns what they said."""
        arguments = self.arguments(is_killed=is_killed)
        ranks = [
            subprocess.Popen(
                [sys.executable, *arguments], env=self.environ | environ, stderr=subprocess.PIPE, text=True
            )
            for environ in of_ranks
        ]
        said = [rank.communicate(timeout=110)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [-9 if is_killed else 0] * len(ranks), said
        return "".join(said)


def plain(port: int) -> list[dict[str, str]]:
    """As Kubernetes' training operator, and whoever reads its documentation, sets them."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank)} | common for rank in (0, 1)]


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
    launches = Launches(gateway, tmp_path, "nothing")
    launches.launch(*slurm(0), is_killed=True)
    launches.launch(*slurm(1))
    check_two_attempts(gateway, tmp_path.name)
    command = [sys.executable, str(ROOT / "examples" / "controller.py"), "--target", gateway.grpc, tmp_path.name]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert len(said) == 21  # the killed ranks' steps, too
    assert said[-1] == "the run has ended: completed"


def test_ranks_of_a_process_group(gateway: RunningGateway, tmp_path: Path) -> None:
    """Whether the session starts before ``init_process_group`` or after it."""
    launches = Launches(gateway, tmp_path, "group first")
    launches.launch(*plain(free_port()), is_killed=True)
    launches.how = "group later"
    launches.launch(*plain(free_port()))
    check_two_attempts(gateway, tmp_path.name)


def test_ranks_that_cannot_agree_say_so_and_are_shown_side_by_side(gateway: RunningGateway, tmp_path: Path) -> None:
    """Nothing is there that all know. What is shown is still right: neither rank resumed the other."""
    said = Launches(gateway, tmp_path, "nothing").launch(*plain(free_port()))
    assert said.count("nothing by which to agree on one attempt") == 2
    assert "ESPER_RUN_ATTEMPT" in said
    with TamiyoClient(gateway.grpc) as client:
        until("the run has ended", lambda: client.ended(tmp_path.name))
        runs = [run for run in client.runs() if run.run_id == tmp_path.name]
        assert [(run.resumed, run.ended) for run in runs] == [(False, "completed")] * 2
        assert len(client.ranks(tmp_path.name).ranks) == 2


def test_torchrun_restarts_its_workers(gateway: RunningGateway, tmp_path: Path) -> None:
    """By its agent's store: without a process group, and without torch in the script."""
    launches = Launches(gateway, tmp_path, "nothing")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(free_port()), *launches.arguments(is_killed=True)]
    done = subprocess.run(command, env=launches.environ, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    check_two_attempts(gateway, tmp_path.name)
