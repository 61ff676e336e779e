"""The operations of a model: as counted by hand, by PyTorch, and with nothing of the model changed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

import esper_otel
from esper_otel.errors import InvalidValue

torch = pytest.importorskip("torch")
flop_counter: Any = import_module("torch.utils.flop_counter")
checkpoint: Any = import_module("torch.utils.checkpoint").checkpoint
nn = torch.nn
BATCH, LENGTH, WIDTH, LAYERS, VOCABULARY = 2, 16, 32, 2, 64
TOKENS = BATCH * LENGTH


class Block(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.out((q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.dropout = nn.Dropout(0.1)
        self.checkpoints = checkpoints

    def forward(self, ids: Any) -> Any:
        x = self.dropout(self.embedding(ids))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return {"logits": self.head(x)}


def ids() -> Any:
    return torch.randint(VOCABULARY, (BATCH, LENGTH))


def by_hand() -> int:
    in_products = LAYERS * (3 + 1 + 4 + 4) * WIDTH * WIDTH + WIDTH * VOCABULARY
    attention = 2 * 2 * LAYERS * BATCH * LENGTH * LENGTH * WIDTH  # scores, and values by scores
    return 6 * in_products * TOKENS + 3 * attention


def test_a_transformer_has_six_operations_a_parameter_and_token_and_those_of_attention() -> None:
    """The count by hand of the papers, forward and backward."""
    assert esper_otel.flops(Transformer(), ids()) == by_hand()


def test_the_count_is_that_of_pytorch_for_a_step_with_backward() -> None:
    model, batch = Transformer(), ids()
    with flop_counter.FlopCounterMode(display=False) as counter:
        model(batch)["logits"].sum().backward()
    assert esper_otel.flops(model, (batch,)) == esper_otel.flops(model, {"ids": batch}) == counter.get_total_flops()
    assert esper_otel.flops(model, batch, backward=False) == by_hand() // 3


@pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning")  # PyTorch 2.4 about itself
def test_recomputation_for_checkpoints_does_not_count() -> None:
    """MFU is about the model's operations, not about those of the machine."""
    model, batch = Transformer(checkpoints=True), ids()
    with flop_counter.FlopCounterMode(display=False) as counter:
        model(batch)["logits"].sum().backward()
    assert esper_otel.flops(model, batch) == by_hand() < counter.get_total_flops()


def test_counting_leaves_the_model_as_it_was() -> None:
    """Gradients, running means and random numbers: training goes on as if nothing had been counted."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[0].weight.grad = torch.ones(4, 4)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    random = torch.get_rng_state()
    assert esper_otel.flops(model, torch.randn(8, 4, generator=torch.Generator())) > 0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))
    assert model[0].bias.grad is None
    assert torch.equal(random, torch.get_rng_state())


def test_a_model_without_parameters_to_train_is_a_mistake() -> None:
    with pytest.raises(InvalidValue, match="nothing to differentiate"):
        esper_otel.flops(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))
