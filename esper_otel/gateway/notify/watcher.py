"""Watches the runs of a gateway, and makes notices of what begins, gets worse, and ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from esper_otel.errors import GatewayError
from esper_otel.frames.frame import FINE
from esper_otel.gateway.limits import SharedPlaces
from esper_otel.gateway.notify.notice import BACK, ENDED, ENTERED, ESCALATED, LEFT, NO_STEPS, SILENT, Notice
from esper_otel.gateway.notify.webhook import Webhook
from esper_otel.leyline.episodes import Episode, EpisodeChange, Episodes, StepSender
from esper_otel.leyline.packets import Page
from esper_otel.log import Warnings
from esper_otel.oona.emergencies import urgent_signals
from esper_otel.text import printable

if TYPE_CHECKING:
    from esper_otel.gateway.items import RunStatus
    from esper_otel.gateway.pull_core import PullCore

_EVERY_S = 1.0
_ALL_EVERY_S = 5.0  # a run that falls silent says nothing
_AT_ONCE = 256
_MOST_RUNS = 10_000  # a tenant has no more of them than are still free
_URGENT = ("HIGH", "CRITICAL")
_NO_STEPS_S = 300  # as the rule EsperRunWithoutSteps
_QUIET = (SILENT, NO_STEPS)


class _WatchedRun:
    """A run that is watched."""

    __slots__ = ("announced", "cursor", "episodes", "state", "tenant")

    def __init__(self, cursor: str, state: str, tenant: str) -> None:
        self.tenant = tenant
        self.cursor = cursor
        self.state = state
        self.episodes = Episodes()
        self.announced: dict[int, None] = {}


class Watcher:
    """Makes notices of risk signals of level HIGH and CRITICAL, of ends, and of runs that fall silent or take no steps.

    Nothing is said about what was stored before the watcher began; a signal that still goes on then is said once more.

    Args:
        runs: the runs.
        webhooks: where notices go.
    """

    def __init__(self, runs: PullCore, webhooks: Iterable[Webhook]) -> None:
        self._runs = runs
        self._webhooks = tuple(webhooks)
        self._changed = runs.changed.follower()
        self._followed: dict[str, _WatchedRun] = {}
        self._places = SharedPlaces(_MOST_RUNS)
        self._all_s = -math.inf
        self._warnings = Warnings()
        for run_id in runs.known_runs():
            followed = _WatchedRun(self._newest(run_id), _state(runs.state_of(run_id)), runs.tenant(run_id))
            self._followed[run_id] = followed
            self._places.restore(followed.tenant, 1)

    async def run(self) -> None:
        """Watches until it is cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - the gateway must go on
                self._warnings.say("watching", "watching runs failed (%s)", type(error).__name__, exc_info=error)

    async def look(self) -> None:
        """Looks at the runs that have changed since the last call, and every five seconds at all."""
        changed, known = self._changed.taken(), self._runs.known_runs()
        now_s = time.monotonic()
        if changed is None or now_s - self._all_s >= _ALL_EVERY_S:
            self._all_s, changed = now_s, known
            for run_id in self._followed.keys() - known:
                followed = self._followed.pop(run_id)
                self._places.give_back(followed.tenant, 1)
                self._forget(run_id, followed)
        for run_id in sorted(changed & known):
            if run_id not in self._followed:
                tenant = self._runs.tenant(run_id)
                if not self._places.take(tenant):
                    self._warnings.say("too many", "too many runs: no notices are made for run %s and others", run_id)
                    continue
                self._followed[run_id] = _WatchedRun("", "", tenant)
            await self._look_at(run_id, self._followed[run_id])
            await asyncio.sleep(0)

    async def _look_at(self, run_id: str, followed: _WatchedRun) -> None:
        while page := await self._page(run_id, followed):
            for packets in page:
                sender = StepSender(packets.rank, packets.attempt, packets.writer)
                time_s = packets.state.timestamp_ns / 1e9
                changes = followed.episodes.note(packets.step, urgent_signals(packets), time_s=time_s, sender=sender)
                self._put(self._signals(run_id, followed, changes, int(time_s * 1e3)), followed)
            followed.cursor = page.cursor
        known = self._runs.state_of(run_id)
        before, followed.state = followed.state, _state(known)
        now_ms = time.time_ns() // 1_000_000
        if before in _QUIET and followed.state not in _QUIET:
            does = "sends again" if before == SILENT else "has ended" if followed.state else "takes steps again"
            self._put([Notice(BACK, run_id, now_ms, f"run {printable(run_id)} {does}")], followed)
        if followed.state not in {before, "", *_QUIET}:  # how it ended
            self._put(self._signals(run_id, followed, followed.episodes.end(), now_ms), followed)
            self._put([_end(run_id, known, now_ms)], followed)
        elif followed.state != before and followed.state in _QUIET and before in {"", *_QUIET}:
            self._put([_quiet(run_id, followed.state, now_ms)], followed)

    def _forget(self, run_id: str, followed: _WatchedRun) -> None:
        """Ends what was told of a run that the gateway has dropped, so that no alert of it is repeated for ever."""
        now_ms = time.time_ns() // 1_000_000
        self._put(self._signals(run_id, followed, followed.episodes.end(), now_ms), followed)
        if followed.state in _QUIET:
            text = f"run {printable(run_id)} has sent no step for so long that its steps were dropped"
            self._put([Notice(BACK, run_id, now_ms, text)], followed)

    async def _page(self, run_id: str, followed: _WatchedRun) -> Page | None:
        try:
            return await self._runs.packets(run_id, followed.cursor, _AT_ONCE)
        except GatewayError:  # dropped, or its store was replaced
            followed.cursor = ""
            return None

    def _signals(
        self, run_id: str, followed: _WatchedRun, changes: Iterable[EpisodeChange], time_ms: int
    ) -> Iterable[Notice]:
        for kind, episode in changes:
            is_known = episode.number in followed.announced
            if kind == "left" and is_known:
                del followed.announced[episode.number]
                yield _of_signal(run_id, LEFT, episode, time_ms)
            elif kind != "left" and episode.level in _URGENT:
                followed.announced[episode.number] = None
                yield _of_signal(run_id, ESCALATED if is_known else ENTERED, episode, time_ms)

    def _put(self, notices: Iterable[Notice], followed: _WatchedRun) -> None:
        some = [notice._replace(tenant=followed.tenant) for notice in notices]
        for webhook in self._webhooks if some else ():
            webhook.put(some)

    def _newest(self, run_id: str) -> str:
        """Returns the cursor after the newest step that is stored."""
        try:
            life = self._runs.entries(run_id, "", 1).cursor.rpartition(":")[0]
        except GatewayError:
            return ""
        ranks = {state.origin.rank for state in self._runs.state_of(run_id).states}
        return f"{life}:{max((self._runs.last_number(run_id, rank) for rank in ranks), default=0)}"


def _state(known: RunStatus) -> str:
    """Returns how a run ended, ``run_silent``, ``run_without_steps``, or nothing."""
    if known.outcome is not None:
        return known.outcome
    unended, now_ns = [state for state in known.states if state.ended is None], time.time_ns()
    if not unended or all(state.is_silent for state in unended):
        return SILENT if unended else ""
    lives = [state for state in unended if not state.is_silent]
    return NO_STEPS if all(state.is_without_steps(now_ns, _NO_STEPS_S * 10**9) for state in lives) else ""


def _quiet(run_id: str, state: str, now_ms: int) -> Notice:
    what = "has sent nothing for a minute"
    if state == NO_STEPS:
        what = f"has taken no step for {_NO_STEPS_S // 60} minutes, but its process lives"
    return Notice(state, run_id, now_ms, f"run {printable(run_id)} {what}")


def _end(run_id: str, known: RunStatus, time_ms: int) -> Notice:
    outcome = known.outcome or ""
    how = "has completed" if outcome == "completed" else f"has ended: {outcome}"
    failed = "" if outcome in FINE else " (failed)"
    early = "" if any(state.last_time_unix_ns for state in known.states) or known.stored else " before its first step"
    return Notice(ENDED, run_id, time_ms, f"run {printable(run_id)} {how}{failed}{early}", reason=outcome)


def _of_signal(run_id: str, event: str, episode: Episode, time_ms: int) -> Notice:
    sender = episode.sender
    rank = f", rank {sender.rank}" if sender.rank else ""
    reason = f": {episode.reason}" if episode.reason else ""
    what = {
        ENTERED: f"{episode.name} began in step {episode.first}{reason}",
        ESCALATED: f"{episode.name} is worse, step {episode.worst_step}{reason}",
        LEFT: f"{episode} is over",
    }[event]
    step = episode.last if event == LEFT else episode.first if event == ENTERED else episode.worst_step
    return Notice(
        *(
            event,
            run_id,
            time_ms,
            f"run {printable(run_id)}{rank}: {episode.level} {what}",
            sender.rank,
            sender.attempt,
            step,
        ),
        *(episode.name, episode.level, episode.worst, episode.reason),
    )
