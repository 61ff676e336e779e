"""Counts the samples of a batch of any type, at a bounded cost and without using the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

_PARTS = 16  # examined of one container
_LOOKS = 64  # objects examined in one batch
_NUMBERS = (int, float, complex, str, bytes)
_IMAGE_CHANNELS = {1, 3, 4}


def samples_of(batch: object) -> int | None:
    """Returns the number of samples in a batch; None if unknown.

    - For a tensor or an array: the size of the first dimension.
    - For a mapping, tuple, dataclass or other object: that of its first tensor, or else the common length of its lists.
    - For a list of samples (numbers, texts, mappings, images of different sizes): its length.
    - For a batch of graphs: the number that it reports (``num_graphs``, ``batch_size``).
    """
    try:
        if isinstance(batch, list | tuple) and len(batch) == 2:  # the most common case
            inputs, targets = batch
            if type(inputs) is Tensor and type(targets) is Tensor and inputs.dim() > targets.dim():
                return inputs.size(0)
        return _Count().of(batch)
    except Exception:  # noqa: BLE001 - any attribute of a user's object may raise
        return None


class _Count:
    """Counts the samples of one batch."""

    def __init__(self) -> None:
        self._left = _LOOKS

    def of(self, value: object, *, is_part: bool = False) -> int | None:
        self._left -= 1
        if self._left < 0 or value is None or isinstance(value, _NUMBERS):
            return None
        if isinstance(value, Tensor):
            return int(value.size(0)) if value.dim() else None
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return self._of_sequence(value, is_part=is_part)
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple):
            return int(shape[0]) if shape else None
        if isinstance(value, Mapping):
            return self._of_parts(islice(value.values(), _PARTS))
        return self._of_object(value)

    def _of_object(self, value: Any) -> int | None:
        said = _said(value)
        if said is not None or isinstance(getattr(value, "batch", None), Tensor):
            return said  # the length of its ``batch`` is the number of nodes
        if isinstance(value, tuple):  # a named tuple
            sizes = getattr(value, "batch_sizes", None)  # packed sequences: how many have a first element, ...
            if isinstance(sizes, Tensor) and sizes.is_cpu and sizes.dim() == 1:
                return int(sizes[0])
            return self._of_parts(islice(value, _PARTS))
        if dataclasses.is_dataclass(value):
            names = [field.name for field in islice(dataclasses.fields(value), _PARTS)]
            return self._of_parts(getattr(value, name, None) for name in names)
        return self._of_parts(islice(getattr(value, "__dict__", {}).values(), _PARTS))

    def _of_sequence(self, value: list[Any] | tuple[Any, ...], *, is_part: bool) -> int | None:
        first = list(islice(value, _PARTS))
        tensors = [each for each in first if isinstance(each, Tensor)]
        if tensors and len(tensors) == len(first) > 1:
            return self._of_tensors(tensors, len(value), is_part=is_part)
        if tensors and any(each.dim() for each in tensors):
            mixed = any(isinstance(each, _NUMBERS) for each in first)
            # A tensor with a number is a sample (an image and its label), not a batch, which has many labels.
            return None if mixed and is_part else self.of(next(each for each in tensors if each.dim()))
        are_rows = bool(first) and all(isinstance(each, list) and _is_of_numbers(each) for each in first)
        if are_rows and not is_part:  # two rows, or inputs and targets
            return None if isinstance(value, list) else self._of_parts(first)
        is_list = is_part or isinstance(value, list)
        if first and is_list and (are_rows or all(isinstance(each, _NUMBERS) or _is_sample(each) for each in first)):
            return len(value)
        return self._of_parts(first)

    def _of_tensors(self, tensors: list[Tensor], length: int, *, is_part: bool) -> int | None:
        """Counts for a sequence of tensors only, which are samples or parts of a batch such as inputs and targets."""
        sizes = {int(each.size(0)) if each.dim() else None for each in tensors}
        if sizes == {None}:
            return length
        alike = len({(each.dim(), each.dtype) for each in tensors}) == 1
        if alike and tensors[0].dim() == 3 and sizes <= _IMAGE_CHANNELS:
            is_clear = is_part or len({tuple(each.shape) for each in tensors}) > 1
            return length if is_clear else None
        if alike and len(sizes) > 1:  # sequences of different lengths, or source and target with batch as dimension 1
            return length if is_part or length > 2 else None
        return next(int(each.size(0)) for each in tensors if each.dim())

    def _of_parts(self, parts: Iterable[object]) -> int | None:
        """Returns the count of the first tensor or array among the parts, or else the count that all parts share."""
        found = set()
        for part in parts:
            count = self.of(part, is_part=True)
            if count is None:
                continue
            if not isinstance(part, list | tuple):
                return count
            found.add(count)
        return found.pop() if len(found) == 1 else None


def _is_sample(value: object) -> bool:
    """Whether the value, as an item of a list, is one sample."""
    if isinstance(value, Mapping):
        return True
    if isinstance(value, tuple):
        return any(isinstance(each, _NUMBERS) or _is_scalar(each) for each in islice(value, _PARTS))
    return False


def _is_of_numbers(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], _NUMBERS)


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and not value.dim()


def _said(value: Any) -> int | None:
    """Returns the size that a batch of graphs reports, if reading it does not use the device."""
    number = getattr(value, "_num_graphs", None)
    if isinstance(number, int):
        return number
    ends = getattr(value, "ptr", None)
    if isinstance(ends, Tensor) and ends.dim() == 1:
        return max(int(ends.size(0)) - 1, 0)
    size = getattr(value, "batch_size", None)
    if isinstance(size, tuple) and size:
        size = size[0]
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if isinstance(getattr(value, "batch", None), Tensor):  # then num_graphs would be computed on the device
        return None
    number = getattr(value, "num_graphs", None)
    return number if isinstance(number, int) else None
