"""Several gateways: a run is found on those that have it, and pulled as if it were on one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from esper_otel.errors import GatewayError, GatewayUnavailable, StaleCursor, UnknownRun
from esper_otel.leyline.packets import Packets, Page
from esper_otel.pull.event_infos import EventInfo, EventPage
from esper_otel.pull.infos import RunInfo
from esper_otel.pull.position import Position, StepKey

_PAUSE_S = 0.1
_AWAY_S = 1.0  # a gateway that did not answer, or did not know the run, is left alone for so long
_ANSWER_S, _SLOW_S = 3.0, 15.0  # how long the others wait for one of them, and how long it is left alone then

Pulled: TypeAlias = Page | EventPage
Answer: TypeAlias = Pulled | GatewayError


class NoAnswer(GatewayUnavailable):
    """One of several gateways has not answered within the time that the others wait for it."""


class Ask(NamedTuple):
    """What to ask the gateways next.

    Attributes:
        cursors: by address, the cursor to pull after.
        wait_s: how long each gateway may wait for a step; the answers of the others are not needed once there is one.
        timeout_s: how long to wait for answers.
        pause_s: how long to wait before.
    """

    cursors: Mapping[str, str]
    wait_s: float
    timeout_s: float
    pause_s: float = 0.0


class SeveralGateways:
    """Pulls from several gateways. It decides what to ask and what to make of it; a client asks.

    A run is at one gateway at a time, and moves when a gateway ends or one is added; its ranks may be at different
    ones. All are asked for what they have. A step that came from one is left out if another has it too. If numbers of
    steps are missing, the other gateways are read to their ends before that is told as a gap.

    Args:
        addresses: of the gateways.
        timeout_s: how long a pull waits for the first of them to answer.
    """

    def __init__(self, addresses: Sequence[str], timeout_s: float) -> None:
        self._addresses = tuple(addresses)
        self._timeout_s = timeout_s
        self._away_until_s: dict[str, float] = {}
        self._unknown_until_s: dict[str, float] = {}

    def pulling(
        self, run_id: str, cursor: str, rank: int | None, most: int, wait_s: float, what: Kind
    ) -> Generator[Ask, Mapping[str, Answer], Any]:
        """Yields what to ask, takes the answers, and returns the next page. See ``TamiyoClient.pull``.

        Args:
            run_id: the run.
            cursor: where to go on; empty to begin.
            rank: the rank; None for all.
            most: the maximum number of steps.
            wait_s: seconds to wait for a step.
            what: what is pulled.
        """
        position = Position.of(cursor, rank, self._addresses)
        begun_s = time.monotonic()
        errors: dict[str, GatewayError] = {}
        is_waiting, is_sure, pause_s = False, False, 0.0
        while True:
            left_s = begun_s + wait_s - time.monotonic()
            asked = self._asked(is_sure=is_sure)
            each_s = min(left_s, _AWAY_S) if is_waiting and left_s > 0 else 0.0
            cursors = {address: position.cursors[address] for address in asked}
            answers = yield Ask(cursors, each_s, each_s + min(self._timeout_s, _ANSWER_S), pause_s)
            pages, is_begun_anew = self._noted(answers, position, errors)
            are_all = len(answers) == len(asked) and (is_sure or len(asked) == len(self._addresses))
            found, has_moved = joined(pages, position, most, are_all=are_all, what=what)
            if found or found.gap:
                return found
            if has_moved or is_begun_anew or any(map(len, pages.values())):  # another may have what is missing
                is_waiting, is_sure, pause_s = False, True, 0.0
                continue
            is_away = any(isinstance(error, GatewayUnavailable) for error in errors.values())
            if time.monotonic() >= begun_s + wait_s + (self._timeout_s if is_away and not pages else 0.0):
                if pages:
                    return found
                reasons = "; ".join(map(str, errors.values())) or "no gateway answered in time"
                raise (GatewayUnavailable if is_away else UnknownRun)(f"run {run_id!r} was not found: {reasons}")
            is_waiting, is_sure, pause_s = True, False, 0.0 if pages else _PAUSE_S

    def _asked(self, *, is_sure: bool) -> list[str]:
        """Returns the gateways to ask now.

        Args:
            is_sure: whether to ask those, too, that did not know the run a moment ago.
        """
        now_s = time.monotonic()
        asked = [address for address in self._addresses if self._away_until_s.get(address, 0.0) <= now_s]
        if not is_sure:
            asked = [address for address in asked if self._unknown_until_s.get(address, 0.0) <= now_s]
        return asked or list(self._addresses)

    def _noted(
        self, answers: Mapping[str, Answer], position: Position, errors: dict[str, GatewayError]
    ) -> tuple[dict[str, Pulled], bool]:
        """Returns the pages among answers, and whether a gateway must be read from its beginning."""
        pages: dict[str, Pulled] = {}
        is_begun_anew = False
        for address, answer in answers.items():
            if not isinstance(answer, GatewayError):
                pages[address] = answer
                errors.pop(address, None)
                continue
            if isinstance(answer, StaleCursor) and position.cursors[address]:
                is_begun_anew = True
            elif isinstance(answer, UnknownRun):
                self._unknown_until_s[address] = time.monotonic() + _AWAY_S
            elif isinstance(answer, GatewayUnavailable):
                is_slow = isinstance(answer, NoAnswer)  # asking it costs the others that much time
                self._away_until_s[address] = time.monotonic() + (_SLOW_S if is_slow else _AWAY_S)
            else:
                raise answer
            errors[address] = answer
            if isinstance(answer, (StaleCursor, UnknownRun)) and position.cursors[address]:
                position.begin_anew(address)
        return pages, is_begun_anew


def key_of(step: Packets) -> StepKey:
    """Returns what tells a step from others."""
    return StepKey((step.attempt, step.rank, step.writer), step.number, step.step, step.revision)


def _key_of_event(event: EventInfo) -> StepKey:
    return StepKey((event.attempt, event.rank, event.process), event.number, 0, 1)


class Kind(NamedTuple):
    """What is pulled from several gateways: steps or events.

    Attributes:
        method: the method of a gateway that returns them.
        page: makes a page of items, a cursor and a gap.
        key_of: returns what tells an item from others.
        order: returns what the items of several gateways are sorted by, so that numbers of a writer do not go back.
    """

    method: str
    page: Callable[[tuple[Any, ...], str, int], Pulled]
    key_of: Callable[[Any], StepKey]
    order: Callable[[Any], tuple[int, ...]]


STEPS = Kind("Pull", Page, key_of, lambda step: (step.state.timestamp_ns,))
# Not by time: a checkpoint may get its number before what happened in the step before it.
EVENTS = Kind("Events", EventPage, _key_of_event, lambda event: (event.attempt, event.number, event.rank))


def joined(
    pages: Mapping[str, Pulled], position: Position, most: int, *, are_all: bool, what: Kind = STEPS
) -> tuple[Any, bool]:
    """Joins pages of several gateways to the puller's next page, and moves its position.

    Args:
        pages: by address.
        position: where the puller stands.
        most: the maximum number of steps.
        are_all: whether every gateway that can answer has answered. If not, nothing after missing steps is taken.
        what: what the pages have.

    Returns:
        The page, and whether the position has moved.
    """
    steps = [(step, what.key_of(step), address) for address, page in pages.items() for step in page]
    full = {address for _, key, address in steps if not position.has(key, address)}
    if sum(map(bool, map(len, pages.values()))) > 1:
        steps.sort(key=lambda each: what.order(each[0]))
    gaps = {
        address: page.gap for address, page in pages.items() if not (len(page) and position.knows(what.key_of(page[0])))
    }
    taken, gap, left = _taken(steps, position, most, lambda address: not are_all or bool(full - {address}))
    if not taken and left and are_all:  # each waits for another: no gateway knows more
        taken, gap, left = _taken(steps, position, most, lambda _: False)
    has_moved = False
    for address, page in pages.items():
        if address not in left and page.cursor != position.cursors[address]:
            gap += gaps.get(address, 0)
            position.move(address, page.cursor)
            has_moved = True
    return what.page(tuple(taken), position.text(), gap), has_moved


def _taken(
    steps: Iterable[tuple[Any, StepKey, str]], position: Position, most: int, may_follow: Callable[[str], bool]
) -> tuple[list[Any], int, set[str]]:
    """Takes steps, up to the next gap; returns them, the gap, and the gateways that still have some.

    Args:
        steps: steps, each with what tells it from others, and with its gateway.
        position: where the puller stands; it is moved.
        most: the maximum number of steps.
        may_follow: whether missing steps may still come from another gateway than this one.
    """
    taken: list[Any] = []
    gap, is_over = 0, False
    left: set[str] = set()
    held: set[tuple[int, int, str]] = set()
    for step, key, address in steps:
        if position.has(key, address):
            continue
        missed = position.missed(key, address)
        is_over = is_over or len(taken) == most or (missed > 0 and bool(taken) and not may_follow(address))
        if is_over or key.writer in held or (missed and may_follow(address)):
            held.add(key.writer)
            left.add(address)
            continue
        gap += missed
        position.add(key, address)
        taken.append(step)
    return taken, gap, left


def merged_runs(of_gateways: Iterable[Iterable[RunInfo]]) -> list[RunInfo]:
    """Joins what several gateways know of each writer.

    What is missing at the gateway that heard of it last is counted as long as no other gateway has stored it.
    """
    found: dict[tuple[str, int, int, str], list[RunInfo]] = {}
    lists = list(map(list, of_gateways))
    if len(lists) == 1:
        return lists[0]
    for runs in lists:
        for run in runs:
            found.setdefault((run.run_id, run.attempt, run.rank, run.writer), []).append(run)
    merged = {key: _merged(some) for key, some in found.items()}
    ended: dict[str, RunInfo] = {}
    for run in merged.values():
        newest = ended.setdefault(run.run_id, run)
        if run.last_received_unix_ns > newest.last_received_unix_ns:
            ended[run.run_id] = run
    return [replace(merged[key], run_ended=ended[key[0]].run_ended) for key in sorted(merged)]


def _merged(some: list[RunInfo]) -> RunInfo:
    newest = max(some, key=lambda run: run.last_received_unix_ns)
    if len(some) == 1:
        return newest
    elsewhere = sum(run.stored for run in some) - newest.stored
    firsts = [run.first_step for run in some if run.first_step is not None]
    lasts = [run.last_step for run in some if run.last_step is not None]
    return replace(
        newest,
        world_size=max(run.world_size for run in some),
        first_step=min(firsts, default=None),
        last_step=max(lasts, default=None),
        last_time_unix_ns=max(run.last_time_unix_ns for run in some),
        ended=next((run.ended for run in (newest, *some) if run.ended), None),
        device=next((run.device for run in (newest, *some) if run.device), ""),
        units=next((run.units for run in (newest, *some) if run.units), {}),
        resumed=any(run.resumed for run in some),
        missing=max(newest.missing - max(elsewhere - newest.unseen, 0), 0),
        incomplete=sum(run.incomplete for run in some),
        stored=sum(run.stored for run in some),
        differing=sum(run.differing for run in some),
        too_late=sum(run.too_late for run in some),
        unseen=max(newest.unseen - elsewhere, 0),
    )
