"""Several ranks for real: torchrun, gloo on the CPU, DDP and FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gateways import RunningGateway
from programs import until

from esper_otel import TamiyoClient

torch = pytest.importorskip("torch")
fsdp = pytest.importorskip("torch.distributed.fsdp")

TRAIN = """
import json, sys, time
import torch
import torch.distributed as dist
import esper_otel

kind, delay_s = sys.argv[1], float(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
if kind == "ddp":
    net = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

def batches():
    for step in range(12):
        if rank == 1:
            time.sleep(delay_s)
        random = torch.Generator().manual_seed(100 * step + rank)
        yield torch.randn(8, 16, generator=random), torch.randint(0, 4, (8,), generator=random)

norms = []
with esper_otel.start() as telemetry:
    for inputs, targets in telemetry.batches(batches()):
        with telemetry.step(epoch=0, samples=8) as now:
            loss = torch.nn.functional.cross_entropy(net(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            now.gradients(net)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            optimizer.step()
            now.put(loss=loss)
    recorded = [packets.state.training_metrics["gradient_norm"] for packets in telemetry.pull()]
    run = telemetry.run_id
print("said", json.dumps({"rank": rank, "run": run, "norms": norms, "recorded": recorded}), flush=True)
dist.destroy_process_group()
"""


def torchrun(
    folder: Path, gateway: RunningGateway, processes: int, *arguments: str, **variables: str
) -> list[dict[str, object]]:
    """What each rank says, by rank."""
    (folder / "train.py").write_text(TRAIN, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job-7"]
    environ = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}",
        "ESPER_EXPORT_EVERY_S": "0.05",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [*command, folder / "train.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line.partition("said ")[2]) for line in done.stdout.splitlines() if "said " in line]
    return sorted(said, key=lambda each: each["rank"])


def test_each_rank_of_ddp_is_there_and_the_one_that_waits_for_data_is_named(tmp_path: Path) -> None:
    """One run, one attempt, whatever the ranks' clocks; the norm is that of the averaged gradients, on each rank."""
    with RunningGateway() as gateway:
        first, second, third = torchrun(tmp_path, gateway, 3, "ddp", "0.06")
        assert first["run"] == second["run"] == third["run"] == "job-7"
        for each in (first, second, third):
            assert each["recorded"] == pytest.approx(each["norms"], rel=1e-6)
        assert first["norms"] == pytest.approx(second["norms"], rel=1e-6)
        with TamiyoClient(gateway.grpc) as client:
            until("all ranks have ended", lambda: [run.ended for run in client.runs()] == ["completed"] * 3)
            runs = client.runs()
            assert [(run.rank, run.world_size, run.stored) for run in runs] == [(0, 3, 12), (1, 3, 12), (2, 3, 12)]
            assert len({run.attempt for run in runs}) == 1
            ranks = client.ranks("job-7", steps=10)
            assert (ranks.slowest_rank, ranks.slowest_by) == (1, "input_wait_ms")
            assert ranks.input_wait_spread_ms == pytest.approx(60, abs=25)
            assert len(client.pull("job-7", rank=2)) == 12


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="this torch has no FSDP2")
def test_shards_of_fsdp_have_the_norm_of_the_whole_and_rank_0_can_send_alone(tmp_path: Path) -> None:
    with RunningGateway() as gateway:
        said = torchrun(tmp_path, gateway, 2, "fsdp", "0", ESPER_EXPORT_RANKS="rank0")
        for each in said:
            assert each["recorded"] == pytest.approx(each["norms"], rel=1e-6)
        assert said[0]["norms"] == pytest.approx(said[1]["norms"], rel=1e-6)
        with TamiyoClient(gateway.grpc) as client:
            until("rank 0 has ended", lambda: [run.ended for run in client.runs()] == ["completed"])
            assert [(run.rank, run.world_size, run.stored) for run in client.runs()] == [(0, 2, 12)]
