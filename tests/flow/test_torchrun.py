"""Several ranks for real: torchrun, gloo on the CPU, DDP and FSDP2."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
import warm
from gateways import RunningGateway
from patience import patience
from programs import until

from esper_otel import TamiyoClient

pytestmark = pytest.mark.lengthy

pytest.importorskip("torch")

TRAIN = """
import json, time
import torch
import torch.distributed as dist
import esper_otel

dist.init_process_group("gloo")
rank = dist.get_rank()

def batches(delay_s):
    for step in range(12):
        if rank == 1:
            time.sleep(delay_s)
        random = torch.Generator().manual_seed(100 * step + rank)
        yield torch.randn(8, 16, generator=random), torch.randint(0, 4, (8,), generator=random)

def train(shard, delay_s, **start):
    torch.manual_seed(0)
    net = shard(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    norms = []
    with esper_otel.start(**start) as telemetry:
        for inputs, targets in telemetry.batches(batches(delay_s)):
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
        said = {"rank": rank, "run": telemetry.run_id, "norms": norms, "recorded": recorded}
    print("said", json.dumps(said), flush=True)

train(torch.nn.parallel.DistributedDataParallel, 0.06)
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    pass
else:
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    settings = esper_otel.EsperSettings(export_ranks="rank0")
    train(lambda model: fully_shard(model, mesh=mesh), 0.0, run_id="sharded", settings=settings)
dist.destroy_process_group()
"""


def test_each_rank_is_there_and_the_one_that_waits_for_data_is_named(tmp_path: Path) -> None:
    """DDP: one run, one attempt, the norm of averaged gradients. FSDP2: the norm of the whole; rank 0 sends alone."""
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job-7"]
    with RunningGateway() as gateway:
        environ = {
            **os.environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}",
            "ESPER_EXPORT_EVERY_S": "0.05",
            "OMP_NUM_THREADS": "1",
            "PYTHON_EXEC": str(warm.executable(tmp_path)),
        }
        done = warm.run(*command, tmp_path / "train.py", env=environ)
        assert done.returncode == 0, done.stderr[-3000:]
        said = [json.loads(line.partition("said ")[2]) for line in done.stdout.splitlines() if "said " in line]
        names = ["job-7", "sharded"] if hasattr(import_module("torch.distributed.fsdp"), "fully_shard") else ["job-7"]
        for name in names:
            first, second = sorted((each for each in said if each["run"] == name), key=lambda each: each["rank"])
            assert first["recorded"] == pytest.approx(first["norms"], rel=1e-6)
            assert second["recorded"] == pytest.approx(second["norms"], rel=1e-6)
            assert first["norms"] == pytest.approx(second["norms"], rel=1e-6)
        with TamiyoClient(gateway.grpc) as client:
            processes = 2 if names == ["job-7"] else 3
            until("all have ended", lambda: [run.ended for run in client.runs()] == ["completed"] * processes)
            runs = [(run.run_id, run.rank, run.world_size, run.stored) for run in client.runs()]
            assert runs == [("job-7", 0, 2, 12), ("job-7", 1, 2, 12), ("sharded", 0, 2, 12)][:processes]
            assert len({run.attempt for run in client.runs() if run.run_id == "job-7"}) == 1
            ranks = client.ranks("job-7", steps=10)
            assert (ranks.slowest_rank, ranks.slowest_by) == (1, "input_wait_ms")
            assert ranks.input_wait_spread_ms is not None
            assert 35 < ranks.input_wait_spread_ms < patience(85)
            assert len(client.pull("job-7", rank=1)) == 12
