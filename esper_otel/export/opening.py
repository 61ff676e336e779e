"""Creates a session's step exporter with its encoder, sender and spool."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from opentelemetry.sdk.resources import Resource

from esper_otel.export.device_points import DevicePoint
from esper_otel.export.encode import Encoder
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.event_exporter import EventExporter
from esper_otel.export.event_source import EventSource, ReaderOf
from esper_otel.export.exporter import StepExporter
from esper_otel.export.folder import EVENTS, PHASES
from esper_otel.export.journal_file import JournalFile
from esper_otel.export.source import LeftoverSource, leftovers_in
from esper_otel.export.spool import Spool
from esper_otel.export.transport import Sender, open_sender
from esper_otel.export.variables import Variables, warn
from esper_otel.frames.event_log import EventLog
from esper_otel.frames.frame import Run
from esper_otel.frames.phase_log import PhaseLog
from esper_otel.frames.ring import Ring
from esper_otel.log import Warnings
from esper_otel.schema import Metric
from esper_otel.settings import EsperSettings

_LONGEST_S = 3600.0


class EventWiring(NamedTuple):
    """What sending events needs.

    Attributes:
        endpoint: where logs are sent.
        sender: sends them.
        log: the session's events.
        reader_of: makes readers of frames.
        resource: returns the session's Resource; None before its first step, since the run may change until then.
    """

    endpoint: Endpoint
    sender: Sender
    log: EventLog
    reader_of: ReaderOf
    resource: Callable[[], Resource | None]


def shortest_period_s(
    settings: EsperSettings, environ: Mapping[str, str] = os.environ, *, ignored: Callable[[str], None] = warn
) -> float:
    """Returns the shortest time between two requests: ours, if it is set, or else ``OTEL_METRIC_EXPORT_INTERVAL``.

    Args:
        settings: the settings.
        environ: the environment.
        ignored: called with a message if the variable cannot be used.
    """
    if settings.is_given("export_every_s"):
        return settings.export_every_s
    every_ms = Variables(environ, ignored).number(
        "OTEL_METRIC_EXPORT_INTERVAL",
        default=settings.export_every_s * 1e3,
        lowest=math.ulp(0.0),
        highest=2**31 - 1,
        unit="a number of milliseconds above 0",
    )
    return min(every_ms / 1e3, _LONGEST_S)


def open_exporter(
    endpoint: Endpoint,
    settings: EsperSettings,
    ring: Ring,
    catalogue: Mapping[str, Metric],
    resource_of: Callable[[Run], Resource],
    *,
    phases: PhaseLog,
    run_of: Callable[[], Run],
    settled_run: Callable[[], Run],
    prepare: Callable[[], None],
    health: Callable[[], Mapping[tuple[str, str], float]],
    idle_ns: Callable[[int], int | None],
    fault: Callable[[str, Exception], None],
    warnings: Warnings,
    events: EventWiring | None = None,
    device: Callable[[], Sequence[DevicePoint]] = tuple,
    is_certain: bool = False,
) -> StepExporter:
    """Creates the exporter without starting it. See ``StepExporter`` for the arguments.

    ``run_of`` returns the run as it is known now, for the file of phases; ``settled_run`` the run that its ranks agree
    on, and is called if the session closes without any step. With ``is_certain``, the run will not be another one at
    the first step: a spool then keeps it from the start, so that the next session can tell of it if this one is killed.

    Raises:
        ConfigurationError: the endpoint or the spool cannot be used.
    """
    spool = _opened_spool(settings, ring, catalogue, resource_of, _rank_of(run_of()), warnings)
    phase_file = None
    if spool is not None:
        phase_file = JournalFile(spool.folder, PHASES, phases, run_of, resource_of, warnings)
    if phase_file is not None and is_certain:
        phase_file.write(())

    def leftovers(are_all: bool) -> Iterable[LeftoverSource]:
        if settings.spool_dir is None:
            return ()
        return leftovers_in(
            settings.spool_dir,
            Encoder,
            fault,
            most_bytes=settings.spool_bytes,
            warnings=warnings,
            reader_of=None if events is None else events.reader_of,
            rank=None if are_all else _rank_of(run_of()),
        )

    def prepared() -> None:
        prepare()
        if spool is not None:
            spool.tend()

    return StepExporter(
        ring,
        Encoder(catalogue, resource_of),
        open_sender(endpoint, settings.token_file),
        every_s=shortest_period_s(settings),
        timeout_s=endpoint.timeout_s,
        prepare=prepared,
        health=health,
        idle_ns=idle_ns,
        fault=fault,
        warnings=warnings,
        spool=spool,
        leftovers=leftovers,
        phases=phases,
        phase_file=phase_file,
        run_of=settled_run,
        events=None if events is None else _live_events(events, spool, run_of, resource_of, fault, warnings),
        device=device,
    )


def _live_events(
    events: EventWiring,
    spool: Spool | None,
    run_of: Callable[[], Run],
    resource_of: Callable[[Run], Resource],
    fault: Callable[[str, Exception], None],
    warnings: Warnings,
) -> EventExporter:
    """Returns what sends the session's events, and keeps them in its spool."""
    file = None if spool is None else JournalFile(spool.folder, EVENTS, events.log, run_of, resource_of, warnings)
    return EventExporter(
        events.sender,
        EventSource(events.reader_of(events.log), file, events.resource),
        timeout_s=events.endpoint.timeout_s,
        fault=fault,
        warnings=warnings,
    )


def _opened_spool(
    settings: EsperSettings,
    ring: Ring,
    catalogue: Mapping[str, Metric],
    resource_of: Callable[[Run], Resource],
    rank: int | None,
    warnings: Warnings,
) -> Spool | None:
    """Returns the session's spool; None without one."""
    if settings.spool_dir is None:
        return None
    return Spool(
        settings.spool_dir,
        ring,
        catalogue,
        resource_of,
        most_bytes=settings.spool_bytes,
        warnings=warnings,
        rank=rank,
    )


def _rank_of(run: Run) -> int | None:
    """Returns the rank of a process whose run has several."""
    return run.rank if run.world_size > 1 else None


def token_for(endpoint: Endpoint, of_steps: Endpoint, token_file: Path | None) -> Path | None:
    """Returns the token file for the endpoint of events: only the host that steps go to gets the token."""
    return token_file if endpoint.host == of_steps.host else None
