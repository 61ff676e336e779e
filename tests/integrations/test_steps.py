"""One step of an optimizer is one row, with what belongs to it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
from patience import patience

import esper_otel
from esper_otel.testing import MemoryCollector

torch = pytest.importorskip("torch")

from esper_otel.integrations import loop as loop_module  # noqa: E402 - only where torch is
from esper_otel.integrations.loader import Feed  # noqa: E402
from esper_otel.integrations.loop import Loop  # noqa: E402
from esper_otel.integrations.steps import OptimizerSteps  # noqa: E402


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("ESPER_BLACK_BOX_FRAMES", "0")


def loader(size: int = 8) -> Any:
    random = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4, generator=random))
    return torch.utils.data.DataLoader(data, batch_size=size)


def setting(kind: Any = None, **named: Any) -> tuple[Any, Any]:
    model = torch.nn.Linear(4, 2)
    return model, (kind or torch.optim.SGD)(model.parameters(), **(named or {"lr": 0.1}))


def rows(watched: Any) -> list[Any]:
    watched.close()
    return [packet.state.training_metrics for packet in watched.telemetry.pull(max_packets=1000)]


def test_put_is_the_mean_over_micro_batches_by_their_samples() -> None:
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader(24))  # of 24 and of 8
    for number, (inputs,) in enumerate(watched):
        model(inputs).sum().backward()
        watched.put(loss=float(number))
        if number == 1:
            optimizer.step()
    assert [row["loss"] for row in rows(watched)] == [pytest.approx(0.25)]


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("clears_first", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_put_before_the_next_batch_is_requested_ahead_of_the_step(
    micro_batches: int, *, clears_first: bool, is_scaled: bool
) -> None:
    """As nanoGPT: forward, the next batch, backward. No step is taken to be skipped, and no value is another step's."""
    model, optimizer = setting()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=is_scaled)
    watched = esper_otel.watch(model, optimizer, loader(2))
    batches = iter(watched)
    (inputs,) = next(batches)
    for number in range(8):
        loss = model(inputs).square().sum() / micro_batches
        watched.put(accuracy=number / 8)
        (inputs,) = next(batches)
        if clears_first and number % micro_batches == 0:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        if number % micro_batches == micro_batches - 1:
            scaler.step(optimizer)
            scaler.update()
            if not clears_first:
                optimizer.zero_grad()
    expected = [(number + (micro_batches - 1) / 2) / 8 for number in range(0, 8, micro_batches)]
    assert [row["accuracy"] for row in rows(watched)] == expected
    assert watched.telemetry.health()["failed"] == 0


def test_a_step_at_the_top_of_the_loop_is_of_the_batches_before() -> None:
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader(4))
    for number, (inputs,) in enumerate(watched):
        if number in {2, 4}:
            optimizer.step()
            optimizer.zero_grad()
        model(inputs).sum().backward()
        watched.put(accuracy=number / 8)
    optimizer.step()
    found = rows(watched)
    assert [row["accuracy"] for row in found] == [0.0625, 0.3125, 0.6875]
    samples = [row["samples_per_s"] * (row["input_wait_ms"] + row["step_latency_ms"]) / 1e3 for row in found]
    assert samples == pytest.approx([8, 8, 16])


def test_a_skipped_step_is_a_failed_row_of_its_own() -> None:
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader())
    for number, (inputs,) in enumerate(watched):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        watched.put(accuracy=number / 4)
        if number != 1:
            optimizer.step()
    found = rows(watched)
    assert [row["accuracy"] for row in found] == [0.0, 0.25, 0.5, 0.75]
    assert ["gradient_norm" in row for row in found] == [True, False, True, True]
    health = watched.telemetry.health()
    assert health["recorded"] == 4


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("is_set_to_none", [False, True])
def test_a_step_is_skipped_however_the_gradients_are_cleared(*, is_set_to_none: bool, clips: bool) -> None:
    """Gradients that are set to zero remain the same tensors; so do those that accumulate."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader())
    for number, (inputs,) in enumerate(watched):
        optimizer.zero_grad(set_to_none=is_set_to_none)
        model(inputs).sum().backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        watched.put(accuracy=number / 4)
        if number != 1:
            optimizer.step()
    assert [row["accuracy"] for row in rows(watched)] == [0.0, 0.25, 0.5, 0.75]
    assert watched.telemetry.health()["failed"] == 1
    assert not any(each._backward_hooks for each in model.parameters())  # nothing of ours is left on them


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("is_set_to_none", [False, True])
@pytest.mark.parametrize("creates_graph", [False, True])
@pytest.mark.parametrize("clears_first", [False, True])
def test_gradients_that_accumulate_are_of_one_step(
    *, is_set_to_none: bool, creates_graph: bool, clears_first: bool
) -> None:
    """Two backward passes a batch, clipped before the step. With ``create_graph`` each sum is another tensor."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader())
    for number, (inputs,) in enumerate(watched):
        if clears_first and number % 2 == 0:
            optimizer.zero_grad(set_to_none=is_set_to_none)
        for _ in range(2):
            model(inputs).square().sum().backward(create_graph=creates_graph)
        watched.put(accuracy=number / 4)
        if number % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if not clears_first:
                optimizer.zero_grad(set_to_none=is_set_to_none)
    assert [row["accuracy"] for row in rows(watched)] == [0.125, 0.625]
    assert watched.telemetry.health()["failed"] == 0


@pytest.fixture
def group() -> Iterator[None]:
    """One rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("are_views", [False, True])
def test_batches_of_several_ranks_accumulate_or_are_skipped(*, are_views: bool) -> None:
    """Gradients that are views of buckets are other tensors after each batch, so a skipped batch is not recognized."""
    model, optimizer = setting()
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=are_views)
    watched = esper_otel.watch(parallel, optimizer, loader(4))
    for number, (inputs,) in enumerate(watched):
        if number >= 4:
            optimizer.zero_grad()
        with parallel.no_sync() if number in {0, 2} else nullcontext():
            parallel(inputs).sum().backward()
        watched.put(accuracy=number / 8)
        if number not in {0, 2, 5}:
            optimizer.step()
            optimizer.zero_grad()
    skipped = [0.5, 0.6875, 0.875] if are_views else [0.5, 0.625, 0.75, 0.875]
    assert [row["accuracy"] for row in rows(watched)] == [0.0625, 0.3125, *skipped]
    assert watched.telemetry.health()["failed"] == (0 if are_views else 1)


def test_batches_that_were_taken_together_are_of_one_step() -> None:
    """As a support set and a query set: the first of them has no gradients of its own, in no step."""
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader(4))
    batches = iter(watched)
    for number in range(4):
        optimizer.zero_grad()
        (first,), (second,) = next(batches), next(batches)
        model(torch.cat([first, second])).sum().backward()
        watched.put(accuracy=number / 4)
        optimizer.step()
    samples = [row["samples_per_s"] * (row["input_wait_ms"] + row["step_latency_ms"]) / 1e3 for row in rows(watched)]
    assert samples == pytest.approx([8] * 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_that_is_left_without_a_stand_in(workers: int) -> None:
    """As under ``run``. The batch at the ``break`` is in no step; what comes after the loop is no part of the last."""
    model, optimizer = setting()
    pause_s = patience(0.1)
    plain = torch.utils.data.DataLoader(
        loader().dataset, batch_size=8, num_workers=workers, persistent_workers=bool(workers)
    )
    watched = esper_otel.watch(model, optimizer, plain)
    for _ in range(3):
        for number, (inputs,) in enumerate(plain):
            if number == 2:
                break
            optimizer.zero_grad()
            model(inputs).sum().backward()
            optimizer.step()
        time.sleep(pause_s)
    iterator = iter(plain)
    optimizer.zero_grad()
    model(next(iterator)[0]).sum().backward()
    optimizer.step()
    time.sleep(pause_s)
    watched.close()
    packets = list(watched.telemetry.pull(max_packets=1000))
    found = [packet.state.training_metrics for packet in packets]
    samples = [row["samples_per_s"] * (row["input_wait_ms"] + row["step_latency_ms"]) / 1e3 for row in found]
    assert samples == pytest.approx([8] * 7)
    assert [packet.state.current_epoch for packet in packets] == [0, 0, 1, 1, 2, 2, 3]
    assert found[-1]["step_latency_ms"] < pause_s * 1e3
    assert workers or max(row["step_latency_ms"] for row in found) < pause_s * 1e3


def test_put_after_the_loop_belongs_to_its_last_step() -> None:
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader(16))
    for epoch in range(2):
        for (inputs,) in watched:
            model(inputs).sum().backward()
            optimizer.step()
        watched.put(accuracy=epoch / 2)
    assert [row.get("accuracy") for row in rows(watched)] == [None, 0.0, None, 0.5]


def test_put_after_an_evaluation_on_the_watched_loader_belongs_to_the_step_before_it() -> None:
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader(8))
    for number, (inputs,) in enumerate(watched):
        model(inputs).sum().backward()
        optimizer.step()
        watched.put(loss=float(number))
        if number % 2:
            with torch.no_grad():
                for (others,) in watched:
                    watched.put(loss=9.0 + len(model(others)))  # of no step
        watched.put(accuracy=number / 4)
    found = rows(watched)
    assert [row["loss"] for row in found] == [0.0, 1.0, 2.0, 3.0]
    assert [row["accuracy"] for row in found] == [0.0, 0.25, 0.5, 0.75]
    samples = [row["samples_per_s"] * (row["input_wait_ms"] + row["step_latency_ms"]) / 1e3 for row in found]
    assert samples == pytest.approx([8] * 4)


def test_a_step_is_recorded_amid_a_long_evaluation_and_what_is_put_after_it_is_of_the_next_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop_module, "_LONGEST_HOLD_S", 0.0)
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader(8))

    def evaluated() -> list[object]:
        with torch.no_grad():
            return [watched.telemetry.health()["recorded"] for _ in watched]

    for number, (inputs,) in enumerate(watched):
        model(inputs).sum().backward()
        optimizer.step()
        watched.put(loss=float(number))
        if number == 1:
            assert evaluated() == [1, 2, 2, 2]
            watched.put(accuracy=0.25, loss=7.0)
    assert evaluated() == [3, 4, 4, 4]
    watched.put(accuracy=0.5)
    found = rows(watched)
    assert [row["loss"] for row in found] == [0.0, 1.0, 2.0, 3.0]
    assert [row.get("accuracy") for row in found] == [None, None, 0.25, None]
    assert caplog.text.count("values put after an evaluation of more than two seconds (accuracy, loss)") == 1
    assert "not recorded, since no step followed: accuracy" in caplog.text


def test_each_of_several_optimizers_makes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose a step was stands beside it, and not in its packet: Tamiyo's networks have no such input."""
    collector = MemoryCollector()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    with collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        found, norms = two_optimizers()
        indexes = [point.value for point in collector.points() if point.name == "esper.optimizer.index"]
    assert [value for value in indexes if value is not None] == [0, 1, 0, 1]
    assert [row["gradient_norm"] for row in found] == pytest.approx(norms)
    assert ["samples_per_s" in row for row in found] == [True, False, True, False]
    assert ["input_wait_ms" in row for row in found] == [True, False, True, False]


def two_optimizers() -> tuple[list[Any], list[float]]:
    (one, first), (other, second) = setting(), setting()
    watched = esper_otel.watch(one, [first, second], loader(16))
    norms = []
    for (inputs,) in watched:
        for model, optimizer in ((one, first), (other, second)):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            norms.append(float(torch.cat([each.grad.flatten() for each in model.parameters()]).norm()))
            optimizer.step()
    return rows(watched), norms


def test_an_optimizer_after_one_that_is_gone_is_not_the_second_of_several() -> None:
    """As in a sweep, of which ``esper-otel run`` follows one optimizer after another."""
    telemetry = esper_otel.start(run_id="sweep")
    steps = OptimizerSteps(Loop(telemetry), Feed(NothingWaits()))
    for _ in range(3):
        model, optimizer = setting()
        model(torch.ones(1, 4)).sum().backward()
        steps.before(optimizer, (), {})
        optimizer.step()
        steps.after()
        steps.end()
        del model, optimizer
        gc.collect()
    steps.loop.parts.close()
    telemetry.close()
    found = [packet.names for packet in telemetry.pull(max_packets=10)]
    assert ["gradient_norm" in names for names in found] == [True] * 3
    assert not any("esper.optimizer.index" in names for names in found)


def test_an_optimizer_that_is_new_gets_all_batches_of_its_first_step() -> None:
    """As under ``esper-otel run``, where it is heard of when it steps: its gradients before that were not known."""
    telemetry = esper_otel.start(run_id="accumulating")
    feed = Feed(NothingWaits())
    steps = OptimizerSteps(Loop(telemetry), feed)
    feed._waiting = steps  # type: ignore[assignment] # as a script has it, which is both
    for _ in range(2):
        model, optimizer = setting()
        taker = Taker()
        for samples in (3, 5):
            feed.asks(taker)
            feed.gets(taker, torch.ones(samples, 4))
            model(torch.ones(samples, 4)).sum().backward()
        steps.before(optimizer, (), {})
        optimizer.step()
        steps.after()
        steps.wait()
        steps.end()
        del model, optimizer
        gc.collect()
    steps.loop.parts.close()
    telemetry.close()
    found = [packet.state.training_metrics for packet in telemetry.pull(max_packets=10)]
    spent_s = [(row["step_latency_ms"] + row["input_wait_ms"]) / 1e3 for row in found]
    assert [round(row["samples_per_s"] * each) for row, each in zip(found, spent_s, strict=True)] == [8, 8]


class Taker:
    """Asks for batches."""


class NothingWaits:
    """No loader is followed."""

    def wait(self) -> None: ...
    def batch(self, samples: int | None = None) -> None: ...
    def no_batch(self) -> None: ...
    def discard(self) -> None: ...
    def discard_last(self) -> None: ...
    def stop(self) -> None: ...


def test_the_norm_of_a_closure_is_that_of_its_last_evaluation() -> None:
    model, optimizer = setting(torch.optim.LBFGS, max_iter=3)
    watched = esper_otel.watch(model, optimizer, loader(16))
    expected = []
    for (inputs,) in watched:
        norms: list[float] = []
        optimizer.step(closure(model, optimizer, inputs, norms))
        expected.append(norms[-1])
    assert [row["gradient_norm"] for row in rows(watched)] == pytest.approx(expected)


def closure(model: Any, optimizer: Any, inputs: Any, norms: list[float]) -> Callable[[], Any]:
    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        norms.append(float(torch.cat([each.grad.flatten() for each in model.parameters()]).norm()))
        return loss

    return evaluate


def test_a_closure_that_raises_has_no_frame_of_ours_in_its_traceback() -> None:
    model, optimizer = setting()
    watched = esper_otel.watch(model, optimizer, loader())

    def broken() -> Any:
        raise KeyError("of the script")

    with pytest.raises(KeyError) as caught:
        optimizer.step(broken)
    assert not [entry for entry in caught.traceback if "esper_otel" in str(entry.path)]
    watched.close()


class Shard(torch.Tensor):  # type: ignore[misc, name-defined] # torch may be absent
    """As a DTensor of FSDP2: one rank has a part of it."""

    device_mesh = "of two ranks"


def test_the_norm_of_shards_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """By the callbacks of frameworks, too, which may be on one rank only."""
    with esper_otel.start() as telemetry:
        loop = Loop(telemetry)
        for gradient in (Shard([3.0]), Shard([4.0]), torch.tensor([5.0])):
            parameter = torch.nn.Parameter(torch.ones(1))
            parameter.grad = gradient
            loop.batch()
            loop.gradients([parameter])
            loop.stepped()
            loop.end(epoch=0)
        loop.parts.close()
        found = [packet.state.training_metrics.get("gradient_norm") for packet in telemetry.pull()]
    assert found == [None, None, 5.0]
    assert caplog.text.count("gradient_norm is left out: the gradients are FSDP2 shards") == 1


def test_a_second_watch_of_one_model_ends_the_first() -> None:
    model, optimizer = setting()
    first = esper_otel.watch(model, optimizer, loader())
    second = esper_otel.watch(model, optimizer, loader())
    for (inputs,) in second:
        model(inputs).sum().backward()
        optimizer.step()
    assert len(rows(second)) == 4
    assert rows(first) == []
    assert not optimizer._optimizer_step_pre_hooks


class Sam(torch.optim.Optimizer):  # type: ignore[misc, name-defined] # torch may be absent
    """As the public one: two steps for one, the second of them by an optimizer inside."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups: list[Any] = self.base_optimizer.param_groups

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def first_step(self) -> None:
        for each in self.param_groups[0]["params"]:
            self.state[each]["moved"] = each.grad * 0.05
            each.add_(self.state[each]["moved"])
            each.grad = None

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def second_step(self) -> None:
        for each in self.param_groups[0]["params"]:
            each.sub_(self.state[each]["moved"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def train_by_sam(model: Any, optimizer: Sam, batches: Any, *, by_closure: bool) -> list[float]:
    norms: list[float] = []
    for (inputs,) in batches:
        evaluate = closure(model, optimizer, inputs, norms)
        if by_closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.first_step()
            evaluate()
            optimizer.second_step()
    return norms[1::2]


@pytest.mark.parametrize("by_closure", [True, False])
def test_the_two_steps_of_sam_are_one_row(*, by_closure: bool) -> None:
    """With the norm that the second of them sees, and the weights to the last bit."""
    weights = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        model, optimizer = setting(Sam)
        batches = esper_otel.watch(model, optimizer, loader(16)) if is_watched else loader(16)
        norms = train_by_sam(model, optimizer, batches, by_closure=by_closure)
        weights.append([each.tolist() for each in model.parameters()])
    assert weights[0] == weights[1]
    found = rows(batches)
    assert [row["gradient_norm"] for row in found] == pytest.approx(norms)
    assert all("samples_per_s" in row for row in found)


def test_sam_is_not_two_optimizers_for_run() -> None:
    """Which hears of both."""
    telemetry = esper_otel.start()
    feed = Feed(NothingWaits())
    steps = OptimizerSteps(Loop(telemetry), feed)
    model, optimizer = setting(Sam)
    hooks = [
        hook
        for each in (optimizer, optimizer.base_optimizer)
        for hook in (each.register_step_pre_hook(steps.before), each.register_step_post_hook(lambda *_: steps.after()))
    ]
    norms = train_by_sam(model, optimizer, loader(16), by_closure=True)
    steps.end()
    for hook in hooks:
        hook.remove()
    steps.loop.parts.close()
    telemetry.close()
    found = list(telemetry.pull(max_packets=10))
    assert [packet.state.training_metrics["gradient_norm"] for packet in found] == pytest.approx(norms)
    assert len(steps._known) == 1


def test_an_optimizer_in_the_place_of_the_watched_one_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not one of another model."""
    model, optimizer = setting()
    other = torch.optim.AdamW([*model.parameters()][1:], lr=0.1)
    another, its = setting()
    watched = esper_otel.watch(model, optimizer, loader(2))
    for _ in range(8):
        for (inputs,) in watched:
            (model(inputs).sum() + another(inputs).sum()).backward()
            other.step()
            its.step()
    watched.close()
    said = [record.getMessage() for record in caplog.records if "has not stepped" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("the watched SGD has not stepped, but another AdamW has")
    assert "no step of a followed" not in caplog.text
    assert not import_module("torch.optim.optimizer")._global_optimizer_post_hooks


def test_a_wrapper_that_is_no_optimizer_is_refused_with_what_to_give() -> None:
    model, _ = setting()
    with pytest.raises(esper_otel.InvalidValue, match="if it wraps one, give that"):
        esper_otel.watch(model, object(), loader())  # type: ignore[arg-type]
    with pytest.raises(esper_otel.InvalidValue, match=r"a test_steps.Foreign .* record them by telemetry.step\(\)"):
        esper_otel.watch(model, Foreign(model), loader())  # type: ignore[arg-type]


class Foreign:
    """Updates parameters without ``torch.optim``, as Keras's optimizers and fastai's own do."""

    def __init__(self, model: Any) -> None:
        self.parameters = [*model.parameters()]

    def apply(self) -> None:
        with torch.no_grad():
            torch._foreach_add_(self.parameters, [each.grad for each in self.parameters], alpha=-0.1)


class Wraps:
    """As fastai's OptimWrapper: an optimizer of ``torch.optim`` in ``opt``, and groups of its own."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt
        self.param_groups = [dict(group) for group in opt.param_groups]

    def step(self) -> None:
        self.opt.step()


def train_by_others(kind: str, model: Any, *, watched: bool) -> tuple[Any, list[float]]:
    torch.manual_seed(1)
    model.reset_parameters()
    batches, norms = loader(2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper: Any = Wraps(optimizer)
    if watched:
        batches = esper_otel.watch(model, optimizer if kind == "foreign" else wrapper, batches)
    for _ in range(8):
        for (inputs,) in batches:
            model.zero_grad()
            model(inputs).square().mean().backward()
            norms.append(torch.cat([each.grad.flatten() for each in model.parameters()]).norm().item())
            (Foreign(model).apply if kind == "foreign" else wrapper.step)()
    return batches, norms


@pytest.mark.parametrize("kind", ["foreign", "wraps"])
def test_steps_by_the_optimizers_of_others_are_followed_or_said_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = setting()
    train_by_others(kind, model, watched=False)
    weights = [each.tolist() for each in model.parameters()]
    watched, norms = train_by_others(kind, model, watched=True)
    assert [each.tolist() for each in model.parameters()] == weights
    found = [row["gradient_norm"] for row in rows(watched)]
    assert found == ([] if kind == "foreign" else pytest.approx(norms, rel=1e-5))
    said = [record.getMessage() for record in caplog.records if "no step of a followed" in record.getMessage()]
    assert ["Keras" in each for each in said] == ([True] if kind == "foreign" else [])
