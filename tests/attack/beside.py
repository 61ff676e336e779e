"""What is sent beside steps: events, phases, and signs of life; very many of them, and asked for by many at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import grpc
from log_requests import request as log_request

from attack.otlp import message, packed
from attack.target import Attack, Target, bearer
from esper_otel.pull.calls import method
from esper_otel.pull.messages import EventsRequest, HoursRequest

_PHASE = "esper.phase.length_ms"
_ASKING, _AT_ONCE = 4, 100


def phases(run: str, first: int, count: int, **resource: str | int) -> bytes:
    """A request with so many phases, each of a name and a time of its own."""
    made = message(run, (), scope="esper_otel.phases", **resource)
    gauge = made.resource_metrics[0].scope_metrics[0].metrics.add(name=_PHASE).gauge
    now = time.time_ns()
    for number in range(first, first + count):
        point = gauge.data_points.add(time_unix_nano=now + number * 1_000_000, as_double=1.0)
        point.attributes.add(key="phase").value.string_value = f"phase-{number}-{'x' * 200}"
    return made.SerializeToString()


def lives(prefix: str, count: int) -> bytes:
    """A request with a count of so many runs: they live, and no step of them is known."""
    made = message(prefix, (), scope="esper_otel.health")
    gauge = made.resource_metrics[0].scope_metrics[0].metrics.add(name="esper.frames.recorded").sum
    gauge.aggregation_temporality, now = 2, time.time_ns()  # type: ignore[assignment] # cumulative
    for number in range(count):
        point = gauge.data_points.add(time_unix_nano=now, as_int=1)
        point.attributes.add(key="esper.run.id").value.string_value = f"{prefix}{number}"
    return made.SerializeToString()


def events(run: str, first: int, count: int) -> bytes:
    """A request with so many events, each with as many attributes as it may have."""
    made = log_request(run, range(first, first + count))
    for record in made.resource_logs[0].scope_logs[0].log_records:
        for number in range(100):
            record.attributes.add(key=f"a{number}").value.int_value = number
    return made.SerializeToString()


def _asked(target: Target, name: str, asked: bytes) -> list[threading.Thread]:
    """Threads that ask for the same, a hundred times at once each, for as long as the attack lasts."""

    def ask() -> None:
        with target.channel() as channel:
            call = channel.unary_unary(method(name)[0], None, None)
            while target.left_s() and target.gateway.is_running():
                calls = [
                    call.future(asked, timeout=max(target.left_s(), 0.1), metadata=bearer()) for _ in range(_AT_ONCE)
                ]
                for each in calls:
                    with contextlib.suppress(grpc.RpcError):
                        each.result()

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(_ASKING)]
    for each in asking:
        each.start()
    return asking


def _beside(name: str, asked: bytes, send: Callable[[Target, int], None]) -> Callable[[Target], None]:
    def attack(target: Target) -> None:
        for number in range(4):
            send(target, number)
        asking = _asked(target, name, asked)
        for number in target.rounds(0.5):
            send(target, number + 4)
        for each in asking:
            each.join(target.left_s() + 2)

    return attack


def _send_events(target: Target, number: int) -> None:
    content = events(f"rogue-events-{number % 8}", 1 + number * 2_000, 2_000)
    target.post(packed(content), path="/v1/logs", content_encoding="gzip")


def _send_phases(target: Target, number: int) -> None:
    run = "rogue-phases" if number < 4 else f"rogue-phases-{number}"
    target.post(packed(phases(run, number * 10_000, 10_000)), content_encoding="gzip")


def _send_lives(target: Target) -> None:
    content = packed(lives("rogue-life-", 100_000))
    for _ in target.rounds(0.2):
        target.post(content, content_encoding="gzip")


ATTACKS = (
    Attack(
        "events",
        "2,000 events a request with 100 attributes each, and 400 pages of them at once",
        _beside("Events", EventsRequest(run_id="rogue-events-1", max_events=1_000).SerializeToString(), _send_events),
    ),
    Attack(
        "phases",
        "10,000 phases of names of their own a request, of new runs, and the hours of a run 400 times at once",
        _beside("Hours", HoursRequest(run_id="rogue-phases", with_accounts=True).SerializeToString(), _send_phases),
    ),
    Attack("signs-of-life", "counts of 100,000 runs that are not known, in one request", _send_lives),
)
