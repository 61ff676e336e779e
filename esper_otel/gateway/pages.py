"""Pages: converts stored frames and the state of runs to the messages that pullers receive."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

from esper_otel.errors import StaleCursor, UnknownRun
from esper_otel.frames.frame import GUESSED_STEP
from esper_otel.gateway.faults import Busy
from esper_otel.gateway.items import Origin, RunState
from esper_otel.gateway.store.base import StoredFrame, StoredPage
from esper_otel.gateway.turns import Turn, pause
from esper_otel.leyline.packets import Packets, Page, packets
from esper_otel.leyline.risk import Rule, signals, with_signals
from esper_otel.pull.messages import PullRequest, Run, page_bytes, step_bytes
from esper_otel.schema import METRICS, STEP_METRICS

Made = TypeVar("Made")

# Metrics of a step that packets have no place for. Metrics for which a packet has a field are not among them.
_OF_STEPS_ALONE = {metric.name for metric in METRICS if metric.level == "step" and not metric.key}
_OF_STEPS_ALONE -= {metric.name for metric in STEP_METRICS}
_OF_STEPS_ALONE -= {"esper.global_step", "esper.epoch", "esper.frame.sequence"}

_DEFAULT_PACKETS = 64
_PAGE_BYTES = 16 * 1024 * 1024
_FETCHED, _FETCHED_FIRST = 32, 4  # steps at once; large ones are fetched one by one
_MANY_SEEDS = 1_000
_STEP_BYTES, _STEP_HEAD = 300, 16  # of a step, in addition to its bytes: in memory, and in a page


class Bounds(NamedTuple):
    """Limits on making a page.

    Attributes:
        turn: a context in which a batch of steps is made.
        has_room: whether a page may have this many bytes.
    """

    turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    has_room: Callable[[int], bool] = lambda _: True


FREE = Bounds()


class PulledPage(NamedTuple):
    """A page for a puller.

    Attributes:
        body: a serialized PullResponse.
        steps: number of steps in it.
        cursor: the cursor for the next page.
        gap: number of steps before the first one that were dropped or have not arrived.
    """

    body: bytes
    steps: int
    cursor: str
    gap: int


class MadeSteps:
    """Steps as bytes, made once for all pullers; those that were not read for longest are dropped.

    Args:
        most_bytes: limit of their size.

    Attributes:
        used: their size in bytes.
    """

    def __init__(self, most_bytes: int = 64 * 1024 * 1024) -> None:
        self.most = most_bytes
        self.used: int = 0
        self._steps: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()

    def get(self, key: tuple[str, str, int]) -> bytes | None:
        """Returns a step: by its run, the id of the run's store, and its position there."""
        step = self._steps.get(key)
        if step is not None:
            self._steps.move_to_end(key)
        return step

    def put(self, key: tuple[str, str, int], step: bytes) -> None:
        """Keeps a step; two pullers may have made it at the same time."""
        before = self._steps.pop(key, None)
        self.used += len(step) + _STEP_BYTES - (0 if before is None else len(before) + _STEP_BYTES)
        self._steps[key] = step
        while self.used > self.most:
            self.used -= len(self._steps.popitem(last=False)[1]) + _STEP_BYTES


class EntrySource(Protocol):
    """Where pages read entries: a store, or what was fetched from elsewhere."""

    def after(self, run_id: str, cursor: str, rank: int | None, most: int) -> StoredPage:
        """Returns the entries after a cursor. See ``Store``."""


async def page(
    store: EntrySource,
    request: PullRequest,
    made: Callable[[StoredFrame], bytes],
    steps: MadeSteps,
    clock_ns: Callable[[], int],
    bounds: Bounds = FREE,
) -> PulledPage:
    """Makes a page of the steps after a cursor, in turns, so that other requests are served in between.

    Args:
        store: where the steps are stored.
        request: the run, the cursor and the number of steps.
        made: makes a step from a stored entry; see ``step_bytes``.
        steps: the steps that were made before.
        clock_ns: Unix time in nanoseconds.
        bounds: limits on time and memory.

    Raises:
        UnknownRun, StaleCursor: the run or the cursor cannot be used.
        Busy: there is no room for a single step.
    """
    rank = request.rank if request.HasField("rank") else None
    most = request.max_packets or _DEFAULT_PACKETS
    cursor, gap, size, fetched = request.cursor, 0, 0, _FETCHED_FIRST
    shown: list[tuple[bytes, int]] = []

    def answered() -> PulledPage:
        now_unix_ns = clock_ns()
        aged = ((step, (now_unix_ns - time_unix_ns) / 1e9) for step, time_unix_ns in shown)
        return PulledPage(page_bytes(aged, cursor, gap), len(shown), cursor, gap)

    while True:
        few = min(most - len(shown), fetched)
        before = cursor
        try:
            found = store.after(request.run_id, cursor, rank, few)
        except (UnknownRun, StaleCursor):  # dropped meanwhile: the next pull will report it
            if shown:
                return answered()
            raise
        if shown and found.gap:
            return answered()
        fetched = _next_fetched(found.entries)
        gap += found.gap
        life = found.cursor.partition(":")[0]
        some: deque[bytes] = deque()
        for place, entry in enumerate(found.entries):
            if entry.item.missed and shown:  # the gap is before the first step of a page
                if place:
                    cursor = store.after(request.run_id, before, rank, place).cursor
                return answered()
            gap += entry.item.missed
            if not some:
                some = await _made(found.entries[place:], request.run_id, life, made, steps, bounds)
            step = some.popleft()
            size += len(step) + _STEP_HEAD
            has_room = bounds.has_room(size)
            if not has_room and not shown:
                raise Busy("too many answers that are not read yet")
            if not has_room or (size > _PAGE_BYTES and shown):
                if place:
                    cursor = store.after(request.run_id, before, rank, place).cursor
                return answered()
            shown.append((step, entry.item.frame.time_unix_ns))
        cursor = found.cursor
        if len(found.entries) < few or len(shown) == most:
            return answered()


async def _made(
    entries: Sequence[StoredFrame],
    run_id: str,
    life: str,
    made: Callable[[StoredFrame], bytes],
    steps: MadeSteps,
    bounds: Bounds,
) -> deque[bytes]:
    """Returns the steps of the first entries, at least one; in a turn of their own, if they are not made yet."""
    known: deque[bytes] = deque()
    for entry in entries:
        step = steps.get((run_id, life, entry.position))
        if step is None:
            break
        known.append(step)
    if known:
        return known
    new = await _steps(entries, lambda entry, _: made(entry), 0, bounds)
    for entry, step in zip(entries, new, strict=False):
        steps.put((run_id, life, entry.position), step)
    return new


async def packets_after(
    store: EntrySource,
    run_id: str,
    cursor: str,
    most: int,
    made: Callable[[StoredFrame, int], Packets],
    clock_ns: Callable[[], int],
) -> Page:
    """Does the same as ``page``, for a reader in this process: the packets are not serialized.

    Raises:
        UnknownRun, StaleCursor: the run or the cursor cannot be used.
    """
    found: list[Packets] = []
    gap, size, fetched = 0, 0, _FETCHED_FIRST
    while True:
        few = min(most - len(found), fetched)
        try:
            after = store.after(run_id, cursor, None, few)
        except (UnknownRun, StaleCursor):  # dropped meanwhile: the next call will report it
            if found:
                break
            raise
        if found and after.gap:
            break
        gap, cursor = gap + after.gap, after.cursor
        entries = after.entries
        fetched = _next_fetched(entries)
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
    """Makes the steps of the first entries: at least one, and as many as fit in a turn.

    A step with many seeds takes longer than a turn, so it is made in a thread.
    """
    steps: deque[Made] = deque()
    async with bounds.turn():
        await pause()
        if _is_large(entries[0]):
            return deque([await asyncio.to_thread(made, entries[0], now_unix_ns)])
        turn = Turn()
        for entry in entries:
            if _is_large(entry):
                break
            steps.append(made(entry, now_unix_ns))
            if turn.is_over:
                break
    return steps


def _next_fetched(entries: Sequence[StoredFrame]) -> int:
    return 1 if any(map(_is_large, entries)) else _FETCHED


def _is_large(entry: StoredFrame) -> bool:
    frame = entry.item.frame
    return len(frame.live.ids) + len(frame.seeds.ids) > _MANY_SEEDS


def step_of(
    entry: StoredFrame, *, rules: tuple[Rule, ...], latency_budget_ms: float, with_values: bool = False
) -> bytes:
    """Returns an entry as bytes; see ``step_bytes`` and ``packets_of``."""
    made = packets_of(entry, 0, rules=rules, latency_budget_ms=latency_budget_ms)
    if with_values:
        values = entry.item.frame.values()
        made = replace(made, values={name: values[name] for name in values if name in _OF_STEPS_ALONE})
    return step_bytes(made)


def packets_of(entry: StoredFrame, now_unix_ns: int, *, rules: tuple[Rule, ...], latency_budget_ms: float) -> Packets:
    """Returns an entry as packets, with its risk signals."""
    item = entry.item
    made = packets(
        item.frame,
        revision=item.revision,
        complete=item.complete,
        latency_budget_ms=latency_budget_ms,
        now_unix_ns=now_unix_ns,
    )
    made = with_signals(made, signals(made.state, loss_before=entry.loss_before, rules=rules))
    if not item.origin.writer and made.step < GUESSED_STEP:
        return made
    names = made.names if made.step < GUESSED_STEP else made.names - {"esper.global_step"}
    return replace(made, writer=item.origin.writer, names=names)


def forgotten(origin: Origin, ended: str | None) -> RunState:
    """Returns the state of a writer of which only stored steps are known, because it was silent for too long."""
    return RunState(origin, 0, "", None, None, 0, 0, ended=ended, is_silent=True)


def run_message(state: RunState, stored: int, run_ended: str | None) -> Run:
    """Returns the state of a writer as a message, with its number of stored steps and the outcome of the whole run."""
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
        host=state.host,
        revision=state.revision,
        settings=state.settings,
        location=state.location,
        device=state.device,
        units=dict(state.units),
    )
