"""MemoryCollector against the official exporters and against senders that misbehave."""

from __future__ import annotations

import datetime
import gzip
import http.client
import ipaddress
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from frame_examples import RUN, TIME_UNIX_NS, make_frame, seed_table
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # has .pyi, no py.typed
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # as above
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression as HttpCompression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from patience import patience

from esper_otel.errors import ConfigurationError, WrongState
from esper_otel.export.encode import Encoder
from esper_otel.export.resource import resource_for
from esper_otel.frames.ring import blocks_of
from esper_otel.schema import METRICS
from esper_otel.testing import MemoryCollector, Point

CATALOGUE = {metric.name: metric for metric in METRICS}
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
EMPTY = ExportMetricsServiceRequest().SerializeToString()
IGNORED = b"\x78\x00"  # a field that no version of OTLP has, which every receiver skips


def measured(value: float = 1.5) -> sdk.MetricsData:
    """One gauge point and one sum point, as the SDK would collect them."""
    gauge = sdk.Gauge([sdk.NumberDataPoint({"seed_id": "a", "of": ("x", "y")}, 0, TIME_UNIX_NS, value)])
    total = sdk.Sum([sdk.NumberDataPoint({}, 1, TIME_UNIX_NS, 7)], sdk.AggregationTemporality.CUMULATIVE, True)
    metrics = [sdk.Metric("loss", "", "loss", gauge), sdk.Metric("steps", "", "count", total)]
    scope = sdk.ScopeMetrics(InstrumentationScope("tests"), metrics, "")
    return sdk.MetricsData([sdk.ResourceMetrics(Resource({"esper.rank": 3}), [scope], "")])


POINTS = [
    Point("loss", "loss", 1.5, TIME_UNIX_NS, {"seed_id": "a", "of": ["x", "y"]}, {"esper.rank": 3}, "tests", 0),
    Point("steps", "count", 7, TIME_UNIX_NS, {}, {"esper.rank": 3}, "tests", 0),
]


def call(collector: MemoryCollector, body: bytes = EMPTY, timeout_s: float = 5.0) -> ExportMetricsServiceResponse:
    """One plain gRPC request."""
    with grpc.insecure_channel(collector.grpc_endpoint.removeprefix("http://")) as channel:
        export = channel.unary_unary(EXPORT, bytes, ExportMetricsServiceResponse.FromString)
        response: ExportMetricsServiceResponse = export(body, timeout=timeout_s)
        return response


def connection_to(collector: MemoryCollector, timeout_s: float = 5.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(collector.http_endpoint).netloc, timeout=timeout_s)


def post(
    collector: MemoryCollector,
    body: bytes = EMPTY,
    path: str = "/v1/metrics",
    timeout_s: float = 5.0,
    **headers: str,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """One plain HTTP request; ``Content_Encoding=`` becomes the header ``Content-Encoding``."""
    connection = connection_to(collector, timeout_s)
    try:
        names = {"Content-Type": "application/x-protobuf"}
        names |= {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request("POST", path, body, names)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_the_official_grpc_exporter_is_received(compression: grpc.Compression) -> None:
    """What a demo or test says has arrived must have come the way of real telemetry."""
    with MemoryCollector() as collector:
        exporter = GrpcExporter(endpoint=collector.grpc_endpoint, insecure=True, compression=compression)
        assert exporter.export(measured()) is sdk.MetricExportResult.SUCCESS
        exporter.shutdown()
        assert collector.points() == POINTS


@pytest.mark.parametrize("compression", [HttpCompression.NoCompression, HttpCompression.Gzip])
def test_the_official_http_exporter_is_received(compression: HttpCompression) -> None:
    """As over gRPC."""
    with MemoryCollector() as collector:
        exporter = HttpExporter(endpoint=f"{collector.http_endpoint}/v1/metrics", compression=compression)
        assert exporter.export(measured()) is sdk.MetricExportResult.SUCCESS
        assert exporter.export(measured()) is sdk.MetricExportResult.SUCCESS
        exporter.shutdown()
        assert collector.points() == POINTS * 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


def test_both_ports_speak_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates are where exports fail in practice; a client without TLS must not stop the server."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # with requests, these win over certificate_file
        monkeypatch.delenv(name, raising=False)
    certificate_file, key_file = certificate
    with MemoryCollector(certificate_file=certificate_file, key_file=key_file) as collector:
        assert collector.grpc_endpoint.startswith("https://")
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            post(collector)
        credentials = grpc.ssl_channel_credentials(certificate_file.read_bytes())
        over_grpc = GrpcExporter(endpoint=collector.grpc_endpoint, credentials=credentials)
        over_http = HttpExporter(
            endpoint=f"{collector.http_endpoint}/v1/metrics", certificate_file=str(certificate_file)
        )
        assert over_grpc.export(measured()) is sdk.MetricExportResult.SUCCESS
        assert over_http.export(measured()) is sdk.MetricExportResult.SUCCESS
        over_grpc.shutdown()
        over_http.shutdown()
        assert collector.points() == POINTS * 2


def test_a_certificate_without_its_key_is_a_mistake(certificate: tuple[Path, Path]) -> None:
    """Without an error the test that asked for TLS would run without."""
    with pytest.raises(ConfigurationError, match="TLS needs both files"):
        MemoryCollector(certificate_file=certificate[0])


def test_a_broken_certificate_leaves_nothing_open(certificate: tuple[Path, Path]) -> None:
    """A failed start must not leak the server that had started already."""
    before = set(threading.enumerate())
    broken = MemoryCollector(certificate_file=certificate[1], key_file=certificate[1])
    with pytest.raises(ssl.SSLError), broken:
        pass
    assert_gone(before)


def test_requests_without_the_required_header_are_turned_away() -> None:
    """Tokens are tested by having them refused."""
    with MemoryCollector(headers={"authorization": "Bearer s3"}) as collector:
        with pytest.raises(grpc.RpcError) as refused:
            call(collector)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert post(collector, Authorization="Bearer s4")[0] == 401
        assert collector.attempts == 0
        exporter = GrpcExporter(endpoint=collector.grpc_endpoint, insecure=True, headers={"authorization": "Bearer s3"})
        assert exporter.export(measured()) is sdk.MetricExportResult.SUCCESS
        exporter.shutdown()
        assert post(collector, Authorization="Bearer s3")[0] == 200
        assert len(collector.requests) == 2


def test_an_answer_refuses_until_it_is_taken_back() -> None:
    """Outages in tests begin and end; what was refused has not arrived."""
    with MemoryCollector(answer=lambda request: grpc.StatusCode.UNAVAILABLE) as collector:
        with pytest.raises(grpc.RpcError) as refused:
            call(collector)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        collector.answer = lambda request: 503
        status, body, headers = post(collector)
        assert (status, Status.FromString(body).message, headers["Retry-After"]) == (503, "refused", None)
        assert (collector.requests, collector.attempts) == ([], 2)
        collector.answer = None
        call(collector)
        assert (len(collector.requests), collector.attempts) == (1, 3)


def test_refusals_carry_the_hint_when_to_come_back() -> None:
    """Senders must be tested on the hints that OTLP defines: RetryInfo and Retry-After."""
    with MemoryCollector(answer=lambda request: grpc.StatusCode.UNAVAILABLE, retry_after_s=2.5) as collector:
        with pytest.raises(grpc.RpcError) as refused:
            call(collector)
        (details,) = refused.value.trailing_metadata()
        assert details.key == "grpc-status-details-bin"
        hint = RetryInfo()
        assert Status.FromString(details.value).details[0].Unpack(hint)
        assert hint.retry_delay.ToMilliseconds() == 2500
        collector.answer = lambda request: 429
        assert post(collector)[2]["Retry-After"] == "2"


def test_partial_success_is_reported_and_kept() -> None:
    """A backend that takes most of a request says so in its answer."""
    partial = ExportMetricsServiceResponse()
    partial.partial_success.rejected_data_points = 2
    with MemoryCollector(answer=lambda request: partial) as collector:
        assert call(collector) == partial
        assert ExportMetricsServiceResponse.FromString(post(collector)[1]) == partial
        assert len(collector.requests) == 2


def test_an_answer_of_the_other_protocol_shows_up_as_a_fault(capfd: pytest.CaptureFixture[str]) -> None:
    """A test whose bad weather is a typing error must not pass."""
    with MemoryCollector(answer=lambda request: 503) as collector:
        with pytest.raises(grpc.RpcError) as refused:
            call(collector)
        assert refused.value.code() is grpc.StatusCode.UNKNOWN
        collector.answer = lambda request: grpc.StatusCode.UNAVAILABLE
        with pytest.raises(http.client.RemoteDisconnected):
            post(collector)
    assert "is not an answer for HTTP" in capfd.readouterr().err


def assert_gone(before: set[threading.Thread]) -> None:
    """No thread is left that was not there before."""
    deadline = time.monotonic() + 60
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_a_hanging_collector_takes_requests_never_answers_and_still_closes_at_once() -> None:
    """A black hole is the worst endpoint; a test of it must itself end."""
    before = set(threading.enumerate())
    with MemoryCollector(hang=True) as collector:
        with pytest.raises(grpc.RpcError) as late:
            call(collector, timeout_s=0.2)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(TimeoutError):
            post(collector, timeout_s=0.2)
        assert collector.wait_for(lambda so_far: so_far.attempts == 2)
        assert collector.requests == []
        started = time.monotonic()
    assert time.monotonic() - started < patience(2)
    assert_gone(before)


@pytest.mark.parametrize("use", ["nothing", "an idle connection", "a half-sent request"])
def test_leaving_closes_ports_connections_and_threads(use: str) -> None:
    """Keep-alive connections of exporters must not keep a test-suite alive."""
    before = set(threading.enumerate())
    with MemoryCollector() as collector:
        connection = connection_to(collector)
        if use == "an idle connection":
            connection.request("POST", "/v1/metrics", EMPTY, {"Content-Type": "application/x-protobuf"})
            assert connection.getresponse().read() == b""
        elif use == "a half-sent request":
            connection.putrequest("POST", "/v1/metrics")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(b"only this")
        started = time.monotonic()
    assert time.monotonic() - started < patience(2)
    connection.close()
    assert_gone(before)
    for endpoint in (collector.grpc_endpoint, collector.http_endpoint):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", urlsplit(endpoint).port or 0), timeout=1)


def test_an_answer_that_blocks_holds_closing_up_only_for_the_timeout() -> None:
    """close() is bounded whatever the user's callable does."""
    may_end = threading.Event()

    def block(request: ExportMetricsServiceRequest) -> None:
        may_end.wait(30)

    before = set(threading.enumerate())
    collector = MemoryCollector(answer=block).__enter__()
    with pytest.raises(grpc.RpcError):
        call(collector, timeout_s=0.2)
    with pytest.raises(TimeoutError):
        post(collector, timeout_s=0.2)
    assert collector.attempts == 2
    started = time.monotonic()
    collector.close(timeout_s=0.5)
    assert time.monotonic() - started < patience(2)
    may_end.set()
    assert_gone(before)


def test_a_collector_is_entered_once() -> None:
    """A second life would mix two tests' telemetry."""
    with MemoryCollector() as collector:
        pass
    with pytest.raises(WrongState, match="entered only once"), collector:
        pass


def test_a_frame_counts_when_all_its_points_have_come_and_only_once() -> None:
    """Collectors cut, repeat and reorder; received must mean received whole."""
    table = seed_table({f"seed-{row}": {"alpha": 0.5, "stage": 4.0} for row in range(20)})
    history = [make_frame(sequence=step, seeds=table, time_unix_ns=TIME_UNIX_NS + step * 1_000_000) for step in (1, 2)]
    encoder = Encoder(CATALOGUE, resource_for, max_points=30)
    (*first, first_end), (*second, second_end) = (
        [request.body for request in encoder.requests(blocks_of([frame]))] for frame in history
    )
    assert first
    counts = []
    with MemoryCollector() as collector:
        for bodies in ([second_end], first, first, [first_end], [first_end], first, second):
            for body in bodies:
                assert post(collector, body)[0] == 200
            counts.append(collector.frames_received)
    assert counts == [0, 0, 0, 1, 1, 1, 2]


def test_points_beside_the_frames_do_not_complete_one() -> None:
    """Stale markers may have the time and the streams of a frame whose points never came."""
    frame = make_frame()
    encoder = Encoder(CATALOGUE, resource_for, max_points=7)
    first, first_end = [request.body for request in encoder.requests(blocks_of([frame]))]
    with MemoryCollector() as collector:
        post(collector, first)
        streams = [(point.name, point.attributes) for point in collector.points()]
    (markers,) = encoder.stale(RUN, streams, time_unix_ns=frame.time_unix_ns)
    with MemoryCollector() as collector:
        post(collector, first_end)
        post(collector, markers)
        assert collector.frames_received == 0
        post(collector, first)
        assert collector.frames_received == 1


def test_frames_of_other_ranks_and_attempts_are_other_frames() -> None:
    """Ranks record in the same nanosecond often enough."""
    runs = [RUN, replace(RUN, rank=1), replace(RUN, attempt=RUN.attempt + 1)]
    encoder = Encoder(CATALOGUE, resource_for)
    (request,) = encoder.requests(blocks_of([make_frame(run=run) for run in runs]))
    with MemoryCollector() as collector:
        call(collector, request.body)
        assert collector.frames_received == 3


def test_a_long_run_is_received_in_bounded_memory() -> None:
    """A demo may run for days: only the newest requests are kept, and counting goes on."""
    encoder = Encoder(CATALOGUE, resource_for, max_points=2_000)
    history = (make_frame(time_unix_ns=TIME_UNIX_NS + step * 1_000_000) for step in range(10_500))
    with MemoryCollector(keep=2) as collector:
        last = b""
        for request in encoder.requests(blocks_of(history)):
            last = request.body
            call(collector, last)
        assert collector.frames_received == 10_500
        assert len(collector.requests) == 2
        assert collector.requests[-1] == ExportMetricsServiceRequest.FromString(last)
        call(collector, last)
        assert collector.frames_received == 10_500


def test_waiting_ends_when_the_predicate_holds_or_time_is_up() -> None:
    """Tests wait for what they expect, not for a fixed time."""
    with MemoryCollector() as collector:
        assert not collector.wait_for(lambda so_far: bool(so_far.points()), timeout_s=0.05)
        sender = threading.Thread(target=call, args=(collector,))
        sender.start()
        assert collector.wait_for(lambda so_far: len(so_far.requests) == 1)
        sender.join()


@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda collector: post(collector, path="/v1/traces"), 404),
        (lambda collector: post(collector, b"{}", Content_Type="text/plain"), 415),
        (lambda collector: post(collector, b"{", Content_Type="application/json"), 400),
        (lambda collector: post(collector, b"\xff\xff"), 400),
        (lambda collector: post(collector, b"no gzip", Content_Encoding="gzip"), 400),
        (lambda collector: post(collector, gzip.compress(IGNORED)[:-4], Content_Encoding="gzip"), 400),
        (lambda collector: post(collector, gzip.compress(IGNORED * 11 * 2**20), Content_Encoding="gzip"), 400),
        (lambda collector: post(collector, b"", Content_Length=str(21 * 2**20)), 413),
        (lambda collector: post(collector, b"", Content_Length="many"), 413),
    ],
    ids=["path", "text", "no json", "no protobuf", "no gzip", "cut gzip", "gzip bomb", "too large", "no number"],
)
def test_what_is_no_otlp_is_refused_and_not_kept(
    send: Callable[[MemoryCollector], tuple[int, bytes, http.client.HTTPMessage]], status: int
) -> None:
    """A sender's mistakes must show in its tests, as they would at a real collector."""
    with MemoryCollector() as collector:
        assert send(collector)[0] == status
        assert collector.requests == []
        assert post(collector)[0] == 200


def test_importing_it_needs_neither_torch_nor_grpc() -> None:
    """It is used on hosts that have no torch, and grpc starts threads of its own."""
    script = "import esper_otel.testing, sys, json; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not {"torch", "grpc"} & set(json.loads(ran.stdout))
