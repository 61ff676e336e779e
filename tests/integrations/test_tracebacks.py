"""A traceback shows the script's frames and those of the libraries it calls, and not ours."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import esper_otel

torch = pytest.importorskip("torch")

from esper_otel.integrations.listening import PatchedMethod  # noqa: E402 - only where torch is
from esper_otel.integrations.loader import Feed, follow, unfollow  # noqa: E402
from esper_otel.integrations.patches import Patches  # noqa: E402
from esper_otel.integrations.saves import _Saves  # noqa: E402


class Broken(torch.utils.data.Dataset):  # type: ignore[misc, name-defined] # torch may be absent
    """Its second sample cannot be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        if index:
            raise ValueError("a bad sample")
        return torch.ones(4)


class Unwilling(list[int]):
    """A loader that refuses all it is asked for."""

    def __iter__(self) -> Any:
        raise ValueError("no iterator")

    def __getitem__(self, _index: Any) -> Any:
        raise ValueError("no batch")

    def save(self) -> None:
        raise ValueError("no room")

    def __setattr__(self, name: str, value: object) -> None:
        raise ValueError("no attribute")

    def __delattr__(self, name: str) -> None:
        raise ValueError("no attribute")


class Fails(torch.autograd.Function):  # type: ignore[misc, name-defined]
    """Has no gradient."""

    @staticmethod
    def forward(_context: Any, inputs: Any) -> Any:
        return inputs.clone()

    @staticmethod
    def backward(_context: Any, _gradient: Any) -> Any:
        raise ValueError("no gradient")


def take_all(loader: Any) -> None:
    for _ in loader:
        pass


def step_backward(_loader: Any) -> None:
    Fails.apply(torch.ones(1, requires_grad=True)).sum().backward()


def frames(doing: Callable[[Any], object], loader: Any) -> list[tuple[str, str]]:
    """Where the exception has passed, and what it says."""
    with pytest.raises((ValueError, AttributeError, TypeError)) as caught:
        doing(loader)
    return [(each.filename, each.name) for each in traceback.extract_tb(caught.value.__traceback__)]


def plain() -> Any:
    return torch.utils.data.DataLoader(Broken())


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "a batch": (plain, take_all),
    "a batch of a generator": (lambda: (each for each in plain()), take_all),
    "an iterator": (Unwilling, take_all),
    "an attribute": (plain, lambda loader: loader.nothing),
    "an attribute that is set": (plain, lambda loader: setattr(loader, "batch_size", 2)),
    "an attribute that is deleted": (Unwilling, lambda loader: delattr(loader, "nothing")),
    "an item": (Unwilling, lambda loader: loader[0]),
    "a length": (lambda: torch.utils.data.DataLoader(iter([])), len),
    "a backward pass": (plain, step_backward),
}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper_otel.start() as telemetry:
        yield lambda loader: esper_otel.watch(model, optimizer, loader, telemetry=telemetry)


@pytest.mark.parametrize("case", CASES)
def test_an_exception_of_a_watched_loop_passes_without_a_frame_of_ours(
    watched: Callable[[Any], Any], case: str
) -> None:
    made, doing = CASES[case]
    expected = frames(doing, made())  # before anything is followed
    assert frames(doing, watched(made())) == expected


def test_nor_with_a_loader_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start() as telemetry:
        assert frames(take_all, telemetry.batches(plain())) == frames(take_all, plain())


class Nothing:
    """Hears of batches."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_: None


def test_nor_with_one_that_is_followed_from_outside() -> None:
    """As under ``esper-otel run``."""
    expected = frames(take_all, plain())
    feed = Feed(Nothing())
    follow(feed)
    try:
        assert frames(take_all, plain()) == expected
    finally:
        unfollow(feed)


@pytest.mark.parametrize("is_heard", [True, False])
def test_nor_in_a_method_that_is_listened_to(*, is_heard: bool) -> None:
    loader, other = Unwilling(), Unwilling()
    expected = frames(Unwilling.save, loader)
    heard: list[BaseException] = []
    listening = PatchedMethod(loader, "save", raised=heard.append)
    try:
        assert frames(Unwilling.save, loader if is_heard else other) == expected
    finally:
        listening.end()
    assert [str(each) for each in heard] == (["no room"] if is_heard else [])


def test_nor_in_a_checkpoint_that_is_timed() -> None:
    expected = frames(Unwilling.save, Unwilling())
    saves: Patches[Any] = _Saves()
    saves.followers = [Nothing()]
    original = Unwilling.save
    try:
        saves.replace(Unwilling, "save", _Saves()._around)
        assert frames(Unwilling.save, Unwilling()) == expected
    finally:
        Unwilling.save = original  # type: ignore[method-assign]
