"""Events that are read from frames: each once, the same as the episodes of packets, also after a kill in between."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from frame_examples import make_frame

from esper_otel.events.frame_events import EventReader
from esper_otel.frames.block import Block
from esper_otel.frames.event_log import Event, EventLog, checked_event
from esper_otel.frames.frame import ABSENT, COLUMN, WIDTH, Frame, SeedTable
from esper_otel.frames.journal import entries_in, line_of
from esper_otel.frames.ring import blocks_of
from esper_otel.leyline import state
from esper_otel.leyline.episodes import Episodes
from esper_otel.leyline.risk import signals

pytestmark = pytest.mark.own_code


def frames_of(rows: Sequence[Mapping[str, float]], *, first_step: int = 1) -> list[Frame]:
    """Frames with these values, a second apart."""
    return [
        make_frame()._replace(
            sequence=number,
            global_step=first_step + number - 1,
            epoch=0,
            time_unix_ns=10**18 + number * 10**9,
            names=tuple(values),
            numbers=tuple(values.values()),
            context={},
            seeds=SeedTable((), np.empty((0, WIDTH))),
            live=SeedTable((), np.empty((0, WIDTH))),
            retired=(),
        )
        for number, values in enumerate(rows, 1)
    ]


def with_stages(frame: Frame, stages: Mapping[str, float], retired: tuple[str, ...] = ()) -> Frame:
    cells = np.full((len(stages), WIDTH), ABSENT)
    cells[:, COLUMN["stage"]] = list(stages.values())
    table = SeedTable(tuple(stages), cells)
    return frame._replace(seeds=table, live=table, retired=retired)


def read(frames: Sequence[Frame], log: EventLog | None = None, *, at_once: int = 1_000) -> list[Event]:
    """The events of frames, read in parts of a size."""
    reader = EventReader(log or EventLog())
    for start in range(0, len(frames), at_once):
        blocks: list[Block] = list(blocks_of(frames[start : start + at_once]))
        reader.read(blocks, blocks[0].first, blocks[-1].last)
    return reader.log.waiting(None, 10_000)


def told(events: Sequence[Event]) -> list[tuple[object, ...]]:
    return [(event.name, event.step, *event.attributes.values()) for event in events]


def noisy(seed: int, count: int = 400) -> list[dict[str, float]]:
    """Losses with spikes, gaps, NaN and slow hooks."""
    luck = random.Random(seed)
    rows = []
    for number in range(count):
        row = {"loss": 2.0 - 0.001 * number + luck.choice([0.0] * 20 + [0.076, 0.15, 0.4, -0.3])}
        row["hook_latency_ms"] = luck.choice([10.0, 49.9, 50.0, 50.000001, 80.0] if number % 90 < 30 else [1.0])
        if luck.random() < 0.05:
            row["loss"] = luck.choice([math.nan, math.inf])
        if luck.random() < 0.05:
            del row["loss"]
        rows.append(row)
    return rows


@pytest.mark.parametrize("at_once", [1, 7, 1_000])
@pytest.mark.parametrize("seed", range(3))
def test_signals_are_the_episodes_of_the_packets(seed: int, at_once: int) -> None:
    """Computed as the gateway does: packets of each step, then episodes. In whatever parts frames are sent."""
    frames = frames_of(noisy(seed))
    episodes, expected = Episodes(), []
    loss: float | None = None
    for frame in frames:
        found = signals(state(frame), loss_before=loss)
        loss = frame.last_loss() if frame.last_loss() is not None else loss
        changes = episodes.note(frame.global_step, found, time_s=frame.time_unix_ns / 1e9)
        expected += [
            (f"esper.signal.{change.kind}", frame.global_step, change.episode.name)
            for change in changes
            if change.kind != "escalated"
        ]
    events = [
        event
        for event in read(frames, at_once=at_once)
        if event.name.startswith("esper.signal") and event.attributes["esper.signal.name"] != "loss_nonfinite"
    ]
    assert len(expected) > 10
    assert [(event.name, event.step, event.attributes["esper.signal.name"]) for event in events] == expected


@pytest.mark.parametrize("at_once", [1, 1_000])
@pytest.mark.parametrize("lost", [math.nan, -math.inf, 1e39])
def test_a_loss_that_is_not_finite_is_an_episode(lost: float, at_once: int) -> None:
    """As `--notify` tells it. A step without a loss is none."""
    rows = [{"loss": 1.0}] * 3 + [{"loss": lost}] * 4 + [{"accuracy": 0.5}] * 2 + [{"loss": 1.0}] * 12
    entered, left = read(frames_of(rows), at_once=at_once)
    assert told([entered]) == [("esper.signal.entered", 4, "loss_nonfinite", "CRITICAL", 4)]
    assert entered.severity == 17, "ERROR"
    assert entered.body == f"Signal loss_nonfinite has begun: loss {lost:g}."
    assert told([left]) == [("esper.signal.left", 17, "loss_nonfinite", "CRITICAL", 4)]
    assert left.body == "Signal loss_nonfinite has ended: steps 4 to 7."


def test_a_kill_between_any_two_frames_changes_no_event() -> None:
    """The next session reads the journal back and the frames again that were not acknowledged; none is told twice."""
    frames = frames_of([{"hook_latency_ms": 80.0 if number in {5, 6, 40} else 1.0} for number in range(1, 61)])
    frames = [with_stages(frame, {"s": 2.0 if frame.sequence < 30 else 4.0}) for frame in frames]
    whole = read(frames)
    assert [event.number for event in whole] == [*range(1, 7)]
    for kill in range(1, 60):
        before = read(frames[:kill], at_once=10)
        content = b"".join(map(line_of, before)) + b'[7, "torn'
        stored = list(entries_in(content, checked_event, 0))
        assert stored == [event._replace(attributes=dict(event.attributes)) for event in before]
        acknowledged = max(kill - 5, 0)
        log = EventLog(before=stored)
        again = read(frames[acknowledged:], log)
        left_at = {event.step or 0 for event in again if event.name == "esper.signal.left"}
        assert len(left_at) == 2
        assert min(left_at) in range(16, 27), "at most ten steps later, since steps without signals are not stored"
        assert [event.name for event in sorted(again, key=lambda each: each.sequence)] == [
            event.name for event in whole
        ]


def test_stages_of_seeds_are_told_when_they_change() -> None:
    """Also of a seed that is seldom recorded, and of a second life under the same name."""
    plain = frames_of([{"loss": 1.0}] * 8)
    stages: list[dict[str, float]] = [{"a": 2.0}, {"a": 2.0, "b": 1.0}, {}, {"a": 3.0}, {"a": ABSENT}, {"a": 3.0}]
    frames = [with_stages(frame, each) for frame, each in zip(plain, stages, strict=False)]
    frames += [with_stages(plain[6], {}, retired=("a",)), with_stages(plain[7], {"a": 3.0, "b": math.nan})]
    expected = [
        ("esper.seed.stage", 1, "a", "GERMINATED"),
        ("esper.seed.stage", 2, "b", "DORMANT"),
        ("esper.seed.stage", 4, "a", "TRAINING", "GERMINATED"),
        ("esper.seed.stage", 8, "a", "TRAINING"),
    ]
    for at_once in (1, 3, 8):
        assert told(read(frames, at_once=at_once)) == expected
        log = EventLog()
        read(frames[:7], log, at_once=at_once)
        assert set(log.stages()) == {"b"}, "what has ended need not be stored"


def test_a_first_step_above_one_is_a_resume_and_told_once() -> None:
    frames = frames_of([{"loss": 1.0}] * 3, first_step=501)
    assert told(read(frames, at_once=1)) == [("esper.run.resumed", 501)]
    assert told(read(frames_of([{"loss": 1.0}]))) == []
    log = EventLog(before=read(frames[:1]), delivered=1)
    assert told(read(frames, log)) == []


def test_the_end_tells_what_goes_on_and_then_how_the_run_ended() -> None:
    log = EventLog()
    frames = frames_of([{"hook_latency_ms": 80.0}] * 2)
    reader = EventReader(log)
    blocks = list(blocks_of(frames))
    reader.read(blocks, 1, 2)
    reader.end("ValueError", 0, exit_status=1)
    reader.end("completed", 0)
    *_, left, ended = log.waiting(None, 9)
    assert (left.name, left.attributes["esper.signal.first_step"], left.step) == ("esper.signal.left", 1, 2)
    assert dict(ended.attributes) == {
        "esper.outcome": "ValueError",
        "exception.type": "ValueError",
        "process.exit.code": 1,
    }
    assert (ended.severity, ended.time_unix_ns) == (17, frames[-1].time_unix_ns)
    assert log.last == ended.number


def test_what_a_line_of_a_file_has_is_checked() -> None:
    event = read(frames_of([{"loss": 1.0}], first_step=7))[0]
    good = json.loads(line_of(event))
    assert checked_event(good).step == 7
    for place, wrong in (
        (0, "1"),
        (0, -1),
        (2, 3),
        (6, "7"),
        (8, []),
        (8, {"a": [1]}),
        (8, {"a": 2**63}),
        (6, -1),
        (9, None),
    ):
        with pytest.raises(ValueError, match="not an event"):
            checked_event([*good[:place], wrong, *good[place + 1 :]])
    with pytest.raises(ValueError, match="not an event"):
        checked_event(good[:-1])
