"""``start()``, which connects recording, deriving, probing, exporting and packets."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from signal import Signals
from typing import TYPE_CHECKING, Any

from opentelemetry.metrics import MeterProvider

from esper_otel import leyline
from esper_otel.derive.deriver import Deriver
from esper_otel.derive.processor import Processor
from esper_otel.errors import InvalidCatalogue
from esper_otel.events.frame_events import EventReader
from esper_otel.export.device_points import DevicePoint
from esper_otel.export.endpoint import Endpoint
from esper_otel.export.exporter import StepExporter
from esper_otel.export.instruments import Instruments, instruments_of
from esper_otel.export.opening import EventWiring, open_exporter, token_for
from esper_otel.export.provider import Exporters, OwnProvider, events_exporter, exporters_for
from esper_otel.export.resource import resources
from esper_otel.export.transport import open_sender
from esper_otel.frames.black_box import BlackBox
from esper_otel.frames.event_log import Event
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import Ring
from esper_otel.leyline.risk import configured
from esper_otel.log import Warnings, announce
from esper_otel.native import threads
from esper_otel.probes import host_and_device_probes
from esper_otel.probes.sampler import Sampler
from esper_otel.record.clock import Clock
from esper_otel.record.device import device_name
from esper_otel.record.frame_publisher import FramePublisher
from esper_otel.record.mistakes import Mistakes
from esper_otel.record.names import Names
from esper_otel.record.peak import Peak
from esper_otel.record.phases import process_start_unix_ns
from esper_otel.record.recorder import Recorder
from esper_otel.schema import METRICS, Metric
from esper_otel.session.absence import reasons
from esper_otel.session.counts import SessionCounts
from esper_otel.session.declared_metrics import declared, instrument_entries
from esper_otel.session.device_report import DeviceReport
from esper_otel.session.ending import exit_status, forget, is_interactive, watch
from esper_otel.session.environment import endpoint_for, logs_endpoint_for, settings_with_warnings, spared
from esper_otel.session.event_notes import EventNotes
from esper_otel.session.page_hint import LONGEST_WAIT_S, show_the_way, wait_for_page
from esper_otel.session.parallel import place_in_mesh
from esper_otel.session.session_run import SessionRun
from esper_otel.session.spared_telemetry import telemetry_of
from esper_otel.session.telemetry import Telemetry
from esper_otel.settings import EsperSettings, signal_names

if TYPE_CHECKING:
    import torch
    from opentelemetry.sdk.resources import Resource
    from torch.distributed.device_mesh import DeviceMesh

    from esper_otel.session.show import Figure

_READERS_S = 1.0  # for the SDK's readers, however long closing has taken before
_CATALOGUE = frozenset(metric.name for metric in METRICS)
_STALE_AFTER_NS = 300 * 1_000_000_000


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
        settings=settings_with_warnings() if settings is None else settings,
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
        self.rules = spared(settings, lambda: configured(settings.risk_thresholds), lambda _: configured({}))
        self._close_timeout_s = settings.close_timeout_s
        self._enriched = settings.tolaria_step_enrichment_enabled
        self._warnings = Warnings()
        self._mistakes = Mistakes() if settings.on_mistake == "warn" else None
        has_provider = meter_provider is not None
        self._run = SessionRun(settings, identity, self._warnings, has_readers=has_provider)
        run = self._run.first
        probes = host_and_device_probes(self._device) if self._enriched else []
        names, processors = declared(metrics, processors, probes, enriched=self._enriched)
        exporters, endpoint = self._ways_out(settings, run, has_provider=has_provider, export_steps=export_steps)
        self._resource_of = _resources(settings, parallel)
        self._deriver = Deriver(processors, self._fault)
        self._sampler = Sampler(probes, period_s=settings.probe_period_s)
        self._hardware = self._described(settings, run) if self._enriched else None
        self._publisher = self._opened_publisher(run, names, settings, epochs)
        self._publisher.settle_run = self._run.settled
        self._black_box = self._opened_black_box(settings, names)
        self._publisher.alarmed = self._black_box.loss_is_not_finite
        self._recorder = self._opened_recorder(settings)
        self._lacks_events = False
        self._events = self._opened_events(settings, endpoint)
        attributes = self._resource_of(run).attributes
        self._counts = SessionCounts(
            self._recorder, self._publisher, self._mistakes, settings, attributes, lambda: self.telemetry.pulled
        )
        if device is not None:
            self._publisher.set_device(device_name(device), named=True)
        # A provider given by the user has its own Resource, so the points themselves must carry the run's attributes.
        self.attributes: Mapping[str, str | int] = (
            {} if meter_provider is None else {"esper.run.id": run.run_id, "esper.rank": run.rank}
        )
        self._exporter = None if endpoint is None else self._step_exporter(endpoint, settings)
        self._counts.exporter = self._exporter
        # Opened after everything that may raise, so that a failed start leaves no port open.
        certain = self._resource_of(self._run.certain(run))
        self._provider = OwnProvider(certain, exporters.readers) if meter_provider is None else None
        self._instruments = self._attached(meter_provider, instrument_entries(names, has_twins=settings.hw_metrics))
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
                self._run.note_readers()
            return exporters, endpoint_for(settings, exporters)

        return spared(settings, found, lambda error: (Exporters(False, None, (), str(error)), None))

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

        def opened() -> EventNotes | None:
            exporter = events_exporter()  # also where nothing is sent, since it reports names that nobody has
            self._lacks_events = exporter.is_on and endpoint is None
            logs = None if endpoint is None else logs_endpoint_for(settings, exporter)
            if logs is None or endpoint is None:
                return None
            sender = open_sender(logs, token_for(logs, endpoint, settings.token_file))
            return EventNotes(self._recorder, self._mistakes, logs, sender)

        return spared(settings, opened, lambda _: None)

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
        return spared(
            settings,
            lambda: self._opened_exporter(endpoint, settings),
            lambda _: spared(settings, lambda: self._opened_exporter(endpoint, without), lambda _: None),
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
            is_certain=self._run.is_certain,
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

    def _describe(self, endpoint: Endpoint | None, off: str, unfollowed: Sequence[str]) -> str:
        run = self._publisher.run
        name = "its ranks agree on the run id at the first step" if self._run.lacks_run_id else f"run {run.run_id}"
        parts = [name, f"rank {run.rank} of {run.world_size}"]
        parts.append(
            f"steps are not sent ({off})" + ", so events are not either" * self._lacks_events
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
        return {} if os.getpid() != self._process_id else self._counts.by_name()

    # -- used by Telemetry -------------------------------------------------------------------------------

    def health(self) -> Mapping[str, int | float | str | None]:
        """See ``Telemetry.health``."""
        return self._counts.health()

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
        level = logging.WARNING if self._counts.has_lost() else logging.INFO
        announce("closed", self._counts.summary(outcome), level)

    def _stop_readers(self, deadline_s: float, least_s: float) -> None:
        if self._provider is not None:
            self._provider.shutdown(timeout_millis=max(deadline_s - time.monotonic(), least_s) * 1e3)

    def _stop_probes(self, deadline_s: float) -> None:
        for each in (self._sampler, self._hardware):
            if each is not None:
                each.stop(max(deadline_s - time.monotonic(), 0.1))


def _resources(settings: EsperSettings, parallel: Mapping[str, int] | DeviceMesh | None) -> Callable[[Run], Resource]:
    places = spared(settings, lambda: place_in_mesh(parallel), lambda _: {})
    changed = settings.changed()
    return spared(
        settings,
        lambda: resources(changed, parallel=places),
        lambda _: resources(changed, {}, places),
    )


def _began_unix_ns() -> int:
    """Returns when start-up began: with the process for its first session, else now, as at a prompt."""
    now_unix_ns = time.time_ns()
    if is_interactive() or next(_sessions):
        return now_unix_ns
    return process_start_unix_ns(now_unix_ns) or now_unix_ns


def _gradient_math() -> Any:
    return importlib.import_module("esper_otel.derive.gradients")
