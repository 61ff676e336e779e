"""Crowd: the writers for which there is no room, and how long their senders are asked to retry."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from esper_otel.gateway.receive.request import PointSender

_MOST = 10_000


class _Refusals(NamedTuple):
    first_s: float
    last_s: float


class RequestWriters:
    """The writers of one request.

    Attributes:
        tenant: the tenant whose share of the room the request uses.
        crowded: the writers for which there was no room.
        has_others: whether there was room for at least one writer.
    """

    def __init__(self, tenant: str = "") -> None:
        self.tenant = tenant
        self.crowded: dict[tuple[str, int, int], None] = {}
        self.has_others: bool = False

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs for which there was no room."""
        return tuple(writer[0] for writer in self.crowded)


def second_of(sender: PointSender) -> PointSender:
    """Returns a name for the second of two writers that only the numbers of their frames tell apart."""
    return sender._replace(run=replace(sender.run, run_id=f"{sender.run.run_id} (a second process)"))


class Crowd:
    """Decides how to answer a request that contains a writer for which there is no room.

    Its sender is asked to retry, so that nothing is lost if room is made. But a request that also carries points of
    other writers, such as a collector's, would then block those forever. After ``patient_s`` it is answered with a
    partial success, and the points of the writer without room are refused for good.

    Args:
        patient_s: how long such a request is refused as a whole.
    """

    def __init__(self, patient_s: float) -> None:
        self._patient_s = patient_s
        self._refused: dict[tuple[str, int, int], _Refusals] = {}

    def note(self, request: RequestWriters, sender: PointSender, now_s: float, *, is_taken: bool) -> None:
        """Records a writer of a request, and whether there was room for it."""
        writer = (sender.run.run_id, sender.run.attempt, sender.run.rank)
        if is_taken:
            request.has_others = True
            if self._refused:
                self._refused.pop(writer, None)
            return
        request.crowded[writer] = None
        known = self._refused.pop(writer, None)
        if known is None or now_s - known.last_s > self._patient_s:  # its last refusal was long ago: start over
            known = _Refusals(now_s, now_s)
        self._refused[writer] = _Refusals(known.first_s, now_s)
        if len(self._refused) > _MOST:
            del self._refused[next(iter(self._refused))]

    def waiting(self, request: RequestWriters, now_s: float) -> tuple[str, ...]:
        """Returns the runs for whose sake a request should be retried; none if that would block others for too long."""
        if not request.has_others:
            return request.runs
        return tuple(
            writer[0]
            for writer in request.crowded
            if writer in self._refused and now_s - self._refused[writer].first_s < self._patient_s
        )
