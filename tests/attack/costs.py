"""Requests that cost more than their bytes: in memory, in CPU, or in one turn of the event loop."""

from __future__ import annotations

import threading
import time

from attack.http2 import Connection
from attack.otlp import (
    MIB,
    MOST_REQUEST,
    Point,
    body,
    empty_members,
    empty_messages,
    ends,
    nested,
    packed,
    seeds_at_own_times,
    unfinished,
)
from attack.target import EXPORT, Attack, Target
from esper_otel.schema import SEED_METRICS

_JSON = "application/json"
# Paths of field numbers in ExportMetricsServiceRequest, to what is sent empty.
_EMPTIES = {
    "resources": (1,),
    "scopes": (1, 2),
    "metrics": (1, 2, 2),
    "gauge points": (1, 2, 2, 5, 1),
    "histogram points": (1, 2, 2, 9, 1),
    "attributes of a resource": (1, 1, 1),
    "attributes of a point": (1, 2, 2, 5, 1, 7),
    "attributes of a scope": (1, 2, 1, 3),
}
_2090 = 3_786_912_000 * 10**9
_WIDE_SEEDS, _WIDE_STEPS = 3_000, 300


def _seeds(target: Target) -> None:
    """A quarter of a megabyte each: 6,000 points, each of its own seed at its own time."""
    for number in target.rounds(0.2):
        target.post(seeds_at_own_times(f"rogue-seeds-{number % 3}", 6_000))


def _members(target: Target) -> None:
    for number in target.rounds(0.05):
        target.post(empty_members((number % 4 + 1) * MIB), content_encoding="gzip")


def _empty(target: Target) -> None:
    paths = list(_EMPTIES.values())
    with target.channel() as channel:
        for number in target.rounds(0.05):
            content = empty_messages(paths[number // 2 % len(paths)])
            if number % 2:
                target.export(channel, content, is_gzip=True)
            else:
                target.post(packed(content), content_encoding="gzip")


def _json(target: Target) -> None:
    count = (MOST_REQUEST - 128) // 3
    metrics = b'{"resourceMetrics":[{"scopeMetrics":[{"metrics":['
    wholes = (
        (b'{"resourceMetrics":[', b"{},", count, b"{}]}"),
        (metrics, b"{},", count, b"{}]}]}]}"),
        (b'{"resourceMetrics":[', b"[],", count, b"[]]}"),
        (metrics + b'{"sum":{"dataPoints":"', b"x", 2 * count, b'"}}]}]}]}'),
        (metrics + b'{"summary":{"dataPoints":[', b"{},", 900_000, b"{}]}}]}]}]}"),
        (b"", b'{"a":', 200_000, b"1" + b"}" * 200_000),
        (b"", b"[", 1_000_000, b""),
        (b'{"resourceMetrics":"', b"x", 3 * count, b'"}'),
    )
    for number in target.rounds(0.05):
        begin, part, times, end = wholes[number % len(wholes)]
        target.post(packed(begin + part * times + end), kind=_JSON, content_encoding="gzip")


def _in_flight(target: Target) -> None:
    """Messages of 64 KB that become 63 MiB, many at once on one connection."""
    content = packed(nested((1, 3), b"x" * (63 * MIB)))
    for _ in target.rounds(0.5):
        connection = Connection(target.gateway.grpc)
        try:
            for number in range(60):
                connection.call(2 * number + 1, EXPORT, "rogue-token", is_gzip=True)
                if not connection.message(
                    2 * number + 1, content, min(target.deadline_s, time.monotonic() + 2), is_gzip=True
                ):
                    break
            time.sleep(min(target.left_s(), 2.0))
        except OSError:
            pass
        finally:
            connection.close()


def _unfinished(target: Target) -> None:
    """Frames that never complete wait together, and are released together."""
    for number in range(3):
        target.post(unfinished(f"rogue-wait-{number}", 20_000))
    time.sleep(target.left_s())


def _far_ends(target: Target) -> None:
    for number in range(8):
        if target.left_s():
            target.post(ends(f"rogue-ends-{number}", 0, 39_000, _2090))
    for number in target.rounds(0.02):
        target.post(ends("rogue-ends-0", number, 1, _2090 + 1))


def _late_points(target: Target) -> None:
    """A few points of old steps, which change all steps after them: seeds, ends, and the first global step at last."""
    now = time.time_ns()
    for first in range(0, 6_000, 2_000):
        at = (now + place * 1_000_000 for place in range(first, first + 2_000))
        target.post(body("rogue-late", [Point("loss", 1.0, each) for each in at]))
    time.sleep(min(2.5, target.left_s() / 2))
    for number in target.rounds(0.05):
        places = range(number * 50, number * 50 + 50)
        late = [Point("kasmina.seed.alpha", 0.5, now + place * 1_000_000, f"late-{place}") for place in places]
        target.post(body("rogue-late", [each._replace(is_end=number % 2 == 1) for each in late]))
        if number == 20:
            target.post(body("rogue-late", [Point("esper.global_step", 1.0, now + 7_000 * 1_000_000)]))


def _holes(target: Target) -> None:
    """Every second number is missing: each of 19,000 frames waits for one before it."""
    for number in target.rounds(2.0):
        now = time.time_ns()
        points = []
        for place in range(19_000):
            at = now + place * 1_000_000
            points += [Point("esper.frame.sequence", 2.0 * place + 2.0, at), Point("esper.frame.points", 2.0, at)]
        target.post(body(f"rogue-holes-{number}", points, scope="esper_otel", esper__run__attempt=1))


def _large_step(target: Target) -> None:
    """A step of 20,000 seeds in two halves, then one point more of it again and again, and pulls of it."""
    now = time.time_ns()
    names = [metric.name for metric in SEED_METRICS]
    points = [Point(name, 0.5, now, f"seed-{seed}") for name in names for seed in range(20_000)]
    for half in (points[:100_000], points[100_000:]):
        target.post(body("rogue-large-step", half))
    with target.channel() as channel:
        for number in target.rounds(0.05):
            target.post(body("rogue-large-step", [Point("loss", float(number), now)]))
            target.pull(channel, "rogue-large-step", max_packets=2)


def _page(target: Target) -> None:
    now = time.time_ns()
    seeds = [Point("kasmina.seed.alpha", 0.5, now, f"seed-{number}") for number in range(_WIDE_SEEDS)]
    steps = [Point("loss", 1.0, now + number * 1_000_000) for number in range(_WIDE_STEPS)]
    target.post(body("rogue-page", [*seeds, *steps]))
    time.sleep(min(1.0, target.left_s()))

    def look() -> None:
        for _ in target.rounds():
            try:
                target.gateway.get("/page/steps?run=rogue-page", timeout_s=max(target.left_s(), 0.1))
            except OSError:
                time.sleep(0.05)

    looking = [threading.Thread(target=look, daemon=True) for _ in range(4)]
    for each in looking:
        each.start()
    for each in looking:
        each.join(target.left_s() + 1)


ATTACKS = (
    Attack("seeds-at-own-times", "6,000 points a request, each of its own seed at its own time", _seeds),
    Attack("gzip-members", "gzip bodies of 1 to 4 MiB of empty members", _members),
    Attack("empty-messages", "65 KB that become 64 MiB of empty sub-messages", _empty),
    Attack("json-of-nothing", "64 MiB of {}, of [], of depth and of one wrong value, in JSON", _json),
    Attack("grpc-in-flight", "60 gRPC messages at once of 64 KB that become 63 MiB", _in_flight),
    Attack("frames-that-wait", "60,000 frames that never complete", _unfinished),
    Attack("far-ends", "312,000 ends in the year 2090, then more one by one", _far_ends),
    Attack("late-points", "late points of old steps, each of which changes 6,000 steps", _late_points),
    Attack("holes", "19,000 frames whose numbers have a hole before each", _holes),
    Attack("large-step", "a step of 20,000 seeds, corrected and pulled again and again", _large_step),
    Attack(
        *("page-of-seeds", "the live page of a run with 3,000 seeds, from four windows", _page),
        options=("--ui",),
        has_pull_tokens=False,
    ),
)
