"""Gradients: the norm is PyTorch's, the conflict rate is exact; CUDA itself is in ``record/test_cuda``."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from properties import examples

import esper_otel
from esper_otel.errors import InvalidValue

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402 - after the check for torch

from esper_otel.derive import gradients as gradients_module  # noqa: E402 - after the check for torch
from esper_otel.derive.gradients import conflict_by_matrices, gradient_conflict_rate, gradient_norm  # noqa: E402


def with_gradients(*gradients: Any) -> list[Any]:
    """Parameters that have these gradients; None for one that has none."""
    parameters = []
    for gradient in gradients:
        if gradient is None:
            parameters.append(torch.nn.Parameter(torch.zeros(2)))
            continue
        parameter = torch.nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


# -- norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_norm_is_what_clip_grad_norm_returns(dtype: Any) -> None:
    """To the bit: a user compares the two."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)).to(dtype)
    model(torch.randn(8, 20, dtype=dtype)).square().sum().backward()
    norm = gradient_norm(model)
    assert type(norm) is float
    assert norm == torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()


def test_the_model_its_parameters_a_generator_and_one_tensor_are_all_taken() -> None:
    """Whatever clip_grad_norm_ takes, and the model."""
    model = torch.nn.Linear(3, 1, bias=False)
    model(torch.tensor([1.0, 2.0, 2.0])).backward()
    given: list[Any] = [model, list(model.parameters()), model.parameters(), model.weight, {model.weight}]
    assert [gradient_norm(each) for each in given] == [3.0] * 5


def test_parameters_without_a_gradient_do_not_count() -> None:
    """Frozen and unused ones."""
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert gradient_norm([frozen, *with_gradients(None, torch.tensor([3.0, 4.0]))]) == 5.0


@pytest.mark.parametrize(
    "given",
    [torch.nn.Linear(2, 1), torch.nn.ReLU(), [], with_gradients(None), iter(())],
    ids=lambda given: type(given).__name__,
)
def test_without_any_gradient_there_is_no_norm(given: Any) -> None:
    """Missing is not 0."""
    assert gradient_norm(given) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow_or_round(dtype: Any) -> None:
    """Four times 40,000 is 80,000, which float16 does not have; scaled gradients come so close to its end."""
    gradient = torch.full((4,), 40_000.0, dtype=dtype)
    assert gradient_norm(with_gradients(gradient)) == 2.0 * float(gradient[0])


def test_dtypes_mix_and_the_widest_counts() -> None:
    """Mixed precision keeps some layers in float32."""
    gradients = [torch.full((4,), 0.1, dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    expected = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert gradient_norm(with_gradients(*gradients)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_gives_a_norm_that_is_not(value: float) -> None:
    """The one moment when somebody looks."""
    norm = gradient_norm(with_gradients(torch.tensor([1.0, value])))
    assert repr(norm) == repr(value)


def test_sparse_gradients_count_once_per_element() -> None:
    """An embedding's gradient lists a row once for every use."""
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 1, 2])).sum().backward()
    assert gradient_norm(embedding) == pytest.approx(math.sqrt(4 * (2.0**2 + 1.0**2)))


def test_a_scaler_divides_by_its_scale_before_and_after_it_is_used() -> None:
    """It makes its scale when it first scales."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameters = with_gradients(torch.tensor([3.0, 4.0]) * 1024.0)
    assert gradient_norm(parameters, scaler=scaler) == 5.0
    scaler.scale(torch.tensor(1.0))
    assert gradient_norm(parameters, scaler=scaler) == 5.0
    assert gradient_norm(parameters) == 5.0 * 1024.0


def test_a_disabled_scaler_changes_nothing() -> None:
    """The same script runs with and without mixed precision."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert gradient_norm(with_gradients(torch.tensor([3.0, 4.0])), scaler=scaler) == 5.0


def test_a_sharded_gradient_is_reduced_over_its_mesh() -> None:
    """FSDP2 leaves DTensors."""
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor, "DTensor"):
        pytest.skip("the destructor of torch 2.4's Gloo group may wait for ever for a thread that waits for the GIL")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        parameter = torch.nn.Parameter(tensor.DTensor.from_local(torch.zeros(2), mesh, [tensor.Shard(0)]))
        parameter.grad = tensor.DTensor.from_local(torch.tensor([3.0, 4.0]), mesh, [tensor.Shard(0)])
        assert gradient_norm([parameter, *with_gradients(torch.tensor([12.0]))]) == 13.0
        assert gradient_conflict_rate([parameter.grad, torch.tensor([-1.0, 0.0])]) == 1.0
    finally:
        distributed.destroy_process_group()


FIX = "give the model, or parameters whose .grad counts"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model", f"a str has no parameters; {FIX}"),
        (None, f"a NoneType has no parameters; {FIX}"),
        ({"weight": torch.ones(1)}, f"a dict has no parameters; {FIX}"),
        ([("weight", torch.ones(1))], f"a tuple is among the parameters; {FIX}"),
        (torch.ones(2, requires_grad=True).sum(), f"a tensor that is the result of an operation keeps no .grad; {FIX}"),
        ([torch.ones(2)], f"none of the tensors has, or requires, a gradient; {FIX}"),
    ],
    ids=["a name", "None", "a dict", "named parameters", "a loss", "gradients"],
)
def test_what_has_no_gradients_is_a_mistake(given: Any, message: str) -> None:
    """The loss, or the gradients themselves, in place of the parameters."""
    with pytest.raises(InvalidValue, match=f"^gradients: {re.escape(message)}$"):
        gradient_norm(given)


def test_a_scaler_must_be_one() -> None:
    """A number is none."""
    wrong: Any = 1024.0
    with pytest.raises(InvalidValue, match=r"^scaler: 1024\.0 is not a torch\.amp\.GradScaler$"):
        gradient_norm(with_gradients(torch.ones(1)), scaler=wrong)


# -- conflict ------------------------------------------------------------------------------------------------


def expected_rate(sources: Sequence[Sequence[Any]]) -> float | None:
    """The definition, in float64 and one pair at a time."""
    products = [
        math.fsum(
            float(np.dot(np.float64(a).ravel(), np.float64(b).ravel()))
            for a, b in zip(one, other, strict=True)
            if a is not None and b is not None
        )
        for one, other in itertools.combinations(sources, 2)
    ]
    if not products or not np.isfinite(products).all():
        return None
    return sum(product < 0.0 for product in products) / len(products)


def rate_by_matrices(sources: Sequence[Sequence[Any]]) -> float:
    """The conflict rate as it is computed on a CUDA device, on the CPU."""
    rate = conflict_by_matrices(list(zip(*sources, strict=True)), len(sources), torch.device("cpu"))
    return rate.item()


SMALL_WHOLE = st.integers(-3, 3).map(float)  # their products are exact, and often cancel to exactly 0
SHAPES: list[tuple[int, ...]] = [(), (4,), (2, 3), (0,), (2, 1, 2)]


@st.composite
def sources_of_arrays(draw: st.DrawFn) -> list[list[Any]]:
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    one = st.tuples(*(st.none() | arrays.arrays(np.float64, shape, elements=SMALL_WHOLE) for shape in shapes))
    return [list(source) for source in draw(st.lists(one, min_size=0, max_size=5))]


def tensors(sources: Sequence[Sequence[Any]], dtype: Any) -> list[list[Any]]:
    return [[None if each is None else torch.tensor(each).to(dtype) for each in source] for source in sources]


@given(sources_of_arrays(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_the_rate_is_the_share_of_pairs_with_a_negative_product(given: list[list[Any]], dtype: Any) -> None:
    """For any number of sources, with tensors missing here and there, on the host and as on a device."""
    expected = expected_rate(given)
    sources = tensors(given, dtype)
    assert gradient_conflict_rate(sources) == expected
    assert gradient_conflict_rate({str(at): source for at, source in enumerate(sources)}) == expected
    if expected is not None:
        assert rate_by_matrices(sources) == expected


@examples(10)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 5))
def test_blocks_add_up_to_the_whole(seed: int, elements: int, count: int) -> None:
    """Wherever the block boundaries fall."""
    random = np.random.default_rng(seed)
    given = [[random.standard_normal((elements, 3)), random.standard_normal(elements)] for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients_module, "_HOST_BLOCK", 7)
        patch.setattr(gradients_module, "_DEVICE_BLOCK", 7)
        assert gradient_conflict_rate(tensors(given, torch.float64)) == expected_rate(given)
        assert rate_by_matrices(tensors(given, torch.float64)) == expected_rate(given)


def strided(array: Any, how: str) -> Any:
    tensor = torch.tensor(array)
    if how == "transposed":
        return tensor.t().contiguous().t()
    if how == "every other":
        return torch.stack([tensor, -tensor], dim=-1)[..., 0]
    return tensor


@examples(25)
@given(
    st.lists(
        st.tuples(
            arrays.arrays(np.float32, (6, 5), elements=SMALL_WHOLE),
            st.sampled_from(["plain", "transposed", "every other"]),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_how_a_tensor_lies_in_memory_does_not_matter(given: list[tuple[Any, str]]) -> None:
    """channels_last gradients, transposed weights, slices of a flat buffer; each source its own way."""
    sources = [[strided(array, how)] for array, how in given]
    expected = expected_rate([[array] for array, _ in given])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients_module, "_HOST_BLOCK", 7)
        assert gradient_conflict_rate(sources) == expected
    assert rate_by_matrices(sources) == expected


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-22, 1e-8, 1.0, 1e8, 1e22, 1e30])
def test_the_size_of_float32_gradients_does_not_matter(size: float) -> None:
    """A product of two of them may be too small or too large for a float32."""
    random = np.random.default_rng(3)
    units = [random.standard_normal(1_000) for _ in range(4)]
    sources = [torch.tensor(unit * size, dtype=torch.float32) for unit in units]
    expected = expected_rate([[unit] for unit in units])
    assert gradient_conflict_rate(sources) == expected
    assert rate_by_matrices([[source] for source in sources]) == expected


def test_large_products_that_cancel_in_float32_are_not_lost() -> None:
    """Infinity minus infinity on the way to a small sum, which float64 holds in whatever order it is added up."""
    one = torch.tensor([1e20, 1e20, 1e13])
    other = torch.tensor([1e20, -1e20, -1e13])
    assert gradient_conflict_rate([one, other]) == 1.0


@pytest.mark.parametrize("cosine", [1e-6, -1e-6])
def test_the_sign_is_right_for_gradients_that_are_almost_orthogonal(cosine: float) -> None:
    """Training near a saddle: a sample of the elements would toss a coin."""
    random = np.random.default_rng(5)
    one = random.standard_normal(1_000_000)
    other = random.standard_normal(1_000_000)
    other -= one * (one @ other) / (one @ one)
    other += one * cosine * np.linalg.norm(other) / np.linalg.norm(one)
    sources = [torch.tensor(one, dtype=torch.float32), torch.tensor(other, dtype=torch.float32)]
    expected = float(sources[0].double() @ sources[1].double() < 0)
    assert expected == float(cosine < 0)
    assert gradient_conflict_rate(sources) == expected
    assert rate_by_matrices([[source] for source in sources]) == expected


@pytest.mark.parametrize(
    "sources",
    [{}, [], [torch.ones(2)], {"a": [torch.ones(2)]}, iter([torch.ones(1)])],
    ids=lambda sources: type(sources).__name__,
)
def test_fewer_than_two_sources_have_no_rate(sources: Any) -> None:
    """Nobody to disagree with."""
    assert gradient_conflict_rate(sources) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_rate_undefined(value: float, dtype: Any) -> None:
    """Undefined, not 'no conflict'."""
    sources = [[torch.tensor([1.0, value], dtype=dtype)], *([torch.tensor([1.0, 2.0], dtype=dtype)] for _ in range(2))]
    assert gradient_conflict_rate(sources) is None
    assert math.isnan(rate_by_matrices(sources))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_even_a_gradient_of_zeros_makes_it_defined(value: float) -> None:
    """Zero times NaN is NaN; zeros take a short cut."""
    sources = [[torch.zeros(2)], [torch.tensor([1.0, value])]]
    assert gradient_conflict_rate(sources) is None
    assert math.isnan(rate_by_matrices(sources))


def test_a_tensor_that_only_one_source_has_does_not_count() -> None:
    """Not even when it is not finite: no pair has it."""
    sources = [[torch.tensor([1.0]), torch.tensor([math.nan])], [torch.tensor([-1.0]), None], [None, None]]
    assert gradient_conflict_rate(sources) == 1 / 3
    assert rate_by_matrices(sources) == 1 / 3


def test_dtypes_may_differ_between_sources() -> None:
    """A half-precision seed in a float32 host, a float64 probe."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    sources = [[torch.tensor([1.0, (-1.0) ** at * 2.0], dtype=dtype)] for at, dtype in enumerate(dtypes)]
    assert gradient_conflict_rate(sources) == rate_by_matrices(sources) == 4 / 6


def test_sparse_gradients_are_compared_element_by_element() -> None:
    """An embedding with sparse=True, against one without."""
    sources = []
    for sparse, sign in ((True, 1.0), (True, -1.0), (False, 1.0)):
        embedding = torch.nn.Embedding(10, 4, sparse=sparse)
        (sign * embedding(torch.tensor([1, 1, 2]))).sum().backward()
        sources.append([parameter.grad for parameter in embedding.parameters()])
    assert gradient_conflict_rate(sources) == rate_by_matrices(sources) == 2 / 3


def test_gradients_may_be_generated_and_may_require_gradients() -> None:
    """``p.grad for p in model.parameters()``; with create_graph a gradient has a graph of its own."""
    weights = torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad((weights**3).sum(), weights, create_graph=True)
    sources = {"a": (each for each in [gradient]), "b": (-gradient,)}
    assert gradient_conflict_rate(sources) == 1.0
    assert gradient.requires_grad


def test_gradients_are_left_as_they_are() -> None:
    """Measuring is reading."""
    sources = [torch.randn(100, generator=torch.Generator().manual_seed(at)) for at in range(3)]
    before = [source.clone() for source in sources]
    gradient_conflict_rate(sources)
    assert all(torch.equal(source, earlier) for source, earlier in zip(sources, before, strict=True))


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call] # PyTorch's is untyped
    """Notes the largest tensor, in elements, that PyTorch makes beside those given."""

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self._known = {each.untyped_storage().data_ptr() for each in given}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self._known:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 0), (torch.bfloat16, 10_000)], ids=str)
def test_memory_does_not_grow_with_the_parameters(dtype: Any, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 gradients are read where they are; of others a block at a time is converted."""
    monkeypatch.setattr(gradients_module, "_HOST_BLOCK", 10_000)
    sources = [torch.ones(200_000, dtype=dtype) for _ in range(3)]
    with Allocations(sources):  # PyTorch imports much when it is watched for the first time
        gradient_conflict_rate(sources)
    tracemalloc.start()
    try:
        with Allocations(sources) as made:
            assert gradient_conflict_rate(sources) == 0.0
        assert made.largest == largest
        assert tracemalloc.get_traced_memory()[1] < 200_000, "bytes that NumPy and Python took"
    finally:
        tracemalloc.stop()


SOURCE_FIX = "give a tensor, or a sequence of tensors such as [parameter.grad for parameter in model.parameters()]"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (torch.ones(2, 3), "a Tensor is not a mapping or sequence of gradient sources"),
        ("ab", "a str is not a mapping or sequence of gradient sources"),
        (None, "a NoneType is not a mapping or sequence of gradient sources"),
        (torch.nn.Linear(1, 1), "a Linear is not a mapping or sequence of gradient sources"),
        ([torch.ones(1), None], f"source 1 is a NoneType; {SOURCE_FIX}"),
        ({"a": torch.nn.Sequential()}, f"source 'a' is a Sequential; {SOURCE_FIX}"),
        ({"a": {"weight": torch.ones(1)}}, f"source 'a' is a dict; {SOURCE_FIX}"),
        ({"a": "grad"}, f"source 'a' is a str; {SOURCE_FIX}"),
        ({"a": [1.0]}, "source 'a' at position 0 is a float, not a tensor or None"),
        ([np.ones(2)], "source 0 at position 0 is a float64, not a tensor or None"),
        (
            {"a": [torch.ones(1), torch.tensor(1)]},
            "source 'a' at position 1 is torch.int64; give floating-point gradients",
        ),
        ([torch.tensor(1j)], "source 0 at position 0 is torch.complex64; give floating-point gradients"),
        ([torch.tensor(True)], "source 0 at position 0 is torch.bool; give floating-point gradients"),
        ([torch.empty(1, device="meta")], "source 0 at position 0 is on the meta device, without data"),
        ({"a": [torch.ones(1)], "b": []}, "source 'b' has 0 tensors, the first has 1"),
        (
            {"a": [None, None], "b": [None, torch.ones(())], "c": [None, torch.ones(3)]},
            "source 'c' at position 1 has shape (3,), others have ()",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else type(value).__name__,
)
def test_sources_that_cannot_be_compared_are_a_mistake_that_names_the_culprit(sources: Any, message: str) -> None:
    """Broadcasting, or comparing the wrong layers, would give a number."""
    with pytest.raises(InvalidValue, match=f"^sources: {re.escape(message)}$"):
        gradient_conflict_rate(sources)


def test_it_is_a_public_function() -> None:
    """Under the package's name, on demand."""
    given: Mapping[str, Any] = {"a": torch.tensor([1.0]), "b": torch.tensor([-1.0])}
    assert esper_otel.gradient_conflict_rate(given) == 1.0
