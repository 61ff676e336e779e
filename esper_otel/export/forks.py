"""Keeps this library's threads out of gRPC while the process forks.

gRPC prepares its own threads and connections for a fork, unless some thread is inside gRPC at that moment. In that case
it writes a line to standard error and leaves the child with locks that are never released, so that the child's next use
of gRPC crashes or hangs.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType

from esper_otel import unix
from esper_otel.errors import ConfigurationError
from esper_otel.native import threads

_PATIENCE_S = 0.1  # enough for a request to a nearby endpoint
_CUTS_AT_ANY_TIME = 3
_CUT_S = 1.0  # a request that has been cut returns within milliseconds
_SWITCH = "GRPC_ENABLE_FORK_SUPPORT"
_OFF = {"0", "f", "false", "n", "no"}


class ForkGate:
    """A gate that the thread using gRPC enters, and that is shut while another thread forks.

    A slow request is aborted for a fork and must then be repeated. A request that has been aborted several times and
    has used half of its time is not aborted again, so that steps arrive even in a process that forks all the time.

    Args:
        cut: aborts the request of the thread inside; called by the thread that is about to fork.

    Raises:
        ConfigurationError: this is a forked child in which gRPC cannot work.
    """

    def __init__(self, cut: Callable[[], None]) -> None:
        if _broken:
            raise ConfigurationError(
                f"a session cannot send over gRPC in this forked process, because {_broken[0]}: start the process "
                'with multiprocessing\'s "spawn" method, or set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf'
            )
        self._cut = cut
        self._changed: threading.Condition = threads().Condition()
        self._is_inside = self._is_shut = False
        self._patient_until_s = self._half_s = 0.0
        self._cuts = 0
        if os.environ.get(_SWITCH, "").lower() in _OFF:  # gRPC reads it once, when it is first used
            _unprepared[:] = [f"its parent sent over gRPC with {_SWITCH} off"]
        _gates.add(self)

    def begin(self, timeout_s: float) -> None:
        """Announces a request that may take ``timeout_s``, including repetitions."""
        now_s = time.monotonic()
        self._patient_until_s, self._half_s, self._cuts = now_s + _PATIENCE_S, now_s + timeout_s / 2.0, 0

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_shut)
            self._is_inside = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_inside = False
            self._changed.notify_all()

    def shut(self) -> None:
        """Closes the gate and waits briefly until no thread is inside; aborts a request that takes longer."""
        with self._changed:
            self._is_shut = True
            if self._left(self._patient_until_s - time.monotonic()):
                return
            if self._cuts >= _CUTS_AT_ANY_TIME and time.monotonic() > self._half_s:
                return
            self._cuts += 1
        self._cut()
        with self._changed:
            self._left(_CUT_S)

    def is_empty(self) -> bool:
        """Whether no thread is inside."""
        return not self._is_inside

    def open(self) -> None:
        """Undoes ``shut``."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()

    def _left(self, timeout_s: float) -> bool:
        return self._changed.wait_for(self.is_empty, max(timeout_s, 0.0))


_gates: weakref.WeakSet[ForkGate] = weakref.WeakSet()
_broken: list[str] = []  # in a forked child: why gRPC cannot be used
_unprepared: list[str] = []  # why no child will be able to use gRPC
_forking = threads().RLock()  # if two threads fork at once, the first to finish must not open the gates for both


def _before_fork() -> None:
    _forking.acquire()
    for gate in list(_gates):
        gate.shut()


def _after_fork_in_parent() -> None:
    for gate in list(_gates):
        gate.open()
    _forking.release()


def _after_fork_in_child() -> None:
    if _unprepared or not all(gate.is_empty() for gate in _gates):
        _broken[:] = _unprepared or ["its parent was inside gRPC when it forked"]
    _gates.clear()  # they belong to the parent's senders, which are not used in the child
    _forking.release()


unix.at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
