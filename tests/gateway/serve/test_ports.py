"""The gateway's ports: what senders and pullers meet, over real sockets."""

from __future__ import annotations

import contextlib
import gzip
import json
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from certificates import Authority
from frame_examples import RUN, make_frame
from gateways import RunningGateway, pull, runs
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from patience import patience

import esper_otel
from esper_otel import EsperSettings, Telemetry
from esper_otel.export.encode import Encoder
from esper_otel.export.resource import resource_for
from esper_otel.frames.frame import Run
from esper_otel.frames.ring import blocks_of
from esper_otel.gateway.serve.ports import OTLP_SERVICE
from esper_otel.leyline import SystemStatePacket, TelemetryPacket
from esper_otel.pull.messages import SERVICE
from esper_otel.schema import METRICS

PROTOBUF = {"content-type": "application/x-protobuf"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningGateway]:
    """A gateway for tests that do not ask for more than one run of their own."""
    with RunningGateway() as gateway:
        yield gateway


def body_of(run_id: str, steps: int = 1) -> bytes:
    """A request with some steps of a run."""
    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    run = Run(run_id, RUN.attempt)
    frames = [
        make_frame(run=run, sequence=step, global_step=step, time_unix_ns=RUN.attempt * 10**6 + step * 10**6)
        for step in range(1, steps + 1)
    ]
    [request] = encoder.requests(blocks_of(frames))
    return request.body


def export(channel: grpc.Channel, body: bytes, token: str | None = None, **call: Any) -> ExportMetricsServiceResponse:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    method = channel.unary_unary(f"/{OTLP_SERVICE}/Export", None, ExportMetricsServiceResponse.FromString)
    response: ExportMetricsServiceResponse = method(body, timeout=300, metadata=metadata, **call)
    return response


def code_of(call: Any, *arguments: Any, **more: Any) -> grpc.StatusCode:
    """The status code that a call fails with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **more)
    code: grpc.StatusCode = caught.value.code()
    return code


def recorded(telemetry: Telemetry, steps: int = 30) -> None:
    """Steps with everything that is easily lost: NaN, an absent value, a seed that is silent, one that is retired."""
    for step in range(steps):
        with telemetry.step(epoch=step // 10) as now:
            now.put({"loss": float("nan") if step == 7 else 2.0 - step / 64, "gradient_norm": 0.0})
            if step % 3:
                now.put({"accuracy": step / 64})
            now.seed("seed-10", stage=4, alpha=step / 64, alpha_steps=step, isolation_violations=step // 5)
            if step < 20 and step % 2:
                now.seed("s", stage=2, last_kernel_latency_ms=float(step))
        if step == 20:
            telemetry.retire_seed("s")
        if step == 25:
            telemetry.validation(loss=1.5, accuracy=0.25)


def comparable(packet: Any) -> Any:
    """A packet's fields; NaN cannot be in one."""
    return MessageToDict(packet, preserving_proto_field_name=True)


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"},
    ],
    ids=str,
)
def test_pulled_packets_are_those_pulled_in_process(
    shared: RunningGateway, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field by field: a controller must not decide otherwise because it is somewhere else."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    address = shared.grpc if environment["OTEL_EXPORTER_OTLP_PROTOCOL"] == "grpc" else shared.http
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
    with esper_otel.start(settings=EsperSettings(export_every_s=0.01)) as telemetry:
        recorded(telemetry)
        in_process = telemetry.pull(max_packets=100)
    with shared.channel() as channel:
        steps: list[Any] = []
        gap, cursor = 0, ""
        while page := (response := pull(channel, telemetry.run_id, cursor, max_packets=100)).steps:  # may be partial
            steps += page
            gap, cursor = gap + response.gap, response.cursor
        [run] = [run for run in runs(channel) if run.run_id == telemetry.run_id]
    assert (run.ended, run.stored, run.missing, run.incomplete) == ("completed", 30, 0, 0)
    assert len(steps) == len(in_process) == 30
    assert gap == 0
    for step, packets in zip(steps, in_process, strict=True):
        assert comparable(SystemStatePacket.FromString(step.state)) == comparable(packets.state)
        pulled = [comparable(TelemetryPacket.FromString(packet)) for packet in step.telemetry]
        assert pulled == list(map(comparable, packets.telemetry))
        assert set(step.names) == packets.names
        assert (step.complete, step.revision, step.step) == (True, 1, packets.step)


def test_otlp_in_json_is_taken(shared: RunningGateway) -> None:
    """Not everybody who sends has protobuf."""
    request = ExportMetricsServiceRequest.FromString(body_of("in-json"))
    body = json.dumps(MessageToDict(request)).encode()
    answer = requests.post(f"http://{shared.http}/v1/metrics", body, headers=JSON, timeout=300)
    assert (answer.status_code, answer.headers["content-type"], answer.json()) == (200, "application/json", {})
    with shared.channel() as channel:
        [step] = pull(channel, "in-json").steps
    assert SystemStatePacket.FromString(step.state).training_metrics["loss"] == 2.5


@pytest.mark.parametrize("body", [b"\x0a", b"\xff" * 50, b"not protobuf"], ids=repr)
def test_a_malformed_request_is_refused_for_good_and_harms_nobody(shared: RunningGateway, body: bytes) -> None:
    """Its sender must not come again with it, and others must not notice."""
    url = f"http://{shared.http}/v1/metrics"
    with shared.channel() as channel:
        assert code_of(export, channel, body) is grpc.StatusCode.INVALID_ARGUMENT
        assert requests.post(url, body, headers=PROTOBUF, timeout=300).status_code == 400
        assert requests.post(url, body, headers=JSON, timeout=300).status_code == 400
        assert requests.post(url, body, headers=PROTOBUF | {"content-encoding": "gzip"}, timeout=300).status_code == 400
        assert not export(channel, body_of("unharmed")).HasField("partial_success")


def test_points_that_are_not_taken_are_partial_success_with_a_reason(shared: RunningGateway) -> None:
    """The sender's log must say how many, and why."""
    request = ExportMetricsServiceRequest.FromString(body_of("partly"))
    metric = request.resource_metrics[0].scope_metrics[0].metrics.add(name="latencies")
    metric.histogram.data_points.add(time_unix_nano=RUN.attempt * 10**6, count=3)
    with shared.channel() as channel:
        partial = export(channel, request.SerializeToString()).partial_success
        assert partial.rejected_data_points == 1
        assert partial.error_message == "1 neither gauge nor sum ('latencies')"
        assert pull(channel, "partly").steps
    text = requests.get(f"http://{shared.http}/metrics", timeout=300).text
    assert 'esper_gateway_rejected_points_total{reason="neither gauge nor sum"} 1\n' in text
    assert 'esper_gateway_rejected_points_total{reason="no time"} 0\n' in text


def test_a_metric_that_nobody_knows_is_named(shared: RunningGateway) -> None:
    """In the answer and where it is counted, however it is called, and no more of it than is of use."""
    names = ["system.cpu.time", 'with "quotes" \\', "line\nbreak\x1b[31m", "é" * 500, *(f"other{n}" for n in range(20))]
    request = ExportMetricsServiceRequest.FromString(body_of("unknown names"))
    scope = request.resource_metrics[0].scope_metrics.add()
    for name in names:
        scope.metrics.add(name=name).gauge.data_points.add(time_unix_nano=RUN.attempt * 10**6, as_double=1.0)
    with shared.channel() as channel:
        partial = export(channel, request.SerializeToString()).partial_success
    assert partial.rejected_data_points == len(names)
    assert partial.error_message.startswith(f"{len(names)} unknown metric ('system.cpu.time', ")
    assert partial.error_message.endswith("'other0', others)")
    assert partial.error_message.isprintable()
    assert len(partial.error_message) < 300
    text = requests.get(f"http://{shared.http}/metrics", timeout=300).text
    counted = [line for line in text.splitlines() if line.startswith("esper_gateway_rejected_metric_points_total{")]
    of = 'esper_gateway_rejected_metric_points_total{reason="unknown metric",metric='
    assert f'{of}"system.cpu.time"}} 1' in counted
    assert f'{of}"with \\"quotes\\" \\\\"}} 1' in counted
    assert f'{of}"others"}} {len(names) - 5}' in counted


def test_a_request_that_is_refused_as_a_whole_is_counted_by_its_reason(tmp_path: Path) -> None:
    """Refused for good it is lost, and somebody has to hear of it."""
    (tmp_path / "tokens").write_text("secret run=mine\n", encoding="utf-8")
    with RunningGateway("--send-tokens", str(tmp_path / "tokens")) as gateway:
        url = f"http://{gateway.http}/v1/metrics"
        mine = {"authorization": "Bearer secret"} | PROTOBUF
        statuses = [
            requests.post(url, body, headers=headers, timeout=300).status_code
            for body, headers in (
                (body_of("mine"), mine),
                (b"\xff" * 9, mine),
                (body_of("mine"), PROTOBUF),
                (body_of("others"), mine),
                (gzip.compress(bytes(65 * 1024 * 1024)), mine | {"content-encoding": "gzip"}),
                (b"", mine | {"content-type": "text/plain"}),
            )
        ]
        assert statuses == [200, 400, 401, 403, 413, 415]
        with gateway.channel() as channel:
            assert code_of(export, channel, body_of("mine")) is grpc.StatusCode.UNAUTHENTICATED
        text = requests.get(f"http://{gateway.http}/metrics", timeout=300).text
    for reason, count in {
        "malformed": 1,
        "credentials missing or unknown": 2,
        "credentials not for the run": 1,
        "too large": 1,
        "content type or encoding": 1,
        "fault of the gateway": 0,
    }.items():
        assert f'esper_gateway_refused_requests_total{{reason="{reason}"}} {count}\n' in text
    assert "a request was refused for good, malformed" in gateway.said


def test_a_gzip_bomb_is_refused_and_harms_nobody(shared: RunningGateway) -> None:
    """128 MiB of nothing in 128 kB."""
    bomb = gzip.compress(bytes(128 * 1024 * 1024), 9)
    url = f"http://{shared.http}/v1/metrics"
    for headers in (PROTOBUF, JSON):
        assert requests.post(url, bomb, headers=headers | {"content-encoding": "gzip"}, timeout=300).status_code == 413
    with shared.channel() as channel:
        body = bytes(128 * 1024 * 1024)
        code = code_of(export, channel, body, compression=grpc.Compression.Gzip)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not export(channel, body_of("after the bomb")).HasField("partial_success")
    status = Path(f"/proc/{shared.process.pid}/status").read_text(encoding="ascii")
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak_kib < 500_000


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"content-type": "text/plain"}, 415), (PROTOBUF | {"content-encoding": "snappy"}, 415)],
    ids=str,
)
def test_what_the_gateway_does_not_speak_is_said(shared: RunningGateway, headers: dict[str, str], status: int) -> None:
    """With the answer that HTTP has for it."""
    answer = requests.post(f"http://{shared.http}/v1/metrics", body_of("x"), headers=headers, timeout=300)
    assert answer.status_code == status
    assert requests.get(f"http://{shared.http}/v1/metrics", timeout=300).status_code == 405
    assert requests.post(f"http://{shared.http}/v1/traces", b"", headers=PROTOBUF, timeout=300).status_code == 404


def test_a_long_poll_ends_when_a_step_comes_and_no_later(shared: RunningGateway) -> None:
    """A controller must hear of a step at once."""
    arrived: list[float] = []

    def wait() -> None:
        with shared.channel() as channel:
            assert pull(channel, "polled", wait_s=20.0).steps
            arrived.append(time.monotonic())

    with shared.channel() as channel:
        export(channel, body_of("someone else"))
        waiting = threading.Thread(target=wait)
        waiting.start()
        while "esper_gateway_waiting_pulls 1" not in requests.get(f"http://{shared.http}/metrics", timeout=300).text:
            time.sleep(0.01)
        sent = time.monotonic()
        export(channel, body_of("polled"))
        waiting.join(120)
    assert arrived[0] - sent < 1.0


@pytest.mark.parametrize(
    ("request_fields", "code"),
    [
        ({"run_id": "nobody knows"}, grpc.StatusCode.NOT_FOUND),
        ({"run_id": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"run_id": "known", "wait_s": -1.0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"run_id": "known", "wait_s": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"run_id": "known", "max_packets": 1001}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"run_id": "known", "cursor": "made up"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"run_id": "known", "cursor": "0badcafe::1"}, grpc.StatusCode.FAILED_PRECONDITION),
    ],
    ids=str,
)
def test_a_pull_that_cannot_be_right_is_told_so(
    shared: RunningGateway, request_fields: dict[str, Any], code: grpc.StatusCode
) -> None:
    """With the code that says whether to come again."""
    with shared.channel() as channel:
        export(channel, body_of("known"))
        assert code_of(pull, channel, **request_fields) is code


def test_health_and_reflection_answer(shared: RunningGateway) -> None:
    """What a load balancer and grpcurl ask."""
    with shared.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", OTLP_SERVICE, SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=300)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {OTLP_SERVICE, SERVICE, "grpc.health.v1.Health"} <= set(services)


def test_those_who_look_after_the_gateway_get_answers(shared: RunningGateway) -> None:
    """Each metric once with help and type, as Prometheus wants it."""
    assert requests.get(f"http://{shared.http}/healthz", timeout=300).text == "ok\n"
    assert requests.get(f"http://{shared.http}/readyz", timeout=300).status_code == 200
    answer = requests.get(f"http://{shared.http}/metrics", timeout=300)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = [line.rpartition(" ")[0] for line in answer.text.splitlines() if not line.startswith("#")]
    helps = [line.split()[2] for line in answer.text.splitlines() if line.startswith("# HELP")]
    assert len(names) == len(set(names))
    assert {name.partition("{")[0] for name in names} <= set(helps)


def test_tokens_of_senders_and_pullers_are_two_things(tmp_path: Path) -> None:
    """A trainer must not pull, a controller must not send, and nobody another's run; a rotation needs no restart."""
    send, take = tmp_path / "send", tmp_path / "pull"
    send.write_text("# senders\nold-token run=team-a/\nany-token\n")
    take.write_text("pull-token run=team-a/\n")
    with RunningGateway("--send-tokens", str(send), "--pull-tokens", str(take)) as gateway:
        url = f"http://{gateway.http}/v1/metrics"
        with gateway.channel() as channel:
            for token in (None, "wrong", "pull-token", ""):
                assert code_of(export, channel, body_of("team-a/1"), token) is grpc.StatusCode.UNAUTHENTICATED
                headers = PROTOBUF | ({} if token is None else {"authorization": f"Bearer {token}"})
                assert requests.post(url, body_of("team-a/1"), headers=headers, timeout=300).status_code == 401
            export(channel, body_of("team-a/1"), "old-token")
            assert code_of(export, channel, body_of("team-b/1"), "old-token") is grpc.StatusCode.PERMISSION_DENIED
            export(channel, body_of("team-b/1"), "any-token")
            assert code_of(pull, channel, "team-a/1") is grpc.StatusCode.UNAUTHENTICATED
            assert code_of(pull, channel, "team-a/1", token="any-token") is grpc.StatusCode.UNAUTHENTICATED
            assert len(pull(channel, "team-a/1", token="pull-token").steps) == 1
            assert code_of(pull, channel, "team-b/1", token="pull-token") is grpc.StatusCode.PERMISSION_DENIED
            assert [run.run_id for run in runs(channel, "pull-token")] == ["team-a/1"]
            send.write_text("new-token\n")
            deadline_s = time.monotonic() + 120
            while time.monotonic() < deadline_s:
                try:
                    export(channel, body_of("team-a/1"), "new-token")
                    break
                except grpc.RpcError:
                    time.sleep(0.05)
            assert code_of(export, channel, body_of("team-a/1"), "any-token") is grpc.StatusCode.UNAUTHENTICATED
        assert requests.get(f"http://{gateway.http}/healthz", timeout=300).status_code == 200
    assert "token" not in gateway.said.replace("--send-tokens", "")


def test_tls_with_clients_certificates_and_a_new_certificate_on_the_way(tmp_path: Path) -> None:
    """Both ports; a client without a certificate is not let in; a renewal needs no restart."""
    authority, another = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    server, client = authority.pair("server"), authority.pair("client")
    options = ["--tls-cert", str(server.certificate), "--tls-key", str(server.key)]
    with RunningGateway(*options, "--client-ca", str(authority.certificate), "--grpc", "0.0.0.0:0") as gateway:
        port = gateway.grpc.rpartition(":")[2]

        def served_by(root: Path) -> bool:
            credentials = grpc.ssl_channel_credentials(
                root.read_bytes(), client.key.read_bytes(), client.certificate.read_bytes()
            )
            with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
                try:
                    export(channel, body_of("over tls"))
                except grpc.RpcError:
                    return False
                return True

        assert served_by(authority.certificate)
        url = f"https://{gateway.http}/healthz"
        mine = (str(client.certificate), str(client.key))
        assert requests.get(url, verify=str(authority.certificate), cert=mine, timeout=300).text == "ok\n"
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.get(url, verify=str(authority.certificate), timeout=300)
        with grpc.secure_channel(
            f"localhost:{port}", grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        ) as channel:
            assert code_of(export, channel, body_of("nobody")) is grpc.StatusCode.UNAVAILABLE
        renewed = another.pair("renewed")
        server.key.write_bytes(renewed.key.read_bytes())
        server.certificate.write_bytes(renewed.certificate.read_bytes())
        assert served_by(another.certificate)


def test_sigterm_ends_it_at_once_also_with_a_puller_waiting() -> None:
    """A deployment must not wait for the longest poll, of a minute."""
    with RunningGateway() as gateway, gateway.channel() as channel:
        export(channel, body_of("run"))
        cursor = pull(channel, "run").cursor
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(pull(channel, "run", cursor, wait_s=60.0)))
        waiting.start()
        while "esper_gateway_waiting_pulls 1" not in requests.get(f"http://{gateway.http}/metrics", timeout=300).text:
            time.sleep(0.01)
        started_s = time.monotonic()
        assert gateway.end(signal.SIGTERM) == 0
        waiting.join(120)
        assert time.monotonic() - started_s < patience(3.0)
        assert [(len(answer.steps), answer.cursor) for answer in answers] == [(0, cursor)]
        gateway.process.poll()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grpc", "0.0.0.0:0"], "plain text"),
        (["--http", "[::]:0"], "plain text"),
        (["--grpc", "4327"], "HOST:PORT"),
        (["--grpc", "none", "--http", "none"], "nothing is left"),
        (["--tls-cert", "a.pem"], "--tls-key"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "No such file"),
        (["--client-ca", "a.pem"], "--tls-cert"),
        (["--send-tokens", "/nowhere/tokens"], "no such file"),
        (["--threshold", "hook_buget=3"], "hook_budget"),
        (["--threshold", "hook_budget"], "SIGNAL=VALUE"),
        (["--hold", "-1"], "--hold"),
        (["--store", "/dev/null/store"], "--store"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_said_before_anything_listens(options: list[str], message: str) -> None:
    """Each names the option and the fix."""
    with pytest.raises(AssertionError) as caught, RunningGateway(*options):
        pass
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_port_that_is_taken_is_said(shared: RunningGateway) -> None:
    """Two gateways on one port would share the steps between them."""
    for option, address in (("--grpc", shared.grpc), ("--http", shared.http)):
        said = rf"{option} {address}: .*port.*: give another port, or port 0 for a free one"
        with pytest.raises(AssertionError, match=said), RunningGateway(option, address):
            pass


def test_connections_are_bounded_and_those_that_are_served_stay_so() -> None:
    """A client that opens too many is cut off beyond five hundred; who was there before goes on."""
    with RunningGateway() as gateway, requests.Session() as before, contextlib.ExitStack() as opened:
        url = f"http://{gateway.http}/healthz"
        assert before.get(url, timeout=300).text == "ok\n"
        host, _, port = gateway.http.rpartition(":")
        others = [opened.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(550)]
        closed: set[int] = set()
        deadline_s = time.monotonic() + 20
        while len(closed) < 51 and time.monotonic() < deadline_s:
            ready, _, _ = select.select([each for each in others if each.fileno() not in closed], [], [], 1.0)
            closed |= {each.fileno() for each in ready if each.recv(1) == b""}
        assert len(closed) == 51  # with the one before, 500 are left
        assert before.get(url, timeout=300).text == "ok\n"
        served = next(each for each in others if each.fileno() not in closed)
        served.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        served.settimeout(20)
        assert served.recv(12) == b"HTTP/1.1 200"


def test_a_connection_that_says_nothing_holds_up_nobody(shared: RunningGateway) -> None:
    """Half-open connections are the weather of networks."""
    for address in (shared.grpc, shared.http):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.sendall(b"POST /v1/metrics HTTP/1.1\r\ncontent-length: 100\r\n")
            with shared.channel() as channel:
                export(channel, body_of("meanwhile"))
