"""Telemetry: one session, as a trainer and a controller see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from esper_otel.errors import ConfigurationError, InvalidValue, WrongState
from esper_otel.frames.frame import Run
from esper_otel.leyline import Page, packets
from esper_otel.leyline.risk import Rule, signals, with_signals
from esper_otel.record.loaders import Loader, following
from esper_otel.record.recorder import Recorder
from esper_otel.record.step import Step
from esper_otel.record.values import UINT32_MAX, UINT64_MAX, whole

if TYPE_CHECKING:
    from esper_otel.record.values import Scalar

Batch = TypeVar("Batch")

_STATE_VERSION = 1
_STATE_KEYS = frozenset({"version", "global_step", "last_finite_loss", "isolation_violations", "derive"})


def outcome_of(kind: type[BaseException] | None, error: BaseException | None) -> str | None:
    """The outcome of a run whose ``with`` block was left by this exception; None if by none, or by ``sys.exit(0)``."""
    if kind is None:
        return None
    status = error.code if isinstance(error, SystemExit) else 1
    is_fine = status is None or (isinstance(status, int) and not status & 0xFF)
    return None if is_fine else kind.__name__


class _Waits:
    """Times how long a loop waits for each batch; what another thread fetches ahead is no wait of the loop's."""

    def __init__(self, waited: Callable[[float], None]) -> None:
        self._waited = waited
        self._thread = threading.get_ident()
        self._asked_s: dict[int, float] = {}

    def asks(self, taker: object) -> None:
        """See ``Listener``."""
        self._asked_s[id(taker)] = time.perf_counter()

    def gets(self, taker: object, _batch: object) -> None:
        """See ``Listener``."""
        now_s = time.perf_counter()
        asked_s = self._asked_s.pop(id(taker), now_s)
        if threading.get_ident() == self._thread:
            self._waited((now_s - asked_s) * 1e3)

    def gets_nothing(self, taker: object) -> None:
        """See ``Listener``."""
        self._asked_s.pop(id(taker), None)

    def left(self, taker: object) -> None:
        """See ``Listener``."""


class Wiring(Protocol):
    """What the session has put behind its recorder."""

    @property
    def latency_budget_ms(self) -> float:
        """Above it a seed's kernel latency is DEGRADED."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The table of risks."""

    def health(self) -> Mapping[str, int | float | str | None]:
        """See ``Telemetry.health``."""

    def absent(self) -> Mapping[str, str]:
        """See ``Telemetry.absent``."""

    def derive_state(self) -> dict[str, Any]:
        """The processors' states."""

    def load_derive_state(self, states: Mapping[str, Any]) -> None:
        """Takes the processors' states."""

    def interrupted(self) -> None:
        """See ``Telemetry.interrupted``."""

    def join(self, deadline_s: float) -> None:
        """Waits until what ``close`` began is done, at most until ``deadline_s``."""

    def close(self, deadline_s: float, outcome: str) -> None:
        """Flushes and stops everything by ``deadline_s`` of ``time.monotonic``."""


class Telemetry:
    """A live session: records steps, sends them, and gives Leyline packets. Made by ``esper_otel.start``.

    Threads: one thread records; ``pull``, ``health`` and ``close`` may be called from any.

    Attributes:
        pulled: sequence number of the frame up to which ``pull`` without a cursor has come.
    """

    def __init__(self, recorder: Recorder, wiring: Wiring) -> None:
        self._recorder = recorder
        self._wiring = wiring
        self.pulled: int = 0
        self._is_closed = False
        self._before_close: list[Callable[[str | None], None]] = []
        # Marks this session's cursors. The attempt that the run begins with may not be the one that its ranks agree on.
        self._mark = str(recorder.publisher.run.attempt)

    @property
    def run(self) -> Run:
        """Run id, attempt, rank and device, as in every frame. Device and attempt may change until the first frame."""
        return self._recorder.publisher.run

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._recorder.publisher.run.run_id

    # -- recording ---------------------------------------------------------------------------------------

    def step(self, *, epoch: int, samples: int | None = None, global_step: int | None = None) -> Step:
        """One training step: ``with telemetry.step(epoch=..., samples=len(targets)) as now``.

        A step that raises is published as far as it got, and the exception goes on.

        Args:
            epoch: the epoch it belongs to.
            samples: training samples in it; gives ``samples_per_s``.
            global_step: its number; 1, then the highest so far + 1, when it is not given.

        Raises:
            InvalidValue: an argument that is not a whole number from 0.
            WrongState: another step is open (on entering), or the session is closed.
        """
        if self._is_closed:
            self._check_open()
        return Step(
            self._recorder,
            None if global_step is None else whole("global_step", global_step, UINT64_MAX),
            epoch if epoch.__class__ is int and 0 <= epoch <= UINT32_MAX else whole("epoch", epoch, UINT32_MAX),
            None if samples is None else whole("samples", samples, UINT64_MAX),
        )

    def record_step(
        self,
        values: Mapping[str, Scalar | None],
        *,
        epoch: int,
        global_step: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Records a whole step that the trainer has measured itself; keys are the catalogue's names.

        A derived value that is given stands; what is absent is derived.

        Raises:
            UnknownMetric: a name that is not declared; the message names the nearest.
            InvalidValue: a value that is not one number, or an argument that is not a whole number from 0.
            WrongState: a step is open, or the session is closed.
        """
        if self._is_closed:
            self._check_open()
        self._recorder.record_step(values, epoch, global_step, samples)

    def batches(self, loader: Iterable[Batch]) -> Loader[Batch]:
        """The loader's batches; times ``input_wait_ms`` of the step that follows each.

        What this returns behaves as the loader in every other respect. Waits count on the thread that calls this.
        """
        return following(Loader, loader, _Waits(self._recorder.waited))

    def seeds(self, ids: Sequence[str], **columns: object) -> None:
        """Records rows of many seeds at once, for the open step or else for the next.

        Args:
            ids: the seeds, each once.
            columns: arrays of shape (len(ids),) by field name, as in ``Step.seed``; NaN or None means absent.
                CPU tensors, lists and NumPy arrays.

        Raises:
            UnknownMetric: a field that seeds do not have.
            InvalidName: an id that cannot be one, or that comes twice.
            InvalidValue: a column of another shape, type or device.
        """
        self._check_open()
        self._recorder.seeds(ids, columns)

    def retire_seed(self, seed_id: str) -> None:
        """Ends a seed's life: it is in no packet after the open step's, and its series end."""
        self._check_open()
        self._recorder.retire(seed_id)

    def validation(self, *, loss: Scalar | None = None, accuracy: Scalar | None = None) -> None:
        """Notes validation results; every packet that follows has them until the next call."""
        self._check_open()
        if loss is None and accuracy is None:
            raise InvalidValue("validation", "needs loss= or accuracy=")
        self._recorder.set_context({"esper.validation.loss": loss, "esper.validation.accuracy": accuracy})

    def _check_open(self) -> None:
        if self._is_closed:
            raise WrongState(f"the session of run {self.run_id} is closed; start another one")

    # -- reading -----------------------------------------------------------------------------------------

    def pull(self, cursor: str | None = None, max_packets: int = 64) -> Page:
        """Packets of published steps, oldest first.

        Args:
            cursor: ``Page.cursor`` of an earlier pull of this session; else where the last pull without a cursor
                ended.
            max_packets: the most steps to return.

        Raises:
            InvalidValue: a cursor that this session did not give, or ``max_packets`` below 1.
        """
        if whole("max_packets", max_packets, 2**31) < 1:
            raise InvalidValue("max_packets", "is below 1")
        self._recorder.publisher.drain()
        after = self.pulled if cursor is None else self._position(cursor)
        frames, gap = self._recorder.publisher.ring.after(after, max_packets)
        position = frames[-1].sequence if frames else after + gap
        now_unix_ns = self._recorder.clock.now_ns()
        budget_ms = self._wiring.latency_budget_ms
        made = []
        loss = self._loss_before(frames[0].sequence) if frames else None
        for frame in frames:
            step = packets(frame, latency_budget_ms=budget_ms, now_unix_ns=now_unix_ns)
            made.append(with_signals(step, signals(step.state, loss_before=loss, rules=self._wiring.rules)))
            loss = frame.last_loss()
        if cursor is None:  # only now: what raises in between, a Ctrl-C included, must not cost the caller these steps
            self.pulled = position
        return Page(tuple(made), cursor=f"{self._mark}:{position}", gap=gap)

    @property
    def beginning(self) -> str:
        """The cursor before the first step of this session."""
        return f"{self._mark}:0"

    def _loss_before(self, sequence: int) -> float | None:
        """The loss in the packet of the step before; None when there is none, or it fell out of the ring."""
        frames, _ = self._recorder.publisher.ring.after(sequence - 2, 1)
        return frames[0].last_loss() if frames and frames[0].sequence == sequence - 1 else None

    def _position(self, cursor: object) -> int:
        mark, _, position = cursor.partition(":") if isinstance(cursor, str) else ("", "", "")
        if mark != self._mark or not position.isdecimal():
            raise InvalidValue("cursor", f"{cursor!r} is none that this session gave (Page.cursor)")
        return int(position)

    def health(self) -> Mapping[str, int | float | str | None]:
        """How the telemetry itself is doing.

        Returns:
            ``recorded``, ``exported``, ``dropped`` and ``queue`` in frames, ``kept`` by the spool, ``buffer_bytes``,
            ``retries`` and ``latency_ms`` of the last request, None before it, ``failed`` steps, ``nonfinite`` and
            ``out_of_range`` values, ``faults`` of ours, and ``last_error`` of the export, None when there is none.
        """
        return self._wiring.health()

    def absent(self) -> Mapping[str, str]:
        """Why each of the request's metrics that the newest frame lacks is absent, by metric name."""
        return self._wiring.absent()

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step number and derive state, in plain values, for a checkpoint. Waits for CUDA scalars under way."""
        recorder = self._recorder
        recorder.publisher.drain(wait=True)
        return {
            "version": _STATE_VERSION,
            "global_step": recorder.highest_step,
            "last_finite_loss": recorder.publisher.last_finite_loss,
            "isolation_violations": recorder.publisher.live.violations(),
            "derive": self._wiring.derive_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint: numbering and derived series continue as if never interrupted.

        Raises:
            ConfigurationError: the state is not one of ``state_dict()``, or of a later version.
            WrongState: a step is open.
        """
        if self._recorder.open_step is not None:
            raise WrongState("load_state_dict() inside a step")
        given: object = state
        if not isinstance(given, Mapping) or given.get("version") != _STATE_VERSION or not _STATE_KEYS.issubset(given):
            raise ConfigurationError(
                "the checkpoint's telemetry state is not one that this version of esper_otel wrote "
                f"(version {_STATE_VERSION}): pass what telemetry.state_dict() returned"
            )
        recorder = self._recorder
        recorder.highest_step = whole("global_step", state["global_step"], UINT64_MAX)
        recorder.publisher.last_finite_loss = state["last_finite_loss"]
        recorder.publisher.live.resume_violations(state["isolation_violations"])
        self._wiring.load_derive_state(state["derive"])

    # -- the end -----------------------------------------------------------------------------------------

    def close(self, timeout_s: float = 5.0, outcome: str | None = None) -> None:
        """Sends what is left and ends the session, within about ``timeout_s``. Packets can still be pulled.

        A second call waits for the first, which a signal or another thread may have found under way.

        Args:
            timeout_s: how long to wait for the endpoint, in seconds.
            outcome: how the run ended, as sent in ``esper.run.ended``; ``completed`` when it is not given.
        """
        deadline_s = time.monotonic() + max(timeout_s, 0.0)
        if self._is_closed:
            self._wiring.join(deadline_s)
            return
        while self._before_close:
            try:
                self._before_close.pop()(outcome)
            except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
                self._recorder.fault("recording the last step", error)
        self._is_closed = True
        try:
            self._recorder.publisher.settle(deadline_s)
        finally:  # a Ctrl-C ends the waiting for a device, and no more
            self._wiring.close(deadline_s, outcome or "completed")

    def before_close(self, end: Callable[[str | None], None]) -> None:
        """Calls this with the outcome before the session ends, for a step that is not yet recorded."""
        self._before_close.append(end)

    def interrupted(self) -> None:
        """Sends what is there at once, in the background; may be called from a signal handler."""
        self._wiring.interrupted()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome=outcome_of(kind, error))
