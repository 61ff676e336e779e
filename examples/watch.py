"""A plain script in three lines: the import, the watch around the loader, and the loss."""

import torch

import esper_otel

torch.manual_seed(0)
model = torch.nn.Linear(20, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 2, (640,)))
loader = torch.utils.data.DataLoader(data, batch_size=32)

loader = esper_otel.watch(model, optimizer, loader)

for _ in range(2):
    for inputs, targets in loader:
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loader.put(loss=loss)

print("the last loss:", loss.item())
