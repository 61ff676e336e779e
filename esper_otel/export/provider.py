"""Provider: the session's own MeterProvider, with the readers that ``OTEL_METRICS_EXPORTER`` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import NamedTuple

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.resources import Resource

from esper_otel.errors import ConfigurationError

_GROUP = "opentelemetry_metrics_exporter"
# The SDK keeps each attribute set that it ever saw, and puts what is above its limit, 2,000 unless told otherwise,
# into one point without a name.
SEED_IDS = 100_000
_PROTOCOLS = {"otlp": None, "otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}


class Exporters(NamedTuple):
    """What ``OTEL_METRICS_EXPORTER`` asks for.

    Attributes:
        steps: whether every step goes out over OTLP.
        protocol: the OTLP protocol that the name itself fixes, if it does.
        readers: names of the exporters that are the SDK's business.
        off: why steps are not sent; empty when they are.
    """

    steps: bool
    protocol: str | None
    readers: tuple[str, ...]
    off: str


def sdk_is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``OTEL_SDK_DISABLED`` switches OpenTelemetry off as a whole."""
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def exporters_from_environment(environ: Mapping[str, str] = os.environ) -> Exporters:
    """Reads ``OTEL_SDK_DISABLED`` and ``OTEL_METRICS_EXPORTER``: otlp (the default), console, prometheus, none, lists.

    Any other name is looked up among the exporters that installed packages offer, as everywhere in OpenTelemetry.

    Raises:
        ConfigurationError: a name that no installed package offers, or none beside others.
    """
    if sdk_is_disabled(environ):
        return Exporters(False, None, (), "OTEL_SDK_DISABLED=true")
    setting = environ.get("OTEL_METRICS_EXPORTER", "").strip() or "otlp"
    names = [name for name in (part.strip() for part in setting.split(",")) if name]
    if "none" in names:
        if len(names) > 1:
            raise ConfigurationError(f"OTEL_METRICS_EXPORTER={setting!r}: 'none' cannot stand beside others")
        return Exporters(False, None, (), "OTEL_METRICS_EXPORTER=none")
    readers = tuple(dict.fromkeys(name for name in names if name not in _PROTOCOLS))
    offered = {point.name for point in entry_points(group=_GROUP)}
    for name in readers:
        if name not in offered:
            hint = ": pip install 'esper-otel[prometheus]'" if name == "prometheus" else ""
            raise ConfigurationError(
                f"OTEL_METRICS_EXPORTER={setting!r}: no installed package offers {name!r}{hint}; "
                f"there are: {', '.join(sorted(offered | {'otlp', 'none'}))}"
            )
    protocols = [_PROTOCOLS[name] for name in names if name in _PROTOCOLS]
    return Exporters(
        bool(protocols),
        protocols[0] if protocols else None,
        readers,
        "" if protocols else f"OTEL_METRICS_EXPORTER={setting}",
    )


def exporters_for(*, has_provider: bool, export_steps: bool | None, is_silent: bool = False) -> Exporters:
    """What the environment asks for, and what the caller of ``start`` does.

    Args:
        has_provider: whether the user has given a MeterProvider, whose readers are then the user's business.
        export_steps: whether every step goes out; None leaves it to the environment.
        is_silent: whether this rank sends nothing, whatever else is said.

    Raises:
        ConfigurationError: as ``exporters_from_environment``.
    """
    if is_silent:
        return Exporters(False, None, (), "export_ranks is rank0")
    if has_provider and not sdk_is_disabled():
        exporters = Exporters(False, None, (), "export_steps=True was not asked for")
    else:
        exporters = exporters_from_environment()
    if export_steps is None or sdk_is_disabled():  # no argument overrules the operator's switch
        return exporters
    return exporters._replace(steps=export_steps, off="" if export_steps else "export_steps=False")


def own_provider(resource: Resource, reader_names: tuple[str, ...]) -> MeterProvider:
    """A MeterProvider that is not the global one. Whoever made it shuts it down."""
    return MeterProvider(
        metric_readers=[_reader(name) for name in reader_names],
        resource=resource,
        shutdown_on_exit=False,
        views=[View(instrument_name="kasmina.seed.*", aggregation_cardinality_limit=SEED_IDS)],
    )


def _reader(name: str) -> MetricReader:
    [point, *_] = entry_points(group=_GROUP, name=name)
    try:
        made = point.load()()
    except Exception as error:
        raise ConfigurationError(f"OTEL_METRICS_EXPORTER: {name!r} cannot be started: {error}") from error
    if isinstance(made, MetricReader):
        return made
    if isinstance(made, MetricExporter):
        return PeriodicExportingMetricReader(made)
    raise ConfigurationError(f"OTEL_METRICS_EXPORTER: {name!r} is neither an exporter nor a reader of metrics")
