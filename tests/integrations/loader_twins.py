"""Scripts that do with a loader what scripts do, each run with and without telemetry; see test_loaders.py.

What a case prints is the same with and without. What was recorded of it goes to a file, next to what the script itself
has counted.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import pickle
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset


class Data(Dataset[Any]):
    """21 samples, each of which takes its time."""

    def __init__(self, delay_s: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(21, 4, generator=generator)
        self.delay_s = delay_s

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        if self.delay_s:
            time.sleep(self.delay_s)
        return self.inputs[index], torch.tensor(index % 2)


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Data(0.001))


class Loaded(DataLoader[Any]):
    """A user's own class."""

    names = ("a", "b")

    def called(self) -> int:
        return id(self)


class Slotted:
    """No ``__dict__``, and indexable only."""

    __slots__ = ("batches",)

    def __init__(self) -> None:
        self.batches = batches_of(5)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


class Run:
    """One case: a model, an optimizer, and what the script itself counts of its steps."""

    def __init__(self, how: str) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.model = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.how = how
        self.watched: Any = None
        self.used: list[int] = []
        self.expected: list[int | None] = []
        self.said: list[Any] = []
        self.telemetry: Any = None

    def watch(self, loader: Any) -> Any:
        if self.how == "without":
            return loader
        import esper_otel

        if self.how == "batches":
            self.telemetry = esper_otel.start(run_id="twin")
            return self.telemetry.batches(loader)
        self.watched = esper_otel.watch(self.model, self.optimizer, loader, run_id="twin")
        self.telemetry = self.watched.telemetry
        return self.watched

    def say(self, *values: Any) -> None:
        self.said += values

    def backward(self, batch: Any) -> None:
        inputs, targets = batch[:2]
        loss: Any = torch.nn.functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.used.append(len(inputs))

    def step(self, batch: Any) -> None:
        if not self.used:  # else the gradients add up
            self.optimizer.zero_grad()
        self.backward(batch)
        self.optimizer.step()
        self.expected.append(sum(self.used))
        self.used = []

    def state(self) -> list[Any]:
        weights = b"".join(each.detach().numpy().tobytes() for each in self.model.parameters())
        parts = (weights, torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode())
        return [*self.said, *(hashlib.sha256(part).hexdigest()[:12] for part in parts)]

    def rows(self) -> list[dict[str, Any]]:
        self.telemetry.close()
        rows = []
        for packets in self.telemetry.pull(max_packets=1000):
            row = {name: value for name, value in packets.state.training_metrics.items() if name in packets.names}
            row["epoch"] = packets.state.current_epoch
            rows.append(row)
        return rows


CASES: list[Callable[[Run], None]] = []


def case(function: Callable[[Run], None]) -> Callable[[Run], None]:
    CASES.append(function)
    return function


def batches_of(number: int) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(4 + n, 4, generator=generator), torch.zeros(4 + n, dtype=torch.long)) for n in range(number)]


def loader_of(**named: Any) -> DataLoader[Any]:
    return DataLoader(Data(), batch_size=4, **named)


# -- what a loader is -----------------------------------------------------------------------------------------


@case
def attributes(run: Run) -> None:
    original = Loaded(Data(), batch_size=4, shuffle=True)
    loader = run.watch(original)
    run.say(loader.dataset is original.dataset, loader.sampler is original.sampler, loader.batch_size, len(loader))
    run.say(isinstance(loader, Loaded), isinstance(loader, DataLoader), issubclass(type(loader), DataLoader))
    run.say(type(loader).__name__, loader.__class__ is Loaded, loader.called() == id(original), loader.names)
    run.say(loader == original, original == loader, hash(loader) == hash(original), [original].count(loader))
    run.say(repr(loader) == repr(original), sorted(vars(loader)), set(dir(original)) <= set(dir(loader)))
    run.say(str(inspect.signature(loader.__init__)), hasattr(loader, "__getitem__"), hasattr(loader, "nothing"))
    loader.note = 3
    run.say(original.note)  # type: ignore[attr-defined]
    del loader.note
    run.say(hasattr(original, "note"))
    for change in (lambda: setattr(loader, "batch_size", 2), lambda: loader.nothing, lambda: loader[0]):
        try:
            change()
        except Exception as error:
            run.say(type(error).__name__, str(error))
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        run.say(type(other) is Loaded, len(other), sum(len(batch[0]) for batch in other))
    again = type(loader)(loader.dataset, batch_size=7)
    run.say(isinstance(again, Loaded), len(again))


@case
def other_loaders(run: Run) -> None:
    rows = [1, 2, 3]
    loader = run.watch(rows)
    run.say(
        isinstance(loader, list),
        loader[1:],
        loader.__add__([4]),
        loader * 2,
        loader == [1, 2, 3],
        2 in loader,
        [*reversed(loader)],
    )
    run.say(bool(loader), len(loader), copy.copy(loader), pickle.loads(pickle.dumps(loader)), json.dumps([*loader]))
    loader.append(4)
    run.say(rows, list(loader), max(loader))


@case
def generators(run: Run) -> None:
    def made() -> Iterator[Any]:
        torch.rand(1)
        yield from batches_of(4)

    loader = run.watch(made())
    run.say(iter(loader) is loader, hasattr(loader, "__len__"), inspect.isgenerator(loader))
    torch.rand(1)
    first = next(loader)
    run.step(first)
    for batch in loader:
        run.step(batch)
    run.say([*loader], next(loader, "no more"))


@case
def slots_and_indices(run: Run) -> None:
    loader = run.watch(Slotted())
    run.say(len(loader), loader[2][0].shape[0], isinstance(loader, Slotted))
    for batch in loader:
        run.step(batch)


@case
def samplers(run: Run) -> None:
    data = Data()
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0, seed=3)
    loader = run.watch(DataLoader(data, batch_size=4, sampler=sampler))
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            run.step(batch)


# -- iterators ------------------------------------------------------------------------------------------------


@case
def random_numbers(run: Run) -> None:
    """The loader takes its seed when it is asked for an iterator."""
    loader = run.watch(loader_of(shuffle=True))
    for _ in range(2):
        iterator = iter(loader)
        run.say(torch.rand(1).item(), len(iterator), iterator._num_yielded, type(iterator).__name__)
        for batch in iterator:
            run.say(torch.rand(1).item())
            run.step(batch)
        run.say(iterator._num_yielded)


@case
def workers(run: Run) -> None:
    loader = run.watch(loader_of(shuffle=True, num_workers=1, persistent_workers=True))
    iterators = set()
    for _ in range(2):
        iterator = iter(loader)
        run.say(len(iterator._index_queues), iterator._workers[0].is_alive())
        iterators.add(id(loader._iterator))
        for batch in iterator:
            run.step(batch)
        del iterator
        run.say(loader._iterator._workers[0].is_alive())
    run.say(len(iterators))
    next(iter(loader))


@case
def looks(run: Run) -> None:
    """A look at one batch, before and in the middle, is part of no step."""
    loader = run.watch(loader_of(shuffle=True))
    run.say(next(iter(loader))[0].sum().item())
    for epoch in range(2):
        for number, batch in enumerate(loader):
            run.step(batch)
            if number == 2:
                run.say(next(iter(loader))[0].sum().item())
        with torch.no_grad():
            run.say(sum(len(batch[0]) for batch in loader))
        run.say(epoch)


@case
def many_at_once(run: Run) -> None:
    loader = run.watch(loader_of())
    for first, second in zip(loader, loader, strict=True):
        run.backward(first)
        run.step(second)
    for batch in itertools.islice(itertools.cycle(loader), 8):
        run.step(batch)
    run.expected[-2:] = [None, None]  # nobody has asked the loader for them
    endless = iter(loader)
    for _ in range(8):
        try:
            batch = next(endless)
        except StopIteration:
            endless = iter(loader)
            batch = next(endless)
        run.step(batch)


@case
def broken_off(run: Run) -> None:
    loader = run.watch(loader_of())
    for batch in loader:
        run.step(batch)
        if len(run.expected) == 3:
            break
    time.sleep(0.2)
    for batch in loader:
        run.step(batch)
        break


@case
def streams(run: Run) -> None:
    loader = run.watch(DataLoader(Stream(), batch_size=4))
    try:
        len(loader)
    except TypeError as error:
        run.say(str(error))
    for batch in loader:
        run.step(batch)


# -- ahead of the loop ----------------------------------------------------------------------------------------


class Ahead:
    """As timm's PrefetchLoader: a batch ahead."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        batch = None
        for following in self.loader:
            if batch is not None:
                yield batch
            batch = following
        yield batch


@case
def a_batch_ahead(run: Run) -> None:
    loader = Ahead(run.watch(DataLoader(Data(0.001), batch_size=4)))
    for _ in range(2):
        for batch in loader:
            run.step(batch)


class Prefetcher:
    """As apex's data_prefetcher: a class that requests a batch ahead."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.batches = iter(loader)
        self.preload()

    def preload(self) -> None:
        self.following = next(self.batches, None)

    def next(self) -> Any:
        batch = self.following
        self.preload()
        return batch


@case
def a_batch_ahead_by_a_class(run: Run) -> None:
    loader = run.watch(loader_of())
    for _ in range(2):
        prefetcher = Prefetcher(loader)
        while (batch := prefetcher.next()) is not None:
            run.step(batch)
    run.expected[0] = 8  # of the two that were requested before; then it is known that one of them was not for it


@case
def pairs(run: Run) -> None:
    """Two batches of each step, by a generator."""
    loader = run.watch(loader_of())

    def paired() -> Iterator[Any]:
        batches = iter(loader)
        for first in batches:
            yield first, next(batches)

    for _ in range(2):
        for first, second in paired():
            run.step([torch.cat(parts) for parts in zip(first, second, strict=True)])
    run.expected[0] = 4  # it could have been a batch ahead


@case
def the_next_batch_before_the_step(run: Run) -> None:
    """As nanoGPT: while the model computes, before the backward pass."""
    loader = run.watch(loader_of())
    for _ in range(2):
        batches = iter(loader)
        batch = next(batches)
        while batch is not None:
            loss: Any = torch.nn.functional.cross_entropy(run.model(batch[0]), batch[1])
            following = next(batches, None)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.expected.append(len(batch[0]))
            batch = following


@case
def in_another_thread(run: Run) -> None:
    loader = run.watch(loader_of())
    ahead: queue.Queue[Any] = queue.Queue(2)

    def fetch() -> None:
        for batch in loader:
            ahead.put(batch)
        ahead.put(None)

    thread = threading.Thread(target=fetch)
    thread.start()
    while (batch := ahead.get()) is not None:
        run.step(batch)
    thread.join()
    run.expected = [None] * len(run.expected)


@case
def a_generator_that_trains(run: Run) -> None:
    loader = run.watch(loader_of())

    def trained() -> Iterator[int]:
        for number, batch in enumerate(loader):
            if number % 2 == 0:
                run.backward(batch)
            else:
                run.step(batch)
            yield number

    run.say([*trained()])


@case
def accelerates(run: Run) -> None:
    accelerate: Any = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    loader = run.watch(loader_of(shuffle=True))
    model, optimizer, prepared = accelerator.prepare(run.model, run.optimizer, loader)
    run.say(type(prepared).__name__, len(prepared), prepared.batch_size, type(optimizer).__name__)
    for each in (
        prepared,
        accelerate.skip_first_batches(prepared, 3),
        accelerate.skip_first_batches(loader, 2),
        prepared,
    ):
        for batch in each:
            run.step(batch)
        run.say(len(each))
    run.say(model is run.model)


@case
def accelerates_streams(run: Run) -> None:
    """One process reads, and dispatches to all."""
    accelerate: Any = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(run.watch(DataLoader(Stream(), batch_size=4)))
    run.say(type(loader).__name__)
    for batch in loader:
        run.step(batch)


@case
def accelerates_before(run: Run) -> None:
    accelerate: Any = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    loader = run.watch(accelerator.prepare(loader_of(shuffle=True)))
    run.say(type(loader).__name__, isinstance(loader, DataLoader), loader.total_batch_size)
    for each in (loader, accelerate.skip_first_batches(loader, 3)):
        run.say(type(each).__name__)
        for batch in each:
            run.step(batch)


@case
def sharded(run: Run) -> None:
    """Each rank trains on its own half. Only where there are ranks."""
    if "RANK" not in os.environ:
        return
    accelerate: Any = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    numbers = torch.arange(24.0)
    loader = run.watch(DataLoader(TensorDataset(numbers.repeat(4, 1).T), batch_size=4))
    prepared = accelerator.prepare(loader)
    for _ in range(2):
        for (inputs,) in prepared:
            run.say([int(each) for each in inputs[:, 0]])
            run.step((inputs, torch.zeros(len(inputs), dtype=torch.long)))
    accelerator.end_training()


# -- odd batches ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    """A batch as a dataclass."""

    name: str
    inputs: Any


@case
def odd_batches(run: Run) -> None:
    inputs, targets = batches_of(1)[0]
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(5, 3)])
    strings = ["a", "b", "c"]
    odd: list[tuple[Any, int | None]] = [
        (nested, 2),
        ([torch.ones(3, 8, 9), torch.ones(3, 7, 9)], 2),
        (([[0.5] * 4] * 7, [1] * 7), 7),
        (Pair("x", inputs), 4),
        ({"a": {"b": inputs}}, 4),
        (strings, 3),
        ("abc", None),
        (None, None),
    ]
    loader = run.watch([(inputs, targets, each) for each, _ in odd])
    for batch in loader:
        run.step(batch)


def main(counted: str, ways: list[str], names: list[str]) -> None:
    found: dict[str, dict[str, Any]] = {}
    for how in ways:
        print(how, flush=True)
        found[how] = {}
        for each in CASES:
            if not names or each.__name__ in names:
                found[how][each.__name__] = one(each, how)
    Path(counted).write_text(json.dumps(found), encoding="utf-8")


def one(each: Callable[[Run], None], how: str) -> dict[str, Any]:
    run = Run(how)
    started_s = time.perf_counter()
    each(run)
    spent_ms = (time.perf_counter() - started_s) * 1e3
    print(each.__name__, json.dumps(run.state(), default=repr), flush=True)
    rows = [] if run.telemetry is None else run.rows()
    return {"expected": run.expected, "spent_ms": spent_ms, "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2].split("+"), sys.argv[3:])
