"""Kasmina: isolation, blending and fallback, measured on a real host."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import pytest
from later import needs

from esper_otel import Stage
from esper_otel.demo.pace import Pace
from esper_otel.demo.tamiyo import Action, Command
from esper_otel.errors import WrongState

torch = pytest.importorskip("torch")
needs("sklearn")

from torch import Tensor, nn  # noqa: E402 - only where torch is
from torch.nn.functional import cross_entropy  # noqa: E402

from esper_otel.demo.host import Host  # noqa: E402
from esper_otel.demo.kasmina import Kasmina  # noqa: E402

PACE = Pace(between=1, training=2, blending=4, shadowing=1, probation=1, embargo=1, risk_tolerance=0.9)


def _host() -> Host:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Host()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def _kasmina(host: Host, *actions: Action, seeds: int = 1) -> Kasmina:
    kasmina = Kasmina(host, seeds=seeds, pace=PACE, random_seed=1)
    _command(kasmina, *actions)
    return kasmina


def _command(kasmina: Kasmina, *actions: Action) -> None:
    for action in actions:
        kasmina.apply(Command(seed.seed_id, action, "the test says so") for seed in kasmina.seeds)


def _step(host: Host, kasmina: Kasmina) -> Tensor:
    images, targets = _batch()
    logits = host(images, kasmina.growing(lambda _: nullcontext()))
    loss = cross_entropy(logits, targets)
    host.zero_grad()
    torch.autograd.backward(loss)
    kasmina.measure(loss, targets)
    detached: Tensor = logits.detach()
    return detached


def _gradients(host: Host) -> Iterable[Tensor]:
    return [parameter.grad.clone() for parameter in host.parameters() if parameter.grad is not None]


def test_seeds_in_training_leave_the_host_bit_for_bit_as_it_was() -> None:
    """They see detached features: the host's output and gradients are those of a host without seeds."""
    alone, with_seeds = _host(), _host()
    none = _kasmina(alone, seeds=0)
    three = _kasmina(with_seeds, Action.GERMINATE, Action.TRAIN, seeds=3)
    for _ in range(3):
        assert torch.equal(_step(alone, none), _step(with_seeds, three))
        for expected, found in zip(_gradients(alone), _gradients(with_seeds), strict=True):
            assert torch.equal(expected, found)
        three.step()
    assert [float(seed.violations) for seed in three.seeds] == [0.0, 0.0, 0.0]
    assert all(float(seed.gradient_norm) > 0 for seed in three.seeds if seed.gradient_norm is not None)


def test_a_seed_that_leaks_into_the_host_is_counted() -> None:
    """The count is a measurement of the host's gradients, not a promise of the code."""

    class Leaky(nn.Module):
        def __init__(self, host: Host) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self._leak = [host.head.weight]

        def forward(self, features: Tensor) -> Tensor:
            def leak(gradient: Tensor) -> None:
                self._leak[0].grad = gradient.sum() + torch.ones_like(self._leak[0])

            changed: Tensor = self.scale * features
            changed.register_hook(leak)  # type: ignore[no-untyped-call] # torch has no types for it
            return changed

    host = _host()
    kasmina = _kasmina(host, Action.GERMINATE, Action.TRAIN)
    kasmina.seeds[0].network = Leaky(host)
    _step(host, kasmina)
    assert float(kasmina.seeds[0].violations) == 1.0
    _step(host, kasmina)
    assert float(kasmina.seeds[0].violations) == 2.0


def test_isolation_statistics_are_those_of_the_two_gradients_where_they_meet() -> None:
    """In BLENDING the task's gradient comes back over two paths; autograd gives each by itself."""
    host = _host()
    kasmina = _kasmina(host, Action.GERMINATE, Action.TRAIN, Action.BLEND)
    seed = kasmina.seeds[0]
    for parameter in seed.parameters():
        nn.init.constant_(parameter, 0.1)
    kasmina.finalize_step()
    _step(host, kasmina)

    images, targets = _batch()
    features = host.layers[0](images)
    host_side, seed_side = features.detach().requires_grad_(), features.detach().requires_grad_()
    assert seed.network is not None
    blended = host_side + seed.alpha * seed.network(seed_side)
    loss = cross_entropy(host.behind(1, blended, kasmina.grown), targets)
    of_host, of_seed = torch.autograd.grad(loss, [host_side, seed_side])
    assert seed.isolation is not None
    expected = [(of_host * of_seed).sum(), of_host.norm(), of_seed.norm()]
    torch.testing.assert_close(torch.stack(seed.isolation), torch.stack(expected))


def test_alpha_rises_in_blending_alone_and_from_0_to_1() -> None:
    kasmina = _kasmina(_host())
    seed = kasmina.seeds[0]
    seen: dict[Stage, list[float]] = {}
    path = (Action.GERMINATE, Action.TRAIN, Action.BLEND, Action.SHADOW, Action.PROBE, Action.FOSSILIZE)
    for action in path:
        _command(kasmina, action)
        for _ in range(PACE.blending):
            kasmina.finalize_step()
            seen.setdefault(seed.stage, []).append(seed.alpha)
    rising = seen.pop(Stage.BLENDING)
    assert rising == sorted(rising)
    assert 0.0 < rising[0] < rising[1]
    assert rising[-1] == 1.0
    assert {stage.name: set(alphas) for stage, alphas in seen.items()} == {
        "GERMINATED": {0.0},
        "TRAINING": {0.0},
        "SHADOWING": {1.0},
        "PROBATIONARY": {1.0},
        "FOSSILIZED": {1.0},
    }


def test_a_seed_whose_output_is_not_finite_is_left_out() -> None:
    """The host's features go on alone; the row says that the fallback was used."""
    alone, host = _host(), _host()
    kasmina = _kasmina(host, Action.GERMINATE, Action.TRAIN, Action.BLEND)
    kasmina.finalize_step()
    for parameter in kasmina.seeds[0].parameters():
        nn.init.constant_(parameter, float("nan"))
    assert torch.equal(_step(host, kasmina), _step(alone, _kasmina(alone, seeds=0)))
    row = kasmina.seeds[0].row()
    assert row["fallback_used"] == 1.0
    assert row["isolation_dot"] is None
    images, _ = _batch()
    assert torch.isfinite(host(images, kasmina.grown)).all()


def test_a_culled_seed_starts_over_with_another_blueprint() -> None:
    kasmina = _kasmina(_host(), Action.GERMINATE, Action.TRAIN, Action.BLEND)
    seed = kasmina.seeds[0]
    before = str(seed.network)
    _command(kasmina, Action.CULL)
    assert (seed.stage, seed.alpha, seed.row()["kernel_attached"]) == (Stage.CULLED, 0.0, False)
    _command(kasmina, Action.EMBARGO, Action.RESET, Action.REST, Action.GERMINATE)
    assert seed.stage is Stage.GERMINATED
    assert str(seed.network) != before


def test_a_command_that_does_not_fit_the_stage_is_refused() -> None:
    kasmina = _kasmina(_host())
    with pytest.raises(WrongState, match="seed-1 is DORMANT: it cannot blend"):
        _command(kasmina, Action.BLEND)
