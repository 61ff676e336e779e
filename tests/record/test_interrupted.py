"""Ctrl-C while a step is published: the step is recorded or it is not, and nothing of it is in later steps."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from frame_examples import RUN, TIME_UNIX_NS, seed_table
from interrupts import interrupted

from esper_otel.derive import deriver, dynamics
from esper_otel.derive.deriver import Deriver
from esper_otel.derive.dynamics import Dynamics
from esper_otel.frames import block, live_seeds
from esper_otel.frames import ring as ring_module
from esper_otel.frames.frame import NO_SEEDS, Frame
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.probes.sampler import Sampler
from esper_otel.record import frame_publisher
from esper_otel.record.frame_publisher import Draft, FramePublisher
from esper_otel.record.names import Names

pytestmark = pytest.mark.own_code

FILES = [str(module.__file__) for module in (block, deriver, dynamics, frame_publisher, live_seeds, ring_module)]


def fail(where: str, error: Exception) -> None:
    raise AssertionError(where) from error


def a_publisher() -> FramePublisher:
    deriving = Deriver([Dynamics(window=2)], fail)
    probing, ring = Sampler([], period_s=1.0), Ring(2**20)
    return FramePublisher(RUN, Names(), ring, deriving=deriving, probing=probing, context={}, warnings=Warnings())


def draft(
    number: int, seeds: Mapping[str, Mapping[str, float]], retired: Sequence[str] = (), **context: float
) -> Draft:
    """A step whose values depend on its number."""
    values = {"loss": 1.0 / number, "gradient_norm": 0.5 * number}
    staying = {f"esper.validation.{name}": value for name, value in context.items()}
    table = seed_table(seeds) if seeds else NO_SEEDS
    return Draft(number, 0, TIME_UNIX_NS + number * 10**9, values, table, retired=retired, context=staying)


def seed(alpha: float, violations: float) -> dict[str, float]:
    return {"stage": 3.0, "alpha": alpha, "isolation_violations": violations}


BEFORE = [draft(number, {"s0": seed(0.1, 0.0), "s1": seed(0.2, number)}) for number in range(1, 4)]
STEP = draft(4, {"s0": seed(0.9, 5.0), "s2": seed(0.9, 1.0)}, ["s1"], loss=0.25)
AFTER = [draft(5, {"s0": {"alpha": 0.3}}), draft(6, {})]


def outcome(publisher: FramePublisher) -> tuple[Any, ...]:
    """All that readers and later steps can see."""
    frames, _ = publisher.ring.after(0, 100)
    state = publisher._deriving.states, publisher.last_finite_loss, publisher.live.violations()
    return [said(frame) for frame in frames], state


def said(frame: Frame) -> tuple[Any, ...]:
    tables = [(table.ids, table.cells.tobytes()) for table in (frame.seeds, frame.live)]
    return frame.sequence, frame.global_step, frame.values(), frame.context, frame.retired, tables


def published(drafts: Sequence[Draft]) -> FramePublisher:
    publisher = a_publisher()
    for each in drafts:
        publisher._publish_draft(each)
    return publisher


def test_a_step_that_is_interrupted_anywhere_is_recorded_or_leaves_nothing_behind() -> None:
    """What it should have ended or set for all later steps, the next one does: nobody asks for that a second time."""
    whole = outcome(published([*BEFORE, STEP, *AFTER]))
    without = {
        is_taken_over: outcome(
            published([*BEFORE, AFTER[0]._replace(retired=STEP.retired, context=STEP.context), AFTER[1]])
            if is_taken_over
            else published([*BEFORE, *AFTER])
        )
        for is_taken_over in (True, False)
    }
    at, is_interrupted, lost = 0, True, 0
    while is_interrupted:
        at += 1
        publisher = published(BEFORE)
        before = publisher.preview(AFTER[0])
        is_interrupted = interrupted(lambda of=publisher: of._publish_draft(STEP), at, FILES)  # type: ignore[misc]
        is_there, has_begun = publisher.ring.last == 4, publisher._before is not None
        if not is_there:
            lost += 1
            if not has_begun:
                assert said(publisher.preview(AFTER[0])) == said(before)
        for each in AFTER:
            publisher._publish_draft(each)
        assert outcome(publisher) == (whole if is_there else without[has_begun]), at
        assert sys.exc_info() == (None, None, None), "the next test would begin inside an exception"
    assert lost > 200


def test_a_step_that_waited_is_published_once_wherever_it_is_interrupted() -> None:
    """It is still in the queue, and is not published twice."""
    whole = outcome(published([*BEFORE, STEP, *AFTER]))
    at, is_interrupted = 0, True
    while is_interrupted:
        at += 3
        publisher = published(BEFORE)
        publisher.waiting.append((STEP, None))
        is_interrupted = interrupted(publisher.drain, at, FILES, apart_from={"drain"})
        for each in AFTER:
            publisher.publish_later(each, None)
        assert outcome(publisher) == whole, at


def test_a_preview_that_is_interrupted_changes_nothing() -> None:
    """A controller asks in the middle of a step; that step and the next are what they would be."""
    whole = outcome(published([*BEFORE, STEP, *AFTER]))
    at, is_interrupted = 0, True
    while is_interrupted:
        at += 3
        publisher = published(BEFORE)
        is_interrupted = interrupted(lambda of=publisher: of.preview(STEP), at, FILES)  # type: ignore[misc]
        for each in (STEP, *AFTER):
            publisher._publish_draft(each)
        assert outcome(publisher) == whole, at
