"""What passes between the gateway's parts: released frames, and the state of the runs they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from esper_otel.frames.frame import Frame

# So many ends of streams that are to come are known of a writer after a restart.
MOST_ENDS = 10_000


class Origin(NamedTuple):
    """Who writes: one process of one attempt of a run.

    Attributes:
        run_id: the run's name.
        attempt: which start of the run.
        rank: the process within the run.
        writer: tells two live processes of the same (run, attempt, rank) apart; empty for the first one seen.
    """

    run_id: str
    attempt: int
    rank: int
    writer: str = ""


class Item(NamedTuple):
    """One released frame: what a puller is given.

    Attributes:
        origin: whose it is.
        frame: the step; its ``live`` seeds carry their last known cells, as in process.
        revision: 1, or higher for a later correction of the step.
        complete: whether every point of the step is in it.
        received_unix_ns: when its last point came.
    """

    origin: Origin
    frame: Frame
    revision: int
    complete: bool
    received_unix_ns: int


class Place(NamedTuple):
    """Where a writer's frames stand: what must be known of them after a restart.

    Attributes:
        origin: whose they are.
        next: the number that is to be released next; None when there are no numbers.
        lowest: the lowest number that has come; None before the first.
        missing: how many numbers after that were skipped and have not come.
        says_step: whether frames say their global step.
        says_epoch: whether they say their epoch.
        holes: the numbers that are missing, each from the first to before the second; of very many the newest.
        ends: of a plain sender, ends of streams that are to come: their times, seeds and columns; of very many some.
    """

    origin: Origin
    next: int | None
    lowest: int | None
    missing: int
    says_step: bool
    says_epoch: bool
    holes: tuple[tuple[int, int], ...]
    ends: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RunState:
    """What is known of one rank of one attempt.

    Attributes:
        origin: whose state it is.
        world_size: processes of the run.
        experiment: name of the experiment.
        first_step: the first step released; None before it.
        first_time_unix_ns: the oldest time of a step that is known here; 0 before it.
        last_step: the newest step released.
        last_time_unix_ns: that step's time.
        last_received_unix_ns: when something of it came last.
        ended: outcome of its end (``completed``, an exception's type, a signal); None while it lives or is silent.
        resumed: whether it resumed the run (see ``launches``).
        is_silent: whether nothing has come for so long that it may not be alive.
        writers: live processes that claim this (run, attempt, rank).
        missing: frames that have not come, between others that have, counted when they were skipped.
        unseen: frames before the first that has come: late, lost, or sent to somebody else.
        incomplete: frames that were released without some of their points, and never completed.
        differing: points that came twice with two values; before the release the first one counted, then the last.
        too_late: frames that came again, or after their place had been forgotten; they were not looked at.
    """

    origin: Origin
    world_size: int
    experiment: str
    first_step: int | None
    last_step: int | None
    last_time_unix_ns: int
    last_received_unix_ns: int
    ended: str | None = None
    resumed: bool = False
    writers: int = 1
    missing: int = 0
    unseen: int = 0
    incomplete: int = 0
    differing: int = 0
    too_late: int = 0
    first_time_unix_ns: int = 0
    is_silent: bool = False
