"""The session's own MeterProvider, with the readers that ``OTEL_METRICS_EXPORTER`` names."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import NamedTuple

from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource

from esper_otel.export.cardinality import SEED_IDS
from esper_otel.export.config_file import VARIABLE as CONFIG_FILE
from esper_otel.export.variables import Variables, warn

_EXPORTERS = "OTEL_METRICS_EXPORTER"
_LOGS_EXPORTER = "OTEL_LOGS_EXPORTER"
PROMETHEUS_PORT = "OTEL_EXPORTER_PROMETHEUS_PORT"
_GROUP = "opentelemetry_metrics_exporter"
_LOGS_GROUP = "opentelemetry_logs_exporter"
# Name patterns of the instruments of seed metrics.
_OF_SEEDS = ("kasmina.seed.*", "esper.seed.*")
_PROTOCOLS = {"otlp": None, "otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}


class Exporters(NamedTuple):
    """The exporters that ``OTEL_METRICS_EXPORTER`` names.

    Attributes:
        steps: whether every step is sent over OTLP.
        protocol: the OTLP protocol, if the exporter's name determines it.
        readers: names of the exporters that the SDK runs.
        off: why steps are not sent; empty when they are sent.
    """

    steps: bool
    protocol: str | None
    readers: tuple[str, ...]
    off: str


_DISABLED = Exporters(False, None, (), "OTEL_SDK_DISABLED=true")


def exporters_from_environment(
    environ: Mapping[str, str] = os.environ, *, ignored: Callable[[str], None] = warn
) -> Exporters:
    """Reads ``OTEL_SDK_DISABLED`` and ``OTEL_METRICS_EXPORTER``: otlp (the default), console, prometheus, none, lists.

    Any other name is looked up among the exporters that installed packages offer, as everywhere in OpenTelemetry.

    Args:
        environ: the environment.
        ignored: called with a message for each value that cannot be used.
    """
    variables = Variables(environ, ignored)
    return _DISABLED if _is_disabled(variables) else _named(variables)


def _is_disabled(variables: Variables) -> bool:
    return variables.boolean("OTEL_SDK_DISABLED", default=False)


def _named(variables: Variables) -> Exporters:
    _, setting = variables.text(_EXPORTERS)
    names = _known(variables, setting) or ["otlp"]
    if names == ["none"]:
        return Exporters(False, None, (), _why_off(variables, "none"))
    protocols = [_PROTOCOLS[name] for name in names if name in _PROTOCOLS]
    return Exporters(
        bool(protocols),
        protocols[0] if protocols else None,
        tuple(dict.fromkeys(name for name in names if name not in _PROTOCOLS)),
        "" if protocols else _why_off(variables, setting),
    )


def _why_off(variables: Variables, setting: str) -> str:
    _, file = variables.text(CONFIG_FILE)
    return f"{CONFIG_FILE}={file!r} has no OTLP exporter of metrics" if file else f"{_EXPORTERS}={setting}"


def _known(variables: Variables, setting: str) -> list[str]:
    """Returns the known exporter names in the setting."""
    given = [name for name in (part.strip() for part in setting.split(",")) if name]
    offered = {point.name for point in entry_points(group=_GROUP)} | {*_PROTOCOLS, "none", "prometheus"}
    known = []
    for name in given:
        word = name if name in offered else name.lower()
        if word not in offered:
            fault = f"no installed package offers {name!r}, there are: {', '.join(sorted(offered))}"
            variables.ignored(f"{_EXPORTERS}={setting!r}: {fault}; it is left out, the default is otlp")
        elif word == "none" and len(given) > 1:
            variables.ignored(
                f"{_EXPORTERS}={setting!r}: 'none' cannot be combined with other exporters; it is left out"
            )
        else:
            known.append(word)
    return known


def exporters_for(*, has_provider: bool, export_steps: bool | None, is_silent: bool = False) -> Exporters:
    """Combines the environment with the arguments of ``start``.

    Args:
        has_provider: whether the user passed a MeterProvider; the user then chooses its readers.
        export_steps: whether every step is sent; None leaves it to the environment.
        is_silent: whether this rank sends nothing, regardless of the other settings.
    """
    if is_silent:
        return Exporters(False, None, (), "export_ranks is rank0")
    variables = Variables(os.environ)
    if _is_disabled(variables):  # no argument overrules the operator's switch
        return _DISABLED
    exporters = Exporters(False, None, (), "export_steps=True was not asked for") if has_provider else _named(variables)
    if export_steps is None:
        return exporters
    return exporters._replace(steps=export_steps, off="" if export_steps else "export_steps=False")


class EventsExporter(NamedTuple):
    """Whether events are sent as OTLP logs, and by which protocol, if the exporter's name determines it."""

    is_on: bool
    protocol: str | None


def events_exporter(
    environ: Mapping[str, str] = os.environ, *, ignored: Callable[[str], None] = warn
) -> EventsExporter:
    """Reads ``OTEL_LOGS_EXPORTER``: events are sent if it names ``otlp``. Its other exporters are not for events.

    With ``OTEL_SDK_DISABLED``, none are, and it is not looked at.

    Args:
        environ: the environment.
        ignored: called with a message for each name that no exporter of logs has.
    """
    variables = Variables(environ, lambda _: None)  # the exporters of metrics have reported the switch
    if _is_disabled(variables):
        return EventsExporter(False, None)
    _, setting = variables.text(_LOGS_EXPORTER)
    words = [word for word in (part.strip().lower() for part in setting.split(",")) if word]
    unknown = [word for word in words if word not in {*_PROTOCOLS, "none", "console"}]
    if unknown:  # or else looking for what is installed would take time in every program
        offered = {point.name.lower() for point in entry_points(group=_LOGS_GROUP)}
        for word in unknown:
            if word not in offered:
                ignored(f"{_LOGS_EXPORTER}={setting!r}: no exporter is called {word!r}; for events of runs it is otlp")
    protocols = [_PROTOCOLS[word] for word in words if word in _PROTOCOLS]
    return EventsExporter(bool(protocols), protocols[0] if protocols else None)


def check_readers(
    names: Iterable[str], environ: Mapping[str, str] = os.environ, *, ignored: Callable[[str], None] = warn
) -> None:
    """Reads the numbers that making these readers reads, without making them.

    Args:
        names: of the readers.
        environ: the environment.
        ignored: called with a message for each number that cannot be used.
    """
    variables = Variables(environ, ignored)
    for is_scraped in {name == "prometheus" for name in names}:
        if is_scraped:
            prometheus_port(variables)
        else:
            _periods_ms(variables)


def prometheus_port(variables: Variables) -> int:
    """Returns the port to be scraped at."""
    return int(variables.number(PROMETHEUS_PORT, default=9464, lowest=0, highest=65535, unit="a port", of=int))


class OwnProvider(MeterProvider):
    """A MeterProvider that is not the global one. Its creator must shut it down.

    Attributes:
        said: messages of its readers, for example the address to scrape.
    """

    def __init__(self, resource: Resource, reader_names: tuple[str, ...]) -> None:
        readers = [reader for reader in map(_reader, reader_names) if reader is not None]
        super().__init__(
            metric_readers=readers,
            resource=resource,
            exemplar_filter=AlwaysOffExemplarFilter(),  # observable instruments have no exemplars
            shutdown_on_exit=False,
            views=[_room_for_seeds(name) for name in _OF_SEEDS],
        )
        self.said: tuple[str, ...] = tuple(reader.said for reader in readers if hasattr(reader, "said"))


def _room_for_seeds(names: str) -> View:
    try:
        return View(instrument_name=names, aggregation_cardinality_limit=SEED_IDS + 1)
    except TypeError:  # the SDK before 1.45.2 has no limits
        return View(instrument_name=names)


def _reader(name: str) -> MetricReader | None:
    """Creates the reader of this name. If that fails, warns and returns None; training continues without it."""
    try:
        if name == "prometheus":
            return _scraped()
        [point, *_] = entry_points(group=_GROUP, name=name)
        made = point.load()()
        if isinstance(made, MetricReader):
            return made
        if isinstance(made, MetricExporter):
            return _periodic(made)
        fault = "it is neither an exporter nor a reader of metrics"
    except Exception as error:  # noqa: BLE001 - other packages may raise anything
        fault = str(error) or type(error).__name__
    warn(f"{_EXPORTERS}: {name!r} cannot be started and is left out: {fault}")
    return None


def _scraped() -> MetricReader:
    try:
        from esper_otel.export.scrape import ScrapeReader
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'esper-otel[prometheus]'") from None
    return ScrapeReader(Variables(os.environ))


def _periodic(exporter: MetricExporter) -> MetricReader:
    interval_ms, timeout_ms = _periods_ms(Variables(os.environ))
    return PeriodicExportingMetricReader(exporter, interval_ms, timeout_ms)


def _periods_ms(variables: Variables) -> tuple[float, float]:
    """Returns the interval and the time-out of a periodic reader."""

    def milliseconds(name: str, default: float) -> float:
        unit = "a number of milliseconds above 0"
        return variables.number(name, default=default, lowest=math.ulp(0.0), highest=2**31 - 1, unit=unit)

    interval_ms = milliseconds("OTEL_METRIC_EXPORT_INTERVAL", 60_000)
    return interval_ms, milliseconds("OTEL_METRIC_EXPORT_TIMEOUT", 30_000)
