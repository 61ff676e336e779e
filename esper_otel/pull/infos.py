"""RunInfo: what a gateway knows of a writer of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from esper_otel.pull.messages import Run, RunsResponse


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One writer of a run: a process of one attempt, as the gateway knows it.

    Attributes:
        run_id: the run's name.
        attempt: number of this start of the run.
        rank: rank of the process within the run.
        writer: tells two live processes of the same (run, attempt, rank) apart; empty for the first one.
        world_size: number of processes of the run; 0 if the writer has sent nothing since the gateway was started.
        experiment: name of the experiment.
        first_step: the first step released; None before the first release.
        last_step: the newest step released; None before the first release.
        last_time_unix_ns: time of the newest step.
        last_received_unix_ns: when something last arrived from this writer.
        ended: ``completed``, an exception's type, or a signal's name; None while it runs or is silent.
        resumed: whether an earlier attempt of its rank is known, or one of another rank that was over when it began.
        writers: number of live processes that claim this (run, attempt, rank).
        missing: steps that have not arrived although earlier and later ones have.
        incomplete: steps released without some of their points.
        stored: steps that can be pulled.
        differing: points that arrived twice with different values.
        too_late: steps that were repeated, or arrived after their place had been forgotten.
        unseen: steps before the first one that arrived: late, lost, or sent to another gateway.
        run_ended: how the whole run ended; see ``TamiyoClient.ended``.
        host: name of its host; empty if it is not known.
        revision: revision of its code; empty if it is not known.
        settings: its settings that differ from the defaults, as text; empty if there are none or they are not known.
        location: where it runs, in words: job, pod, node, local rank, parallel dimensions; empty if it is not known.
        device: the device that trains, in words: model, PyTorch's name, UUID, PCI address; empty if it is not known.
        units: units of the user's own metrics, by name.
    """

    run_id: str
    attempt: int
    rank: int
    writer: str
    world_size: int
    experiment: str
    first_step: int | None
    last_step: int | None
    last_time_unix_ns: int
    last_received_unix_ns: int
    ended: str | None
    resumed: bool
    writers: int
    missing: int
    incomplete: int
    stored: int
    differing: int
    too_late: int
    unseen: int
    run_ended: str | None
    host: str = ""
    revision: str = ""
    settings: str = ""
    location: str = ""
    device: str = ""
    units: Mapping[str, str] = field(default_factory=dict, hash=False)


def run_infos(response: RunsResponse) -> list[RunInfo]:
    """Converts the response to a ``Runs`` call."""
    return [_run_info(run) for run in response.runs]


def run_outcome(runs: Iterable[RunInfo], run_id: str) -> str | None:
    """Returns how the whole run ended, from a gateway's list of runs."""
    return next((run.run_ended for run in runs if run.run_id == run_id), None)


def _run_info(run: Run) -> RunInfo:
    said = {name: getattr(run, name) for name in RunInfo.__slots__}
    for name in ("first_step", "last_step", "ended", "run_ended"):
        if not run.HasField(name):
            said[name] = None
    said["units"] = dict(run.units)
    return RunInfo(**said)
