"""Recording from a CUDA device: nothing waits, nothing is altered by what happens later. Needs a GPU."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import esper_otel
from esper_otel import Telemetry, WrongState
from esper_otel.record.device import compute_capability, device_name, move, pack, scalar

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BUSY_CYCLES = 200_000_000  # about a tenth of a second of one GPU


@pytest.fixture
def telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(run_id="run") as telemetry:
        yield telemetry


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    """A call of PyTorch that waits for the device raises."""
    torch.ones(1, device="cuda").item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it does not find every wait
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def with_tf32() -> Iterator[None]:
    """Coarse products of matrices, as many trainings have them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def newest(telemetry: Telemetry) -> dict[str, float]:
    """The training metrics of the newest packet, once the device has delivered them."""
    torch.cuda.synchronize()
    with telemetry.step(epoch=0) as now:
        now.state()
    return dict(list(telemetry.pull())[-2].state.training_metrics)


REAL_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


@pytest.mark.usefixtures("nothing_waits")
def test_a_step_with_everything_waits_for_nothing(telemetry: Telemetry) -> None:
    """Each wait costs a training its lead over the GPU."""
    model = torch.nn.Linear(64, 8, device="cuda")
    scaler = torch.amp.GradScaler("cuda")
    for _ in range(3):
        with telemetry.step(epoch=0, samples=32) as now:
            inputs, targets = now.to("cuda", torch.randn(32, 64), torch.randn(32, 8).pin_memory())
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            model.zero_grad()
            scaler.scale(loss).backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            now.gradients(model, sources={"a": gradients, "b": [-each for each in gradients]}, scaler=scaler)
            now.put(loss=loss, accuracy=torch.tensor(True).to("cuda", non_blocking=True))
            now.seed("seed-1", alpha=loss, isolation_dot=loss.half())
    torch.cuda.set_sync_debug_mode("default")
    values = newest(telemetry)
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item() / scaler.get_scale()
    assert values["gradient_norm"] == pytest.approx(expected, rel=1e-6)
    assert values["grad_conflict_rate"] == 1.0
    assert values["loss"] == pytest.approx(loss.item())
    assert values["accuracy"] == 1.0
    assert 0.0 < values["h2d_copy_ms"] < 10_000.0


def test_later_changes_in_place_do_not_alter_what_was_put(telemetry: Telemetry) -> None:
    """A running mean goes on in the same tensor."""
    running = torch.tensor(1.0, device="cuda")
    with telemetry.step(epoch=0) as now:
        torch.cuda._sleep(BUSY_CYCLES)
        now.put(loss=running)
        running += 1.0
    running += 1.0
    assert newest(telemetry)["loss"] == 1.0


def test_state_inside_the_step_has_the_devices_values(telemetry: Telemetry) -> None:
    """The controller decides on this step's loss."""
    with telemetry.step(epoch=0) as now:
        torch.cuda._sleep(BUSY_CYCLES)
        now.put(loss=torch.tensor(0.5, device="cuda"))
        state: Any = now.state()
    assert dict(state.training_metrics)["loss"] == 0.5


@pytest.mark.usefixtures("nothing_waits")
def test_every_dtype_arrives_in_order_and_in_another_thread() -> None:
    """One copy for all of them, read by whoever drains."""
    tensors: list[Any] = [
        scalar("loss", torch.full((), at % 2, dtype=dtype, device="cuda")) for at, dtype in enumerate(REAL_DTYPES)
    ]
    pending = pack(tensors)
    arrived: list[float | None] = []

    def read() -> None:
        pending.wait()
        assert pending.done()
        arrived.extend(pending.values())

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert arrived == [float(at % 2) for at in range(len(REAL_DTYPES))]


def test_done_says_no_while_the_device_is_busy() -> None:
    """Asking is free; only ``wait`` waits."""
    tensor: Any = scalar("loss", torch.ones((), device="cuda"))
    pack([tensor]).wait()  # taking pinned memory for the first time may wait
    torch.cuda._sleep(BUSY_CYCLES)
    pending = pack([tensor])
    assert not pending.done()
    pending.wait()
    assert pending.values() == [1.0]


def test_a_value_put_on_another_stream_is_read_after_it_was_computed() -> None:
    """The step may end on a stream that knows nothing of that one."""
    stream = torch.cuda.Stream()
    value = torch.zeros((), device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        value.add_(1.0)
        aside: Any = scalar("loss", value)
    here: Any = scalar("accuracy", torch.full((), 2.0, device="cuda"))
    pending = pack([aside, here])
    pending.wait()
    assert pending.values() == [1.0, 2.0]


def test_moving_to_cuda_is_timed_only_when_something_is_copied() -> None:
    """A batch that a loader has already put there costs no copy."""
    batch = {"inputs": torch.ones(1_000, 1_000).pin_memory(), "ids": ["a"]}
    (moved,), timing = move("cuda", [batch])
    assert moved["inputs"].is_cuda
    assert moved["ids"] == ["a"]
    assert timing is not None
    timing.wait()
    assert timing.done()
    milliseconds = timing.milliseconds()
    assert milliseconds is not None
    assert 0.0 < milliseconds < 10_000.0
    assert move("cuda", [moved, torch.nn.Linear(2, 2, device="cuda"), 3])[1] is None
    assert move("cpu", [moved])[1] is None
    (module,), timing = move("cuda", [torch.nn.Linear(2, 2)])
    assert module.weight.is_cuda
    assert timing is not None


def test_a_copy_to_the_host_is_complete_when_it_returns() -> None:
    """It is read at once, by code that expects so."""
    torch.cuda._sleep(BUSY_CYCLES)
    ((moved,), _) = move("cpu", [torch.ones(1_000, device="cuda")])
    assert moved.sum().item() == 1_000.0


@pytest.mark.usefixtures("with_tf32")
def test_the_conflict_rate_is_exact_on_the_device_too() -> None:
    """Coarse products of matrices, which trainings switch on, do not reach it."""
    generator = torch.Generator().manual_seed(3)
    sources = [[torch.randn(size, generator=generator) for size in (300_000, 7)] for _ in range(5)]
    sources[0][0] = sources[1][0] * 1e-3 + torch.randn(300_000, generator=generator)
    on_device = [[each.cuda() for each in source] for source in sources]
    assert esper_otel.gradient_conflict_rate(on_device) == esper_otel.gradient_conflict_rate(sources)
    mixed = [on_device[0], *sources[1:]]
    assert esper_otel.gradient_conflict_rate(mixed) == esper_otel.gradient_conflict_rate(sources)
    on_device[0][0][0] = float("nan")
    assert esper_otel.gradient_conflict_rate(on_device) is None


def test_devices_are_named_and_have_a_capability() -> None:
    """What the packet's hardware context says."""
    tensor = torch.ones(1, device="cuda")
    name = f"cuda:{torch.cuda.current_device()}"
    assert device_name(tensor) == device_name("cuda") == name
    major, minor = torch.cuda.get_device_capability()
    assert compute_capability(name) == major * 10 + minor
    assert compute_capability("cuda:99") == 0


def test_a_captured_training_step_is_recorded_after_its_replay(telemetry: Telemetry) -> None:
    """Its tensors stay where they are, with new values; threads of ours do not spoil a capture in mode "global"."""
    model = torch.nn.Linear(64, 1, device="cuda")
    inputs = torch.randn(32, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(inputs).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    with telemetry.step(epoch=0) as now:
        now.put(loss=torch.ones((), device="cuda"))
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = model(inputs).square().mean()
        loss.backward()
        with pytest.raises(WrongState):
            telemetry_step_put(telemetry, loss)
    for _ in range(3):
        with telemetry.step(epoch=0) as now:
            inputs.copy_(torch.randn(32, 64, device="cuda"))
            graph.replay()
            now.gradients(model)
            now.put(loss=loss)
            expected = loss.clone()
        assert newest(telemetry)["loss"] == pytest.approx(expected.item())


def telemetry_step_put(telemetry: Telemetry, loss: Any) -> None:
    with telemetry.step(epoch=0) as now:
        now.put(loss=loss)
