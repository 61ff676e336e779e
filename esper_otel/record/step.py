"""The scope of one training step, with methods for everything that can be recorded in it."""

from __future__ import annotations

import gc
import struct
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from esper_otel.captures import check_no_capture
from esper_otel.errors import InvalidValue, WrongState
from esper_otel.frames.frame import ABSENT
from esper_otel.record.device import move
from esper_otel.record.names import PARTS
from esper_otel.record.open_step import OpenStep
from esper_otel.record.seeds import (
    REQUESTED,
    ROW,
    STAGES_OR_ABSENT,
    checked_seed_id,
    checked_stage,
    merged_row,
    more_cells,
)
from esper_otel.record.step_parts import HOST, TimedPart
from esper_otel.record.timed import CallbackTiming, StepTiming
from esper_otel.record.values import ROW_TYPES, CopyTime, DeviceValues, Target, read, read_row
from esper_otel.schema import SEED_FIELDS, Stage

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.amp.grad_scaler import GradScaler

    from esper_otel.leyline.messages import SystemStatePacket
    from esper_otel.record.seeds import FurtherSeedFields
    from esper_otel.record.values import Scalar

    Sources: TypeAlias = Mapping[str, Tensor | Sequence[Tensor | None]] | Sequence[Tensor | Sequence[Tensor | None]]


class Step(OpenStep):
    """One training step while it is open: ``with telemetry.step(epoch=...) as now``.

    Values are numbers or 0-d tensors on any device. A tensor is detached at once. One on a CUDA device is copied
    on the current stream and read when the copy is complete, so training does not wait. ``None`` means unknown:
    the metric stays absent. Threads: the thread that opened the step.

    Attributes:
        global_step: the step's number.
        epoch: the epoch that the step belongs to.
        time_unix_ns: the step's time, fixed when the scope opened.
    """

    __slots__ = ()

    def __enter__(self) -> Step:
        self._recorder.open(self)
        self._started_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = kind is not None
        self._recorder.finish(self, time.perf_counter())

    def is_in_its_scope(self) -> bool:
        """Whether the ``with`` statement that opened the step is still running.

        A KeyboardInterrupt may end the statement before the first line of ``__exit__``. While it runs, the statement
        keeps a reference to that method: up to Python 3.13 a method object, which the garbage collector can find.
        """
        if not self._started_s:
            return False
        if sys.version_info >= (3, 14):
            return True
        leave = type(self).__exit__
        return any(getattr(holder, "__func__", None) is leave for holder in gc.get_referrers(self))

    def put(self, mapping: Mapping[str, Scalar | None] | None = None, /, **values: Scalar | None) -> None:
        """Records step metrics by name. Dotted names must be given in the mapping. A name's last value counts.

        If enrichment is off, gated names are accepted and left out.

        Raises:
            UnknownMetric: a name is not declared; the message suggests the nearest one.
            InvalidValue: a value is not a single number.
            WrongState: the step is not open.
        """
        recorder = self._recorder
        if recorder.open_step is not self:
            raise self._is_over("put()")
        given: Mapping[str, Any] = values
        if mapping is not None:
            if type(mapping) is not dict and not isinstance(mapping, Mapping):
                raise InvalidValue("put", f"takes a mapping of names to values, not {type(mapping).__name__}")
            given = {**mapping, **values} if values else mapping
        if not recorder.names.recordable.issuperset(given):
            given = recorder.names.resolved(given)
        if self._held is not None or [*map(type, given.values())].count(float) != len(given):
            given = self._read(given)
        if self._values:
            self._values.update(given)
        else:
            self._values = {**given}  # twice as fast

    @staticmethod
    def _is_over(call: str) -> WrongState:
        return WrongState(f"{call} outside its step: call it inside 'with telemetry.step(...) as now:'")

    def _read(self, given: Mapping[str, object]) -> dict[str, float]:
        plain, tensors = read(given)
        if self._held is not None:
            self._held.forget(plain)
        if tensors:
            self._keep(tensors)
        return plain

    def _keep(self, tensors: Mapping[Target, Tensor]) -> None:
        self._recorder.publisher.saw(tuple(tensors.values()))
        self._hold(tensors)

    def hook(self) -> StepTiming:
        """Times ``hook_latency_ms``: the controller's evaluation and carrying out its commands."""
        return StepTiming(self._timings, "hook_latency_ms")

    def tamiyo(self) -> StepTiming:
        """Times ``tamiyo_latency_ms``: the controller's evaluation."""
        return StepTiming(self._timings, "tamiyo_latency_ms")

    def apply(self) -> StepTiming:
        """Times ``kasmina.apply_ms``: carrying out the controller's command."""
        return StepTiming(self._timings, "kasmina.apply_ms")

    def finalize(self) -> StepTiming:
        """Times ``kasmina.finalize_ms``: Kasmina's work at the end of the step."""
        return StepTiming(self._timings, "kasmina.finalize_ms")

    def part(self, name: str) -> StepTiming | TimedPart:
        """Times a part of the step: ``with now.part("forward"):``, ``"backward"`` or ``"optimizer"``.

        Recorded as ``esper.forward_ms`` and so on. Does not wait for a GPU, whose own times are used.

        Raises:
            InvalidValue: it is another name.
        """
        metric = PARTS.get(name)
        if metric is None:
            raise InvalidValue("part", f"{name!r} is not one of {', '.join(PARTS)}")
        timer = self._recorder.timer()
        return StepTiming(self._timings, metric) if timer is HOST else TimedPart(self, metric, timer)

    def _hold_part(self, metric: str, timing: CopyTime) -> None:
        """Keeps the duration of a part that a device reports later."""
        if self._held is None:
            self._held = DeviceValues()
        self._held.parts.append((metric, timing))

    def kernel(self, seed_id: str) -> CallbackTiming:
        """Times the seed's ``last_kernel_latency_ms``."""
        seed_id = checked_seed_id(seed_id)
        return CallbackTiming(lambda spent_ms: self.seed(seed_id, last_kernel_latency_ms=spent_ms))

    def to(self, device: Any, *items: Any) -> Any:
        """Moves tensors, or nested dicts, lists and tuples of them, to ``device``. Times ``h2d_copy_ms`` on CUDA.

        Returns:
            The moved item, or a tuple of the moved items if several were given.
        """
        moved, timing = move(device, items)
        if timing is not None:
            if self._held is None:
                self._held = DeviceValues()
            self._held.copies.append(timing)
        self._recorder.publisher.saw(moved)
        return moved[0] if len(items) == 1 else moved

    def gradients(
        self,
        model_or_parameters: nn.Module | Iterable[Tensor] | Tensor,
        *,
        sources: Sources | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        """Records ``gradient_norm`` and, with two or more ``sources``, ``grad_conflict_rate``.

        Does not wait for a GPU.

        Args:
            model_or_parameters: the model or parameters whose ``.grad`` are used. The norm is the L2 norm over all
                of them together.
            sources: gradients by source (seeds, micro-batches), each a tensor or a sequence of tensors.
            scaler: a gradient scaler; the norm is divided by its scale. Omit it after ``scaler.unscale_()``.
        """
        if self._recorder.open_step is not self:
            raise self._is_over("gradients()")
        math = self._recorder.gradient_math()
        check_no_capture("gradients are recorded")
        values: dict[str, object] = {"gradient_norm": math.gradient_norm(model_or_parameters, scaler=scaler)}
        if sources is not None and "grad_conflict_rate" not in self._recorder.names.left_out:
            values["grad_conflict_rate"] = math.conflict_on_device(sources)
        self._values.update(self._read(values))

    def seed(
        self,
        seed_id: str,
        *,
        stage: Scalar | None = ABSENT,
        alpha: Scalar | None = ABSENT,
        alpha_steps: Scalar | None = ABSENT,
        kernel_attached: Scalar | None = ABSENT,
        last_kernel_latency_ms: Scalar | None = ABSENT,
        isolation_violations: Scalar | None = ABSENT,
        fallback_used: Scalar | None = ABSENT,
        isolation_dot: Scalar | None = ABSENT,
        isolation_host_norm: Scalar | None = ABSENT,
        isolation_seed_norm: Scalar | None = ABSENT,
        **more: Unpack[FurtherSeedFields],
    ) -> None:
        """Records cells of one seed's row in this step. Calls for the same seed are merged; a cell's last value counts.

        ``alpha_steps`` is kept only while the seed's last recorded stage is BLENDING. In addition to the ten
        parameters in the signature, these fields are accepted: ``learning_rate``, ``layer_depth``, ``age_epochs``,
        ``risk_score``, ``gradient_norm``, ``alpha_total_steps``, ``alpha_temperature``, ``risk_tolerance`` and
        ``blend_allowed``.

        Raises:
            UnknownMetric: seeds do not have such a field; the message suggests the nearest one.
            InvalidName: the id is empty, longer than 256 bytes or contains control characters.
            InvalidValue: a value is not a single number, or a stage that Leyline does not have.
            WrongState: the step is not open.
        """
        if (
            # Fast path: ten plain floats for a live seed without a row. Comparing classes saves ROW_TYPES.issuperset().
            alpha.__class__ is alpha_steps.__class__ is kernel_attached.__class__ is float
            and (stage.__class__ is float or stage.__class__ is Stage)
            and last_kernel_latency_ms.__class__ is isolation_violations.__class__ is fallback_used.__class__ is float
            and isolation_dot.__class__ is isolation_host_norm.__class__ is isolation_seed_norm.__class__ is float
            and not more
            and stage in STAGES_OR_ABSENT
            and seed_id.__class__ is str
            and seed_id in self._known
            and seed_id not in self._rows
        ):
            self._rows[seed_id] = REQUESTED.pack(
                stage,
                alpha,
                alpha_steps,
                kernel_attached,
                last_kernel_latency_ms,
                isolation_violations,
                fallback_used,
                isolation_dot,
                isolation_host_norm,
                isolation_seed_norm,
            )
            return
        first = (stage, alpha, alpha_steps, kernel_attached, last_kernel_latency_ms)
        last = (isolation_violations, fallback_used, isolation_dot, isolation_host_norm, isolation_seed_norm)
        self._add_row(seed_id, first + last, more)

    def _add_row(self, seed_id: str, cells: tuple[Any, ...], more: Mapping[str, object]) -> None:
        """Adds a row of any kind. If the seed was retired in this step, the row begins a new life."""
        if self._recorder.open_step is not self:
            raise self._is_over("seed()")
        row = self._packed(seed_id, cells, more)
        checked_stage(struct.unpack_from("=d", row)[0])
        if type(seed_id) is not str or seed_id not in self._known:
            seed_id = checked_seed_id(seed_id)
            if seed_id in self._retiring:
                self._is_born_again(seed_id)
        earlier = self._rows.get(seed_id)
        self._rows[seed_id] = row if earlier is None else merged_row(earlier, row)

    def _packed(self, seed_id: str, cells: tuple[Any, ...], more: Mapping[str, object]) -> bytes:
        if not more and self._held is None and ROW_TYPES.issuperset(map(type, cells)):
            try:
                return REQUESTED.pack(*cells)
            except struct.error:  # an int beyond the range of a double
                pass
        seed_id = checked_seed_id(seed_id)
        plain, tensors = read_row(seed_id, (*cells, *more_cells(more)) if more else cells)
        if self._held is not None:
            said = [field for field, cell in zip(SEED_FIELDS, plain, strict=False) if cell is not ABSENT]
            self._held.forget((seed_id, field) for field in said)
        if tensors:
            self._keep(tensors)
        return (ROW if more else REQUESTED).pack(*plain)

    def state(self) -> SystemStatePacket:
        """Returns the SystemStatePacket of the step so far, for a controller that decides inside the step.

        Derived metrics are computed from the values put so far. The call commits nothing, so it may be repeated.
        Timings are those of the previous step, because this step has not ended. The first call waits for the
        step's CUDA scalars.
        """
        if self._recorder.open_step is not self:
            raise self._is_over("state()")
        return self._recorder.state(self)
