"""Times the phases of a session: what a trainer does outside its steps, or inside them but not for training."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from esper_otel.errors import InvalidName, InvalidValue
from esper_otel.frames.phase_log import START_UP, PhaseLog
from esper_otel.record.clock import Clock

if TYPE_CHECKING:
    from esper_otel.record.recorder import Recorder

_MAX_NAME_BYTES = 256
_MS = 1_000_000
_LONGEST_MS = 1e12  # 31 years
_F = TypeVar("_F", bound=Callable[..., Any])

# Names of the other parts of a run's time; a phase of such a name could not be told from the part.
RESERVED = frozenset({"productive", "input_wait", "hooks", "redone", "between_attempts", "unknown"})

# In these phases a batch is not for the next step, so waiting for one belongs to the phase.
_WITHOUT_TRAINING = frozenset({"checkpoint", "evaluation", "compile", "idle"})


def checked_phase_name(name: object) -> str:
    """Returns the name if it is valid: text of 1 to 256 bytes in UTF-8 without control characters, and not reserved."""
    if not isinstance(name, str):
        raise InvalidValue("phase", f"{name!r} is a {type(name).__name__}; give a string")
    size = len(name.encode(errors="surrogatepass"))
    if not 0 < size <= _MAX_NAME_BYTES or any(character < " " or "\x7f" <= character <= "\x9f" for character in name):
        raise InvalidName(f"phase {name[:80]!r}: give 1 to {_MAX_NAME_BYTES} bytes without control characters")
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise InvalidName(f"phase {name[:80]!r} is not valid Unicode")
    if name in RESERVED:
        raise InvalidName(f"phase {name!r} is the name of another part of a run's time; give another one")
    return name


class PhaseScope(ContextDecorator):
    """``with telemetry.phase(name):``, or a decorator. It may be entered again and again, also inside itself."""

    def __init__(self, phases: Phases | None, name: str) -> None:
        self._phases = phases
        self._name = name

    def __call__(self, function: _F) -> _F:
        """Returns the function so that each call is a phase; that of a coroutine function lasts until its result.

        Raises:
            InvalidValue: it is a generator function, whose code runs only while its values are asked for.
        """
        if self._phases is None:
            return function
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            name = getattr(function, "__name__", function)
            self._phases.refuse(InvalidValue("phase", f"{name} is a generator function; use `with` inside it"))
            return function
        if not inspect.iscoroutinefunction(function):
            return super().__call__(function)

        @functools.wraps(function)
        async def timed(*arguments: Any, **named: Any) -> Any:
            with self:
                return await function(*arguments, **named)

        return timed  # type: ignore[return-value]

    def __enter__(self) -> None:
        if self._phases is not None:
            self._phases.enter(self._name, self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._phases is not None:
            self._phases.leave(self)


class _OpenPhase:
    """A phase that has not ended."""

    __slots__ = ("inner_ns", "name", "owner", "start_ns", "step")

    def __init__(self, name: str, owner: object, start_ns: int, step: int | None) -> None:
        self.name = name
        self.owner = owner
        self.start_ns = start_ns
        self.step = step
        self.inner_ns = 0.0  # phases, steps and waits for input inside it


class Phases:
    """Times phases and adds them to a log.

    A moment belongs to the innermost of the phases and steps that are open. A phase on another thread than that of the
    steps holds nothing up, so none of its time is its own.

    Threads: any; what concerns steps and waits is called by the recording thread.

    Args:
        log: receives the phases.
        clock: the session's clock.
        recorder: the recorder of its steps.
        began_unix_ns: when start-up began; None if it is not to be recorded.

    Attributes:
        log: the log.
        has_any: whether a phase has ever begun.
        follows_steps: whether ``step_opens`` and ``step_ended`` are to be called.
        closed_s: seconds that the recording thread has spent in phases that have ended, each moment counted once.
        ended: called with the name, start and end of each phase, in Unix nanoseconds, on the thread that ended it.
        inside: returns the number of the step that a loop is in without having opened it; see ``Loop``.
    """

    def __init__(self, log: PhaseLog, clock: Clock, recorder: Recorder, began_unix_ns: int | None) -> None:
        self.log = log
        self.closed_s: float = 0.0
        self.has_any: bool = False
        self.follows_steps: bool = True  # until the first step, for start-up; then only inside phases
        self.ended: Callable[[str, int, int], None] | None = None
        self.inside: Callable[[], int | None] = lambda: None
        self._clock = clock
        self._recorder = recorder
        self._began_unix_ns = began_unix_ns
        self._thread = threading.get_ident()
        self._process_id = os.getpid()
        self._open: list[_OpenPhase] = []
        self._outside_ns = 0  # like ``closed_s``, but only phases outside steps
        self._step_in: tuple[_OpenPhase, float] | None = None  # the phase that a step was opened in, and when
        self._beside: dict[int, list[_OpenPhase]] = {}

    @property
    def next_step(self) -> int:
        """The number that the next step gets, unless it is given another one."""
        return self._recorder.highest_step + 1

    def refuse(self, error: InvalidValue) -> None:
        """Raises a mistake, or notes it if the session spares the program."""
        if self._recorder.mistakes is None:
            raise error
        self._recorder.mistakes.note(error)

    def enter(self, name: str, owner: object) -> None:
        """Begins a phase."""
        self.has_any = True
        thread, start_ns = threading.get_ident(), self._clock.now_ns()
        if thread != self._thread:
            self._beside.setdefault(thread, []).append(_OpenPhase(name, owner, start_ns, None))
            return
        step = self._recorder.open_step
        number = self.inside() if step is None else step.global_step
        self._note_step()
        self._open.append(_OpenPhase(name, owner, start_ns, number))
        if step is None:
            self.follows_steps = self._recorder.next_step.is_anything = True

    def leave(self, owner: object) -> None:
        """Ends the innermost phase of this owner; those inside it that an interrupt has left open end with it."""
        thread, end_ns = threading.get_ident(), self._clock.now_ns()
        mine = self._open if thread == self._thread else self._beside.get(thread, [])
        if os.getpid() != self._process_id:  # a forked child sends nothing of its parent's session
            mine.clear()
        if not any(each.owner is owner for each in mine):
            return
        if mine is self._open:
            self._note_step()
        while True:
            over = mine.pop()
            self._close(over, end_ns, is_beside=mine is not self._open)
            if over.owner is owner:
                break
        if not mine and mine is not self._open:
            del self._beside[thread]
        self.follows_steps = bool(self._open) or self._began_unix_ns is not None

    def _close(self, over: _OpenPhase, end_ns: int, *, is_beside: bool) -> None:
        length_ns = end_ns - over.start_ns
        own_ms = 0.0 if is_beside else max(length_ns - over.inner_ns, 0.0) / _MS
        if not is_beside:
            if self._open:
                around = self._open[-1]
                around.inner_ns += length_ns if (around.step is None) == (over.step is None) else 0  # else: the step is
            else:
                self.closed_s += length_ns / 1e9
                self._outside_ns += length_ns if over.step is None else 0
        self.log.add(over.name, over.start_ns, end_ns, own_ms, over.step)
        if self.ended is not None:
            self.ended(over.name, over.start_ns, end_ns)

    # -- steps and waits inside phases ---------------------------------------------------------------------

    def step_opens(self, waited_ms: float | None) -> None:
        """A step has been opened, after a wait for input."""
        self._note_step()
        if self._began_unix_ns is not None:
            self._started_up(_ns(waited_ms))
        if self._open:
            self._step_in = self._open[-1], time.perf_counter()

    def step_recorded(self, waited_ms: float | None, spent_ms: float | None) -> None:
        """A whole step has been recorded, which ends now."""
        if self._began_unix_ns is not None:
            self._started_up(_ns(waited_ms) + _ns(spent_ms))
        if self._open and self._open[-1].step is None:
            self._open[-1].inner_ns += _ns(spent_ms)

    def _note_step(self) -> None:
        """Takes the time of the last step that was opened inside a phase from that phase, once the step has ended."""
        if self._step_in is None or self._recorder.open_step is not None:
            return
        (around, opened_s), ended_s = self._step_in, self._recorder.last_end_s
        self._step_in = None
        around.inner_ns += max((ended_s or opened_s) - opened_s, 0.0) * 1e9

    def mark(self) -> float:
        """Returns how long the recording thread has been in phases, in seconds; for ``waited``."""
        open_ns = self._clock.now_ns() - self._open[0].start_ns if self._open else 0
        return self.closed_s + open_ns / 1e9

    def waited(self, seconds: float, mark_s: float) -> float:
        """Returns how much of a wait for input that has just ended is the next step's, in seconds.

        Args:
            seconds: the length of the wait.
            mark_s: ``mark()`` when it began. Phases inside the wait are not part of it.
        """
        if threading.get_ident() != self._thread:
            return seconds
        if not self._open or self._clock.now_ns() - self._open[0].start_ns < seconds * 1e9:
            return max(seconds - (self.mark() - mark_s), 0.0)
        if any(each.name in _WITHOUT_TRAINING for each in self._open):
            return 0.0
        self._open[-1].inner_ns += seconds * 1e9
        return seconds

    def _record_on(self, thread: int) -> None:
        """Makes a thread the recording one. Phases open on the one before lie outside the steps from now on."""
        if thread == self._thread:
            return
        if self._open:
            self._beside[self._thread] = self._open
        self._open = self._beside.pop(thread, [])
        self._thread = thread

    def _started_up(self, before_ns: float) -> None:
        """Records start-up, which has ended ``before_ns`` ago: its first step, or the wait for its input, began."""
        began_ns, self._began_unix_ns = self._began_unix_ns, None
        self._record_on(threading.get_ident())
        self.follows_steps = bool(self._open)
        end_ns = self._clock.now_ns() - int(before_ns)
        if began_ns is None or end_ns <= began_ns:
            return
        inner_ns = self._outside_ns + (max(end_ns - self._open[0].start_ns, 0) if self._open else 0)
        own_ms = max(end_ns - began_ns - inner_ns, 0) / _MS
        self.log.add(START_UP, began_ns, end_ns, own_ms, None)


def _ns(milliseconds: float | None) -> float:
    """Returns a trainer's duration in nanoseconds; 0 for one that cannot be, such as NaN or a negative one."""
    return milliseconds * _MS if milliseconds is not None and 0.0 <= milliseconds <= _LONGEST_MS else 0.0


def process_start_unix_ns(now_unix_ns: int) -> int | None:
    """Returns when this process was started, to about 10 ms; None where the system does not report it as Linux does."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return now_unix_ns - int(age_s * 1e9) if age_s > 0.0 else None
