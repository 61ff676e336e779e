"""FSDP2, watched on one rank only: the others are not kept waiting."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import warm

torch = pytest.importorskip("torch")

SCRIPT = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batches = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8)
watched = None
if dist.get_rank() == 0:
    import esper_otel
    batches = watched = esper_otel.watch(model, optimizer, batches, rank=0, world_size=1)
for inputs in batches:
    loss = model(inputs).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if watched is not None:
        watched.put(loss=loss)
if watched is not None:
    watched.close()
    packets = watched.telemetry.pull(max_packets=9)
    print([("loss" in each.names, "gradient_norm" in each.names) for each in packets])
print([each.full_tensor().tolist() for each in model.parameters()])
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.torch_version.TorchVersion(torch.__version__) < (2, 6), reason="this PyTorch has no FSDP2")
def test_a_rank_that_watches_alone_leaves_the_norm_out_and_says_why(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "none", "OMP_NUM_THREADS": "1", **group}
    ranks = [warm.started(script, env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    (watched, errors), (other, others) = (rank.communicate() for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], (errors, others)
    recorded, weights = watched.splitlines()
    assert recorded == str([(True, False)] * 4)
    assert [weights] == other.splitlines()
    assert errors.count("gradient_norm is left out: the gradients are FSDP2 shards") == 1
