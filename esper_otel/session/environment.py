"""Reads settings and endpoints from the environment. A wrong one raises, or is reported as a warning."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from esper_otel.errors import ConfigurationError, EsperOtelError
from esper_otel.export.endpoint import Endpoint, endpoint_from_environment
from esper_otel.export.file_sender import file_endpoint
from esper_otel.export.opening import shortest_period_s
from esper_otel.export.provider import EventsExporter, Exporters, check_readers, events_exporter, exporters_for
from esper_otel.export.transport import open_sender
from esper_otel.export.variables import warn as ignored
from esper_otel.leyline.risk import configured
from esper_otel.session.page_hint import show_the_way
from esper_otel.settings import EsperSettings, settings_of_environment, unknown_variables

_T = TypeVar("_T")


def check_environment() -> None:
    """Reads the settings for a session that will be started later, with the warnings and errors of ``start``.

    Opens the live page, too, if the environment asks for it.

    Raises:
        ConfigurationError: a setting or environment variable is invalid.
    """
    settings = settings_with_warnings()
    endpoint = spared(settings, lambda: _checked_endpoint(settings), lambda _: None)
    rank = 0 if os.environ.get("RANK", "0") == "0" else 1
    show_the_way(endpoint, rank, wants_page=settings.ui, waits=True)


def _checked_endpoint(settings: EsperSettings) -> Endpoint | None:
    configured(settings.risk_thresholds)
    exporters = exporters_for(has_provider=False, export_steps=None)
    endpoint = endpoint_for(settings, exporters)
    events = events_exporter()
    check_readers(exporters.readers)
    if endpoint is not None:
        shortest_period_s(settings)
        open_sender(endpoint, settings.token_file).close()
        logs_endpoint_for(settings, events)
    return endpoint


def endpoint_for(settings: EsperSettings, exporters: Exporters) -> Endpoint | None:
    """Returns where steps are sent, or the directory that they are written to; None if they are not."""
    if not exporters.steps:
        return None
    if settings.export_file is not None:
        return file_endpoint(settings.export_file)
    return endpoint_from_environment(protocol=exporters.protocol)


def logs_endpoint_for(settings: EsperSettings, exporter: EventsExporter) -> Endpoint | None:
    """Returns where events are sent, or the directory that they are written to; None if they are not."""
    if not exporter.is_on:
        return None
    if settings.export_file is not None:
        return file_endpoint(settings.export_file, "logs")
    return endpoint_from_environment(protocol=exporter.protocol, signal="logs")


def spared(
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


def settings_with_warnings() -> EsperSettings:
    """Returns the settings; warns of variables that look like settings and are not."""
    for message in unknown_variables():
        ignored(message)
    return settings_of_environment(ignored)
