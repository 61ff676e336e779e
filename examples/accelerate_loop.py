"""Accelerate: watch what it has prepared; one step for each step of the optimizer. Needs esper-otel[transformers]."""

import torch
from accelerate import Accelerator

import esper_otel

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = torch.nn.Linear(20, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 2, (640,)))
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=32))

loader = esper_otel.watch(model, optimizer, loader)

for _ in range(2):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            loader.put(loss=loss)

loader.close()
print("steps recorded:", loader.telemetry.health()["recorded"])
