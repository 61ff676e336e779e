"""Items: released frames and the state of their runs, as they pass between the gateway's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from esper_otel.frames.frame import Frame

# The maximum number of future stream ends that are kept for a writer over a restart.
MOST_ENDS = 10_000


class Origin(NamedTuple):
    """A writer: one process of one attempt of a run.

    Attributes:
        run_id: the run's name.
        attempt: number of this start of the run.
        rank: rank of the process within the run.
        writer: tells two live processes of the same (run, attempt, rank) apart; empty for the first one seen.
    """

    run_id: str
    attempt: int
    rank: int
    writer: str = ""


class Item(NamedTuple):
    """One released frame, as it is served to pullers.

    Attributes:
        origin: the writer of the frame.
        frame: the step; its ``live`` seeds carry their last known cells, as in the training process.
        revision: 1, or higher for a later correction of the step.
        complete: whether it contains every point of the step.
        received_unix_ns: when its last point arrived.
        missed: how many frames directly before it had not arrived when it was first released. They are late, lost, or
            were sent to another gateway.
    """

    origin: Origin
    frame: Frame
    revision: int
    complete: bool
    received_unix_ns: int
    missed: int = 0


class Place(NamedTuple):
    """The position of a writer in its sequence of frames, kept over a restart.

    Attributes:
        origin: the writer.
        next: the number of the frame to be released next; None if the frames have no numbers.
        lowest: the lowest number that has arrived; None before the first.
        missing: how many higher numbers were skipped and have not arrived.
        says_step: whether frames state their global step.
        says_epoch: whether frames state their epoch.
        holes: ranges of missing numbers, each from the first to before the second; only the newest if there are many.
        ends: stream ends of a plain sender, those to come and the newest of those that have come: times, seeds and
            columns; only some if there are very many.
        host: name of its host; empty if it is not known.
        revision: revision of its code; empty if it is not known.
        settings: its settings that differ from the defaults, as text; empty if it has none.
        validation_loss: the newest validation loss; None if none is known, or it is NaN.
        location: where it runs, in words: job, pod, node, local rank; empty if it is not known.
        device: the device that trains, in words; empty if it is not known.
        units: units of the user's own metrics, by name.
    """

    origin: Origin
    next: int | None
    lowest: int | None
    missing: int
    says_step: bool
    says_epoch: bool
    holes: tuple[tuple[int, int], ...]
    ends: tuple[tuple[int, str, int], ...] = ()
    host: str = ""
    revision: str = ""
    settings: str = ""
    validation_loss: float | None = None
    location: str = ""
    device: str = ""
    units: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of one writer: one rank of one attempt.

    Attributes:
        origin: the writer.
        world_size: number of processes of the run.
        experiment: name of the experiment.
        first_step: the first step released; None before the first release.
        first_time_unix_ns: the earliest time of a known step; 0 before the first release.
        last_step: the newest step released.
        last_time_unix_ns: time of the newest step.
        last_received_unix_ns: when something last arrived from the writer: a step, or counts, a phase or an end.
        ended: its outcome (``completed``, an exception's type, a signal); None while it runs or is silent.
        resumed: whether it resumed the run (see ``launches``).
        is_silent: whether it has sent nothing for so long that it may be dead.
        host: name of its host; empty if it is not known.
        revision: revision of its code; empty if it is not known.
        settings: its settings that differ from the defaults, as text; empty if it has none.
        location: where it runs, in words: job, pod, node, local rank; empty if it is not known.
        device: the device that trains, in words: model, name, UUID, PCI address; empty if it is not known.
        units: units of the user's own metrics, by name.
        last_loss: the loss of the newest step, which may be NaN; None if it has none.
        validation_loss: the newest validation loss, which may be NaN; None if none is known.
        step_received_unix_ns: when the newest step arrived; 0 before the first release.
        writers: number of live processes that claim this (run, attempt, rank).
        missing: frames that were skipped, between others that have arrived, and have not arrived since.
        unseen: frames before the first one that arrived: late, lost, or sent to another gateway.
        incomplete: frames that were released without some of their points, and never completed.
        differing: points that arrived twice with different values. Before the release the first value is used, after it
            the last.
        too_late: frames that were repeated, or arrived after their place had been forgotten; they were ignored.
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
    host: str = ""
    revision: str = ""
    settings: str = ""
    location: str = ""
    device: str = ""
    units: tuple[tuple[str, str], ...] = ()
    last_loss: float | None = None
    validation_loss: float | None = None
    step_received_unix_ns: int = 0

    def is_without_steps(self, now_unix_ns: int, for_ns: int) -> bool:
        """Returns whether it lives, but its newest step arrived longer ago than this, as in a long evaluation."""
        return not self.is_silent and 0 < self.step_received_unix_ns < now_unix_ns - for_ns


class RunStatus(NamedTuple):
    """What is known of a run.

    Attributes:
        states: the state of each writer, in order.
        stored: how many of its steps are stored.
        outcome: how the whole run ended; None while it has not.
    """

    states: Sequence[RunState]
    stored: int
    outcome: str | None
