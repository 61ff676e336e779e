"""How many samples a batch has: of whatever scripts take for one, bounded, and absent where it is not known."""

from __future__ import annotations

import dataclasses
import time
from collections import UserDict, namedtuple
from typing import Any

import pytest
from patience import patience

torch = pytest.importorskip("torch")

from esper_otel.integrations.samples import samples_of  # noqa: E402 - it imports torch

Named = namedtuple("Named", ["inputs", "targets"])


@dataclasses.dataclass
class Pair:
    name: str
    inputs: Any


class Plain:
    """The custom batch of PyTorch's documentation."""

    def __init__(self) -> None:
        self.inp = torch.ones(6, 2)
        self.tgt = torch.ones(6)


class Graphs:
    """As PyTorch Geometric's: many nodes, three graphs."""

    _num_graphs = 3

    def __init__(self) -> None:
        self.x = torch.ones(50, 4)
        self.batch = torch.zeros(50, dtype=torch.long)


class Counted:
    """What it says has to be computed, on a GPU perhaps."""

    def __init__(self) -> None:
        self.batch = torch.zeros(50, dtype=torch.long)

    @property
    def num_graphs(self) -> int:
        raise AssertionError("asked")


class Raises:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def tensors(*shapes: tuple[int, ...], dtype: Any = None) -> list[Any]:
    return [torch.ones(shape, dtype=dtype or torch.float32) for shape in shapes]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("made", "samples"),
    [
        (lambda: torch.ones(5, 2), 5),
        (lambda: torch.tensor(1.0), None),
        (lambda: tensors((5, 2), (5,)), 5),
        (lambda: tuple(tensors((5, 3, 8, 8), (5, 3, 8, 8))), 5),  # two views
        (lambda: tuple(tensors((5, 7), (5, 9), dtype=torch.long)), 5),  # source and target
        (lambda: tuple(tensors((7, 5), (9, 5), dtype=torch.long)), None),  # the same with the batch second
        (lambda: (torch.tensor(0), *tensors((5, 2))), 5),
        (lambda: torch.nested.nested_tensor(tensors((2, 3), (5, 3))), 2),
        (lambda: torch.nested.nested_tensor(tensors((2, 3), (5, 3), (1, 3)), layout=torch.jagged), 3),
        (lambda: torch.ones(4, 2).to_sparse(), 4),
        (lambda: tensors((3, 8, 9), (3, 7, 9)), 2),  # images of several sizes
        (lambda: (tuple(tensors((3, 8, 9), (3, 7, 9))), ({"boxes": torch.ones(7, 4)}, {"boxes": torch.ones(1, 4)})), 2),
        (lambda: tensors((3, 8, 8), (3, 8, 8)), None),
        (lambda: [(torch.ones(3, 8, 8), 1), (torch.ones(3, 8, 8), 0), (torch.ones(3, 8, 8), 0)], 3),  # not collated
        (lambda: tensors((12, 4), (7, 4), (9, 4)), 3),  # sequences of several lengths
        (lambda: ([[0.5] * 4] * 7, [1] * 7), 7),
        (lambda: [[1, 2, 3], [4, 5, 6]], None),
        (lambda: [1.0, 2.0], 2),
        (lambda: (1.0, 2.0), None),
        (lambda: ["a", "b", "c"], 3),
        (lambda: {"text": ["a", "b", "c"], "label": [0, 1, 0]}, 3),
        (lambda: {"text": ["a", "b"], "label": [0]}, None),
        (lambda: [{"text": "a", "label": 1}] * 4, 4),
        (lambda: {"a": {"b": {"c": torch.ones(4, 1)}}}, 4),
        (lambda: UserDict(input_ids=torch.ones(4, 9), names=["a"] * 4), 4),
        (lambda: [torch.ones(5, 2), ["path"] * 5], 5),
        (lambda: Named(torch.ones(4, 2), torch.ones(4)), 4),
        (lambda: Pair("x", torch.ones(4, 2)), 4),
        (Plain, 6),
        (Graphs, 3),
        (lambda: [Graphs(), ["name"] * 3], 3),
        (Counted, None),
        (lambda: torch.nn.utils.rnn.pack_sequence(tensors((5, 2), (3, 2))), 2),
        (lambda: __import__("numpy").ones((6, 2)), 6),
        (lambda: "abc", None),
        (lambda: b"abc", None),
        (lambda: None, None),
        (lambda: (), None),
        (dict, None),
        (Raises, None),
        (object, None),
    ],
)
def test_samples_are_counted_or_absent(made: Any, samples: int | None) -> None:
    assert samples_of(made()) == samples


def test_no_batch_costs_more_for_being_large() -> None:
    """Nor for containing itself."""
    rows = [[[0.5] * 784 for _ in range(2_000)], [0] * 2_000]
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = None
    for _ in range(500):
        deep = [deep, deep, deep]
    for batch in (rows, endless, deep, [object() for _ in range(100_000)], [[None] * 1_000] * 1_000):
        started_s = time.perf_counter()
        for _ in range(100):
            samples_of(batch)
        assert (time.perf_counter() - started_s) / 100 < patience(4e-3)
