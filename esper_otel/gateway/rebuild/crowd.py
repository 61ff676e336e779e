"""Crowd: the writers for which there is no room, and for how long their requests are to be sent again."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.gateway.receive.request import PointSender

_MOST = 10_000


class _Refusals(NamedTuple):
    first_s: float
    last_s: float


class RequestWriters:
    """The writers of one request.

    Attributes:
        tenant: whose share of the room it takes.
        crowded: those for which there was no room.
        has_others: whether there was room for one.
    """

    def __init__(self, tenant: str = "") -> None:
        self.tenant = tenant
        self.crowded: dict[tuple[str, int, int], None] = {}
        self.has_others = False

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs for which there was no room."""
        return tuple(writer[0] for writer in self.crowded)


class Crowd:
    """Decides what a sender is told whose request has a writer too many.

    It is asked to come again, so that nothing is lost when room is made. A request that carries the points of other
    writers too, as a collector's does, would hold these up for ever: after a while it is answered with a partial
    success, and the points of the one too many are refused for good.

    Args:
        patient_s: how long that while is.
    """

    def __init__(self, patient_s: float) -> None:
        self._patient_s = patient_s
        self._refused: dict[tuple[str, int, int], _Refusals] = {}

    def note(self, request: RequestWriters, sender: PointSender, now_s: float, *, is_taken: bool) -> None:
        """Notes a writer of a request, and whether there was room for it."""
        writer = (sender.run.run_id, sender.run.attempt, sender.run.rank)
        if is_taken:
            request.has_others = True
            if self._refused:
                self._refused.pop(writer, None)
            return
        request.crowded[writer] = None
        known = self._refused.pop(writer, None)
        if known is None or now_s - known.last_s > self._patient_s:  # it has been away
            known = _Refusals(now_s, now_s)
        self._refused[writer] = _Refusals(known.first_s, now_s)
        if len(self._refused) > _MOST:
            del self._refused[next(iter(self._refused))]

    def waiting(self, request: RequestWriters, now_s: float) -> tuple[str, ...]:
        """The runs because of which a request should come again; none when it would hold up others for too long."""
        if not request.has_others:
            return request.runs
        return tuple(
            writer[0]
            for writer in request.crowded
            if writer in self._refused and now_s - self._refused[writer].first_s < self._patient_s
        )
