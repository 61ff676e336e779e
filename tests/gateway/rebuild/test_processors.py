"""``esper-otel check --through``: what a processor of a collector does to a run on its way to the gateway is said.

The processors are played here, as their documentation describes them, by a server between the check and the gateway:
the collector that is built for the tests has only those that our configurations use. One that it has is used in
``tests/check/test_through.py``.
"""

from __future__ import annotations

import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

import pytest
import requests
from gateways import RunningGateway
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from patience import patience

from esper_otel.check.stages import CheckStage
from esper_otel.check.through import ReadBack, run_through
from esper_otel.schema import is_check

pytestmark = pytest.mark.lengthy

Effect = Callable[[ExportMetricsServiceRequest], None]


class Between:
    """A server that does something to each request, and passes it on.

    Args:
        target: the gateway's address for HTTP.
        effect: changes a request.
        gather_s: requests of so long a time are made one before ``effect``; None: each goes at once.
    """

    def __init__(self, target: str, effect: Effect, gather_s: float | None) -> None:
        self._target, self._effect, self._gather_s = target, effect, gather_s
        self._lock = threading.Lock()
        self._gathered = ExportMetricsServiceRequest()
        self.bodies: list[bytes] = []

        take = self._take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                take(ExportMetricsServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_arguments: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, request: ExportMetricsServiceRequest) -> None:
        if self._gather_s is None:
            self._pass_on(request)
            return
        with self._lock:
            if not self._gathered.resource_metrics:
                threading.Timer(self._gather_s, self.flush).start()
            self._gathered.MergeFrom(request)

    def flush(self) -> None:
        """Passes on what was gathered."""
        with self._lock:
            request, self._gathered = self._gathered, ExportMetricsServiceRequest()
        if request.resource_metrics:
            self._pass_on(request)

    def _pass_on(self, request: ExportMetricsServiceRequest) -> None:
        self._effect(request)
        self.bodies.append(request.SerializeToString())
        requests.post(
            f"http://{self._target}/v1/metrics",
            data=self.bodies[-1],
            headers={"content-type": "application/x-protobuf"},
            timeout=10,
        ).raise_for_status()


# -- what processors do ----------------------------------------------------------------------------------


def metrics_of(request: ExportMetricsServiceRequest) -> Iterator[tuple[Any, Any]]:
    """Each metric of a request with the scope's metrics it stands in."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in list(scope.metrics):
                yield scope, metric


def points_of(metric: Any) -> Any:
    return metric.sum.data_points if metric.HasField("sum") else metric.gauge.data_points


def harmless(request: ExportMetricsServiceRequest) -> None:
    """Nothing."""


def without_metrics(pattern: str) -> Effect:
    """The filter processor, with a regular expression on names."""

    def effect(request: ExportMetricsServiceRequest) -> None:
        for scope, metric in metrics_of(request):
            if re.fullmatch(pattern, metric.name):
                scope.metrics.remove(metric)

    return effect


def of_points(change: Callable[[Any, Any], bool | None]) -> Effect:
    """The filter or transform processor, on points: one is dropped where the change returns False."""

    def effect(request: ExportMetricsServiceRequest) -> None:
        for scope, metric in metrics_of(request):
            points = points_of(metric)
            kept = [point for point in points if change(metric, point) is not False]
            if len(kept) != len(points):
                kept = [type(point).FromString(point.SerializeToString()) for point in kept]
                del points[:]
                points.extend(kept)
            if not points:
                scope.metrics.remove(metric)

    return effect


def truncating(size_ns: int, nearest: bool = False) -> Effect:
    def change(_metric: Any, point: Any) -> None:
        more = size_ns // 2 if nearest else 0
        point.time_unix_nano = (point.time_unix_nano + more) // size_ns * size_ns

    return of_points(change)


def shifted(_metric: Any, point: Any) -> None:
    point.time_unix_nano += 3600 * 10**9


def setting(name: str, is_so: Callable[[float], bool], value: Callable[[float], float]) -> Effect:
    def change(metric: Any, point: Any) -> None:
        if re.fullmatch(name, metric.name) and not point.flags and is_so(point.as_double):
            point.as_double = value(point.as_double)

    return of_points(change)


def renaming(old: str, new: str) -> Effect:
    def effect(request: ExportMetricsServiceRequest) -> None:
        for _, metric in metrics_of(request):
            metric.name = re.sub(old, new, metric.name)

    return effect


def without_attributes(*names: str) -> Effect:
    """The resource processor, deleting."""

    def effect(request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            kept = [attribute for attribute in resource.resource.attributes if attribute.key not in names]
            del resource.resource.attributes[:]
            resource.resource.attributes.extend(kept)

    return effect


def folding(_metric: Any, point: Any) -> None:
    """Takes the seed's id away, as a list of labels to keep does."""
    del point.attributes[:]


def one_seed(_metric: Any, point: Any) -> None:
    for attribute in point.attributes:
        if attribute.key == "seed_id":
            attribute.value.string_value = "seed"


def in_capitals(_metric: Any, point: Any) -> None:
    for attribute in point.attributes:
        attribute.value.string_value = attribute.value.string_value.upper()


def in_capitals_at_the_end(metric: Any, point: Any) -> None:
    if metric.name == "esper.run.ended":
        in_capitals(metric, point)


def without_outcome(metric: Any, point: Any) -> None:
    if metric.name == "esper.run.ended":
        del point.attributes[:]


def without_scope(name: str) -> Effect:
    """The filter processor, with a condition on the scope."""

    def effect(request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                if scope.scope.name == name:
                    del scope.metrics[:]

    return effect


def grouped(request: ExportMetricsServiceRequest) -> None:
    """The groupbyattrs processor with the key ``seed_id``: it becomes an attribute of the Resource."""
    result = ExportMetricsServiceRequest()
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                by_seed: dict[str, list[Any]] = {}
                for point in points_of(metric):
                    seed = next((each.value.string_value for each in point.attributes if each.key == "seed_id"), "")
                    by_seed.setdefault(seed, []).append(point)
                for seed, points in by_seed.items():
                    added = result.resource_metrics.add()
                    added.resource.CopyFrom(resource.resource)
                    under = added.scope_metrics.add()
                    under.scope.CopyFrom(scope.scope)
                    moved = under.metrics.add()
                    moved.CopyFrom(metric)
                    del points_of(moved)[:]
                    points_of(moved).extend(points)
                    if seed:
                        added.resource.attributes.add(key="seed_id").value.string_value = seed
                        for point in points_of(moved):
                            del point.attributes[:]
    request.CopyFrom(result)


def newest_only(request: ExportMetricsServiceRequest) -> None:
    """The interval processor: of each stream the newest point."""
    newest: dict[Any, int] = {}

    def streams() -> Iterator[tuple[Any, Any, Any]]:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in points_of(metric):
                        labels = tuple(each.SerializeToString() for each in point.attributes)
                        yield (
                            (resource.resource.SerializeToString(), scope.scope.name, metric.name, labels),
                            metric,
                            point,
                        )

    for stream, _, point in streams():
        newest[stream] = max(newest.get(stream, 0), point.time_unix_nano)
    kept = set(newest.items())
    gone = [(metric, point) for stream, metric, point in streams() if (stream, point.time_unix_nano) not in kept]
    for metric, point in gone:
        points_of(metric).remove(point)


def sampled(keep: float) -> Effect:
    chance = random.Random(5)
    return of_points(lambda _metric, _point: chance.random() < keep)


def sampled_by_time(_metric: Any, point: Any) -> bool:
    """A sampler that decides for whole steps: one of the marked run's does not come."""
    return point.time_unix_nano // 10**6 % 1000 not in {612, 623}


def unrepeated() -> Effect:
    """A deduplication: a point whose stream has the value already is dropped."""
    last: dict[Any, float] = {}
    lock = threading.Lock()

    def effect(request: ExportMetricsServiceRequest) -> None:
        with lock:
            for resource in request.resource_metrics:
                source = resource.resource.SerializeToString()
                for scope in resource.scope_metrics:
                    for metric in scope.metrics:
                        points = points_of(metric)
                        kept = []
                        for point in points:
                            key = (source, metric.name, *(each.SerializeToString() for each in point.attributes))
                            if point.flags or last.get(key) != point.as_double:
                                kept.append(type(point).FromString(point.SerializeToString()))
                            last[key] = point.as_double
                        del points[:]
                        points.extend(kept)

    return effect


def deltas(request: ExportMetricsServiceRequest) -> None:
    """cumulativetodelta: sums only, and the first point of each is dropped."""
    for scope, metric in metrics_of(request):
        if metric.HasField("sum"):
            scope.metrics.remove(metric)


def integers(request: ExportMetricsServiceRequest) -> None:
    """A transform with ``Int()`` on every value."""
    for _, metric in metrics_of(request):
        for point in points_of(metric):
            if not point.flags and math.isfinite(point.as_double):
                point.as_int = int(point.as_double)


def reordered(request: ExportMetricsServiceRequest) -> None:
    """Something that writes points, metrics and Resources in another order."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                turned = [type(point).FromString(point.SerializeToString()) for point in points_of(metric)][::-1]
                del points_of(metric)[:]
                points_of(metric).extend(turned)
    turned = [type(each).FromString(each.SerializeToString()) for each in request.resource_metrics][::-1]
    del request.resource_metrics[:]
    request.resource_metrics.extend(turned)


def twice(request: ExportMetricsServiceRequest) -> None:
    """A request that is sent again."""
    request.MergeFrom(ExportMetricsServiceRequest.FromString(request.SerializeToString()))


def enriched(request: ExportMetricsServiceRequest) -> None:
    """A resource detection processor."""
    for resource in request.resource_metrics:
        resource.resource.attributes.add(key="k8s.pod.name").value.string_value = "trainer-0"


def drop_rank(request: ExportMetricsServiceRequest) -> None:
    """A filter on the Resource, or a balancer that sends each rank elsewhere."""
    kept = [
        type(each).FromString(each.SerializeToString())
        for each in request.resource_metrics
        if {attribute.key: attribute.value.int_value for attribute in each.resource.attributes}["esper.rank"] == 0
    ]
    del request.resource_metrics[:]
    request.resource_metrics.extend(kept)


def is_odd(value: float) -> bool:
    return not math.isfinite(value)


GONE = r"{} did not arrive"
WRONG: dict[str, tuple[Effect, float | None, str]] = {
    "interval": (newest_only, 1.0, "esper.global_step did not arrive in "),
    "filter esper.": (without_metrics(r"esper\..*"), None, GONE.format(r"esper\.global_step")),
    "filter global_step": (without_metrics(r"esper\.global_step"), None, GONE.format(r"esper\.global_step")),
    "filter sequence": (without_metrics(r"esper\.frame\.sequence"), None, GONE.format(r"esper\.frame\.sequence")),
    "filter points": (without_metrics(r"esper\.frame\.points"), None, r"esper\.frame\.points.* did not arrive"),
    "filter frame": (without_metrics(r"esper\.frame\..*"), None, GONE.format(r"esper\.frame\.sequence")),
    "filter all counts": (
        without_metrics(r"esper\.(frame\..*|seeds\.digest|seed\.retired)"),
        None,
        GONE.format(r"esper\.frame\.sequence"),
    ),
    "filter epoch": (without_metrics(r"esper\.epoch"), None, GONE.format(r"esper\.epoch")),
    "filter digest": (without_metrics(r"esper\.seeds\.digest"), None, r"esper\.seeds\.digest.* did not arrive"),
    "filter seeds": (without_metrics(r"esper\.seeds"), None, r"esper\.seeds .* did not arrive"),
    "filter retired": (without_metrics(r"esper\.seed\.retired"), None, r"esper\.seed\.retired did not arrive"),
    "filter end": (without_metrics(r"esper\.run\.ended"), None, GONE.format(r"esper\.run\.ended")),
    "filter the health scope": (without_scope("esper_otel.health"), None, GONE.format(r"esper\.run\.ended")),
    "end without outcome": (of_points(without_outcome), None, r"esper\.run\.ended had .* arrived with none"),
    "another outcome": (of_points(in_capitals_at_the_end), None, r"esper\.run\.ended had .* arrived with COMPLETED"),
    "no world size": (without_attributes("esper.world_size"), None, r"esper\.world_size was 2 and arrived as 1"),
    "filter loss": (without_metrics("loss"), None, GONE.format("loss")),
    "filter seed metrics": (without_metrics(r"kasmina\..*"), None, r"kasmina\.seed\..* did not arrive"),
    "filter NaN": (of_points(lambda _m, point: not math.isnan(point.as_double)), None, "was nan and did not arrive"),
    "filter not finite": (of_points(lambda _m, point: not is_odd(point.as_double)), None, "did not arrive"),
    "filter zero": (of_points(lambda m, p: m.name != "accuracy" or bool(p.as_double)), None, GONE.format("accuracy")),
    "seconds": (truncating(10**9), None, "whole seconds"),
    "nearest second": (truncating(10**9, nearest=True), None, "whole seconds"),
    "tenths": (truncating(10**8), None, "cut to tenths of a second"),
    "milliseconds": (truncating(10**6), None, "whole milliseconds"),
    "microseconds": (truncating(10**3), None, "whole microseconds"),
    "an hour later": (of_points(shifted), None, r"\+3600\.0"),
    "rename": (renaming("^loss$", "train_loss"), None, "loss arrived as train_loss"),
    "swap names": (renaming("^accuracy$", "grad_var"), None, "accuracy arrived as grad_var"),
    "NaN to 0": (setting(".*", math.isnan, lambda _: 0.0), None, "was nan and arrived as 0,"),
    "infinite to large": (setting(".*", math.isinf, lambda _: 1e30), None, "was inf and arrived as 1e"),
    "infinite to NaN": (setting(".*", math.isinf, lambda _: math.nan), None, "was inf and arrived as nan"),
    "scaled": (setting("loss", math.isfinite, lambda value: value * 1.001), None, "loss was .* and arrived as"),
    "rounded": (setting("step_latency_ms", math.isfinite, lambda value: round(value, 3)), None, "step_latency_ms was"),
    "steps from 0": (
        setting(r"esper\.global_step", bool, lambda step: step - 1001),
        None,
        "step 1001 arrived as step 0",
    ),
    "epochs from 1": (setting(r"esper\.epoch", bool, lambda _: 1.0), None, r"esper\.epoch was 5 and arrived as 1"),
    "sequence from 0": (setting(r"esper\.frame\.sequence", bool, lambda _: 1.0), None, "."),
    "integers": (integers, None, "arrived as"),
    "no run id": (without_attributes("esper.run.id"), None, r"esper\.run\.id did not arrive"),
    "no run id at all": (without_attributes("esper.run.id", "service.instance.id"), None, "nothing of run"),
    "no rank": (without_attributes("esper.rank"), None, r"rank 1 arrived as one of rank 0"),
    "no attempt": (without_attributes("esper.run.attempt"), None, r"esper\.run\.attempt did not arrive"),
    "no experiment": (without_attributes("esper.experiment.name"), None, r"esper\.experiment\.name did not arrive"),
    "no device": (without_attributes("esper.device.type"), None, r"esper\.device"),
    "groupbyattrs": (grouped, None, "did not arrive"),
    "no seed ids": (of_points(folding), None, "did not arrive"),
    "two seeds in one": (of_points(one_seed), None, "arrived as seed seed, in"),
    "seed ids in capitals": (
        of_points(in_capitals),
        None,
        "seed esper-check-dies arrived as seed ESPER-CHECK-DIES, in",
    ),
    "sampler": (sampled(0.5), None, "."),
    "sampler, few": (sampled(0.97), None, "."),
    "sampler, whole steps": (of_points(sampled_by_time), None, "steps did not arrive: 1004"),
    "deduplication": (unrepeated(), None, "did not arrive"),
    "one rank": (drop_rank, None, "only those of rank 0 arrived"),
}
HARMLESS: dict[str, tuple[Effect, float | None]] = {
    "nothing": (harmless, None),
    "batch": (harmless, 0.4),
    "cumulativetodelta": (deltas, None),
    "another order": (reordered, 0.3),
    "twice": (twice, None),
    "resource detection": (enriched, None),
}


class Checked(NamedTuple):
    """What the check says, and the requests that it made, as the gateway got them."""

    stage: CheckStage
    bodies: list[bytes]


@pytest.fixture(scope="module")
def checked() -> Iterator[dict[str, Checked]]:
    """What the check says of each: all at the same time, since it waits most of the time."""
    effects = {name: (effect, gather_s) for name, (effect, gather_s, _) in WRONG.items()} | HARMLESS
    with RunningGateway() as gateway, ThreadPoolExecutor(len(effects)) as pool:

        def check(effect: Effect, gather_s: float | None) -> Checked:
            with Between(gateway.http, effect, gather_s) as between:
                environ = {
                    "OTEL_EXPORTER_OTLP_ENDPOINT": between.address,
                    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                }
                [stage, *_] = run_through(ReadBack(None, gateway.grpc, timeout_s=patience(8.0)), environ=environ)
                between.flush()
                return Checked(stage, between.bodies)

        checks = {name: pool.submit(check, *effect) for name, effect in effects.items()}
        yield {name: each.result(600) for name, each in checks.items()}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_processor_loses_or_changes_is_said(checked: dict[str, Checked], name: str) -> None:
    stage = checked[name].stage
    assert stage.ok is False, stage
    assert re.search(WRONG[name][2], stage.message), stage
    assert stage.fix


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_passes(checked: dict[str, Checked], name: str) -> None:
    assert checked[name].stage.ok, checked[name].stage


def test_the_run_is_a_check_and_ends(checked: dict[str, Checked]) -> None:
    """Of both ranks: nothing that it has sent looks alive afterwards, and lists of runs know it for a check."""
    series: set[tuple[int, str, bytes]] = set()
    ended, over = set(series), set()
    for body in checked["nothing"].bodies:
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            said = {attribute.key: attribute.value for attribute in resource.resource.attributes}
            assert is_check(said["esper.run.id"].string_value)
            rank = said["esper.rank"].int_value
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                for point in points_of(metric):
                    key = (rank, metric.name, b"".join(each.SerializeToString() for each in point.attributes))
                    (ended if point.flags else series).add(key)
                    if metric.name == "esper.run.ended":
                        over.add(rank)
    assert over == {0, 1}
    assert {name for _, name, _ in series - ended} == {"esper.run.ended", "esper.seed.retired"}
