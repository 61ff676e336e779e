"""Each ``OTEL_*`` variable in many spellings: what we read of it, beside what the installed SDK reads.

Where the two differ, ``is_meant`` has the reason. Anything else that differs fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as OfficialGrpc
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as OfficialHttp
from opentelemetry.sdk._configuration import _get_exporter_names
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from esper_otel.errors import ConfigurationError
from esper_otel.export.endpoint import endpoint_from_environment
from esper_otel.export.opening import shortest_period_s
from esper_otel.export.provider import exporters_from_environment
from esper_otel.export.resource import resource_for
from esper_otel.frames.frame import Run
from esper_otel.settings import EsperSettings

E = "OTEL_EXPORTER_OTLP_"
RAISES = "raises"


class Reading(NamedTuple):
    """A variable, and how both read it."""

    name: str
    texts: tuple[str, ...]
    ours: Callable[[], object]
    theirs: Callable[[], object]
    beside: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


def of_grpc(read: Callable[[Any], object]) -> Callable[[], object]:
    def reading() -> object:
        exporter: Any = OfficialGrpc()
        exporter.shutdown()
        return read(exporter)

    return reading


def of_http(read: Callable[[Any], object]) -> Callable[[], object]:
    def reading() -> object:
        exporter: Any = OfficialHttp()
        exporter.shutdown()
        return read(exporter)

    return reading


def reader() -> PeriodicExportingMetricReader:
    made = PeriodicExportingMetricReader(ConsoleMetricExporter())
    MeterProvider([made]).shutdown()
    return made


def headers_of(found: Any) -> dict[str, str]:
    return {name: text for name, text in dict(found).items() if name in {"a", "b", "c"}}


HTTP = {f"{E}PROTOCOL": "http/protobuf"}
NUMBERS = ("3", " 3 ", "2.5", "1e1", "+4", "0", "-1", "soon", "", " ", "10s", "nan", "inf", "0x10", "1_000")
ADDRESSES = (
    *("http://h:1", "https://h:1", "http://h:1/", "http://h:1/x", "http://h:1/x/", "HTTP://h:1", "https://h"),
    *("http://u:p@h:1", "http://[::1]:1", "http://h:1?a=b", "h:1", "h", " http://h:1 ", ""),
)
HEADERS = ("a=1", "a=1,b=2", " a = 1 , b = 2 ", "A=1", "a=1,a=2", "a=", "a=x%20y", "a=b=c", "a=1,,b=2", "", "a", "=1")

READINGS = [
    Reading(f"{E}TIMEOUT", NUMBERS, lambda: endpoint_from_environment().timeout_s, of_grpc(lambda each: each._timeout)),
    Reading(
        f"{E}TIMEOUT",
        NUMBERS,
        lambda: endpoint_from_environment().timeout_s,
        of_http(lambda each: each._client._timeout),
        HTTP,
    ),
    Reading(
        f"{E}COMPRESSION",
        ("gzip", "GZIP", " gzip ", "none", "", "deflate", "zstd", "snappy"),
        lambda: endpoint_from_environment().compression == "gzip",
        of_grpc(lambda each: each._compression.name == "Gzip"),
    ),
    Reading(
        f"{E}COMPRESSION",
        ("gzip", "GZIP", " gzip ", "none", "", "deflate", "Deflate", "zstd", "snappy"),
        lambda: endpoint_from_environment().compression,
        of_http(lambda each: each._compression.value),
        HTTP,
    ),
    Reading(
        f"{E}INSECURE",
        ("true", "True", "TRUE", "false", "False", "", "1", "0", "yes"),
        lambda: endpoint_from_environment().is_insecure,
        of_grpc(lambda each: bool(each._insecure)),
        {f"{E}ENDPOINT": "h:1"},
    ),
    Reading(
        f"{E}ENDPOINT", ADDRESSES, lambda: endpoint_from_environment().address, of_grpc(lambda each: each._endpoint)
    ),
    Reading(
        f"{E}ENDPOINT",
        ADDRESSES,
        lambda: endpoint_from_environment().address,
        of_http(lambda each: each._endpoint),
        HTTP,
    ),
    Reading(
        f"{E}METRICS_ENDPOINT",
        ADDRESSES,
        lambda: endpoint_from_environment().address,
        of_http(lambda each: each._endpoint),
        HTTP,
    ),
    Reading(
        f"{E}HEADERS",
        HEADERS,
        lambda: headers_of(endpoint_from_environment().headers),
        of_grpc(lambda each: headers_of(each._headers)),
    ),
    Reading(
        f"{E}HEADERS",
        HEADERS,
        lambda: headers_of(endpoint_from_environment().headers),
        of_http(lambda each: headers_of(each._client._headers)),
        HTTP,
    ),
    Reading(
        f"{E}PROTOCOL",
        ("grpc", "http/protobuf", " grpc ", "GRPC", "http/json", "thrift"),
        lambda: endpoint_from_environment().protocol,
        lambda: {"otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}[_get_exporter_names("metrics")[0]],
        {"OTEL_METRICS_EXPORTER": "otlp"},
    ),
    Reading(
        "OTEL_METRICS_EXPORTER",
        ("otlp", "none", "None", " none ", "console", "otlp,console", "otlp, console", "none,otlp", "", "OTLP"),
        lambda: exporters_from_environment().steps,
        lambda: any(name.startswith("otlp") for name in _get_exporter_names("metrics")),
    ),
    Reading(
        "OTEL_METRIC_EXPORT_INTERVAL",
        NUMBERS,
        lambda: shortest_period_s(EsperSettings()) * 1e3,
        lambda: reader()._export_interval_millis,
    ),
    Reading(
        "OTEL_SDK_DISABLED",
        ("true", "True", "TRUE", " true ", "false", "", "1", "yes"),
        lambda: exporters_from_environment().steps,
        lambda: MeterProvider(shutdown_on_exit=False).get_meter("a").__class__.__name__ != "NoOpMeter",
    ),
    Reading(
        "OTEL_RESOURCE_ATTRIBUTES",
        ("service.name=x", "service.name=x,a=b", " a = b ", "a=x%20y", "a", "a=b=c", "a=1,a=2", "", "=1", "a="),
        lambda: {name: dict(resource_for(Run("r", 1)).attributes).get(name) for name in ("a", "")},
        lambda: {name: dict(Resource.create().attributes).get(name) for name in ("a", "")},
    ),
    Reading(
        "OTEL_SERVICE_NAME",
        ("mine", " mine ", "ü"),
        lambda: resource_for(Run("r", 1)).attributes["service.name"],
        lambda: Resource.create().attributes["service.name"],
    ),
]
# What differs on purpose, by text: what we read, or "refused".
ADDRESSES_OTHERWISE = {
    "h:1": "refused",  # over HTTP: a URL without a scheme is none, and every request would fail
    "h": "refused",
    " http://h:1 ": "http://h:1",  # no address has spaces around it
    "HTTP://h:1": "http://h:1",  # a scheme in any case is the same
    "http://u:p@h:1": "h:1",  # of gRPC: a password in the address would be a part of the host's name
    "http://h:1?a=b": "http://h:1/v1/metrics?a=b",  # the path goes before the query
    "https://h": "h:443",  # of gRPC: its own default port, written out
}
HEADERS_OTHERWISE = dict.fromkeys(
    ("a", "=1"), "refused"
)  # a token without its name would be left out, and refused there


def is_meant(name: str, text: str, ours: object, theirs: object, default: object) -> bool:
    """Whether the two differ as they have to."""
    if name.endswith("HEADERS"):
        return HEADERS_OTHERWISE.get(text) == ours
    if name.endswith("ENDPOINT"):
        meant = ADDRESSES_OTHERWISE.get(text)
        is_default = not text.strip() and ours == default
        return is_default or str(ours) in {meant, f"{meant}/v1/metrics"} or (text, ours) in OF_GRPC
    if name.endswith("PROTOCOL") and (text, ours) in {("http/json", "http/json"), ("GRPC", "grpc")}:
        return True  # the SDK for Python has no JSON yet; words of the specification are not case-sensitive
    if name == "OTEL_METRICS_EXPORTER":
        return ours is True  # without ``opentelemetry-instrument`` the SDK sends nothing unless it is told to
    # What cannot be used, and what is empty, counts as not set, by the specification: no program ends by it.
    cannot_be_used = theirs == RAISES or not text.strip() or text in {"0", "-1", "nan", "inf"}
    return ours == default and (cannot_be_used or theirs == THEIR_DEFAULT.get(name))


OF_GRPC = {("h", "h:443"), (" http://h:1 ", "h:1")}
THEIR_DEFAULT = {"OTEL_METRIC_EXPORT_INTERVAL": 60_000}


def read(reading: Callable[[], object]) -> object:
    try:
        return reading()
    except ConfigurationError:
        return "refused"
    except Exception:
        return RAISES


@pytest.mark.parametrize("reading", READINGS, ids=lambda each: f"{each.name} {'http' if each.beside is HTTP else ''}")
def test_both_read_the_same(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in reading.beside.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv(reading.name, raising=False)
    default, found = read(reading.ours), {}
    for text in reading.texts:
        monkeypatch.setenv(reading.name, text)
        ours, theirs = read(reading.ours), read(reading.theirs)
        if ours != theirs and not is_meant(reading.name, text, ours, theirs, default):
            found[text] = (ours, theirs)
    assert found == {}
