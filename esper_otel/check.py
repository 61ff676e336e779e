"""Check: sends one frame to the endpoint and says, in plain words, what is wrong on the way, if anything is."""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from esper_otel.errors import ConfigurationError
from esper_otel.export.encode import Encoder
from esper_otel.export.endpoint import Endpoint, endpoint_from_environment
from esper_otel.export.exporter import HEALTH_EVERY_S
from esper_otel.export.provider import exporters_from_environment
from esper_otel.export.resource import resource_for
from esper_otel.export.transport import Outcome, Result, open_sender
from esper_otel.frame import Frame, Run
from esper_otel.schema import METRICS, SEED_METRICS
from esper_otel.settings import EsperSettings

_LOOKUP_S = 5.0

_FIXES = {
    Result.TEMPORARY: "steps are kept and sent again until the endpoint takes them; put the endpoint right",
    Result.UNAUTHENTICATED: "set OTEL_EXPORTER_OTLP_HEADERS, for instance authorization=Bearer%20<token>",
    Result.TOO_LARGE: "raise the endpoint's limit for a request to 4 MiB or more",
    Result.REFUSED: "the endpoint's log says what it does not take; steps that it refuses are lost, and counted",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing on the way: ``ok`` is None when it was not looked at."""

    name: str
    ok: bool | None
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found.

    Attributes:
        ok: whether the frame was taken.
        stages: what was looked at, in order, up to the first fault.
        protocol: ``grpc`` or ``http/protobuf``; None when the settings do not say.
        target: where the frame was sent, without credentials.
        latency_ms: time of the request that carried the frame.
        series: the most time series that a run of the given size makes, on each rank.
        samples_per_s: the most samples a second that it sends, on each rank.
    """

    ok: bool
    stages: tuple[Stage, ...]
    protocol: str | None
    target: str | None
    latency_ms: float | None
    series: int
    samples_per_s: float


def run_check(*, seeds: int = 0, steps_per_second: float = 1.0, environ: Mapping[str, str] = os.environ) -> CheckResult:
    """Sends one frame as a run would, stage by stage; takes at most the time-out and a few seconds more.

    Args:
        seeds: live seeds of the run whose size is estimated.
        steps_per_second: its pace.
        environ: where ``OTEL_*`` stand.
    """
    series, samples_per_s = estimate(seeds, steps_per_second)
    stages: list[Stage] = []
    try:
        exporters = exporters_from_environment(environ)
        protocol = {} if exporters.protocol is None else {"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": exporters.protocol}
        endpoint = endpoint_from_environment({**environ, **protocol})
    except ConfigurationError as error:
        stages.append(Stage("settings", False, str(error), "correct the variable"))
        return CheckResult(False, tuple(stages), None, None, None, series, samples_per_s)
    if not exporters.steps:
        stages.append(Stage("settings", False, f"steps are not sent: {exporters.off}", "unset it, or set otlp"))
        return CheckResult(False, tuple(stages), endpoint.protocol, endpoint.target, None, series, samples_per_s)
    stages.append(Stage("settings", True, _described(endpoint)))
    for stage in _on_the_way(endpoint):
        stages.append(stage)
        if stage.ok is False:
            return CheckResult(False, tuple(stages), endpoint.protocol, endpoint.target, None, series, samples_per_s)
    outcome, latency_ms = _send(endpoint)
    stages.append(_of_outcome(outcome, endpoint))
    is_ok = stages[-1].ok is True
    return CheckResult(
        is_ok, tuple(stages), endpoint.protocol, endpoint.target, latency_ms if is_ok else None, series, samples_per_s
    )


def estimate(seeds: int, steps_per_second: float) -> tuple[int, float]:
    """Time series, and samples a second, that one rank makes at most when every metric is recorded in every step."""
    enriched = EsperSettings().tolaria_step_enrichment_enabled
    step = sum(metric.level == "step" and (enriched or not metric.gated) for metric in METRICS)
    session = sum(metric.level == "session" for metric in METRICS)
    of_seeds = seeds * len(SEED_METRICS)
    return step + of_seeds + session, (step + of_seeds) * steps_per_second + session / HEALTH_EVERY_S


def report_text(result: CheckResult) -> str:
    """The findings, a line for each."""
    marks = {True: "ok  ", False: "FAIL", None: "--  "}
    lines = [f"{marks[stage.ok]}  {stage.name}: {stage.message}" for stage in result.stages]
    lines += [f"      fix: {stage.fix}" for stage in result.stages if stage.ok is False and stage.fix]
    if result.latency_ms is not None:
        lines.append(f"      the request took {result.latency_ms:.1f} ms")
    lines.append(f"      such a run makes up to {result.series:,} series, {result.samples_per_s:,.0f} samples a second")
    return "\n".join(lines)


def report_json(result: CheckResult) -> str:
    """The findings as one JSON object."""
    return json.dumps(asdict(result), allow_nan=False)


def _described(endpoint: Endpoint) -> str:
    security = "plain text" if endpoint.is_insecure else "TLS"
    headers = ", ".join(name for name, _ in endpoint.headers)
    return (
        f"{endpoint.protocol} to {endpoint.target}, {security}, compression {endpoint.compression}, "
        f"time-out {endpoint.timeout_s:g} s" + (f", headers {headers}" if headers else "")
    )


def _on_the_way(endpoint: Endpoint) -> Iterator[Stage]:
    """Name resolution, connection and TLS, each only when the one before is well."""
    url = urlsplit(endpoint.address if "://" in endpoint.address else f"//{endpoint.address}")
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    proxy = getproxies().get(url.scheme or "http")
    if endpoint.protocol == "http/protobuf" and proxy and not proxy_bypass(host):
        yield Stage("connection", None, f"goes through the proxy {urlsplit(proxy).hostname}, which is not looked at")
        return
    yield _within(_LOOKUP_S, lambda: _resolved(host, port), "name resolution", f"no answer about {host!r}")
    wait_s = min(endpoint.timeout_s, _LOOKUP_S)
    yield _connected(host, port, wait_s)
    if not endpoint.is_insecure and endpoint.credential_provider is None:
        yield _secured(endpoint, host, port, wait_s)


def _within(timeout_s: float, look: Callable[[], Stage], name: str, silence: str) -> Stage:
    """The stage, or its failure when it takes too long: the system's resolver has no time-out of ours."""
    found: list[Stage] = []
    thread = threading.Thread(target=lambda: found.append(look()), name="esper-otel-check", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else Stage(name, False, f"{silence} within {timeout_s:g} s", "is the network up?")


def _resolved(host: str, port: int) -> Stage:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        reason = error.strerror or str(error)
        return Stage("name resolution", False, f"{host!r}: {reason}", "correct the host in OTEL_EXPORTER_OTLP_ENDPOINT")
    return Stage("name resolution", True, f"{host} is {', '.join(sorted(addresses))}")


def _connected(host: str, port: int, timeout_s: float) -> Stage:
    try:
        with socket.create_connection((host, port), timeout_s):
            return Stage("connection", True, f"port {port} of {host} is open")
    except TimeoutError:
        message, fix = f"no answer from {host}:{port} within {timeout_s:g} s", "a firewall or a wrong address drops it"
    except ConnectionRefusedError:
        message = f"nothing listens on {host}:{port} (connection refused)"
        fix = "start the collector, or correct the port: 4317 for grpc, 4318 for http/protobuf"
    except OSError as error:
        message, fix = f"{host}:{port}: {error.strerror or error}", "is the host reachable from here?"
    return Stage("connection", False, message, fix)


def _secured(endpoint: Endpoint, host: str, port: int, timeout_s: float) -> Stage:
    try:
        context = ssl.create_default_context(cafile=None if endpoint.certificate is None else endpoint.certificate)
        if endpoint.client_certificate is not None:
            context.load_cert_chain(endpoint.client_certificate, endpoint.client_key)
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            return Stage("TLS", True, f"{secured.version()}, the certificate is trusted")
    except ssl.SSLCertVerificationError as error:
        message = f"the certificate of {host}:{port} is not trusted: {error.verify_message}"
        fix = "set OTEL_EXPORTER_OTLP_CERTIFICATE to the authority's PEM file, and use a host name the certificate has"
    except ssl.SSLError as error:
        message = f"{host}:{port} does not speak TLS, or not with us: {error.reason or error}"
        fix = "for plain text give http:// in OTEL_EXPORTER_OTLP_ENDPOINT; for mutual TLS set _CLIENT_CERTIFICATE, _KEY"
    except OSError as error:
        message = f"{host}:{port} ended the TLS handshake: {error.strerror or error}"
        fix = "for plain text give http:// in OTEL_EXPORTER_OTLP_ENDPOINT"
    return Stage("TLS", False, message, fix)


def _send(endpoint: Endpoint) -> tuple[Outcome, float]:
    now_ns = time.time_ns()
    run = Run(f"esper-otel-check-{secrets.token_hex(4)}", now_ns // 1_000_000, device_type="cpu")
    frame = Frame(run, 1, 1, 0, now_ns, {"loss": 0.0}, {})
    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for, _no_fault)
    [request] = encoder.requests([frame])
    try:
        sender = open_sender(endpoint)
    except (ConfigurationError, OSError, ValueError) as error:
        return Outcome(Result.REFUSED, str(error)), 0.0
    started_s = time.perf_counter()
    try:
        outcome = sender.send(request.body, endpoint.timeout_s)
    finally:
        latency_ms = (time.perf_counter() - started_s) * 1e3
        sender.close()
    return outcome, latency_ms


def _no_fault(where: str, error: Exception) -> None:
    """A frame without processors has no readings that could fail."""


def _of_outcome(outcome: Outcome, endpoint: Endpoint) -> Stage:
    if outcome.result is Result.DELIVERED and not outcome.rejected_points:
        return Stage("frame", True, f"{endpoint.target} took it")
    if outcome.result is Result.DELIVERED:
        reason = f"{endpoint.target} refused {outcome.rejected_points} points: {outcome.reason}"
        return Stage("frame", False, reason, "the endpoint's log says what it does not take")
    return Stage("frame", False, outcome.reason, _FIXES[outcome.result])
