"""A script that knows nothing of telemetry: esper-otel run examples/untouched.py."""

import torch

torch.manual_seed(0)
model = torch.nn.Linear(20, 2)
optimizer = torch.optim.Adam(model.parameters())
data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 2, (640,)))

for epoch in range(2):
    for inputs, targets in torch.utils.data.DataLoader(data, batch_size=32, shuffle=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
