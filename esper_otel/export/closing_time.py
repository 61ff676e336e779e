"""ClosingTime: how much time the exporter has, for a request while the session lives, and for all once it closes."""

from __future__ import annotations

import time

_GOODBYE_S = 1.0  # what is left of the time to close, or a fifth of it, is for the end of the run


class ClosingTime:
    """When closing must end. Each time that the endpoint takes frames, it is moved, up to a limit.

    Args:
        timeout_s: how long a request may take.

    Attributes:
        deadline_s: when closing ends, as a time of ``time.monotonic``; None before it begins.
        latest_s: the time to which ``deadline_s`` may be moved.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._patience_s = self._goodbye_s = 0.0
        self.deadline_s: float | None = None
        self.latest_s: float = float("-inf")

    def begin(self, deadline_s: float, latest_s: float) -> None:
        """Begins to count."""
        self._patience_s = max(deadline_s - time.monotonic(), 0.0)
        self._goodbye_s = min(_GOODBYE_S, self._patience_s / 5)
        self.latest_s = latest_s
        self.deadline_s = deadline_s

    def hurry(self, deadline_s: float) -> None:
        """Brings forward the end: by ``deadline_s`` at the latest."""
        self.latest_s = min(self.latest_s, deadline_s)
        if self.deadline_s is not None:
            self.deadline_s = min(self.deadline_s, deadline_s)

    def extend(self) -> None:
        """Gives as much time as there was at first, since the endpoint takes frames, if slowly."""
        if self.deadline_s is not None:
            patient_s = min(time.monotonic() + self._patience_s, self.latest_s)
            self.deadline_s = max(self.deadline_s, patient_s)

    def left_for_frames_s(self) -> float:
        """Returns how much time there is for frames; while the session lives, as much as for a request."""
        if self.deadline_s is None:
            return self._timeout_s
        return self.deadline_s - self._goodbye_s - time.monotonic()

    def left_s(self) -> float:
        """Returns how much time there is for what is sent after the frames."""
        return self._timeout_s if self.deadline_s is None else self.deadline_s - time.monotonic()
