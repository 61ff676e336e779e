"""A model's parameters are those that it has now, whatever has been done to it since the last look."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 - only where torch is

from esper_otel.integrations.parameters import Parameters  # noqa: E402


def a_model() -> Any:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model[1][0].weight = model[0].weight  # shared: counts once
    return model


def replace_in_place(model: Any) -> None:
    """The new one may get the identity of the old one, which is freed first."""
    del model[0].bias
    model[0].bias = nn.Parameter(torch.ones(2))


def exchange(model: Any) -> None:
    model[1] = nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def exchange_after_freeing(model: Any) -> None:
    del model[1]
    gc.collect()
    exchange(model) if len(model) > 1 else model.append(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


CHANGES: list[Callable[[Any], object]] = [
    lambda model: None,
    lambda model: model[0].register_parameter("more", nn.Parameter(torch.ones(1))),
    lambda model: model[1].append(nn.Linear(2, 3)),
    lambda model: model[1].pop(0) if len(model[1]) else None,
    lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(2, 2))),
    lambda model: setattr(model[0], "bias", None),
    lambda model: model.double(),
    lambda model: model[0]._parameters.update(bias=nn.Parameter(torch.ones(2))),
    replace_in_place,
    exchange,
    exchange_after_freeing,
]


@pytest.mark.parametrize("change", CHANGES)
def test_they_are_what_a_walk_finds_after_any_change(change: Callable[[Any], object]) -> None:
    model, parameters = a_model(), Parameters()
    for _ in range(3):
        for _ in range(2):
            assert [*map(id, parameters.of(model))] == [*map(id, model.parameters())]
        change(model)
    other = a_model()
    assert [*map(id, parameters.of(other))] == [*map(id, other.parameters())]


def test_a_model_that_chooses_its_parameters_is_asked_each_time() -> None:
    class Choosing(nn.Linear):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([self.weight] if self.training else [self.bias])

    model, parameters = Choosing(2, 2), Parameters()
    assert [each is model.weight for each in parameters.of(model)] == [True]
    model.eval()
    assert [each is model.bias for each in parameters.of(model)] == [True]


def test_nothing_is_kept_alive() -> None:
    model, parameters = a_model(), Parameters()
    parameters.of(model)
    gone = [weakref.ref(each) for each in (*model.modules(), *model.parameters())]
    del model
    assert [each() for each in gone] == [None] * len(gone)
