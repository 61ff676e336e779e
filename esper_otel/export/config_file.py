"""Reads a declarative configuration file, ``OTEL_CONFIG_FILE``, as the ``OTEL_*`` variables that it stands for.

OpenTelemetry's own package reads the file. Where it is set, it replaces the variables, as specified:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/#declarative-configuration
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opentelemetry.sdk.resources import Resource

from esper_otel.errors import ConfigurationError

VARIABLE = "OTEL_CONFIG_FILE"
_PREFIX = "OTEL_EXPORTER_OTLP_METRICS_"
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"


def configured(environ: Mapping[str, str] = os.environ) -> Mapping[str, str]:
    """Returns the environment; where it names a file, with the variables that the file stands for instead of its own.

    Variables ``OTEL_PYTHON_*`` have no counterpart in a file, and stay.

    Raises:
        ConfigurationError: the file cannot be read, or OpenTelemetry's package for it is not installed.
    """
    path = environ.get(VARIABLE, "").strip()
    if not path:
        return environ
    kept = {
        name: text
        for name, text in environ.items()
        if not name.startswith("OTEL_") or name.startswith("OTEL_PYTHON_") or name == VARIABLE
    }
    return kept | dict(_variables_of(_loaded(path)))


def configured_resource(environ: Mapping[str, str] = os.environ) -> Resource | None:
    """Returns the Resource that the file describes, with its detectors; None without a file.

    Raises:
        ConfigurationError: as ``configured``; or a detector that the file names is not installed.
    """
    path = environ.get(VARIABLE, "").strip()
    if not path:
        return None
    config = _loaded(path)
    try:
        from opentelemetry.configuration._resource import create_resource

        resource: Resource = create_resource(config.resource)
    except Exception as error:
        raise _unusable(path, error) from error
    return resource


def _loaded(path: str) -> Any:
    """Returns the ``OpenTelemetryConfiguration`` in the file, which may name variables of the environment."""
    try:
        state = Path(path).stat()
    except OSError as error:
        raise ConfigurationError(f"{VARIABLE}={path!r}: {error.strerror or error}") from None
    return _parsed(path, state.st_mtime_ns, state.st_size, tuple(sorted(os.environ.items())))


@lru_cache(maxsize=1)
def _parsed(path: str, _changed_ns: int, _size: int, _environ: tuple[tuple[str, str], ...]) -> Any:
    try:
        from opentelemetry.configuration import load_config_file
    except ImportError as error:
        missing = f"the package that reads it is not installed ({error}): pip install opentelemetry-configuration"
        raise ConfigurationError(f"{VARIABLE} is set, but {missing}") from None
    try:
        return load_config_file(path)
    except Exception as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(f"{VARIABLE}={path!r}: {str(error) or type(error).__name__}")


def _variables_of(config: Any) -> Iterator[tuple[str, str]]:
    if config.disabled:
        yield "OTEL_SDK_DISABLED", "true"
    names: list[str] = []
    for reader in [] if config.meter_provider is None else config.meter_provider.readers:
        if reader.periodic is not None:
            yield from _of_push(reader.periodic, names)
        if reader.pull is not None:
            yield from _of_pull(reader.pull.exporter, names)
    yield "OTEL_METRICS_EXPORTER", ",".join(dict.fromkeys(names)) or "none"


def _of_push(periodic: Any, names: list[str]) -> Iterator[tuple[str, str]]:
    exporter, is_first = periodic.exporter, "otlp" not in names
    if periodic.interval is not None:
        yield _INTERVAL, str(periodic.interval)
    if periodic.timeout is not None:
        yield "OTEL_METRIC_EXPORT_TIMEOUT", str(periodic.timeout)
    over_http, over_grpc = exporter.otlp_http, exporter.otlp_grpc
    if is_first and over_http is not None:
        encoding = getattr(over_http.encoding, "value", "protobuf")
        yield _PREFIX + "PROTOCOL", f"http/{encoding}"
        yield from _of_otlp(over_http)
    elif is_first and over_grpc is not None:
        yield _PREFIX + "PROTOCOL", "grpc"
        if over_grpc.tls is not None and over_grpc.tls.insecure is not None:
            yield _PREFIX + "INSECURE", str(over_grpc.tls.insecure).lower()
        yield from _of_otlp(over_grpc)
    if over_http is not None or over_grpc is not None:
        names.append("otlp")
    if exporter.console is not None:
        names.append("console")
    if exporter.otlp_file_development is not None:
        names.append("otlp_file/development")
    names.extend(exporter.additional_properties)


def _of_otlp(exporter: Any) -> Iterator[tuple[str, str]]:
    if exporter.endpoint is not None:
        yield _PREFIX + "ENDPOINT", str(exporter.endpoint)
    headers = ",".join(_headers_of(exporter))
    if headers:
        yield _PREFIX + "HEADERS", headers
    if exporter.compression is not None:
        yield _PREFIX + "COMPRESSION", str(exporter.compression)
    if exporter.timeout is not None:
        yield _PREFIX + "TIMEOUT", f"{exporter.timeout / 1e3:g}"
    files = {"CERTIFICATE": "ca_file", "CLIENT_KEY": "key_file", "CLIENT_CERTIFICATE": "cert_file"}
    for name, field in files.items():
        text = getattr(exporter.tls, field, None)
        if text is not None:
            yield _PREFIX + name, str(text)


def _headers_of(exporter: Any) -> Iterator[str]:
    """Yields entries as ``OTEL_EXPORTER_OTLP_HEADERS`` has them; later ones of the same name count."""
    if exporter.headers_list:
        yield exporter.headers_list
    for pair in exporter.headers or ():
        yield f"{pair.name}={quote(pair.value or '', safe='')}"


def _of_pull(exporter: Any, names: list[str]) -> Iterator[tuple[str, str]]:
    prometheus = exporter.prometheus_development
    if prometheus is None:
        names.extend(exporter.additional_properties)
        return
    names.append("prometheus")
    if prometheus.host is not None:
        yield "OTEL_EXPORTER_PROMETHEUS_HOST", prometheus.host
    if prometheus.port is not None:
        yield "OTEL_EXPORTER_PROMETHEUS_PORT", str(prometheus.port)
