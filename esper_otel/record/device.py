"""Reading numbers from tensors and moving tensors to a device.

A CUDA tensor is copied at once on the current stream, so that later in-place changes do not alter the recorded value.
The copy is read once the device has made it, so the training thread never waits. Any other tensor is read at once.

This module never imports torch unless the program has already imported it.
"""

from __future__ import annotations

import copy
import math
import numbers
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from decimal import Decimal
from itertools import chain, groupby
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from esper_otel.captures import apart_from_captures, check_no_capture
from esper_otel.errors import InvalidValue

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def _torch() -> ModuleType | None:
    """The torch module if the program has imported it; otherwise None, and then there are no tensors."""
    return sys.modules.get("torch")


def scalar(name: str, value: object) -> float | Tensor:
    """Returns the number in ``value``; for a CUDA tensor, a copy made on the current stream with the same dtype.

    Args:
        name: the name of the value, for error messages.
        value: a real number, ``Decimal``, NumPy scalar, 0-d array, or 0-d tensor of any real dtype, on any
            device. A 0-d ``DTensor`` is gathered, so all ranks of its mesh must make the call.

    Raises:
        InvalidValue: the value is anything else.
        WrongState: a CUDA graph is being captured.
    """
    torch = _torch()
    if torch is not None and isinstance(value, torch.Tensor):
        if type(value) is torch.Tensor and value.is_cpu and not value.dim():
            one = value.item()
            if type(one) is float:  # the common case: skips the checks of _of_tensor
                return one
        return _of_tensor(name, value)
    if isinstance(value, np.ndarray | np.generic):
        _check_shape(name, "an array", value.shape)
        if value.dtype.kind not in "biuf":
            raise InvalidValue(name, f"{value.dtype} {value!s} is not one real number; give a float")
        return math.nan if getattr(value, "mask", False) else float(value.item())  # a masked item is 0.0
    if isinstance(value, numbers.Real | Decimal):
        return _of_number(value)
    if isinstance(value, numbers.Complex):
        raise InvalidValue(name, f"{value!r} is complex; give its .real or its abs()")
    if getattr(value, "shape", None) == () and hasattr(value, "__float__"):
        return float(value)  # a 0-d array of another library
    given, kind = reprlib.repr(value), type(value).__name__
    raise InvalidValue(name, f"{given} is a {kind}, not one number; give a float or a 0-d tensor")


def _of_number(value: numbers.Real | Decimal) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator] # both kinds compare with 0
    except ValueError:  # a Decimal that is a signalling NaN
        return math.nan


def _of_tensor(name: str, tensor: Tensor) -> float | Tensor:
    _check_shape(name, "a tensor", tuple(tensor.shape))
    if tensor.is_complex():
        raise InvalidValue(name, "a complex tensor is not one number; give its .real or its .abs()")
    if tensor.is_meta:
        raise InvalidValue(name, "a tensor on the meta device holds no number; give one with data")
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor
        tensor = tensor.full_tensor()
    if tensor.is_cuda:
        check_no_capture("values of CUDA tensors are recorded")
        return _copied(tensor)
    return float(tensor.item())


def _check_shape(name: str, what: str, shape: tuple[int, ...]) -> None:
    if shape:
        raise InvalidValue(name, f"{what} of shape {shape} is not one number; reduce it to 0-d, for example .mean()")


def _copied(tensor: Tensor) -> Tensor:
    import torch

    try:
        tensor = tensor.clone()
        # pack() reads the copy on this same stream: on another stream the copy might not have been made yet.
        tensor.copied_on = torch.cuda.current_stream(tensor.device)  # type: ignore[attr-defined] # our attribute
    except RuntimeError:  # the device has failed; ``pack`` and the training itself will see the error
        pass
    return tensor


class CudaEvent(Protocol):
    """The methods used of ``torch.cuda.Event``, whose own annotations differ between versions of PyTorch."""

    def query(self) -> bool: ...  # noqa: D102 - PyTorch's
    def synchronize(self) -> None: ...  # noqa: D102
    def elapsed_time(self, end_event: Any, /) -> float: ...  # noqa: D102


class Copy(NamedTuple):
    """A copy to the host in progress.

    Once the event ``copied`` has completed, ``host`` holds the values of the tensors at ``positions``.
    """

    positions: Sequence[int]
    host: Tensor
    copied: CudaEvent


class PendingCopies:
    """Scalars being copied from devices to the host. Threads: any, one at a time."""

    def __init__(self, count: int, copies: Iterable[Copy], *, lost: bool = False) -> None:
        self._count = count
        self._copies = tuple(copies)
        self._lost = lost

    def done(self) -> bool:
        """Whether all values have arrived or are lost; never waits."""
        try:
            with apart_from_captures():
                return self._lost or all(each.copied.query() for each in self._copies)
        except RuntimeError:  # CUDA reports the error of any earlier kernel at the next call
            self._lost = True
            return True

    def wait(self) -> None:
        """Waits until all values have arrived or are lost."""
        try:
            with apart_from_captures():
                for each in self._copies:
                    each.copied.synchronize()
        except RuntimeError:
            self._lost = True

    def values(self) -> list[float | None]:
        """The numbers in the order of the tensors; all None if a device failed. Call it only when ``done()``."""
        arrived: list[float | None] = [None] * self._count
        if not self._lost:
            for each in self._copies:
                for position, value in zip(each.positions, each.host.tolist(), strict=True):
                    arrived[position] = value
        return arrived


def pack(tensors: Sequence[Tensor]) -> PendingCopies:
    """Starts copying 0-d CUDA tensors to the host, as float64 to pinned memory, with one copy per device and stream.

    Args:
        tensors: tensors returned by ``scalar``, of any real dtypes, on any CUDA devices.
    """
    import torch

    try:
        streams: dict[torch.cuda.Stream, list[int]] = {}
        for position, tensor in enumerate(tensors):
            stream = getattr(tensor, "copied_on", None) or torch.cuda.current_stream(tensor.device)
            streams.setdefault(stream, []).append(position)
        return PendingCopies(len(tensors), [_to_host(stream, at, tensors) for stream, at in streams.items()])
    except RuntimeError:  # the device has failed
        return PendingCopies(len(tensors), (), lost=True)


def _to_host(stream: torch.cuda.Stream, positions: list[int], tensors: Sequence[Tensor]) -> Copy:
    import torch

    def dtype(position: int) -> str:
        return str(tensors[position].dtype)

    positions = sorted(positions, key=dtype)
    with torch.cuda.stream(stream):
        # Stacked by dtype: one kernel launch for many tensors; some dtypes cannot be stacked with each other.
        parts = [torch.stack([tensors[at] for at in same]).double() for _, same in groupby(positions, dtype)]
        host = torch.empty(len(positions), dtype=torch.float64, device="cpu", pin_memory=True)
        host.copy_(torch.cat(parts), non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call] # PyTorch's
        copied.record(stream)
    return Copy(positions, host, copied)


class CopyTiming(NamedTuple):
    """Measures copies from the host to a CUDA device by two events. Threads: any."""

    started: CudaEvent
    ended: CudaEvent

    def done(self) -> bool:
        """Whether the copies are over, or the device has failed; never waits."""
        try:
            with apart_from_captures():
                return self.ended.query()
        except RuntimeError:
            return True

    def wait(self) -> None:
        """Waits until the copies are over, or the device has failed."""
        try:
            with apart_from_captures():
                self.ended.synchronize()
        except RuntimeError:
            return

    def milliseconds(self) -> float | None:
        """The duration; None if CUDA could not report it. Call it only when ``done()``."""
        try:
            with apart_from_captures():
                return self.started.elapsed_time(self.ended)
        except RuntimeError:
            return None


def move(device: str | int | torch.device | Tensor, items: Sequence[Any]) -> tuple[tuple[Any, ...], CopyTiming | None]:
    """Moves items to a device, without waiting if it is a CUDA device.

    Args:
        device: the target, as for ``device_name``.
        items: tensors, modules and other objects with ``.to``, or nested mappings, lists, tuples and named tuples
            of them. Containers are replaced by new ones; all other objects are returned unchanged.

    Returns:
        The moved items, and the timing of the copies if any item went from the host to a CUDA device.

    Raises:
        InvalidValue: ``device`` does not name a device.
        WrongState: a CUDA graph is being captured.
    """
    name = device_name(device)
    torch = _torch()
    if torch is None:
        return tuple(items), None
    target = torch.device(name)
    if target.type != "cuda" or not _is_on_host(items) or not torch.cuda.is_available():
        return tuple(_moved(item, target) for item in items), None
    check_no_capture("copies to the device are timed")
    stream = torch.cuda.current_stream(target)
    started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started.record(stream)
    moved = tuple(_moved(item, target) for item in items)
    ended.record(stream)
    return moved, CopyTiming(started, ended)


def _moved(item: Any, target: torch.device) -> Any:
    if _moves_itself(item):
        return _moved_by_itself(item, target)
    if isinstance(item, MutableMapping):
        moved = copy.copy(item)  # keeps the type and, for a defaultdict, its default_factory
        moved.update({key: _moved(value, target) for key, value in item.items()})
        return moved
    if isinstance(item, list | tuple):
        values = [_moved(value, target) for value in item]
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)
    return item


def _moves_itself(item: Any) -> bool:
    return callable(getattr(item, "to", None)) and not isinstance(item, type)


def _moved_by_itself(item: Any, target: torch.device) -> Any:
    if target.type != "cuda":  # a non-blocking copy to the host could be read before it has completed
        return item.to(target)
    try:
        return item.to(target, non_blocking=True)
    except TypeError:  # the item's ``to`` takes only a device
        return item.to(target)


def _is_on_host(item: Any) -> bool:
    """Whether any tensor in the item is in host memory."""
    if hasattr(item, "is_cuda"):  # a tensor, a PackedSequence
        return not item.is_cuda
    if hasattr(item, "parameters") and hasattr(item, "buffers"):
        return any(not tensor.is_cuda for tensor in chain(item.parameters(), item.buffers()))
    if isinstance(item, Mapping):
        return any(map(_is_on_host, item.values()))
    if isinstance(item, list | tuple):
        return any(map(_is_on_host, item))
    return _moves_itself(item)


_PLAIN_NAME = re.compile(r"(cpu|cuda)(:(?:0|[1-9]\d{0,2}))?")


def device_name(device: str | int | torch.device | Tensor) -> str:
    """Returns the device's name as PyTorch writes it, such as ``cpu`` or ``cuda:0``.

    Initialises no device. Names of the form ``cpu`` or ``cuda:0`` do not need torch.

    Args:
        device: a name, a CUDA device's number, a ``torch.device``, or a tensor, whose device is taken. ``cuda``
            is the current device, or the first one as long as CUDA is not in use.

    Raises:
        InvalidValue: the argument does not name a device.
    """
    if type(device) is int and device >= 0:
        return f"cuda:{device}"
    text = str(getattr(device, "device", device))
    plain = _PLAIN_NAME.fullmatch(text)
    if plain is None:
        return _other_device_name(text)
    if text.startswith("cpu"):
        return "cpu"
    return text if plain[2] else f"cuda:{_current_cuda_index()}"


def _current_cuda_index() -> int:
    torch = _torch()
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


def _other_device_name(text: str) -> str:
    try:
        import torch

        return str(torch.device(text))
    except (ImportError, RuntimeError):
        given = reprlib.repr(text)
        raise InvalidValue("device", f"{given} is not a device; give one such as 'cpu', 'cuda' or 'cuda:0'") from None


def compute_capability(name: str) -> int:
    """A CUDA device's compute capability as major * 10 + minor; 0 for other devices and while CUDA is not in use."""
    try:
        torch = _torch()
        if torch is None or not name.startswith("cuda") or not torch.cuda.is_initialized():
            return 0
        major, minor = torch.cuda.get_device_capability(name)
        return int(major) * 10 + int(minor)
    except Exception:  # noqa: BLE001 - a failing driver must not stop training for an optional field
        return 0
