"""One tenant who takes what belongs to all: runs, room in the store."""

from __future__ import annotations

import contextlib
import threading
import time

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from attack.otlp import Point, body, many_runs, step
from attack.target import Attack, Target, bearer
from esper_otel.pull.calls import method

_STEPS = 2_000  # of the honest run


def _sends(target: Target, run: str) -> bool:
    """Whether an honest step of a new run is taken; a refusal that asks to retry is none, if it ends in time."""
    for _ in range(10):
        status, answer = target.post(step(run, 1), token="honest-token")
        if status == 200:
            return not ExportMetricsServiceResponse.FromString(answer).partial_success.rejected_data_points
        time.sleep(min(0.2, target.left_s()))
    return False


def _many_runs(target: Target) -> None:
    """As many runs as a gateway knows, kept alive, while honest runs begin."""
    content = many_runs("rogue-run-", 1_000)
    for number in target.rounds(0.2):
        if number % 10 == 0:
            target.post(content)
        target.hold(holds=_sends(target, f"honest-new-{number}"), otherwise="an honest new run was refused")


def _runs_for_ever(target: Target) -> None:
    """Ids that are new each time."""
    for number in target.rounds(0.02):
        target.post(many_runs(f"rogue-ever-{number}-", 500))


def _crowding(target: Target) -> None:
    """Many small runs, so that the largest, an honest one, has to give room."""
    now = time.time_ns()
    for first in range(0, _STEPS, 500):
        points = []
        for place in range(first, first + 500):
            at = now + place * 1_000_000
            points += [Point("loss", 1.0, at), Point("esper.global_step", float(place), at)]
        target.post(body("honest-large", points), token="honest-token")
    before = 0
    for _ in target.rounds(0.1):  # the first step waits for an epoch that does not come
        if (before := _stored(target)) == _STEPS:
            break
    target.hold(holds=before == _STEPS, otherwise=f"of {_STEPS} honest steps {before} were stored in time")
    for number in target.rounds(0.05):
        at = time.time_ns()
        points = [Point("kasmina.seed.alpha", 0.5, at + place * 1_000, f"s{place % 40}") for place in range(400)]
        target.post(body(f"rogue-small-{number % 300}", points))
    after = _stored(target)
    target.hold(holds=before == after > 0, otherwise=f"an honest run had {before} steps stored, then {after}")


def _listings(target: Target) -> None:
    """Thousands of runs, listed again and again by many, and /metrics as quickly as it answers."""
    for number in range(6):
        target.post(many_runs(f"rogue-list-{number}-", 1_000))

    def ask(_: int) -> None:
        with target.channel() as channel:
            call = channel.unary_unary(method("Runs")[0], None, None)
            for _ in target.rounds():
                with contextlib.suppress(grpc.RpcError):
                    call(b"", timeout=max(target.left_s(), 0.1), metadata=bearer())
                with contextlib.suppress(OSError):
                    target.gateway.get("/metrics")

    asking = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
    for each in asking:
        each.start()
    for each in asking:
        each.join(target.left_s() + 2)


def _stored(target: Target) -> int:
    return sum(run.stored for run in target.runs("honest-token") if run.run_id == "honest-large")


ATTACKS = (
    Attack("many-runs", "1,000 runs in a request, again and again", _many_runs),
    Attack("runs-for-ever", "500 new run ids a request, as quickly as they are taken", _runs_for_ever),
    Attack("listings", "lists of 6,000 runs, and /metrics, four at a time", _listings),
    Attack("crowding-out", "small runs that fill a store of 8 MiB", _crowding, options=("--keep-mib", "8")),
)
