"""A loop of your own: everything that a step takes."""

import torch

import esper_otel
from esper_otel import Stage

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = torch.nn.CrossEntropyLoss(reduction="none")
data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 2, (640,)))
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)

with esper_otel.start(experiment="examples", epochs=2) as telemetry:
    for epoch in range(2):
        for inputs, targets in telemetry.batches(loader):
            with telemetry.step(epoch=epoch, samples=len(targets)) as now:
                outputs = model(inputs)
                losses = criterion(outputs, targets)
                parameters = list(model.parameters())
                # Two halves of the batch as sources: do they pull in one direction?
                halves = [torch.autograd.grad(half.mean(), parameters, retain_graph=True) for half in losses.chunk(2)]
                optimizer.zero_grad()
                losses.mean().backward()
                now.gradients(model, sources=halves)
                optimizer.step()
                now.put(loss=losses.mean(), accuracy=(outputs.argmax(1) == targets).float().mean(), optimizer_lr=0.1)
                now.seed("seed-1", stage=Stage.TRAINING, alpha=0.0)
                with now.hook(), now.tamiyo():
                    packet = now.state()  # what a controller in this process decides by
        telemetry.validation(loss=losses.mean())
    print(packet.packet_id, dict(packet.training_metrics)["loss"])
    print("absent here:", telemetry.absent())
