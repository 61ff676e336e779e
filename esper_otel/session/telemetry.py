"""The ``Telemetry`` object: the interface of one session for a trainer and a controller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never, Protocol, TypeVar

from esper_otel.errors import ConfigurationError, InvalidValue, UnknownMetric, WrongState
from esper_otel.frames.frame import Run
from esper_otel.leyline import Page, packets
from esper_otel.leyline.risk import Rule, signals, with_signals
from esper_otel.record.loaders import Loader, following
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.phases import Phases, PhaseScope, checked_phase_name
from esper_otel.record.recorder import Recorder
from esper_otel.record.step import Step
from esper_otel.record.values import UINT32_MAX, UINT64_MAX, whole
from esper_otel.record.work import work_of
from esper_otel.session.raised import status_of

if TYPE_CHECKING:
    from esper_otel.record.values import Scalar

Batch = TypeVar("Batch")

_PATIENCE_S = 5.0
_STATE_VERSION = 1
_RESULTS = ("accuracy", "loss")
_STATE_KEYS = frozenset({"version", "global_step", "last_finite_loss", "isolation_violations", "derive"})


def outcome_of(kind: type[BaseException] | None, error: BaseException | None) -> str | None:
    """Returns the outcome of a run whose ``with`` block this exception ended; None for none or ``sys.exit(0)``."""
    if kind is None:
        return None
    status = status_of(error.code) if isinstance(error, SystemExit) else 1
    return kind.__name__ if status else None


def check_results(names: Iterable[str]) -> None:
    """Raises UnknownMetric unless all names are those of validation results."""
    for name in names:
        if name not in _RESULTS:
            raise UnknownMetric(name, _RESULTS, what="validation result")


class _Waits:
    """Times how long a loop waits for each batch. Prefetching by another thread does not count as waiting."""

    def __init__(self, waited: Callable[[float], None], phases: Phases) -> None:
        self._waited = waited
        self._phases = phases
        self._thread = threading.get_ident()
        self._asked_s: dict[int, tuple[float, float]] = {}

    def asks(self, taker: object) -> None:
        """See ``Listener``."""
        phases = self._phases
        self._asked_s[id(taker)] = time.perf_counter(), phases.mark() if phases.has_any else 0.0

    def gets(self, taker: object, _batch: object) -> None:
        """See ``Listener``."""
        now_s = time.perf_counter()
        asked_s, mark_s = self._asked_s.pop(id(taker), (now_s, 0.0))
        if threading.get_ident() == self._thread:
            waited_s = now_s - asked_s
            self._waited((self._phases.waited(waited_s, mark_s) if self._phases.has_any else waited_s) * 1e3)

    def gets_nothing(self, taker: object) -> None:
        """See ``Listener``."""
        self._asked_s.pop(id(taker), None)

    def left(self, taker: object) -> None:
        """See ``Listener``."""


class Wiring(Protocol):
    """The parts of the session that ``Telemetry`` uses in addition to its recorder."""

    @property
    def latency_budget_ms(self) -> float:
        """The kernel latency above which a seed is DEGRADED."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the risk score."""

    def health(self) -> Mapping[str, int | float | str | None]:
        """See ``Telemetry.health``."""

    def absent(self) -> Mapping[str, str]:
        """See ``Telemetry.absent``."""

    def derive_state(self) -> dict[str, Any]:
        """Returns the processors' states."""

    def load_derive_state(self, states: Mapping[str, Any]) -> None:
        """Restores the processors' states."""

    def show(self) -> None:
        """See ``Telemetry.show``."""

    def interrupted(self) -> None:
        """See ``Telemetry.interrupted``."""

    def join(self, deadline_s: float, *, is_patient: bool) -> None:
        """Waits until a ``close`` in another thread is done, which ends by ``deadline_s`` unless it is patient."""

    def close(self, deadline_s: float, outcome: str, *, is_patient: bool) -> None:
        """Flushes and stops everything by about ``deadline_s``, a time of ``time.monotonic``.

        If it is patient, it goes on while the endpoint takes steps, at most for the setting ``close_timeout_s``.
        """


class Telemetry:
    """A live session: records steps, sends them, and returns Leyline packets. Created by ``esper_otel.start``.

    Threads: one thread records; ``pull``, ``health`` and ``close`` may be called from any thread.

    Attributes:
        pulled: sequence number of the last frame returned by ``pull`` without a cursor.
    """

    def __init__(self, recorder: Recorder, wiring: Wiring) -> None:
        self._recorder = recorder
        self._wiring = wiring
        self.pulled: int = 0
        self._thread = threading.get_ident()
        self._is_closed = False
        self._before_close: list[Callable[[str | None], None]] = []
        self._is_left: Callable[[], bool] | None = None
        # Marks this session's cursors. The attempt cannot serve for that: it changes if the ranks agree on another one.
        self._mark = str(recorder.publisher.run.attempt)

    @property
    def run(self) -> Run:
        """Run id, attempt, rank and device, as in each frame. Device and attempt may change until the first frame."""
        return self._recorder.publisher.run

    @property
    def mistakes(self) -> Mistakes | None:
        """Notes mistakes of the program, for ``esper_otel.integrations``; None if they are raised."""
        return self._recorder.mistakes

    @property
    def run_id(self) -> str:
        """The run's id. Ranks that could not agree on one at the start do so at the first step, where it may change."""
        return self._recorder.publisher.run.run_id

    # -- recording ---------------------------------------------------------------------------------------

    def step(
        self,
        *,
        epoch: int,
        samples: int | None = None,
        global_step: int | None = None,
        tokens: int | None = None,
        flops: float | None = None,
    ) -> Step:
        """Opens one training step: ``with telemetry.step(epoch=..., samples=len(targets)) as now``.

        If the block raises, the step is published with the values recorded so far, and the exception propagates.

        Args:
            epoch: the epoch that the step belongs to.
            samples: number of training samples in the step, from which ``samples_per_s`` is computed.
            global_step: the step's number; by default the highest so far plus 1, starting at 1.
            tokens: number of tokens in the step, from which ``esper.tokens_per_s`` is computed.
            flops: floating-point operations of the step on this rank, forward and backward, such as those of
                ``esper_otel.flops(model, batch)``; from them follow ``esper.tflops_per_s`` and ``esper.mfu``.

        Raises:
            InvalidValue: an argument is not a whole number of at least 0, or flops is not a finite one.
            WrongState: another step is open (raised on entering), or the session is closed.
        """
        if self._is_closed:
            self._check_open()
        return Step(
            self._recorder,
            None if global_step is None else whole("global_step", global_step, UINT64_MAX),
            epoch if epoch.__class__ is int and 0 <= epoch <= UINT32_MAX else whole("epoch", epoch, UINT32_MAX),
            None if samples is None and tokens is None and flops is None else work_of(samples, tokens, flops),
        )

    def record_step(
        self,
        values: Mapping[str, Scalar | None],
        *,
        epoch: int,
        global_step: int | None = None,
        samples: int | None = None,
        tokens: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Records a whole step that the trainer has measured itself. The keys are names from the catalogue.

        Derived metrics that are not given are computed. ``samples``, ``tokens`` and ``flops`` are those of ``step``.

        Raises:
            UnknownMetric: a name is not declared; the message suggests the nearest one.
            InvalidValue: a value is not a single number, or an argument is not a whole number of at least 0.
            WrongState: a step is open, or the session is closed.
        """
        if self._is_closed:
            self._check_open()
        work = None if samples is None and tokens is None and flops is None else work_of(samples, tokens, flops)
        self._recorder.record_step(values, epoch, global_step, work)

    def batches(self, loader: Iterable[Batch]) -> Loader[Batch]:
        """Wraps a loader to time ``input_wait_ms``: the wait for a batch counts for the step that follows.

        The returned object otherwise behaves like the loader. Only waits of the calling thread are counted.
        """
        return following(Loader, loader, _Waits(self._recorder.waited, self._recorder.phases))

    def phase(self, name: str) -> PhaseScope:
        """Times a phase: ``with telemetry.phase("checkpoint"):``, or ``@telemetry.phase("evaluation")`` on a function.

        Usual names are ``checkpoint``, ``evaluation``, ``data``, ``compile`` and ``idle``; any other name is good, too.
        It may lie between steps, inside one, or around several. A moment counts for the innermost phase or step. The
        phase is sent when it ends, as surely as a step. Start-up is recorded without a call. A generator function is
        refused as a mistake: use ``with`` inside it.

        Args:
            name: its name; beyond 64 names, further ones are counted as ``other``.

        Raises:
            InvalidName: the name is empty, longer than 256 bytes, has control characters or is reserved.
            WrongState: the session is closed.
        """
        self._check_open()
        return PhaseScope(self._recorder.phases, checked_phase_name(name))

    def seeds(self, ids: Sequence[str], **columns: object) -> None:
        """Records rows of many seeds at once, for the open step or, if none is open, for the next one.

        Args:
            ids: the seeds, each once.
            columns: CPU tensors, lists or NumPy arrays of shape (len(ids),), by field name as in ``Step.seed``. NaN
                or None means absent.

        Raises:
            UnknownMetric: seeds do not have such a field.
            InvalidName: an id is invalid or occurs twice.
            InvalidValue: a column has another shape or type, or is on a device other than the CPU.
        """
        self._check_open()
        self._recorder.seeds(ids, columns)

    def retire_seed(self, seed_id: str) -> None:
        """Ends a seed's life: packets after the open step do not contain it, and its series end."""
        self._check_open()
        self._recorder.retire(seed_id)

    def validation(self, *, loss: Scalar | None = None, accuracy: Scalar | None = None, **others: Never) -> None:
        """Records validation results. All later packets contain them, until the next call.

        Raises:
            UnknownMetric: there is another result; validation results are ``loss`` and ``accuracy``.
            InvalidValue: a value is not a single number, or there is none.
            WrongState: the session is closed.
        """
        self._check_open()
        check_results(others)
        if loss is None and accuracy is None:
            raise InvalidValue("validation", "needs loss= or accuracy=")
        self._recorder.set_context({"esper.validation.loss": loss, "esper.validation.accuracy": accuracy})

    def _check_open(self) -> None:
        if self._is_closed:
            raise WrongState(f"the session of run {self.run_id} is closed; start another one")

    # -- reading -----------------------------------------------------------------------------------------

    def pull(self, cursor: str | None = None, max_packets: int = 64) -> Page:
        """Returns packets of published steps, oldest first.

        Args:
            cursor: ``Page.cursor`` from an earlier pull of this session; by default the end of the last pull without
                a cursor.
            max_packets: the largest number of steps to return.

        Raises:
            InvalidValue: the cursor is not from this session, or ``max_packets`` is below 1.
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
        if cursor is None:  # set last: if anything raises before, such as Ctrl-C, the caller gets these steps next time
            self.pulled = position
        return Page(tuple(made), cursor=f"{self._mark}:{position}", gap=gap)

    @property
    def beginning(self) -> str:
        """Returns the cursor before the first step of this session."""
        return f"{self._mark}:0"

    def _loss_before(self, sequence: int) -> float | None:
        """Returns the loss in the packet of the previous step; None without one, or if it has left the ring."""
        before = self._recorder.publisher.ring.row(sequence - 1)
        return None if before is None else before.last_loss()

    def _position(self, cursor: object) -> int:
        mark, _, position = cursor.partition(":") if isinstance(cursor, str) else ("", "", "")
        if mark != self._mark or not position.isdecimal():
            raise InvalidValue("cursor", f"{cursor!r} is not a cursor from this session (Page.cursor)")
        return int(position)

    def show(self) -> None:
        """Shows a live figure of this run below the cell of a notebook, until the session is closed.

        It has the charts of the live page, of all steps that are still in the buffer and of those to come. A thread of
        its own adds the newest steps every two seconds.

        Raises:
            ConfigurationError: this is not a notebook, or Bokeh is not installed (``pip install 'esper-otel[ui]'``).
        """
        self._wiring.show()

    def health(self) -> Mapping[str, int | float | str | None]:
        """Returns the state of the telemetry itself.

        Returns:
            ``recorded``, ``exported``, ``dropped``, ``queue`` and, in the spool, ``kept``: numbers of frames.
            ``buffer_bytes``: size of the buffer. ``retries``: retried requests. ``latency_ms``: duration of the last
            request, or None. ``failed``: steps that raised. ``nonfinite`` and ``out_of_range``: numbers of values.
            ``faults``: faults of the telemetry. ``mistakes``: mistakes of the program that were left out, which needs
            ``ESPER_ON_MISTAKE=warn``. ``events``, ``events_dropped``: numbers of events that the endpoint took,
            and of those that were not delivered. ``last_error``: last error of the export, or None.
        """
        return self._wiring.health()

    def absent(self) -> Mapping[str, str]:
        """Returns, by metric name, why metrics of the original request are missing from the newest frame."""
        return self._wiring.absent()

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns step number and derive state as plain values, for a checkpoint. Waits for pending CUDA scalars."""
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
        """Resumes from a checkpoint: numbering and derived series continue as if never interrupted.

        Raises:
            ConfigurationError: the state is not from ``state_dict()``, or is from a later version.
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

    def close(self, timeout_s: float | None = None, outcome: str | None = None) -> None:
        """Sends the remaining steps and how the run ended, then ends the session. Packets can still be pulled.

        If a call from another thread or a signal handler is in progress, waits for it; a ``timeout_s`` then holds for
        that call, too.

        Args:
            timeout_s: how long this may take, in seconds. Without it, closing goes on as long as the endpoint takes
                steps, at most for the setting ``close_timeout_s``, and stops when it has taken none for 5 s.
            outcome: how the run ended, as sent in ``esper.run.ended``; by default ``completed``.
        """
        deadline_s = time.monotonic() + (_PATIENCE_S if timeout_s is None else max(timeout_s, 0.0))
        if self._is_closed:
            self._wiring.join(deadline_s, is_patient=timeout_s is None)
            return
        while self._before_close:
            try:
                self._before_close.pop()(outcome)
            except Exception as error:  # noqa: BLE001 - a fault of ours must not end a user's training
                self._recorder.fault("recording the last step", error)
        self._is_closed = True
        self._is_left = None
        try:
            self._recorder.publisher.settle(deadline_s)
        finally:  # Ctrl-C only cuts short the wait for a device; closing continues
            self._wiring.close(deadline_s, outcome or "completed", is_patient=timeout_s is None)

    def before_close(self, end: Callable[[str | None], None]) -> None:
        """Sets a function to call with the outcome before the session ends, to record a last open step."""
        self._before_close.append(end)

    def close_when(self, is_left: Callable[[], bool]) -> None:
        """Sets a function that returns whether nothing refers to this session any more; a thread then closes it."""
        self._is_left = is_left

    def has_become_left(self) -> bool:
        """Whether the session is to be closed in the background. True only once."""
        if self._is_closed or self._is_left is None or not self._is_left():
            return False
        self._is_left = None
        return True

    def is_of_this_thread(self) -> bool:
        """Whether the calling thread has started the session."""
        return threading.get_ident() == self._thread

    def interrupted(self) -> None:
        """Sends pending steps at once, in the background. May be called from a signal handler."""
        self._wiring.interrupted()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome=outcome_of(kind, error))
