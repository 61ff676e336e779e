"""Compiled code is compiled as without us, and what cannot be seen of it is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import warm

pytestmark = pytest.mark.lengthy

pytest.importorskip("torch")

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters

def train(kind, is_watched):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8)
    watched = None
    if is_watched:
        import esper_otel
        loader = watched = esper_otel.watch(model, optimizer, loader)

    def step(inputs):
        loss = model(inputs).square().sum()
        loss.backward()
        optimizer.step()

    whole = torch.compile(step, backend="eager")
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        for inputs in loader:
            for each in model.parameters():
                each.grad = None
            if kind == "optimizer":
                model(inputs).square().sum().backward()
                compiled()
            else:
                whole(inputs)
    if is_watched:
        watched.close()
    weights = [each.tolist() for each in model.parameters()]
    return weights, dict(counters["graph_break"]), dict(counters["stats"])

print(json.dumps([train(kind, "watch" in sys.argv) for kind in ("optimizer", "step")]))
"""


def test_graphs_and_their_breaks_are_those_of_the_script(tmp_path: Path) -> None:
    """Of a compiled ``optimizer.step``, and of a compiled step of the loop."""
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "none", "ESPER_BLACK_BOX_FRAMES": "0"}
    commands = ([script], [script, "watch"], ["-m", "esper_otel", "run", "--log", log, script])
    processes = [warm.started(*command, env=environment, imported=warm.FRAMEWORKS) for command in commands]
    done = [process.communicate() for process in processes]
    without, watched, run = (output for output, _ in done)
    assert len(json.loads(without)) == 2, done[0][1]
    assert watched == without
    assert run == without
    assert done[1][1].count("steps inside a fully compiled graph") == 2
    assert "steps inside a fully compiled graph" in log.read_text(encoding="utf-8")
