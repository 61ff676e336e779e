"""The norm of gradients, and the share of gradient sources that conflict. Needs torch."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, combinations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from esper_otel.errors import InvalidValue

Source: TypeAlias = "Tensor | Iterable[Tensor | None]"
Sources: TypeAlias = Mapping[str, Source] | Iterable[Source]

# The tensors at one position, one per source; None if the source has no tensor there.
Column: TypeAlias = "Sequence[Tensor | None]"
Array: TypeAlias = npt.NDArray[np.floating[Any]]

# Elements per block on the host: eight sources fit in a core's cache, and the cost of calls is small in comparison.
_HOST_BLOCK = 131_072
# Elements per block on a device: 64 MiB in float64 for eight sources, with few kernel launches.
_DEVICE_BLOCK = 1_048_576
# A float32 inner product smaller than this may have the wrong sign, because products below 1e-38 underflow.
_LOWEST_FLOAT32 = 1e-25


# -- norm ----------------------------------------------------------------------------------------------------


def gradient_norm(
    model_or_parameters: nn.Module | Iterable[Tensor] | Tensor, *, scaler: GradScaler | None = None
) -> float | Tensor | None:
    """Returns the L2 norm over all gradients together: ``sqrt(sum(g ** 2))`` over every element of every ``.grad``.

    The result equals that of ``torch.nn.utils.clip_grad_norm_``, but half precision is summed and returned as
    float32. With FSDP1 or ZeRO it is the norm of this rank's shard. A ``DTensor`` is reduced over its mesh, so all
    ranks of the mesh must make the call.

    Args:
        model_or_parameters: the model or the parameters. Parameters without a gradient are ignored. Sparse gradients
            are coalesced, which waits for a CUDA device.
        scaler: a gradient scaler, for gradients that are still scaled; the norm is divided by its scale.

    Returns:
        A float; or a 0-d tensor if any gradient is on a CUDA device, without waiting for it; or None without gradients.

    Raises:
        InvalidValue: the argument has no parameters, or ``scaler`` is not a gradient scaler.
    """
    norm = norm_of(_gradients_of(model_or_parameters))
    if norm is None:
        return None
    return norm if scaler is None else norm / _scale(scaler, norm.device if isinstance(norm, Tensor) else None)


def norm_of(gradients: list[Tensor]) -> float | Tensor | None:
    """Returns the same of gradients."""
    if not gradients:
        return None
    with torch.no_grad():
        return _total_norm(gradients)


def _gradients_of(given: object) -> list[Tensor]:
    if isinstance(given, nn.Module):
        return [gradient for each in given.parameters() if (gradient := each.grad) is not None]
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise _no_parameters(f"a {type(given).__name__} has no parameters")
    tensors = [given] if isinstance(given, Tensor) else list(given)
    for each in tensors:
        if not isinstance(each, Tensor):
            raise _no_parameters(f"a {type(each).__name__} is among the parameters")
        if not (each.is_leaf or each.retains_grad):
            raise _no_parameters("a tensor that is the result of an operation keeps no .grad")
    gradients = [each.grad for each in tensors if each.grad is not None]
    if tensors and not gradients and not any(each.requires_grad or isinstance(each, nn.Parameter) for each in tensors):
        raise _no_parameters("none of the tensors has, or requires, a gradient")
    return gradients


def _no_parameters(why: str) -> InvalidValue:
    return InvalidValue("gradients", f"{why}; give the model, or parameters whose .grad counts")


def _total_norm(gradients: list[Tensor]) -> float | Tensor:
    if all(type(each) is Tensor and each.dtype is torch.float32 and not each.is_sparse for each in gradients):
        with suppress(RuntimeError):  # the gradients are on several devices
            return _norm_of(torch._foreach_norm(gradients, 2.0))  # noqa: SLF001 - what clip_grad_norm_ uses
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for gradient in gradients:
        dense = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
        group = (dense.device, dense.dtype, getattr(dense, "device_mesh", None))
        groups.setdefault(group, []).append(dense)
    norms: list[Tensor] = []
    for (_, dtype, mesh), group_of in groups.items():
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        these = torch._foreach_norm(group_of, 2.0, dtype=wide)  # noqa: SLF001 - as above
        norms += these if mesh is None else [torch.linalg.vector_norm(torch.stack(these)).full_tensor()]
    device = next((norm.device for norm in norms if norm.is_cuda), norms[0].device)
    dtype = max((norm.dtype for norm in norms), key=lambda each: each.itemsize)
    return _norm_of([norm.to(device, dtype, non_blocking=True) for norm in norms])


def _norm_of(norms: tuple[Tensor, ...] | list[Tensor]) -> float | Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total if total.is_cuda else total.item()


def _scale(scaler: GradScaler, device: torch.device | None) -> float | Tensor:
    # get_scale() waits for the device if the scaler is enabled and its scale is already on the device.
    scale = getattr(scaler, "_scale", None)
    if isinstance(scale, Tensor) and device is not None:
        return scale.to(device, non_blocking=True)
    if not hasattr(scaler, "get_scale"):
        raise InvalidValue("scaler", f"{reprlib.repr(scaler)} is not a torch.amp.GradScaler")
    return scaler.get_scale()


# -- conflict ------------------------------------------------------------------------------------------------


def gradient_conflict_rate(sources: Sources) -> float | None:
    """Returns the share (0 to 1) of pairs of sources whose gradients point in opposing directions.

    This is the share of pairs i < j with ``sum(g_i * g_j) < 0``, over all elements, summed in float64. Only blocks
    of the gradients are copied, one at a time. Waits for CUDA.

    Args:
        sources: two or more sources, by name or in order, such as seeds or micro-batches. A source is a
            floating-point tensor, or a sequence of tensors with the same order and shapes as in every other source.
            None stands for a missing gradient, of a frozen or unused parameter, and adds nothing.

    Returns:
        The share; None with fewer than two sources, or if a product is not finite and the share thus undefined.

    Raises:
        InvalidValue: a source is not a gradient or does not match the first source; the message names it.
    """
    rate = conflict_on_device(sources)
    if isinstance(rate, Tensor):
        rate = float(rate.item())
        return None if math.isnan(rate) else rate
    return rate


def conflict_on_device(sources: Sources) -> float | Tensor | None:
    """Like ``gradient_conflict_rate``, but for gradients on CUDA it returns a 0-d tensor, without waiting.

    The tensor is NaN if the rate is undefined.
    """
    gradients = _checked(sources)
    if len(gradients) < 2:
        return None
    columns = list(zip(*gradients, strict=True))
    device = next((each.device for each in chain(*gradients) if each is not None and each.is_cuda), None)
    with torch.no_grad(), np.errstate(all="ignore"):
        if device is not None:
            return conflict_by_matrices(columns, len(gradients), device)
        return _conflict_on_host(columns, len(gradients))


def _checked(sources: Sources) -> list[list[Tensor | None]]:
    if isinstance(sources, str | Tensor | nn.Module) or not isinstance(sources, Iterable):
        raise InvalidValue("sources", f"a {type(sources).__name__} is not a mapping or sequence of gradient sources")
    named = sources.items() if isinstance(sources, Mapping) else enumerate(sources)
    checked: list[list[Tensor | None]] = []
    shapes: list[torch.Size | None] = []
    for name, source in named:
        if isinstance(source, str | Mapping | nn.Module) or not isinstance(source, Iterable):
            raise InvalidValue(
                "sources",
                f"source {name!r} is a {type(source).__name__}; give a tensor, or a sequence of tensors such as "
                "[parameter.grad for parameter in model.parameters()]",
            )
        tensors = [source] if isinstance(source, Tensor) else list(source)
        if not checked:
            shapes = [None] * len(tensors)
        if len(tensors) != len(shapes):
            raise InvalidValue("sources", f"source {name!r} has {len(tensors)} tensors, the first has {len(shapes)}")
        for at, each in enumerate(tensors):
            if each is not None:
                fault = _fault(each, shapes[at])
                if fault:
                    raise InvalidValue("sources", f"source {name!r} at position {at} {fault}")
                shapes[at] = each.shape
        checked.append(tensors)
    return checked


def _fault(tensor: object, shape: torch.Size | None) -> str | None:
    """Returns why the tensor is not a valid gradient of that shape; None if it is valid."""
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor or None"
    if not tensor.is_floating_point():
        return f"is {tensor.dtype}; give floating-point gradients"
    if tensor.is_meta:
        return "is on the meta device, without data"
    if shape is not None and tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)}, others have {tuple(shape)}"
    return None


def _dense(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor
    return whole if whole.layout == torch.strided else whole.to_dense()


def _conflict_on_host(columns: Iterable[Column], count: int) -> float | None:
    totals = dict.fromkeys(combinations(range(count), 2), 0.0)
    for column in columns:
        present = {source: _dense(tensor) for source, tensor in enumerate(column) if tensor is not None}
        pairs = list(combinations(present, 2))
        for block in _blocks(list(present.values())) if pairs else ():
            products = _products(block)
            if not all(map(math.isfinite, products)):
                return None
            for pair, product in zip(pairs, products, strict=True):
                totals[pair] += product
    return sum(total < 0.0 for total in totals.values()) / len(totals)


def _products(block: Sequence[Array]) -> list[float]:
    """Returns the inner products of all pairs. Those out of float32's reliable range are computed in float64."""
    products = [float(one.dot(other)) for one, other in combinations(block, 2)]
    sizes = [abs(product) for product in products]
    if all(_LOWEST_FLOAT32 < size < math.inf for size in sizes):
        return products
    # Blocks of zeros, common in the gradients of embeddings, need no conversion: their products are exact.
    wide = [each.astype(np.float64) if each.any() else None for each in block]
    for place, (one, other) in enumerate(combinations(wide, 2)):
        if one is not None and other is not None and not _LOWEST_FLOAT32 < sizes[place] < math.inf:
            products[place] = float(one.dot(other))
    return products


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Array]]:
    """Yields the same elements of every tensor, block by block. Float32 and float64 blocks are not copied."""
    laid_out = _laid_out(tensors)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    parts = [tensor.numpy(force=True) if tensor.dtype == dtype else tensor for tensor in laid_out]
    for rows in _rows(laid_out[0], _HOST_BLOCK):
        yield [_array(part[rows], dtype) for part in parts]


def _array(part: Array | Tensor, dtype: torch.dtype) -> Array:
    array: Array = part.to(dtype).numpy(force=True) if isinstance(part, Tensor) else part
    return array.reshape(-1)


def _laid_out(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the tensors with dimensions in the memory order of the first; flat views if all have that order."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        strides = tensors[0].stride()
        order = sorted(range(len(strides)), key=lambda dimension: -strides[dimension])
        tensors = [tensor.permute(order) for tensor in tensors]
        if not all(tensor.is_contiguous() for tensor in tensors):
            return tensors
    return [tensor.view(-1) for tensor in tensors]


def _rows(tensor: Tensor, elements: int) -> Iterator[slice]:
    """Yields equal slices of the first dimension with at most ``elements`` elements, unless one row has more."""
    rows = len(tensor)
    blocks = min(rows, -(-tensor.numel() // elements))
    for block in range(blocks):
        yield slice(rows * block // blocks, rows * (block + 1) // blocks)


def conflict_by_matrices(columns: Iterable[Column], count: int, device: torch.device) -> Tensor:
    """Computes the conflict rate with one matrix product per block, to keep the number of kernel launches low.

    The products are in float64: with float32, a matrix product may use TF32, which is too coarse for the right sign.

    Returns:
        A 0-d tensor on ``device``; NaN if undefined.
    """
    grams: dict[tuple[int, ...], Tensor] = {}  # by the set of sources that have a tensor
    for column in columns:
        present = {source: _dense(tensor) for source, tensor in enumerate(column) if tensor is not None}
        if len(present) < 2:
            continue
        laid_out = _laid_out(list(present.values()))
        for rows in _rows(laid_out[0], _DEVICE_BLOCK):
            parts = [tensor[rows].to(device, torch.float64, non_blocking=True).reshape(-1) for tensor in laid_out]
            block = torch.stack(parts)
            gram = block @ block.T
            key = tuple(present)
            grams[key] = grams[key] + gram if key in grams else gram
    zero = torch.zeros((), dtype=torch.float64, device=device)
    totals = dict.fromkeys(combinations(range(count), 2), zero)
    for sources, gram in grams.items():
        for (row, one), (column_at, other) in combinations(enumerate(sources), 2):
            totals[one, other] = totals[one, other] + gram[row, column_at]
    products = torch.stack(list(totals.values()))
    share = (products < 0.0).double().mean()
    return torch.where(products.isfinite().all(), share, math.nan)
