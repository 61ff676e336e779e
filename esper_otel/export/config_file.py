"""Reads a declarative configuration file, ``OTEL_CONFIG_FILE``, as the ``OTEL_*`` variables that it stands for.

OpenTelemetry's own package reads the file. Where it is set, it replaces the variables, as specified:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/#declarative-configuration
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opentelemetry.sdk.resources import Resource

from esper_otel.errors import ConfigurationError

VARIABLE = "OTEL_CONFIG_FILE"
_METRICS, _LOGS = "OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_LOGS_"
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
_QUOTED = re.compile(r"""'(?:<[a-z ]+>|.)'|(['"].*)""", re.DOTALL)
_PLUGIN = re.compile(r"(?:Failed to load plugin|Plugin) '([^']*)'")
# Errors of OpenTelemetry's package that have nothing of the file's content.
_WITHOUT_VALUES = (
    "Configuration file is empty",
    "Configuration must be a mapping",
    "Configuration path is not a file",
    "Unsupported file format",
    "Unsupported file_format",
)


def configured(environ: Mapping[str, str] = os.environ) -> Mapping[str, str]:
    """Returns the environment; if it names a configuration file, with the variables that are equivalent to that file.

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
    except Exception as error:  # noqa: BLE001 - as in _parsed
        reason = _reason(error)
    else:
        return resource
    raise _unusable(path, reason)


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
        with _silence():
            return load_config_file(path)
    except Exception as error:  # noqa: BLE001 - of the package, whose text may have a token of the file
        reason = _reason(error)
    raise _unusable(path, reason)  # here, so that the package's error is not its context


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the package from logging lines of the file, and values of its variables, which may be tokens."""
    logger = logging.getLogger("opentelemetry.configuration")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Returns why the file cannot be used, and where, without any of its values."""
    each: Any = error
    while each is not None:
        if getattr(each, "problem_mark", None) is not None:  # YAML
            mark = each.problem_mark
            return f"line {mark.line + 1}, column {mark.column + 1}: {_without_values(each.problem or 'not YAML')}"
        if hasattr(each, "absolute_path"):  # the schema
            path = " -> ".join(map(str, each.absolute_path)) or "the top"
            wanted = f" {each.validator_value}" if each.validator in {"type", "required"} else ""
            return f"at {path}, it does not match the schema: {each.validator}{wanted}"
        if hasattr(each, "lineno") and hasattr(each, "colno"):  # JSON
            return f"line {each.lineno}, column {each.colno}: {_without_values(each.msg)}"
        each = each.__cause__ or each.__context__
    named = _PLUGIN.match(str(error))
    if named is not None:
        return f"plugin {named[1]!r} is not installed, or fails"
    text = _without_values(str(error))
    if text.startswith(_WITHOUT_VALUES):
        return text
    return f"OpenTelemetry's package cannot use it: {type(error).__name__}"


def _without_values(text: str) -> str:
    """Returns a text up to the first part in quotes, other than single characters and kinds of tokens."""
    return _QUOTED.sub(lambda found: "" if found[1] else found[0], text).rstrip()


def _unusable(path: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{VARIABLE}={path!r}: {reason}")


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
    yield from _of_logs(config.logger_provider)


def _of_logs(provider: Any) -> Iterator[tuple[str, str]]:
    """Yields variables of the first OTLP exporter of logs, by which events are sent."""
    for processor in [] if provider is None else provider.processors:
        sending = processor.batch or processor.simple
        if sending is not None and (sending.exporter.otlp_http or sending.exporter.otlp_grpc) is not None:
            yield "OTEL_LOGS_EXPORTER", "otlp"
            yield from _of_protocol(sending.exporter, _LOGS)
            return


def _of_push(periodic: Any, names: list[str]) -> Iterator[tuple[str, str]]:
    exporter, is_first = periodic.exporter, "otlp" not in names
    if periodic.interval is not None:
        yield _INTERVAL, str(periodic.interval)
    if periodic.timeout is not None:
        yield "OTEL_METRIC_EXPORT_TIMEOUT", str(periodic.timeout)
    if is_first:
        yield from _of_protocol(exporter, _METRICS)
    if exporter.otlp_http is not None or exporter.otlp_grpc is not None:
        names.append("otlp")
    if exporter.console is not None:
        names.append("console")
    if exporter.otlp_file_development is not None:
        names.append("otlp_file/development")
    names.extend(exporter.additional_properties)


def _of_protocol(exporter: Any, prefix: str) -> Iterator[tuple[str, str]]:
    over_http, over_grpc = exporter.otlp_http, exporter.otlp_grpc
    if over_http is not None:
        encoding = getattr(over_http.encoding, "value", "protobuf")
        yield prefix + "PROTOCOL", f"http/{encoding}"
        yield from _of_otlp(over_http, prefix)
    elif over_grpc is not None:
        yield prefix + "PROTOCOL", "grpc"
        if over_grpc.tls is not None and over_grpc.tls.insecure is not None:
            yield prefix + "INSECURE", str(over_grpc.tls.insecure).lower()
        yield from _of_otlp(over_grpc, prefix)


def _of_otlp(exporter: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if exporter.endpoint is not None:
        yield prefix + "ENDPOINT", str(exporter.endpoint)
    headers = ",".join(_headers_of(exporter))
    if headers:
        yield prefix + "HEADERS", headers
    if exporter.compression is not None:
        yield prefix + "COMPRESSION", str(exporter.compression)
    if exporter.timeout is not None:
        yield prefix + "TIMEOUT", f"{exporter.timeout / 1e3:g}"
    files = {"CERTIFICATE": "ca_file", "CLIENT_KEY": "key_file", "CLIENT_CERTIFICATE": "cert_file"}
    for name, field in files.items():
        text = getattr(exporter.tls, field, None)
        if text is not None:
            yield prefix + name, str(text)


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
