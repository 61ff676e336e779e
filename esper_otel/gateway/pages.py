"""Pages: stored frames and what is known of runs, as the messages that pullers are given."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple, TypeVar

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.frames.frame import GUESSED_STEP
from esper_otel.gateway.faults import Busy
from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.store.base import Store, StoredFrame
from esper_otel.gateway.turns import Turn
from esper_otel.leyline.packets import Packets, Page, packets
from esper_otel.leyline.risk import Rule, signals, with_signals
from esper_otel.pull.messages import PullRequest, PullResponse, Run, Step, step_message

Made = TypeVar("Made")

_DEFAULT_PACKETS = 64
_PAGE_BYTES = 16 * 1024 * 1024
_FETCHED = 32  # steps at once


class Bounds(NamedTuple):
    """What bounds the making of a page.

    Attributes:
        turn: within one some steps are made.
        has_room: whether a page may have so many bytes.
    """

    turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    has_room: Callable[[int], bool] = lambda _: True


FREE = Bounds()


async def page(
    store: Store,
    request: PullRequest,
    made: Callable[[StoredFrame, int], Step],
    clock_ns: Callable[[], int],
    bounds: Bounds = FREE,
) -> PullResponse:
    """Steps after a cursor, made in turns: in between others have theirs.

    Args:
        store: where they are.
        request: how many of what.
        made: makes a step's message of an entry and the time.
        clock_ns: Unix time in nanoseconds.
        bounds: what others leave of time and memory.

    Raises:
        UnknownRun, StaleCursor: nothing can be had so.
        Busy: there is no room for a single step.
    """
    rank = request.rank if request.HasField("rank") else None
    most = request.max_packets or _DEFAULT_PACKETS
    response = PullResponse(cursor=request.cursor)
    size = 0
    while True:
        few = min(most - len(response.steps), _FETCHED)
        try:
            found = store.after(request.run_id, response.cursor, rank, few)
        except (UnknownRun, StaleCursor):  # dropped meanwhile: the next pull will tell
            if response.steps:
                return response
            raise
        if response.steps and found.gap:
            return response
        response.gap += found.gap
        steps: deque[Step] = deque()
        for place, entry in enumerate(found.entries):
            if not steps:
                steps = await _steps(found.entries[place:], made, clock_ns(), bounds)
            step = steps.popleft()
            size += step.ByteSize()
            has_room = bounds.has_room(size)
            if not has_room and not response.steps:
                raise Busy("too many answers that are not read yet")
            if not has_room or (size > _PAGE_BYTES and response.steps):
                number = entry.position if rank is None else entry.number
                response.cursor = found.cursor.rpartition(":")[0] + f":{number - 1}"
                return response
            response.steps.append(step)
        response.cursor = found.cursor
        if len(found.entries) < few or len(response.steps) == most:
            return response


async def packets_after(
    store: Store,
    run_id: str,
    cursor: str,
    most: int,
    made: Callable[[StoredFrame, int], Packets],
    clock_ns: Callable[[], int],
) -> Page:
    """As ``page``, for a reader in this process: nothing is serialized.

    Raises:
        UnknownRun, StaleCursor: nothing can be had so.
    """
    found: list[Packets] = []
    gap = size = 0
    while True:
        few = min(most - len(found), _FETCHED)
        try:
            after = store.after(run_id, cursor, None, few)
        except (UnknownRun, StaleCursor):  # dropped meanwhile: the next call will tell
            if found:
                break
            raise
        if found and after.gap:
            break
        gap, cursor = gap + after.gap, after.cursor
        entries = after.entries
        while entries:
            some = await _steps(entries, made, clock_ns(), FREE)
            entries = entries[len(some) :]
            found += some
            size += sum(each.state.ByteSize() for each in some)
        if len(after.entries) < few or len(found) == most or size > _PAGE_BYTES:
            break
    return Page(tuple(found), cursor, gap)


async def _steps(
    entries: Sequence[StoredFrame], made: Callable[[StoredFrame, int], Made], now_unix_ns: int, bounds: Bounds
) -> deque[Made]:
    """What is made of the first of these entries, at least of one: as many as can be made in a turn."""
    steps: deque[Made] = deque()
    async with bounds.turn():
        await asyncio.sleep(0)  # all others who are ready come first
        turn = Turn()
        for entry in entries:
            steps.append(made(entry, now_unix_ns))
            if turn.is_over:
                break
    return steps


def step_of(entry: StoredFrame, now_unix_ns: int, *, rules: tuple[Rule, ...], latency_budget_ms: float) -> Step:
    """The entry as a message; see ``packets_of``."""
    return step_message(packets_of(entry, now_unix_ns, rules=rules, latency_budget_ms=latency_budget_ms))


def packets_of(entry: StoredFrame, now_unix_ns: int, *, rules: tuple[Rule, ...], latency_budget_ms: float) -> Packets:
    """The entry as packets, with the signals of its risks."""
    item = entry.item
    made = packets(
        item.frame,
        revision=item.revision,
        complete=item.complete,
        latency_budget_ms=latency_budget_ms,
        now_unix_ns=now_unix_ns,
    )
    made = with_signals(made, signals(made.state, loss_before=entry.loss_before, rules=rules))
    names = made.names if made.step < GUESSED_STEP else made.names - {"esper.global_step"}
    return replace(made, writer=item.origin.writer, names=names)


def forgotten(origin: Origin, ended: str | None) -> RunState:
    """What is left of a writer that was silent for so long that all but its stored steps was forgotten."""
    return RunState(origin, 0, "", None, None, 0, 0, ended=ended, is_silent=True)


def run_message(state: RunState, stored: int, run_ended: str | None) -> Run:
    """What is known of a writer, with the number of its steps that can be pulled, and how the whole run ended."""
    return Run(
        run_id=state.origin.run_id,
        attempt=state.origin.attempt,
        rank=state.origin.rank,
        writer=state.origin.writer,
        world_size=state.world_size,
        experiment=state.experiment,
        first_step=state.first_step,
        last_step=state.last_step,
        last_time_unix_ns=state.last_time_unix_ns,
        last_received_unix_ns=state.last_received_unix_ns,
        ended=state.ended,
        resumed=state.resumed,
        writers=state.writers,
        missing=state.missing,
        incomplete=state.incomplete,
        stored=stored,
        differing=state.differing,
        too_late=state.too_late,
        unseen=state.unseen,
        run_ended=run_ended,
    )
