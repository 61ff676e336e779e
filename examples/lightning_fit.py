"""Lightning: one callback. Needs esper-otel[lightning]."""

import lightning
import torch

from esper_otel.integrations.lightning import EsperCallback


class Classifier(lightning.LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self.model(inputs)
        self.log("train_acc", (outputs.argmax(1) == targets).float().mean())
        return torch.nn.functional.cross_entropy(outputs, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


lightning.seed_everything(0)
data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 2, (640,)))
trainer = lightning.Trainer(
    max_epochs=2,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[EsperCallback(metrics={"accuracy": "train_acc"})],
)
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=32))
