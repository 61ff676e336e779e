"""``start()``, which connects recording, deriving, probing, exporting and packets."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from signal import Signals
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry.metrics import MeterProvider

from esper_otel import leyline
from esper_otel.derive.deriver import Deriver, checked_processors
from esper_otel.derive.dynamics import Dynamics
from esper_otel.derive.processor import Processor
from esper_otel.errors import ConfigurationError, EsperOtelError, InvalidCatalogue, InvalidName
from esper_otel.events.frame_events import EventReader
from esper_otel.export.device_points import DevicePoint
from esper_otel.export.endpoint import Endpoint, endpoint_from_environment
from esper_otel.export.event_exporter import NO_LOGS
from esper_otel.export.exporter import StepExporter
from esper_otel.export.file_sender import file_endpoint
from esper_otel.export.instruments import Instruments, instruments_of
from esper_otel.export.opening import EventWiring, open_exporter, token_for
from esper_otel.export.provider import Exporters, OwnProvider, events_exporter, exporters_for
from esper_otel.export.resource import resources
from esper_otel.export.transport import open_sender
from esper_otel.export.variables import warn as ignored
from esper_otel.frames.black_box import BlackBox
from esper_otel.frames.event_log import Event
from esper_otel.frames.frame import FINE, UNKNOWN_ATTEMPT, Frame, Run
from esper_otel.frames.ring import Ring
from esper_otel.leyline.risk import configured
from esper_otel.log import Warnings, announce
from esper_otel.native import threads
from esper_otel.probes import host_and_device_probes
from esper_otel.probes.probe import Probe
from esper_otel.probes.sampler import Sampler
from esper_otel.record.clock import Clock
from esper_otel.record.device import device_name
from esper_otel.record.frame_publisher import FramePublisher
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.names import Names
from esper_otel.record.peak import Peak
from esper_otel.record.phases import process_start_unix_ns
from esper_otel.record.recorder import Recorder
from esper_otel.schema import METRICS, TWINS, Metric
from esper_otel.session.absence import reasons
from esper_otel.session.device_report import DeviceReport
from esper_otel.session.ending import exit_status, forget, is_interactive, live_sessions, outcome_of_process, watch
from esper_otel.session.event_notes import EventNotes
from esper_otel.session.identity import Agreement, agreement_for, identify, new_run_id
from esper_otel.session.late_rank import LateRank
from esper_otel.session.page_hint import LONGEST_WAIT_S, show_the_way, wait_for_page
from esper_otel.session.parallel import place_in_mesh
from esper_otel.session.spared_telemetry import telemetry_of
from esper_otel.session.telemetry import Telemetry
from esper_otel.settings import EsperSettings, settings_of_environment, signal_names, unknown_variables

if TYPE_CHECKING:
    import torch
    from opentelemetry.sdk.resources import Resource
    from torch.distributed.device_mesh import DeviceMesh

    from esper_otel.session.show import Figure

_T = TypeVar("_T")
_READERS_S = 1.0  # for the SDK's readers, however long closing has taken before
_CATALOGUE = frozenset(metric.name for metric in METRICS)
_STALE_AFTER_NS = 300 * 1_000_000_000
_NO_RUN_ID = (
    "the %d ranks have no common run id, so each is a run of its own, this one %s: call "
    "torch.distributed.init_process_group before the first step, give start(run_id=...), or set ESPER_RUN_ID on every "
    "rank"
)
_NO_ATTEMPT = (
    "the %d ranks of run %s have no means to agree on one attempt, so each uses its own: call "
    "torch.distributed.init_process_group before the first step, or set ESPER_RUN_ATTEMPT to the same whole number on "
    "every rank, and to a larger one at each launch"
)


_sessions = itertools.count()


def start(
    *,
    run_id: str | None = None,
    experiment: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    parallel: Mapping[str, int] | DeviceMesh | None = None,
    device: str | int | torch.device | None = None,
    settings: EsperSettings | None = None,
    epochs: int | None = None,
    metrics: Iterable[Metric] = (),
    processors: Iterable[Processor] = (),
    meter_provider: MeterProvider | None = None,
    export_steps: bool | None = None,
    ui: bool | None = None,
) -> Telemetry:
    """Starts telemetry for one training run. The session that it returns is also a context manager.

    In a notebook or at a prompt, a session that this thread has left open is closed first. Programs may have several.

    Args:
        run_id: name of the run, the same after a resume and on every rank. By default it is taken from
            ``ESPER_RUN_ID`` or the launcher, or else generated and logged.
        experiment: name of the experiment that the run belongs to.
        rank: number of this process, below ``world_size``; by default from the launcher's environment.
        world_size: number of ranks.
        parallel: this process's place along each parallel dimension, such as ``{"dp": 3, "tp": 0}``, or a
            ``DeviceMesh`` with named dimensions; by default from ``ESPER_PARALLEL``, like ``dp=3,tp=0``.
        device: the training device; by default that of the first CUDA tensor recorded.
        settings: settings; by default from the environment (``ESPER_*``).
        epochs: planned number of epochs.
        metrics: additional step metrics of the user.
        processors: additional processors of the user. One that gives a built-in derived metric replaces the
            built-in computation.
        meter_provider: a provider on which to register the instruments, instead of creating one. The provider's
            readers then export the instruments, and steps are sent only with ``export_steps=True``. Seeds beyond the
            SDK's cardinality limit are placed in additional scopes; a limit that you have set is kept, with a warning.
        export_steps: whether to send every step over OTLP; by default according to ``OTEL_METRICS_EXPORTER``.
        ui: whether to open the live page, which shows this run in the browser, for notebooks and first tries. Unless
            it is already open, ``esper-otel ui`` is started as a process of its own, which stays as long as it is
            used; closing a short run waits until the page answers, 20 s at most. By default ``ESPER_UI``, which is
            false. Ranks other than 0 open none.

    Raises:
        MistakeError: an argument is invalid.
        ConfigurationError: a setting or environment variable is invalid. With ``ESPER_ON_MISTAKE=warn`` that is a
            warning: the setting has its default, and without a usable endpoint steps are recorded and not sent.
    """
    session = _Session(
        settings=_settings_of_environment() if settings is None else settings,
        identity={"run_id": run_id, "experiment": experiment, "rank": rank, "world_size": world_size},
        parallel=parallel,
        device=device,
        epochs=epochs,
        metrics=tuple(metrics),
        processors=tuple(processors),
        meter_provider=meter_provider,
        export_steps=export_steps,
        ui=ui,
    )
    return session.telemetry


def check_environment() -> None:
    """Reads the settings for a session that will be started later, with the warnings and errors of ``start``.

    Opens the live page, too, if the environment asks for it.

    Raises:
        ConfigurationError: a setting or environment variable is invalid.
    """
    settings = _settings_of_environment()
    endpoint = _spared(settings, lambda: _checked_endpoint(settings), lambda _: None)
    rank = 0 if os.environ.get("RANK", "0") == "0" else 1
    show_the_way(endpoint, rank, wants_page=settings.ui, waits=True)


def _checked_endpoint(settings: EsperSettings) -> Endpoint | None:
    configured(settings.risk_thresholds)
    exporters = exporters_for(has_provider=False, export_steps=None)
    endpoint = _endpoint(settings, exporters)
    if endpoint is not None:
        open_sender(endpoint, settings.token_file).close()
        _logs_endpoint(settings)
    return endpoint


def _endpoint(settings: EsperSettings, exporters: Exporters) -> Endpoint | None:
    """Returns where steps are sent, or the directory that they are written to; None if they are not."""
    if not exporters.steps:
        return None
    if settings.export_file is not None:
        return file_endpoint(settings.export_file)
    return endpoint_from_environment(protocol=exporters.protocol)


def _logs_endpoint(settings: EsperSettings) -> Endpoint | None:
    """Returns where events are sent, or the directory that they are written to; None if they are not."""
    exporter = events_exporter()
    if not exporter.is_on:
        return None
    if settings.export_file is not None:
        return file_endpoint(settings.export_file, "logs")
    return endpoint_from_environment(protocol=exporter.protocol, signal="logs")


def _spared(
    settings: EsperSettings,
    work: Callable[[], _T],
    otherwise: Callable[[EsperOtelError], _T],
    *,
    faults: tuple[type[EsperOtelError], ...] = (ConfigurationError,),
) -> _T:
    """Returns what the work returns. A setting that it cannot use raises, or with ``on_mistake=warn`` is reported.

    Args:
        settings: the settings that can be read.
        work: may raise.
        otherwise: is called instead, with the error.
        faults: what a wrong setting raises.
    """
    try:
        return work()
    except faults as error:
        if settings.on_mistake == "raise":
            raise
        ignored(str(error))
        return otherwise(error)


def _settings_of_environment() -> EsperSettings:
    """Returns the settings; warns of variables that look like settings and are not."""
    for message in unknown_variables():
        ignored(message)
    return settings_of_environment(ignored)


class _Session:
    """All parts of one ``Telemetry``, which are created, watched and ended together."""

    def __init__(
        self,
        *,
        settings: EsperSettings,
        identity: Mapping[str, Any],
        parallel: Mapping[str, int] | DeviceMesh | None,
        device: str | int | torch.device | None,
        epochs: int | None,
        metrics: Sequence[Metric],
        processors: Sequence[Processor],
        meter_provider: MeterProvider | None,
        export_steps: bool | None,
        ui: bool | None,
    ) -> None:
        self.latency_budget_ms = settings.kernel_latency_budget_ms
        self.rules = _spared(settings, lambda: configured(settings.risk_thresholds), lambda _: configured({}))
        self._close_timeout_s = settings.close_timeout_s
        self._enriched = settings.tolaria_step_enrichment_enabled
        self._warnings = Warnings()
        self._mistakes = Mistakes() if settings.on_mistake == "warn" else None
        run, self._agreement = _identified_or_spared(settings, identity)
        probes = host_and_device_probes(self._device) if self._enriched else []
        names, processors = _declared(metrics, processors, probes, enriched=self._enriched)
        has_provider = meter_provider is not None
        exporters, endpoint = self._ways_out(settings, run, has_provider=has_provider, export_steps=export_steps)
        self._resource_of = _resources(settings, parallel)
        self._deriver = Deriver(processors, self._fault)
        self._sampler = Sampler(probes, period_s=settings.probe_period_s)
        self._hardware = self._described(settings, run) if self._enriched else None
        self._publisher = self._opened_publisher(run, names, settings, epochs)
        self._late_rank = LateRank(identity, settings, self._warnings, has_readers=has_provider or exporters.readers)
        self._publisher.settle_run = self._settled
        self._black_box = self._opened_black_box(settings, names)
        self._publisher.alarmed = self._black_box.loss_is_not_finite
        self._recorder = self._opened_recorder(settings)
        self._events = self._opened_events(settings, endpoint)
        self._for_alerts = _for_alerts(settings.risk_thresholds, self._resource_of(run).attributes)
        if device is not None:
            self._publisher.set_device(device_name(device), named=True)
        # A provider given by the user has its own Resource, so the points themselves must carry the run's attributes.
        self.attributes: Mapping[str, str | int] = (
            {} if meter_provider is None else {"esper.run.id": run.run_id, "esper.rank": run.rank}
        )
        self._exporter = None if endpoint is None else self._step_exporter(endpoint, settings)
        # Opened after everything that may raise, so that a failed start leaves no port open.
        certain = self._resource_of(self._certain(run))
        self._provider = OwnProvider(certain, exporters.readers) if meter_provider is None else None
        self._instruments = self._attached(meter_provider, _instruments_for(names, has_twins=settings.hw_metrics))
        self.telemetry = telemetry_of(self._recorder, self)
        self._process_id = os.getpid()
        self._figures: list[Figure] = []
        unfollowed = self._begin(settings.flush_signals)
        announce("started", self._describe(endpoint, exporters.off, unfollowed))
        if show_the_way(endpoint, run.rank, wants_page=settings.ui if ui is None else ui):
            self._warnings.hold("export", LONGEST_WAIT_S)

    def _ways_out(
        self, settings: EsperSettings, run: Run, *, has_provider: bool, export_steps: bool | None
    ) -> tuple[Exporters, Endpoint | None]:
        """Returns the exporters, and the endpoint to which steps are sent, if they are."""
        is_silent = settings.export_ranks == "rank0" and run.rank > 0

        def found() -> tuple[Exporters, Endpoint | None]:
            exporters = exporters_for(has_provider=has_provider, export_steps=export_steps, is_silent=is_silent)
            if has_provider or exporters.readers:
                self._check_run_id(run)
            return exporters, _endpoint(settings, exporters)

        return _spared(settings, found, lambda error: (Exporters(False, None, (), str(error)), None))

    def _opened_publisher(self, run: Run, names: Names, settings: EsperSettings, epochs: int | None) -> FramePublisher:
        return FramePublisher(
            run,
            names,
            Ring(settings.buffer_bytes),
            deriving=self._deriver,
            probing=self._sampler,
            context={} if epochs is None else {"esper.epochs.total": float(epochs)},
            warnings=self._warnings,
        )

    def _described(self, settings: EsperSettings, run: Run) -> DeviceReport:
        found = self._resource_of(run).attributes
        where = {
            name: value for name in ("host.id", "esper.local_rank") if isinstance(value := found.get(name), str | int)
        }
        return DeviceReport(self._device, where, self.probed if settings.hw_metrics else None, settings.probe_period_s)

    def _opened_recorder(self, settings: EsperSettings) -> Recorder:
        publisher = self._publisher
        return Recorder(
            publisher,
            clock=Clock(),
            to_state=leyline.state,
            gradient_math=_gradient_math,
            peak=Peak(settings.peak_tflops, settings.compute_dtype, lambda: publisher.run.device_id),
            mistakes=self._mistakes,
            began_unix_ns=_began_unix_ns(),
        )

    def _opened_events(self, settings: EsperSettings, endpoint: Endpoint | None) -> EventNotes | None:
        """Returns what notes events; None if they are not sent."""
        if endpoint is None:
            return None

        def opened() -> EventNotes | None:
            logs = _logs_endpoint(settings)
            if logs is None:
                return None
            sender = open_sender(logs, token_for(logs, endpoint, settings.token_file))
            return EventNotes(self._recorder, self._mistakes, logs, sender)

        return _spared(settings, opened, lambda _: None)

    def _check_run_id(self, run: Run) -> None:
        """Raises ConfigurationError if the run id is not known yet, for readers, which get it at the start."""
        if self._agreement is not None and self._agreement.lacks_run_id:
            raise ConfigurationError(
                f"{run.world_size} ranks without a common run id, which readers need from the start: give "
                "start(run_id=...) or set ESPER_RUN_ID on every rank, or call "
                "torch.distributed.init_process_group before start()"
            )

    def _opened_black_box(self, settings: EsperSettings, metrics: Names) -> BlackBox:
        publisher, resource_of, hardware = self._publisher, self._resource_of, self._hardware

        def about() -> Mapping[str, object]:
            device = () if hardware is None else hardware.points()
            return {**resource_of(publisher.run).attributes, **(device[0].attributes if device else {})}

        def events() -> Sequence[Event]:
            return () if self._events is None else self._events.log.newest()

        own = {entry.name: entry.unit for entry in metrics.entries.values() if entry.name not in _CATALOGUE}
        return BlackBox(publisher.ring, lambda: publisher.run, settings, about, events, own, self._warnings)

    def _attached(self, meter_provider: MeterProvider | None, entries: Iterable[Metric]) -> Instruments:
        """Returns the provider's instruments, attached to this session."""
        instruments = instruments_of(meter_provider or self._provider)  # type: ignore[arg-type] # one is not None
        try:
            instruments.attach(self, entries)
        except InvalidCatalogue:
            if self._exporter is not None:
                self._exporter.abandon()
            raise
        return instruments

    def _begin(self, flush_signals: str) -> list[str]:
        """Starts the parts that run in threads. Returns the signals that do not flush the session."""
        unfollowed = watch(self.telemetry, signal_names(flush_signals))
        self._publisher.tally.start()
        if self._events is not None and self._exporter is not None:
            self._events.begin()
        self._sampler.start()
        if self._hardware is not None:
            self._hardware.start()
        if self._exporter is not None:
            self._exporter.start()
        return unfollowed

    def _step_exporter(self, endpoint: Endpoint, settings: EsperSettings) -> StepExporter | None:
        """Returns the exporter; with ``on_mistake=warn`` without the spool, or None, if it cannot be opened."""
        without = EsperSettings(**{**vars(settings), "spool_dir": None})
        return _spared(
            settings,
            lambda: self._opened_exporter(endpoint, settings),
            lambda _: _spared(settings, lambda: self._opened_exporter(endpoint, without), lambda _: None),
        )

    def _opened_exporter(self, endpoint: Endpoint, settings: EsperSettings) -> StepExporter:
        publisher = self._publisher
        exporter = open_exporter(
            endpoint,
            settings,
            publisher.ring,
            publisher.names.entries,
            self._resource_of,
            phases=self._recorder.phases.log,
            run_of=lambda: publisher.run,
            settled_run=publisher.settled_run,
            prepare=self._prepare_export,
            health=self.counts,
            idle_ns=self._recorder.clock.idle_ns,
            fault=self._fault,
            warnings=self._warnings,
            events=None if self._events is None else self._event_wiring(self._events),
            device=self.device_points,
        )
        publisher.published = exporter.published()
        return exporter

    def _event_wiring(self, events: EventNotes) -> EventWiring:
        publisher = self._publisher
        rules = self.rules

        def resource() -> Resource | None:
            return self._resource_of(publisher.run) if publisher.ring.last else None

        return EventWiring(events.endpoint, events.sender, events.log, lambda log: EventReader(log, rules), resource)

    def _prepare_export(self) -> None:
        clock = self._recorder.clock
        clock.check()
        if clock.is_ahead:
            self._warnings.say("ahead", "steps are more than 5 minutes ahead of the wall clock: over 1,000 a second")
        if self.telemetry.has_become_left():  # not from this thread, for which closing waits
            threads().Thread(target=self.telemetry.close, name="esper-otel-close").start()

    def _certain(self, run: Run) -> Run:
        """Returns the run for a Resource, which cannot change: without the attempt if the ranks have not agreed yet."""
        return run if self._agreement is None else replace(run, attempt=UNKNOWN_ATTEMPT)

    def _settled(self, run: Run) -> Run:
        """Returns the run with its rank, and what its ranks agree on. Called at the first step: the last opportunity.

        Nothing that names the run has been sent before.
        """
        found = self._late_rank.of(run)
        if found is None:
            return self._with_agreed_attempt(run)
        run, self._agreement = found
        run = self._with_agreed_attempt(run)
        announce("rank", f"run {run.run_id}, rank {run.rank} of {run.world_size}, as torch.distributed says")
        return run

    def _with_agreed_attempt(self, run: Run) -> Run:
        """Returns the run with what its ranks agree on."""
        agreement = self._agreement
        if agreement is None:
            return run
        if agreement.lacks_torch:
            with suppress(ImportError):
                _gradient_math()  # imports torch, which contains the store's client
        if agreement.lacks_run_id:
            run_id = agreement.run_id_by_store(run.run_id)
            if run_id is None:
                self._warnings.say("run id", _NO_RUN_ID, run.world_size, run.run_id)
                return run
            run = replace(run, run_id=run_id)
            announce("agreed", f"run {run_id}, rank {run.rank} of {run.world_size}")
        attempt = agreement.by_store()
        attempt = agreement.without_store() if attempt is None else attempt
        if attempt is None:
            self._warnings.say("attempt", _NO_ATTEMPT, run.world_size, run.run_id)
            return run
        return replace(run, attempt=attempt)

    def _describe(self, endpoint: Endpoint | None, off: str, unfollowed: Sequence[str]) -> str:
        run = self._publisher.run
        is_open = self._agreement is not None and self._agreement.lacks_run_id
        name = "its ranks agree on the run id at the first step" if is_open else f"run {run.run_id}"
        parts = [name, f"rank {run.rank} of {run.world_size}"]
        parts.append(
            f"steps are not sent ({off})"
            if endpoint is None
            else f"writing every step to files in {endpoint.target}"
            if endpoint.protocol == "file"
            else f"sending every step to {endpoint.target} over {endpoint.protocol}"
        )
        parts += () if self._provider is None else self._provider.said
        if not self._enriched:
            parts.append("gated metrics and probes are off (tolaria_step_enrichment_enabled = False)")
        if unfollowed and self._exporter is not None:
            parts.append(
                f"no flush on {' or '.join(unfollowed)} (that requires a session started in the main thread and a "
                "signal that no other library handles)"
            )
        return ", ".join(parts)

    def _device(self) -> str | None:
        return self._publisher.run.device_id or None

    def _fault(self, where: str, error: Exception) -> None:
        self._recorder.fault(where, error)

    # -- read by instruments -----------------------------------------------------------------------------

    def probed(self) -> Mapping[str, float]:
        """See ``InstrumentedSession``."""
        return self._sampler.latest()

    def device_points(self) -> Sequence[DevicePoint]:
        """See ``InstrumentedSession``."""
        return () if self._hardware is None or os.getpid() != self._process_id else self._hardware.points()

    def newest_frame(self) -> Frame | None:
        """Returns the newest frame; None if it is more than 5 minutes old or in a forked child."""
        if os.getpid() != self._process_id:
            return None
        frame = self._publisher.ring.newest()
        if frame is None or self._recorder.clock.now_ns() - frame.time_unix_ns > _STALE_AFTER_NS:
            return None
        return frame

    def counts(self) -> Mapping[tuple[str, str], float]:
        """Returns the session metrics by (name, reason)."""
        if os.getpid() != self._process_id:
            return {}
        publisher, exporter = self._publisher, self._exporter
        publisher.tally.catch_up()
        counters = publisher.counters
        counts: dict[tuple[str, str], float] = {
            ("esper.steps", ""): publisher.ring.last,
            ("esper.steps.failed", ""): counters.failed,
            ("esper.values.nonfinite", ""): counters.nonfinite + publisher.tally.nonfinite,
            ("esper.values.out_of_range", ""): counters.out_of_range + publisher.tally.out_of_range,
            ("esper.clock.jumps", ""): self._recorder.clock.jumps,
            ("esper.errors.internal", ""): counters.faults,
            ("esper.phases.dropped", ""): self._recorder.phases.log.dropped,
            ("esper.frames.recorded", ""): publisher.ring.last,
            ("esper.buffer.bytes", ""): publisher.ring.size,
            ("esper.pull.lag", ""): publisher.ring.last - self.telemetry.pulled,
        }
        for name, total_ms in self._recorder.phases.log.totals().items():
            counts["esper.phase_ms", name] = total_ms
        if self._mistakes is not None:
            counts["esper.mistakes", ""] = self._mistakes.count
        counts.update(self._for_alerts)
        if exporter is not None:
            counts["esper.frames.exported", ""] = exporter.exported
            counts["esper.export.queue", ""] = exporter.waiting
            counts["esper.frames.recovered", ""] = exporter.recovered
            counts["esper.export.retries", ""] = exporter.retries
            counts["esper.points.rejected", ""] = exporter.rejected_points
            if exporter.outcome is not None:
                counts["esper.run.ended", exporter.outcome] = 1
            if exporter.latency_ms is not None:
                counts["esper.export.latency_ms", ""] = exporter.latency_ms
            for reason, dropped in exporter.dropped.copy().items():
                counts["esper.frames.dropped", reason] = dropped
            if exporter.events is not None:
                counts["esper.events.sent", ""] = exporter.events.sent
            for reason, dropped in self._dropped_events().items():
                counts["esper.events.dropped", reason] = dropped
            for reason, unix_s in exporter.errors_unix_s.copy().items():
                counts["esper.export.last_error", reason] = unix_s
        return counts

    # -- used by Telemetry -------------------------------------------------------------------------------

    def health(self) -> Mapping[str, int | float | str | None]:
        """See ``Telemetry.health``."""
        publisher, exporter = self._publisher, self._exporter
        publisher.tally.catch_up()
        return {
            "recorded": publisher.ring.last,
            "exported": 0 if exporter is None else exporter.exported,
            "dropped": 0 if exporter is None else exporter.dropped.total(),
            "queue": 0 if exporter is None else exporter.waiting,
            "kept": 0 if exporter is None else exporter.kept,
            "buffer_bytes": publisher.ring.size,
            "retries": 0 if exporter is None else exporter.retries,
            "latency_ms": None if exporter is None else exporter.latency_ms,
            "failed": publisher.counters.failed,
            "nonfinite": publisher.counters.nonfinite + publisher.tally.nonfinite,
            "out_of_range": publisher.counters.out_of_range + publisher.tally.out_of_range,
            "faults": publisher.counters.faults,
            "mistakes": 0 if self._mistakes is None else self._mistakes.count,
            "events": 0 if exporter is None or exporter.events is None else exporter.events.sent,
            "events_dropped": sum(self._dropped_events().values()),
            "last_error": None if exporter is None else exporter.last_error,
        }

    def absent(self) -> Mapping[str, str]:
        """See ``Telemetry.absent``."""
        return reasons(
            self._publisher.ring.newest(),
            left_out=self._publisher.names.left_out,
            probes=self._sampler.absent(),
            peak=self._recorder.peak.reason,
        )

    def derive_state(self) -> dict[str, Any]:
        """Returns the processors' states."""
        return self._deriver.state_dict()

    def load_derive_state(self, states: Mapping[str, Any]) -> None:
        """Restores the processors' states."""
        self._deriver.load_state_dict(states)

    def show(self) -> None:
        """See ``Telemetry.show``."""
        from esper_otel.session.show import Figure

        publisher = self._publisher
        publisher.drain()
        self._figures.append(Figure(publisher.ring, publisher.run.run_id, publisher.names.entries, self._fault))

    def interrupted(self) -> None:
        """See ``Telemetry.interrupted``."""
        if self._exporter is not None and os.getpid() == self._process_id:
            self._exporter.wake()

    def join(self, deadline_s: float, *, is_patient: bool) -> None:
        """See ``Wiring.join``."""
        if self._exporter is not None and os.getpid() == self._process_id:
            if not is_patient:
                self._exporter.hurry(deadline_s)
            self._exporter.join(deadline_s)

    def close(self, deadline_s: float, outcome: str, *, is_patient: bool) -> None:
        """See ``Wiring.close``; does nothing in a forked child."""
        if os.getpid() != self._process_id:
            return
        with ExitStack() as ending:  # runs the callbacks from last to first, even if one raises
            ending.callback(self._say_closed, outcome)
            ending.callback(forget, self.telemetry)
            ending.callback(self._ended, "the probes", self._stop_probes, deadline_s)
            ending.callback(self._instruments.detach, self)
            if self._provider is not None:
                least_s = _READERS_S if is_patient else 0.1
                ending.callback(self._ended, "the readers", self._stop_readers, deadline_s, least_s)
            if self._exporter is not None:
                patience_s = self._close_timeout_s if is_patient else 0.0
                close = partial(self._close_exporter, self._exporter, deadline_s, outcome, patience_s)
                ending.callback(self._ended, "the export", close)
            ending.callback(self._ended, "the black box", self._black_box.ended, outcome)
            for figure in self._figures:
                ending.callback(self._ended, "the notebook's figure", figure.end)

    @staticmethod
    def _close_exporter(exporter: StepExporter, deadline_s: float, outcome: str, patience_s: float) -> None:
        waited_s, latest_s = 0.0, time.monotonic() + patience_s
        try:
            if outcome not in Signals.__members__:
                waited_s = wait_for_page()
        finally:
            exporter.close(deadline_s + waited_s, outcome, latest_s + waited_s, exit_status())

    def _ended(self, what: str, end: Callable[..., object], *arguments: object) -> None:
        """Ends one part. Never raises: a fault of the telemetry must not make a training run fail at its end."""
        try:
            end(*arguments)
        except Exception as error:  # noqa: BLE001 - see above
            self._fault(f"ending {what}", error)

    def _say_closed(self, outcome: str) -> None:
        has_lost = self._exporter is not None and bool(
            self._exporter.dropped.total() or self._dropped_events().keys() - {NO_LOGS}
        )
        has_lost = has_lost or (self._mistakes is not None and self._mistakes.count > 0)
        announce("closed", self._summary(outcome), logging.WARNING if has_lost else logging.INFO)

    def _stop_readers(self, deadline_s: float, least_s: float) -> None:
        if self._provider is not None:
            self._provider.shutdown(timeout_millis=max(deadline_s - time.monotonic(), least_s) * 1e3)

    def _stop_probes(self, deadline_s: float) -> None:
        for each in (self._sampler, self._hardware):
            if each is not None:
                each.stop(max(deadline_s - time.monotonic(), 0.1))

    def _dropped_events(self) -> dict[str, int]:
        """Returns the number of dropped events by reason."""
        return {} if self._exporter is None or self._exporter.events is None else self._exporter.events.dropped

    def _summary(self, outcome: str) -> str:
        health = self.health()
        summary = f"run {self._publisher.run.run_id} {outcome}, frames recorded {health['recorded']}"
        if self._exporter is not None:
            summary += f", exported {health['exported']}, dropped {health['dropped']}"
            if self._exporter.dropped:
                reasons_why = ", ".join(f"{reason}: {count}" for reason, count in self._exporter.dropped.items())
                summary += f" ({reasons_why})"
            if self._exporter.kept:
                summary += f", kept for the next start {health['kept']}"
            if events := self._dropped_events():
                reasons_why = ", ".join(f"{reason}: {count}" for reason, count in events.items())
                summary += f", events dropped {sum(events.values())} ({reasons_why})"
        if health["mistakes"]:
            summary += f", mistakes left out {health['mistakes']}"
        return summary


def ended_well(outcome: str | None) -> bool:
    """Whether the last step of a run with this outcome counts as complete."""
    return outcome is None or outcome in FINE | {"SystemExit"}


def has_died() -> bool:
    """Whether an uncaught exception ended the program. For callbacks at interpreter exit."""
    return not ended_well(outcome_of_process())


def _identified_or_spared(settings: EsperSettings, identity: Mapping[str, Any]) -> tuple[Run, Agreement | None]:
    faults = _of_identity(identity)
    return _spared(settings, lambda: _identified(identity), lambda _: _identified_anyhow(identity), faults=faults)


def _resources(settings: EsperSettings, parallel: Mapping[str, int] | DeviceMesh | None) -> Callable[[Run], Resource]:
    places = _spared(settings, lambda: place_in_mesh(parallel), lambda _: {})
    changed = settings.changed()
    return _spared(
        settings,
        lambda: resources(changed, parallel=places),
        lambda _: resources(changed, {}, places),
    )


def _of_identity(identity: Mapping[str, Any]) -> tuple[type[EsperOtelError], ...]:
    """Returns what a wrong variable raises: an invalid name, too, if none is an argument."""
    is_of_variable = identity["run_id"] is None and identity["experiment"] is None
    return (ConfigurationError, InvalidName) if is_of_variable else (ConfigurationError,)


def _identified_anyhow(identity: Mapping[str, Any]) -> tuple[Run, Agreement | None]:
    """Returns an identity without variables that cannot be used: a run of its own, if need be with a single rank."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("ESPER_RUN_")}
    own = {**identity, "run_id": identity["run_id"] or new_run_id()}
    for each in (identity, own):
        with suppress(ConfigurationError):
            return _identified(each, environ)
    return _identified({**own, "rank": 0, "world_size": 1}, environ)


def _identified(identity: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> tuple[Run, Agreement | None]:
    """Returns this process's identity and, if the ranks cannot agree on all of it yet, how to agree later."""
    run = identify(**identity, environ=environ)
    if is_interactive():
        _close_earlier(run.rank)
    agreement = agreement_for(run, environ)
    if agreement is not None and agreement.lacks_run_id:
        return replace(run, run_id=new_run_id()), agreement
    attempt = None if agreement is None else agreement.by_store()
    return (run, agreement) if attempt is None else (replace(run, attempt=attempt), None)


def _close_earlier(rank: int) -> None:
    """In a notebook, ends the sessions that an earlier run of a cell has left open: nobody would close them."""
    for session in live_sessions():
        if isinstance(session, Telemetry) and session.is_of_this_thread() and session.run.rank == rank:
            run_id = session.run_id
            session.close(outcome="exit")
            announce("notebook", f"run {run_id} was still open and is closed now, because a new session starts")


def _began_unix_ns() -> int:
    """Returns when start-up began: with the process for its first session, else now, as at a prompt."""
    now_unix_ns = time.time_ns()
    if is_interactive() or next(_sessions):
        return now_unix_ns
    return process_start_unix_ns(now_unix_ns) or now_unix_ns


def _gradient_math() -> Any:
    return importlib.import_module("esper_otel.derive.gradients")


def _for_alerts(thresholds: Mapping[str, float], attributes: Mapping[str, object]) -> dict[tuple[str, str], float]:
    """Returns what the rules for Prometheus must know of a run: its own thresholds, and whether it is muted.

    A disabled signal has the threshold 1e308, because not every receiver takes infinity.
    """
    own = {("esper.risk.threshold", name): min(value, 1e308) for name, value in thresholds.items()}
    return own | ({("esper.alerts.muted", ""): 1.0} if attributes.get("esper.alerts") == "off" else {})


def _instruments_for(names: Names, *, has_twins: bool) -> list[Metric]:
    """Returns the metrics to register; a metric of the user's takes precedence over a twin of this name."""
    twins = [twin.metric for twin in TWINS if has_twins and twin.metric.name not in names.entries]
    return [*names.entries.values(), *twins]


def _declared(
    metrics: Sequence[Metric], processors: Sequence[Processor], probes: Sequence[Probe], *, enriched: bool
) -> tuple[Names, tuple[Processor, ...]]:
    """Returns the session's names and the processors that give at least one recorded metric."""
    catalogue = Names(enriched=enriched).entries
    given = [entry for processor in processors for entry in getattr(processor, "gives", ())]
    measured = [entry for probe in probes for entry in probe.gives]
    brought = {
        entry.name: entry for entry in (*given, *measured) if isinstance(entry, Metric) and entry.name not in catalogue
    }
    names = Names((*metrics, *(entry for entry in brought.values() if entry not in metrics)), enriched=enriched)
    taken = {entry if isinstance(entry, str) else entry.name for entry in given}
    chosen = (Dynamics(without=taken | names.left_out), *processors)
    checked_processors(chosen, names.entries)
    return names, tuple(
        processor
        for processor in chosen
        if not names.left_out.issuperset(entry if isinstance(entry, str) else entry.name for entry in processor.gives)
    )
