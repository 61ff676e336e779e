"""Hours in a tier: members sum up the steps and phases of each writer, and servers make the bars of runs of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.frames.frame import Frame
from esper_otel.gateway.hours.accounts import received_phases, step_times
from esper_otel.gateway.hours.file import AttemptRank
from esper_otel.gateway.items import Origin
from esper_otel.gateway.receive.request import PhasePoint
from esper_otel.hours.account import Account, PhaseTimes

_MOST_PHASES = 64  # of a writer, beside the newest of each name, which has its totals
_MOST_NAMES = 128
_MOST_KNOTS = 160
_MOST_LATEST = 16  # knots that wait to be packed: a knot of its own takes seven times as much memory
_WIDER = 1.2  # how many times as far from the newest step the next knot is that stays
_KNOT = np.dtype("<f8")
_NO_KNOTS = np.zeros((0, 4), _KNOT)


class WriterHours(NamedTuple):
    """Where the hours of a writer went.

    Attributes:
        sums: the sums over its steps, as ``Account.as_json`` gives them, but for the knots; empty without steps.
        knots: of some steps, the number and the sums up to it, shape (knots, 4).
        phases: its newest phases, and the newest of each name.
    """

    sums: Mapping[str, Any]
    knots: npt.NDArray[np.float64]
    phases: Sequence[PhaseTimes]

    @classmethod
    def of(
        cls, sums: Mapping[str, Any], knots: npt.NDArray[np.float64], phases: Iterable[Sequence[Any]]
    ) -> WriterHours:
        """Returns the hours in a record.

        Raises:
            ValueError, TypeError, KeyError: these are none.
        """
        found = cls(sums, knots, tuple(PhaseTimes(str(name), int(ended), *rest) for name, ended, *rest in phases))
        found.account()
        return found

    def account(self) -> Account:
        """Returns the sums over its steps."""
        if not self.sums:
            return Account()
        return Account.from_json({**self.sums, "knots": [(int(step), times) for step, *times in self.knots.tolist()]})


NO_HOURS = WriterHours({}, _NO_KNOTS, ())


class HoursOfWriter:
    """Sums up steps and phases of one writer, as a member does.

    Args:
        known: what was summed up before.
    """

    def __init__(self, known: WriterHours = NO_HOURS) -> None:
        self._account = replace(known.account(), knots=[])
        self._knots = known.knots
        self._phases = {(phase.name, phase.end_unix_ns): phase for phase in known.phases}

    def add(self, frame: Frame) -> None:
        """Adds a released step; a correction of an earlier step, or a repeated one, is left out."""
        last = self._account.last
        if last is None or frame.time_unix_ns > last.time_unix_ns:
            self._account.add_step(step_times(frame))
            if len(self._account.knots) >= _MOST_LATEST:
                self._pack()

    def _pack(self) -> None:
        latest = np.array([(step, *times) for step, times in self._account.knots], _KNOT).reshape(-1, 4)
        self._knots = np.concatenate((self._knots, latest))
        if len(self._knots) > _MOST_KNOTS:
            self._knots = _spread(self._knots)
        self._account.knots.clear()

    def add_phase(self, phase: PhaseTimes) -> None:
        """Adds what is known of a phase; one that is known already is completed."""
        place = phase.name, phase.end_unix_ns
        before = self._phases.pop(place, None)
        both = zip(phase, before or phase, strict=True)
        self._phases[place] = PhaseTimes(*(old if new is None else new for new, old in both))  # type: ignore[arg-type] # in order
        if len(self._phases) > 2 * (_MOST_PHASES + _MOST_NAMES):
            self._phases = {(each.name, each.end_unix_ns): each for each in self._kept()}

    def _kept(self) -> list[PhaseTimes]:
        """Returns the newest phases, and the newest of each name, in order of their ends."""
        ordered = sorted(self._phases.values(), key=lambda phase: phase.end_unix_ns)
        newest = {phase.name: phase for phase in ordered}
        named = [newest[name] for name in list(newest)[-_MOST_NAMES:]]
        return sorted({*named, *ordered[-_MOST_PHASES:]}, key=lambda phase: phase.end_unix_ns)

    @property
    def last_unix_ns(self) -> int:
        """When the newest phase ended; 0 if there is none."""
        return max((ended for _, ended in self._phases), default=0)

    def written(self) -> WriterHours:
        """Returns what goes into a record."""
        account = self._account
        if not account.steps:
            return WriterHours({}, _NO_KNOTS, self._kept())
        self._pack()
        return WriterHours(replace(account, knots=[]).as_json(), _spread(self._knots), self._kept())


def _spread(knots: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns some of the knots, each so much farther from the newest one than the one after it.

    Of those that are about as far, the farthest stays: a nearer one takes its place when it has moved on.
    """
    if not len(knots):
        return knots
    places = (np.log(knots[-1, 0] - knots[:, 0] + 1) / math.log(_WIDER)).astype(np.int64)
    places[-1] = -1  # the newest one stays
    spread: npt.NDArray[np.float64] = knots[np.diff(places, prepend=-2) != 0]
    return spread


def phases_of(points: Sequence[PhasePoint]) -> list[tuple[Origin, PhaseTimes]]:
    """Returns the phases in a request, each with the rank's first writer: phases are by rank, not by process."""
    return [
        (Origin(run_id, writer.attempt, writer.rank, ""), phase) for run_id, writer, phase in received_phases(points)
    ]


def joined(accounts: Mapping[Origin, Account]) -> dict[AttemptRank, Account]:
    """Returns the sums over the steps of each rank and attempt of a run; several processes may claim to be one."""
    found: dict[AttemptRank, list[Account]] = {}
    for origin, account in accounts.items():
        found.setdefault(AttemptRank(origin.rank, origin.attempt), []).append(account)
    return {writer: some[0] if len(some) == 1 else merged(some) for writer, some in found.items()}


def merged(accounts: Iterable[Account]) -> Account:
    """Returns the sums of several processes of one rank and attempt, or of one in two partitions, as one account."""
    whole = Account()
    with_steps = [account for account in accounts if account.first is not None]
    for account in sorted(with_steps, key=lambda account: account.start_unix_ns):
        later = [(step, whole.sums.plus(times)) for step, times in account.knots if step > whole.highest]
        whole = replace(
            account,
            steps=whole.steps + account.steps,
            first=whole.first or account.first,
            highest=max(whole.highest, account.highest),
            sums=whole.sums.plus(account.sums),
            again=whole.again.plus(account.again),
            knots=whole.knots + later,
        )
    return whole
