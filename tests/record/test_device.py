"""Device: what is one number, what moves, and what a device is called; CUDA itself is in ``test_cuda``."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import esper_otel
from esper_otel.errors import InvalidValue, WrongState
from esper_otel.record.device import Copy, CopyTiming, PendingCopies, compute_capability, device_name, move, scalar

torch = pytest.importorskip("torch")

REAL_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_a_0_d_tensor_of_any_real_dtype_is_read_exactly(dtype: Any) -> None:
    """One value of the dtype is one double."""
    for number in (0, 1):
        value = scalar("loss", torch.tensor(float(number)).to(dtype))
        assert (type(value), value) == (float, number)


@given(st.floats(width=32))
def test_what_a_float32_tensor_holds_is_what_is_read(number: float) -> None:
    """NaN and infinities are values too."""
    value = scalar("loss", torch.tensor(number, dtype=torch.float32))
    assert value == number or (math.isnan(number) and math.isnan(value))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *((kind(3), 3.0) for kind in (np.float16, np.float32, np.float64, np.longdouble, np.int8, np.uint64)),
        (np.True_, 1.0),
        (np.array(0.5), 0.5),
        (Decimal("0.5"), 0.5),
        (Decimal("1e400"), math.inf),
        (Decimal("-inf"), -math.inf),
        (Fraction(1, 4), 0.25),
        (Fraction(10**400), math.inf),
        (Fraction(-(10**400)), -math.inf),
        (torch.tensor(2**63 - 1), float(2**63)),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.nn.Parameter(torch.tensor(0.5)), 0.5),
    ],
    ids=repr,
)
def test_any_one_real_number_is_read(given: object, expected: float) -> None:
    """A number too large for a double is infinite, which is data, not a mistake."""
    value = scalar("loss", given)
    assert (type(value), value) == (float, expected)


@pytest.mark.parametrize(
    "given",
    [
        *(Decimal("nan"), Decimal("sNaN"), torch.tensor(math.nan), np.float32(math.nan)),
        np.ma.array([1, 2], mask=True).mean(),  # as float() says, too
        np.ma.array(0.5, mask=True),
    ],
)
def test_nan_is_a_value(given: object) -> None:
    """Recording keeps it; nothing raises."""
    assert math.isnan(scalar("loss", given))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_value_read_is_not_altered_by_what_happens_to_the_tensor_later(requires_grad: bool) -> None:
    """Optimisers and metrics write in place."""
    tensor = torch.tensor(0.5, requires_grad=requires_grad)
    value = scalar("loss", tensor)
    tensor.detach().add_(1.0)
    assert value == 0.5


class ForeignArray:
    """A 0-d array of a library that we do not know."""

    shape = ()

    def __float__(self) -> float:
        return 0.5


def test_a_0_d_array_of_another_library_is_read() -> None:
    """JAX and CuPy have such."""
    assert scalar("loss", ForeignArray()) == 0.5


SHAPE = "of shape {} is not one number; reduce it to 0-d, for example .mean()"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3), "a tensor " + SHAPE.format("(3,)")),
        (torch.zeros(1), "a tensor " + SHAPE.format("(1,)")),
        (torch.zeros(0, 2), "a tensor " + SHAPE.format("(0, 2)")),
        (np.zeros((1, 1)), "an array " + SHAPE.format("(1, 1)")),
        (torch.tensor(1j), "a complex tensor is not one number; give its .real or its .abs()"),
        (torch.empty((), device="meta"), "a tensor on the meta device holds no number; give one with data"),
        (np.complex64(1j), "complex64 1j is not one real number; give a float"),
        (np.str_("0.5"), "<U3 0.5 is not one real number; give a float"),
        (np.array(None), "object None is not one real number; give a float"),
        (1j, "1j is complex; give its .real or its abs()"),
        ("0.5", "'0.5' is a str, not one number; give a float or a 0-d tensor"),
        (b"1", "b'1' is a bytes, not one number; give a float or a 0-d tensor"),
        (None, "None is a NoneType, not one number; give a float or a 0-d tensor"),
        ([0.5], "[0.5] is a list, not one number; give a float or a 0-d tensor"),
        (list(range(100)), "[0, 1, 2, 3, 4, 5, ...] is a list, not one number; give a float or a 0-d tensor"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_one_number_is_a_mistake_whose_message_has_the_fix(given: object, message: str) -> None:
    """Found at the first step; nothing is averaged or truncated on the quiet."""
    with pytest.raises(InvalidValue, match=f"^loss: {re.escape(message)}$") as raised:
        scalar("loss", given)
    assert raised.value.name == "loss"


def test_a_sharded_scalar_is_gathered() -> None:
    """A loss of a parallelised model is a DTensor."""
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor, "DTensor"):  # torch 2.4
        tensor = importlib.import_module("torch.distributed._tensor")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        loss = tensor.DTensor.from_local(torch.tensor(0.5), mesh, [tensor.Partial()])
        assert scalar("loss", loss) == 0.5
    finally:
        distributed.destroy_process_group()


# -- values on their way -------------------------------------------------------------------------------------


class FakeEvent:
    """An event of a device that is still busy, is done, or has failed."""

    def __init__(self, *, is_over: bool = True, fails: bool = False) -> None:
        self.is_over = is_over
        self.fails = fails

    def _ask(self) -> bool:
        if self.fails:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return self.is_over

    def query(self) -> bool:
        return self._ask()

    def synchronize(self) -> None:
        self.is_over = True
        self._ask()

    def elapsed_time(self, end_event: FakeEvent, /) -> float:
        self._ask()
        end_event._ask()
        return 1.5


def copy_of(positions: Sequence[int], values: Sequence[float], event: FakeEvent) -> Copy:
    return Copy(positions, torch.tensor(values, dtype=torch.float64), event)


def test_values_come_in_the_order_of_the_tensors_whatever_device_had_them() -> None:
    """A step's tensors may lie on several devices."""
    slow = FakeEvent(is_over=False)
    pending = PendingCopies(3, [copy_of([2, 0], [0.3, 0.1], FakeEvent()), copy_of([1], [0.2], slow)])
    assert not pending.done()
    pending.wait()
    assert pending.done()
    assert pending.values() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("ask", [PendingCopies.done, PendingCopies.wait])
def test_a_device_that_fails_loses_values_and_raises_nothing(ask: Callable[[PendingCopies], object]) -> None:
    """Training learns of it from its own calls; telemetry must not be the one to end it."""
    pending = PendingCopies(2, [copy_of([0], [0.1], FakeEvent()), copy_of([1], [0.2], FakeEvent(fails=True))])
    ask(pending)
    assert pending.done()
    assert pending.values() == [None, None]


def test_the_time_of_copies_is_known_when_they_are_over() -> None:
    """Resolved after the step, by whoever drains."""
    timing = CopyTiming(FakeEvent(), FakeEvent(is_over=False))
    assert not timing.done()
    timing.wait()
    assert timing.done()
    assert timing.milliseconds() == 1.5


def test_a_device_that_fails_has_no_copy_time() -> None:
    """Missing, not 0."""
    timing = CopyTiming(FakeEvent(), FakeEvent(fails=True))
    timing.wait()
    assert timing.done()
    assert timing.milliseconds() is None


# -- moving --------------------------------------------------------------------------------------------------

Batch = namedtuple("Batch", ["inputs", "targets"])


class PlainTo:
    """Moves itself, and knows nothing of non_blocking."""

    device = "meta"

    def to(self, device: Any) -> PlainTo:
        self.device = str(device)
        return self


def test_nested_tensors_arrive_in_containers_of_the_same_type() -> None:
    """Loaders give dicts of lists of tensors, and collate functions named tuples. 'meta' stands for any device."""
    source = torch.ones(2, 3)
    given: list[Any] = [
        source,
        {"a": [source, 1], "b": {"c": (source, "text")}},
        Batch(source, [source]),
        OrderedDict(a=source),
        defaultdict(list, a=source),
        UserDict(a=source),
    ]
    (tensor, nested, batch, ordered, default, user), timing = move("meta", given)
    assert timing is None
    assert type(nested["b"]["c"]) is tuple
    assert nested["a"][1] == 1
    assert nested["b"]["c"][1] == "text"
    assert type(batch) is Batch
    assert type(ordered) is OrderedDict
    assert type(user) is UserDict
    assert (type(default), default["new"]) == (defaultdict, [])
    moved = [tensor, nested["a"][0], nested["b"]["c"][0], batch.inputs, batch.targets[0]]
    moved += [ordered["a"], default["a"], user["a"]]
    assert {each.device.type for each in moved} == {"meta"}
    assert given[1]["a"][0].device.type == given[5]["a"].device.type == "cpu", "what was given is left as it was"


def test_modules_packed_sequences_and_objects_with_to_move_themselves() -> None:
    """Their own ``to`` knows what is in them."""
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    (module, sequence, plain), _ = move("cpu", [torch.nn.Linear(2, 1), packed, PlainTo()])
    assert isinstance(module, torch.nn.Linear)
    assert isinstance(sequence, torch.nn.utils.rnn.PackedSequence)
    assert plain.device == "cpu"


@pytest.mark.parametrize("item", [None, 1, "text", {1}, np.ones(2), PlainTo, MappingProxyType({}), range(3)], ids=repr)
def test_what_cannot_move_is_returned_as_it_is(item: Any) -> None:
    """A batch has paths, ids and lengths too."""
    (moved,), timing = move("cpu", [item])
    assert moved is item
    assert timing is None


def test_a_tensor_that_is_there_already_is_the_same_tensor() -> None:
    """On the CPU, ``to`` costs a call and copies nothing."""
    tensor = torch.ones(2)
    moved, timing = move("cpu", (tensor,))
    assert moved == (tensor,)
    assert moved[0] is tensor
    assert timing is None


def test_an_empty_call_moves_nothing() -> None:
    """Always a tuple."""
    assert move("cpu", []) == ((), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_cuda_device_is_reported_by_pytorch() -> None:
    """Its message knows why: no driver, or a build without CUDA."""
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        move("cuda", [torch.ones(2)])


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda:0", "cuda:0"),
        ("cuda:13", "cuda:13"),
        (1, "cuda:1"),
        ("mps", "mps"),
        (torch.device("cpu"), "cpu"),
        (torch.device("cuda", 2), "cuda:2"),
        (torch.ones(1), "cpu"),
        (torch.empty(1, device="meta"), "meta"),
    ],
    ids=repr,
)
def test_a_device_has_one_name(device: Any, name: str) -> None:
    """However it was given; frames of one run must agree."""
    assert device_name(device) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda")], ids=repr)
def test_cuda_without_a_number_is_the_first_device_as_long_as_cuda_is_not_in_use(device: Any) -> None:
    """Asking for the current one would initialise CUDA, which breaks a fork that follows."""
    assert device_name(device) == "cuda:0"
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    "device", ["gpu", "", "cuda:-1", "cuda:01", "cuda: 1", "CUDA", None, -1, True, 1.5, [0]], ids=repr
)
def test_what_is_no_device_is_a_mistake(device: Any) -> None:
    """Said at the start."""
    given = re.escape(repr(str(device)))
    message = f"^device: {given} is not a device; give one such as 'cpu', 'cuda' or 'cuda:0'$"
    with pytest.raises(InvalidValue, match=message):
        device_name(device)
    with pytest.raises(InvalidValue, match=r"^device: "):
        move(device, [])


@pytest.mark.parametrize("name", ["cpu", "cuda:0", "cuda:99", "mps", "", "nonsense"])
def test_the_compute_capability_is_0_where_there_is_none(name: str) -> None:
    """It is an ornament; no driver is asked."""
    if not torch.cuda.is_initialized():
        assert compute_capability(name) == 0


def test_a_host_without_torch_records_numbers_and_names_devices() -> None:
    """The torch-free install: nothing is imported, nothing is missing."""
    script = """
import sys
sys.modules["torch"] = None
import numpy
from esper_otel.errors import InvalidValue
from esper_otel.record.device import compute_capability, device_name, move, scalar
assert scalar("loss", numpy.float32(0.5)) == 0.5
assert [device_name(each) for each in ("cpu", "cuda", "cuda:1", 2)] == ["cpu", "cuda:0", "cuda:1", "cuda:2"]
assert move("cuda", [[1], "a"]) == (([1], "a"), None)
assert compute_capability("cuda:0") == 0
try:
    device_name("mps")
except InvalidValue as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert ran.stdout == "device: 'mps' is not a device; give one such as 'cpu', 'cuda' or 'cuda:0'\n", ran.stderr


def test_what_a_cuda_graph_would_capture_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake, as there is no GPU: it says that a capture goes on. The copy would be made once, not at each replay."""
    model = torch.nn.Linear(2, 1)
    model(torch.ones(2)).backward()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(run_id="run") as telemetry, telemetry.step(epoch=0) as now:
        with monkeypatch.context() as capture:
            capture.setattr(torch.cuda, "is_initialized", lambda: True)
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(WrongState, match=r"after replay\(\)"):
                now.gradients(model)
            now.put(loss=0.5)  # a float asks nothing of the device
        now.gradients(model)
