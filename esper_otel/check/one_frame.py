"""Sends one frame to the endpoint and describes any fault on the way in plain words."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from esper_otel.check.in_folder import in_folder
from esper_otel.check.in_spool import in_spool
from esper_otel.check.one_event import at_logs
from esper_otel.check.stages import FIXES, CheckStage
from esper_otel.errors import ConfigurationError, EsperOtelError
from esper_otel.export.blocks import COUNTED
from esper_otel.export.encode import Encoder, Request
from esper_otel.export.endpoint import GRPC_NAMES, Endpoint, endpoint_from_environment
from esper_otel.export.exporter import HEALTH_EVERY_S
from esper_otel.export.file_sender import file_endpoint
from esper_otel.export.opening import shortest_period_s, token_for
from esper_otel.export.provider import check_readers, events_exporter, exporters_from_environment
from esper_otel.export.proxies import proxy_of
from esper_otel.export.resource import resource_for
from esper_otel.export.streams import Stream
from esper_otel.export.transport import Outcome, Result, Sender, open_sender
from esper_otel.frames.frame import Frame, Run
from esper_otel.frames.ring import blocks_of
from esper_otel.leyline.risk import configured
from esper_otel.schema import METRICS, SEED_CELLS, new_check_id
from esper_otel.session.identity import identify
from esper_otel.session.parallel import place_in_mesh
from esper_otel.settings import EsperSettings, unknown_variables

_ON_THE_WAY_S = 5.0  # time limit for all checks before the frame is sent
_LONG_TIMEOUT_S = 600.0
_AFTER_SIGNAL_S = 2.0

_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}  # reported by OpenSSL before 3.2, and since 3.2
_OF_CERTIFICATE = {  # OpenSSL's X509_V_ERR_*
    9: "it is not valid yet: is the clock of this machine right?",
    10: "it must be renewed there",
    62: "use a host name that the certificate has",
    64: "use a host name or address that the certificate has",
}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check.

    Attributes:
        ok: whether the frame was accepted, or can be written to files.
        stages: the checked stages, in order, up to the first fault.
        protocol: ``grpc``, ``http/protobuf``, ``http/json`` or ``file``; None when the settings do not say.
        target: where the frame was sent, without credentials, or the directory of the files.
        latency_ms: time of the request that carried the frame.
        series: the most time series that a run of the given size makes, per rank.
        samples_per_s: the most samples per second that it sends, per rank.
    """

    ok: bool
    stages: tuple[CheckStage, ...]
    protocol: str | None
    target: str | None
    latency_ms: float | None
    series: int
    samples_per_s: float


def run_check(*, seeds: int = 0, steps_per_second: float = 1.0, environ: Mapping[str, str] = os.environ) -> CheckResult:
    """Checks each stage and sends one frame as a run would; takes at most the time-out and a few seconds more.

    With ``ESPER_EXPORT_FILE``, checks that directory instead, since a run sends nothing. Sends events if a run does so.

    Args:
        seeds: number of live seeds, to estimate the size of a run.
        steps_per_second: number of steps per second, to estimate the size of a run.
        environ: the environment with the ``OTEL_*`` variables.
    """
    is_enriched = EsperSettings.tolaria_step_enrichment_enabled
    stages: list[CheckStage] = []
    found: _RunSettings | None = None
    latency_ms = None
    try:
        settings = EsperSettings()
        is_enriched = settings.tolaria_step_enrichment_enabled
        found = _read(settings, environ)
        sender = open_sender(found.endpoint, settings.token_file) if found.is_sent else None
    except (EsperOtelError, OSError) as error:
        stages.append(CheckStage("settings", False, str(error)))
    else:
        _, samples_per_s = _size(seeds, steps_per_second, is_enriched=is_enriched)
        latency_ms = _look(found, sender, stages, samples_per_s)
    is_ok = stages[-1].ok is True
    series, samples_per_s = _size(seeds, steps_per_second, is_enriched=is_enriched)
    return CheckResult(
        is_ok,
        tuple(stages),
        None if found is None else found.endpoint.protocol,
        None if found is None else found.endpoint.target,
        latency_ms if is_ok else None,
        series,
        samples_per_s,
    )


class _RunSettings(NamedTuple):
    """What a run would do with its steps and events.

    Attributes:
        own: the settings of this library.
        endpoint: where steps are sent, or the directory of files.
        off: why steps are neither sent nor written; empty if they are.
        logs: where events are sent; None if they are not.
    """

    own: EsperSettings
    endpoint: Endpoint
    off: str
    logs: Endpoint | None

    @property
    def is_sent(self) -> bool:
        """Whether steps are sent, and not written to files."""
        return not self.off and self.endpoint.protocol != "file"


def _read(settings: EsperSettings, environ: Mapping[str, str]) -> _RunSettings:
    """Reads all settings that ``start()`` reads.

    Raises:
        EsperOtelError: one cannot be used, or would be ignored.
    """
    for message in unknown_variables():
        _refuse(message)
    configured(settings.risk_thresholds)
    place_in_mesh(None, environ)
    identify(run_id=None, experiment=None, rank=None, world_size=None, environ=environ)
    exporters = exporters_from_environment(environ, ignored=_refuse)
    events = events_exporter(environ, ignored=_refuse)
    check_readers(exporters.readers, environ, ignored=_refuse)
    if exporters.steps:
        shortest_period_s(settings, environ, ignored=_refuse)
    if exporters.steps and settings.export_file is not None:
        return _RunSettings(settings, file_endpoint(settings.export_file), "", None)
    endpoint = endpoint_from_environment(environ, protocol=exporters.protocol, ignored=_refuse)
    logs = None
    if exporters.steps and events.is_on:
        logs = endpoint_from_environment(environ, protocol=events.protocol, ignored=_refuse, signal="logs")
    return _RunSettings(settings, endpoint, "" if exporters.steps else exporters.off, logs)


def _refuse(message: str) -> None:
    """Treats an ignored setting as a fault; a run would only warn about it."""
    raise ConfigurationError(message)


def _look(found: _RunSettings, sender: Sender | None, stages: list[CheckStage], samples_per_s: float) -> float | None:
    """Adds stages up to the first fault. Returns the duration of the request; None when none was sent."""
    latency_ms = None
    try:
        for stage in _stages(found, sender, samples_per_s):
            if isinstance(stage, float):
                latency_ms = stage
                continue
            stages.append(stage)
            if stage.ok is False:
                break
    finally:
        if sender is not None:
            sender.close()
    return latency_ms


def _stages(found: _RunSettings, sender: Sender | None, samples_per_s: float) -> Iterator[CheckStage | float]:
    """Yields the stages in order, and the duration of the request; the caller stops at the first fault."""
    endpoint, settings = found.endpoint, found.own
    if found.off:
        yield CheckStage("settings", False, f"steps are not sent: {found.off}", "unset it, or set otlp")
    if sender is not None:
        yield CheckStage("settings", True, _described(endpoint, settings.token_file))
    else:
        yield from in_folder(Path(endpoint.target), samples_per_s)
    if settings.spool_dir is not None:
        yield in_spool(settings.spool_dir, settings.spool_bytes)
    if sender is None:
        return
    yield from _on_the_way(endpoint)
    now_ns = time.time_ns()
    run = Run(new_check_id(), now_ns // 1_000_000, device_type="cpu")
    outcome, latency_ms = _send(endpoint, sender, run, now_ns)
    yield latency_ms
    yield of_outcome(outcome, endpoint)
    if found.logs is not None:
        yield at_logs(found.logs, token_for(found.logs, endpoint, settings.token_file), run)


def _size(seeds: int, steps_per_second: float, *, is_enriched: bool) -> tuple[int, float]:
    """Returns the time series and samples per second of one rank, if every metric is recorded in every step."""
    step = sum(metric.level == "step" and (is_enriched or not metric.gated) for metric in METRICS)
    session = sum(metric.level == "session" for metric in METRICS)
    of_seeds = seeds * len(SEED_CELLS)
    return step + of_seeds + session, (step + of_seeds) * steps_per_second + session / HEALTH_EVERY_S


def report_text(result: CheckResult) -> str:
    """Formats the findings as text, one per line."""
    marks = {True: "ok  ", False: "FAIL", None: "--  "}
    lines = [f"{marks[stage.ok]}  {stage.name}: {stage.message}" for stage in result.stages]
    lines += [f"      fix: {stage.fix}" for stage in result.stages if stage.ok is False and stage.fix]
    if result.latency_ms is not None:
        lines.append(f"      the request took {result.latency_ms:.1f} ms")
    lines.append(f"      such a run makes up to {result.series:,} series, {result.samples_per_s:,.0f} samples a second")
    return "\n".join(lines)


def report_json(result: CheckResult) -> str:
    """Formats the findings as one JSON object."""
    return json.dumps(asdict(result), allow_nan=False)


def _described(endpoint: Endpoint, token_file: Path | None) -> str:
    security = "plain text" if endpoint.is_insecure else "TLS"
    names = [name for name, _ in endpoint.headers]
    seconds = f"time-out {endpoint.timeout_s:g} s"
    if endpoint.timeout_s >= _LONG_TIMEOUT_S:
        seconds += " (OTEL_EXPORTER_OTLP_TIMEOUT is in seconds here, not milliseconds)"
    parts = [f"{endpoint.protocol} to {endpoint.target}", security, f"compression {endpoint.compression}", seconds]
    if token_file is not None:
        part = f"bearer token from {str(token_file)!r}"
        if "authorization" in names:
            names.remove("authorization")
            part += " in place of the authorization in OTEL_EXPORTER_OTLP_HEADERS"
        parts.append(part)
    if names:
        parts.append(f"headers {', '.join(names)}")
    return ", ".join(parts)


def _on_the_way(endpoint: Endpoint) -> Iterator[CheckStage]:
    """Checks name resolution, connection and TLS; the caller stops at the first fault."""
    proxy = proxy_of(endpoint)
    if proxy is not None and proxy.is_used:
        yield CheckStage("connection", None, f"goes through the proxy {proxy}, which is not looked at")
        return
    if proxy is not None:
        yield CheckStage("proxy", None, f"{proxy} is not http://host:port: gRPC passes it by")
    if endpoint.address.startswith(GRPC_NAMES):
        yield CheckStage("connection", None, f"gRPC finds {endpoint.target} itself")
        return
    url = urlsplit(endpoint.address if "://" in endpoint.address else f"//{endpoint.address}")
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    deadline_s = time.monotonic() + _ON_THE_WAY_S
    silence = f"no answer about the name {host!r}", "is the network up?"
    yield _within(deadline_s, lambda: _resolved(host, port), "name resolution", *silence)
    silence = f"no answer from {host}:{port}", "a firewall or a wrong address drops it"
    connect_by_s = min(deadline_s, time.monotonic() + endpoint.timeout_s)
    yield _within(connect_by_s, lambda: _connected(host, port), "connection", *silence)
    if not endpoint.is_insecure and endpoint.credential_provider is None:
        left_s = max(min(deadline_s - time.monotonic(), endpoint.timeout_s), 0.1)
        silence = f"{host}:{port} does not answer the TLS handshake", "for plain text give http://"
        yield _within(deadline_s, lambda: _secured(endpoint, host, port, left_s), "TLS", *silence)


def _authorities(endpoint: Endpoint) -> Path | None:
    """Returns the file or folder of the authorities that the sender trusts; None when it cannot be found.

    Neither gRPC nor ``requests`` uses the system's own store.
    """
    if endpoint.certificate is not None:
        return endpoint.certificate
    is_grpc = endpoint.protocol == "grpc"
    names = ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",) if is_grpc else ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    named = next(filter(None, map(os.environ.get, names)), None)
    if named is not None:
        return Path(named)
    module, file = ("grpc", "_cython/_credentials/roots.pem") if is_grpc else ("certifi", "cacert.pem")
    found = find_spec(module)
    shipped = Path(found.origin).parent / file if found is not None and found.origin else None
    return shipped if shipped is not None and shipped.is_file() else None


def _within(deadline_s: float, look: Callable[[], CheckStage], name: str, silence: str, fix: str) -> CheckStage:
    """Runs a check with a time limit, in a thread.

    A name lookup has no time-out of its own, and a connection attempt has one for each address.
    """
    found: list[CheckStage] = []
    timeout_s = max(deadline_s - time.monotonic(), 0.1)
    thread = threading.Thread(target=lambda: found.append(look()), name="esper-otel-check", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else CheckStage(name, False, f"{silence} within {timeout_s:.1f} s", fix)


def _resolved(host: str, port: int) -> CheckStage:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        reason = error.strerror or str(error)
        return CheckStage(
            "name resolution", False, f"{host!r}: {reason}", "correct the host in OTEL_EXPORTER_OTLP_ENDPOINT"
        )
    found = ", ".join(sorted(addresses))
    return CheckStage("name resolution", True, f"{host} needs none" if found == host else f"{host} is {found}")


def _connected(host: str, port: int) -> CheckStage:
    try:
        with socket.create_connection((host, port), _ON_THE_WAY_S):
            return CheckStage("connection", True, f"port {port} of {host} is open")
    except ConnectionRefusedError:
        message = f"nothing listens on {host}:{port} (connection refused)"
        fix = "start the collector, or correct the port: 4317 for grpc, 4318 for http/protobuf"
    except OSError as error:
        message, fix = f"{host}:{port}: {error.strerror or error}", "is the host reachable from here?"
    return CheckStage("connection", False, message, fix)


def _secured(endpoint: Endpoint, host: str, port: int, timeout_s: float) -> CheckStage:
    try:
        trusted = _authorities(endpoint)
        is_folder = trusted is not None and trusted.is_dir()
        context = ssl.create_default_context(
            cafile=None if is_folder else trusted, capath=trusted if is_folder else None
        )
        if endpoint.protocol == "grpc":
            context.set_alpn_protocols(["h2"])
        if endpoint.client_certificate is not None:
            context.load_cert_chain(endpoint.client_certificate, endpoint.client_key)
        with (
            socket.create_connection((host, port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            if endpoint.protocol != "grpc" or secured.selected_alpn_protocol() == "h2":
                return CheckStage("TLS", True, f"{secured.version()}, the certificate is trusted")
        message = f"{host}:{port} speaks TLS, but not HTTP/2, which gRPC needs"
        fix = "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use the port for gRPC, usually 4317"
    except ssl.SSLCertVerificationError as error:
        message = f"the certificate of {host}:{port} is not trusted: {error.verify_message}"
        fix = _OF_CERTIFICATE.get(error.verify_code, "set OTEL_EXPORTER_OTLP_CERTIFICATE to the authority's PEM file")
    except ssl.SSLError as error:
        is_plain = error.reason in _NO_TLS
        message = f"{host}:{port} does not speak TLS{'' if is_plain else f' with us: {error.reason or error}'}"
        fix = "for plain text give http:// in OTEL_EXPORTER_OTLP_ENDPOINT"
        if not is_plain:
            fix = "does it require a client certificate? set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and _CLIENT_KEY"
    except OSError as error:
        message = f"{host}:{port} ended the TLS handshake: {error.strerror or error}"
        fix = "for plain text give http:// in OTEL_EXPORTER_OTLP_ENDPOINT"
    return CheckStage("TLS", False, message, fix)


def _send(endpoint: Endpoint, sender: Sender, run: Run, now_ns: int) -> tuple[Outcome, float]:
    frame = Frame(run, 1, 1, 0, now_ns, ("loss",), (0.0,), {})
    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    [request] = encoder.requests(blocks_of([frame]))
    started_s, outcome = time.perf_counter(), None
    try:
        outcome = sender.send(request.body, endpoint.timeout_s)
        latency_ms = (time.perf_counter() - started_s) * 1e3
    finally:
        if outcome is None:  # a signal has come; the endpoint may have taken the frame
            _end(min(endpoint.timeout_s, _AFTER_SIGNAL_S), sender, encoder, request, frame)
        elif outcome.result is Result.DELIVERED:
            _end(endpoint.timeout_s, sender, encoder, request, frame)
    return outcome, latency_ms


def _end(timeout_s: float, sender: Sender, encoder: Encoder, request: Request, frame: Frame) -> None:
    """Ends the run and its series as a session does, so that it does not look alive after the check."""
    after_ns = frame.time_unix_ns + 1_000_000
    outcome = {("esper.run.ended", "completed"): 1.0}
    ended = encoder.health_scope(outcome, start_unix_ns=frame.time_unix_ns, time_unix_ns=after_ns)
    streams: list[Stream] = [(name, {}) for name in sorted({*request.names, *COUNTED})]
    for body in encoder.stale(frame.run, streams, time_unix_ns=after_ns, health=[ended]):
        sender.send(body, timeout_s)


def of_outcome(outcome: Outcome, endpoint: Endpoint) -> CheckStage:
    """Describes the outcome of a request as a stage."""
    if outcome.result is Result.DELIVERED and not outcome.rejected_points:
        remark = f", and remarks: {outcome.reason}" if outcome.reason else ""
        return CheckStage("frame", True, f"{endpoint.target} took it{remark}")
    if outcome.result is Result.DELIVERED:
        reason = f"{endpoint.target} refused {outcome.rejected_points} points: {outcome.reason}"
        return CheckStage("frame", False, reason, "the endpoint's log says what it does not accept")
    return CheckStage("frame", False, outcome.reason, FIXES[outcome.result])
