"""What we promise, measured side by side in one run: ``make bench``.

Recording is measured by the mean CPU of a whole process (``recording.py``): what other threads, collections and memory
cost a step is in it. Rounds take ours and theirs in turns, so that whatever else the machine does meets both: a ratio
is the median of the rounds' ratios. A time alone is the median of the quietest round. Each section of the table is
measured in a process of its own.

Writes the table into docs/reference/costs.md, between its marks, with the date and the command.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gateway
import loops
import many_ranks
import numpy as np
import torch
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, Gauge
from recording import FIELDS, GIVEN, LONG, NAMES, STREAMS, TURNS, Sdk, measured, measured_pauses

import esper_otel
from esper_otel.export.encode import Encoder
from esper_otel.export.resource import resource_for
from esper_otel.frames.block import Block
from esper_otel.frames.frame import Frame
from esper_otel.frames.ring import Ring
from esper_otel.leyline import packets
from esper_otel.schema import METRICS, SEED_METRICS, STEP_METRICS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "costs.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COMMAND = "make bench"


class Row(NamedTuple):
    """One line of the table."""

    what: str
    ours: str
    theirs: str
    ratio: str
    promise: str
    kept: bool | None


def timed(work: Callable[[], object], times: int) -> list[float]:
    """Microseconds of each call."""
    clock = time.perf_counter_ns
    spent = []
    for _ in range(times):
        started = clock()
        work()
        spent.append((clock() - started) / 1e3)
    return spent


def turns(
    ours: Callable[[], object], theirs: Callable[[], object], times: int, rounds: int = 15
) -> tuple[list[float], list[float], float]:
    """Both, in turns, after a round that warms up; and how many times as long theirs take."""
    a: list[float] = []
    b: list[float] = []
    ratios = []
    for number in range(rounds + 1):
        first, second = timed(ours, times), timed(theirs, times)
        if number:
            a += first
            b += second
            ratios.append(statistics.median(second) / statistics.median(first))
    return a, b, statistics.median(ratios)


def least(
    ours: Callable[[], object], theirs: Callable[[], object], times: int, rounds: int = 15
) -> tuple[float, float]:
    """Seconds of CPU of the process a call, as a mean of each round, in turns: the least of ours and of theirs."""
    means: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for work, of_work in zip((ours, theirs), means, strict=True):
            started_s = time.process_time()
            for _ in range(times):
                work()
            of_work.append((time.process_time() - started_s) / times)
    return min(means[0]), min(means[1])


def quietest(work: Callable[[], object], times: int, rounds: int = 60) -> list[float]:
    """The round with the least median, of rounds over some seconds: a neighbour's noise lasts for one or two."""
    found = []
    for _ in range(rounds):
        found.append(timed(work, times))
        time.sleep(0.1)
    return min(found, key=statistics.median)


def p99(spent: list[float]) -> float:
    return float(np.quantile(spent, 0.99))


def us(spent: list[float]) -> str:
    return f"{statistics.median(spent):,.1f} µs (p99 {p99(spent):,.1f})"


def observable(seeds: int) -> tuple[MeterProvider, InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    meter = provider.get_meter("bench")
    ids = [{"seed_id": f"seed-{number}"} for number in range(seeds)]

    def of_step(_options: CallbackOptions) -> list[Observation]:
        return [Observation(0.5)]

    def of_seeds(_options: CallbackOptions) -> list[Observation]:
        return [Observation(0.5, attributes) for attributes in ids]

    for metric in STEP_METRICS:
        meter.create_observable_gauge(metric.name, [of_step], metric.unit)
    for metric in SEED_METRICS:
        meter.create_observable_gauge(metric.name, [of_seeds], metric.unit)
    return provider, reader


def recording() -> list[Row]:
    """The hot path: means of the whole process, each row in a process of its own."""
    found = measured()
    rows = []
    for (name, is_exported), of_row in found.items():
        stream = STREAMS[name]
        what = f"{stream.what}, and export" if is_exported else stream.what
        ours = f"{of_row['ours']:,.1f} µs (calls {of_row['median']:,.1f}, p99 {of_row['p99']:,.1f})"
        theirs, ratio = f"{of_row['theirs']:,.1f} µs", f"{of_row['ratio']:,.1f}x"
        promise, kept = "", None
        if stream.like:  # both in units of the SDK in the same process, since the machine is not equally busy
            more = found[stream.like, is_exported]["ratio"] / of_row["ratio"]
            ratio += f", costs {more:.2f} of {STREAMS[stream.like].what}"
            promise, kept = "at most 2", more <= 2.0
        elif stream.promise and not is_exported:
            promise, kept = f"{stream.promise:g}x", of_row["ratio"] >= stream.promise
        rows.append(Row(what, ours, theirs, ratio, promise, kept))
    return rows


def inside_steps() -> list[Row]:
    """What parts of a step and phases add, by the host's clock; means of CPU of the whole process, in turns."""
    os.environ["OTEL_METRICS_EXPORTER"] = "none"
    with esper_otel.start(device="cpu") as telemetry:

        def step() -> None:
            with telemetry.step(epoch=0) as now:
                now.put(loss=0.5)

        def parts() -> None:
            with telemetry.step(epoch=0) as now:
                for part in ("forward", "backward", "optimizer"):
                    with now.part(part):
                        pass
                now.put(loss=0.5)

        def phase() -> None:
            with telemetry.phase("checkpoint"):
                pass
            step()

        rows = []
        for what, work, most_us in (("three parts of a step", parts, 15.0), ("a phase between steps", phase, 60.0)):
            with_it_s, without_s = least(work, step, 2_000)
            spent_us = (with_it_s - without_s) * 1e6
            ours = f"{spent_us:,.1f} µs more a step"
            rows.append(Row(what, ours, "", "", f"at most {most_us:g} µs", spent_us <= most_us))
        return rows


def pausing() -> list[Row]:
    """What recording adds to the longest step, to collections and to memory."""
    ours, control = measured_pauses()
    longest, of_control = (min(each["longest_ms"] for each in turns) for turns in (ours, control))
    full, full_of_control = (max(each["full"] for each in turns) for turns in (ours, control))
    tracked, held, resident = (max(each[key] for each in ours) for key in ("tracked", "held", "resident"))
    return [
        Row(
            f"longest of {LONG:,} steps, against the same loop without telemetry; least of {TURNS} turns",
            f"{longest:.1f} ms",
            f"{of_control:.1f} ms",
            f"{longest - of_control:+.1f} ms",
            "at most +2 ms",
            longest <= of_control + 2.0,
        ),
        Row(
            "full garbage collections in these steps; most of the turns",
            f"{full:.0f}",
            f"{full_of_control:.0f}",
            "",
            "as many",
            full <= full_of_control,
        ),
        Row(
            "live objects that the collector tracks, more after these steps than before",
            f"{tracked:.0f}",
            f"{max(each['tracked'] for each in control):.0f}",
            f"{tracked / LONG:.4f} a step",
            "at most 0.01 a step",
            tracked <= 0.01 * LONG,
        ),
        Row(
            "bytes held a step: what the ring says, against the growth of the process",
            f"{held:.0f}",
            f"{resident:.0f}",
            f"{held / resident:.2f}x",
            "within 10 %",
            abs(held / resident - 1) <= 0.1,
        ),
    ]


def other_gauges() -> list[Row]:
    """Calls of ``record_step`` beside other ways to keep a value; medians of calls in turns."""
    rows = []
    os.environ["OTEL_METRICS_EXPORTER"] = "none"
    with esper_otel.start(run_id="bench") as telemetry:

        def record_step() -> None:
            telemetry.record_step(GIVEN, epoch=0)

        sdk, labelled = Sdk(), {"run": "bench"}
        a, b, ratio = turns(record_step, lambda: sdk.set(labelled), 2000)
        rows.append(
            Row("a call of `record_step`, against gauges with one attribute", us(a), us(b), f"{ratio:,.0f}x", "", None)
        )
        registry = CollectorRegistry()
        prometheus = [Gauge(name.replace(".", "_"), name, registry=registry) for name in NAMES]

        def prometheus_client() -> None:
            for gauge in prometheus:
                gauge.set(0.5)

        a, b, ratio = turns(record_step, prometheus_client, 2000)
        rows.append(Row("the same, against prometheus_client", us(a), us(b), f"{ratio:.1f}x", "", None))
        floor = np.zeros(21)

        def bare_floor() -> None:
            for place in range(21):
                floor[place] = 0.5
            time.monotonic_ns()

        a, b, ratio = turns(record_step, bare_floor, 2000)
        rows.append(Row("the same, against 21 array stores and a clock", us(a), us(b), f"{ratio:.1f}x", "", None))
    return rows


def ring_of(seeds: int, steps: int) -> Ring:
    """The rows of a session."""
    ids = [f"seed-{number}" for number in range(seeds)]
    os.environ["OTEL_METRICS_EXPORTER"] = "none"
    with esper_otel.start(run_id="bench") as telemetry:
        for number in range(steps):
            if seeds:
                columns: dict[str, Any] = {field: np.full(seeds, number / steps) for field in FIELDS}
                telemetry.seeds(ids, **columns | {"stage": np.full(seeds, 4.0)})
            telemetry.record_step(dict.fromkeys(NAMES, 0.5), epoch=0)
        return telemetry._recorder.publisher.ring


def frames_of(seeds: int, steps: int) -> list[Frame]:
    """The same rows as frames."""
    return ring_of(seeds, steps).after(0, steps)[0]


def exporting() -> list[Row]:
    """Mean CPU time of the process per point, from readings to bytes; the least of some rounds in turns."""
    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    ring = ring_of(8, 100)

    def blocks() -> Iterator[Block]:  # as the exporter takes them
        sent = 0
        while (block := ring.block(sent, 1_000)[0]) is not None:
            yield block
            sent = block.last

    points = sum(request.points for request in encoder.requests(blocks()))
    provider, reader = observable(8)

    def ours() -> None:
        for _request in encoder.requests(blocks()):
            pass

    def theirs() -> None:
        data = reader.get_metrics_data()
        assert data is not None
        encode_metrics(data).SerializeToString()

    of_ours, of_theirs = least(ours, theirs, 20)
    of_ours, of_theirs = of_ours / points * 1e9, of_theirs / 101 * 1e9
    ratio = of_theirs / of_ours
    provider.shutdown()
    row = Row(
        "a point exported: 100 steps x (21 + 8 x 10) a request",
        f"{of_ours:,.0f} ns",
        f"{of_theirs:,.0f} ns",
        f"{ratio:,.0f}x",
        "250x",
        ratio >= 250,
    )
    return [row]


def gpu_like_steps(seconds: float, busy: threading.Event, begun: Callable[[], int]) -> tuple[list[float], list[float]]:
    """Milliseconds of steps of short waits without the GIL; those that met an export, and the others."""
    met: list[float] = []
    others: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        started, is_met, exports = time.perf_counter(), busy.is_set(), begun()
        for _ in range(16):
            time.sleep(0.0001)
        spent = (time.perf_counter() - started) * 1e3
        (met if is_met or begun() != exports else others).append(spent)
    return met, others


def gil() -> list[Row]:
    """1,000 seeds exported again and again beside a loop that waits for a GPU."""
    ring = ring_of(1000, 1)
    encoder = Encoder({metric.name: metric for metric in METRICS}, resource_for)
    provider, reader = observable(1000)

    def theirs() -> None:
        data = reader.get_metrics_data()
        assert data is not None
        encode_metrics(data).SerializeToString()

    def ours() -> None:
        block, _ = ring.block(0, 1)
        assert block is not None
        list(encoder.requests([block]))

    medians = []
    for export in (ours, theirs):
        busy, over, begun = threading.Event(), threading.Event(), [0]

        def work(
            export: Callable[[], None] = export,
            busy: threading.Event = busy,
            over: threading.Event = over,
            begun: list[int] = begun,
        ) -> None:
            while not over.wait(0.1):
                busy.set()
                begun[0] += 1
                export()
                busy.clear()

        thread = threading.Thread(target=work)
        thread.start()
        met, others = gpu_like_steps(10.0, busy, functools.partial(begun.__getitem__, 0))
        over.set()
        thread.join()
        medians.append((statistics.median(met), statistics.median(others), len(met)))
    provider.shutdown()
    (a, quiet_a, met_a), (b, quiet_b, _) = medians
    return [
        Row(
            f"a GPU-like step that meets an export of 1,000 seeds, against a quiet one ({met_a} met)",
            f"{a / quiet_a:.2f}x",
            f"{b / quiet_b:.1f}x",
            "",
            "at most 1.5x",
            a / quiet_a <= 1.5,
        )
    ]


def converting() -> list[Row]:
    """Frames to packets."""
    [small] = frames_of(8, 1)
    [large] = frames_of(100, 1)
    state = quietest(lambda: esper_otel.leyline.state(small), 500)
    seeds = quietest(lambda: packets(large), 50)
    state_us, seeds_us = statistics.median(state), statistics.median(seeds)
    return [
        Row(
            "a step packet, 21 metrics and 8 seeds", us(state), "29 to 55 µs (esper-lite)", "", "30 µs", state_us <= 30
        ),
        Row(
            "all packets of a step with 100 seeds",
            us(seeds),
            "6 to 10 ms (esper-lite)",
            f"{6000 / seeds_us:.0f}x",
            "10x",
            seeds_us <= 600,
        ),
    ]


def conflict() -> list[Row]:
    """8 sources x 10 M float32 in 122 tensors, one thread."""
    torch.set_num_threads(1)
    size = 10_000_000 // 122
    sources = [[torch.randn(size) for _ in range(122)] for _ in range(8)]

    def read() -> None:
        for source in sources:
            for tensor in source:
                tensor.numpy().sum()

    def pairwise() -> None:
        for left in range(8):
            for right in range(left):
                sum(torch.dot(a, b) for a, b in zip(sources[left], sources[right], strict=True)).item()  # type: ignore[union-attr] # a tensor

    spent: dict[str, list[float]] = {"ours": [], "read": [], "pairwise": []}
    for _ in range(8):
        spent["ours"] += timed(lambda: esper_otel.gradient_conflict_rate(sources), 1)
        spent["read"] += timed(read, 1)
        spent["pairwise"] += timed(pairwise, 1)
    ours, one_read, dots = (statistics.median(each[1:]) for each in spent.values())
    return [
        Row(
            "conflict rate, 8 x 10 M, against one read",
            f"{ours / 1e3:.0f} ms",
            f"{one_read / 1e3:.0f} ms",
            f"{ours / one_read:.1f}",
            "at most 4",
            ours <= 4 * one_read,
        ),
        Row(
            "the same, against pairwise `torch.dot`",
            f"{ours / 1e3:.0f} ms",
            f"{dots / 1e3:.0f} ms",
            f"{ours / dots:.2f}",
            "at most 0.6",
            ours <= 0.6 * dots,
        ),
    ]


def ending() -> list[Row]:
    """close() against an endpoint that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        os.environ["OTEL_METRICS_EXPORTER"] = "otlp"
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        telemetry = esper_otel.start(run_id="bench")
        telemetry.record_step({"loss": 1.0}, epoch=0)
        started_s = time.monotonic()
        telemetry.close()
        spent_s = time.monotonic() - started_s
    return [
        Row("close() against a hanging endpoint", f"{spent_s:.1f} s", "12 to 19 s (SDK)", "", "5 s", spent_s <= 5.6)
    ]


def behind_a_gateway() -> list[Row]:
    """Points, requests and latency at a gateway."""
    decoding = gateway.decoding()
    ratio = decoding.ours / decoding.loop
    mine, parsed = gateway.receiving()
    taken_ms = gateway.latencies_ms()
    p50, p99 = np.percentile(taken_ms, 50), np.percentile(taken_ms, 99)
    return [
        Row(
            "gateway, from bytes to steps, one core, against a loop over protobuf",
            f"{decoding.ours / 1e6:.1f} M points/s",
            f"{decoding.loop / 1e6:.2f} M points/s",
            f"{ratio:.1f}x",
            "1 M points/s, 4x",
            bool(decoding.ours >= 1e6 and ratio >= 4),
        ),
        Row(
            "gateway, requests of one step, against a gRPC server that only parses them",
            f"{mine:,.0f}/s",
            f"{parsed:,.0f}/s",
            f"{mine / parsed:.2f}x",
            "1,000/s",
            mine >= 1_000,
        ),
        Row(
            "end of a step to its packets in another process, by the gateway",
            f"{p50:.1f} ms (p99 {p99:.1f})",
            "",
            "",
            "p99 20 ms",
            bool(p99 < 20),
        ),
    ]


def in_others_loops() -> list[Row]:
    """What is added to a step of a loop that is not ours, next to what TraceML adds."""
    costs = loops.measured(3)
    added = {key: cost.cpu - costs[key[0], "alone"].cpu for key, cost in costs.items()}
    rows = []
    for loop, ways in loops.OURS.items():
        ours = [f"`{way}` {added[loop, way]:,.0f} µs" for way in ways]
        theirs = [f"{way} {added[loop, way]:,.0f} µs" for way in loops.TRACEML[loop] if (loop, way) in added]
        what = f"CPU added to a step of {loops.LOOPS[loop]}, of {costs[loop, 'alone'].cpu:,.0f} µs"
        rows.append(Row(what, ", ".join(ours), ", ".join(theirs) or loops.no_traceml(loop), "", "", None))
    return rows


def many_ranks_at_a_gateway() -> list[Row]:
    """The whole gateway process."""
    (ours,) = many_ranks.measured(3, [sys.executable])

    def row(what: str, spent: float, unit: str, most: float) -> Row:
        return Row(
            f"gateway, CPU of its process: {what}", f"{spent:.1f} {unit}", "", "", f"{most:g} {unit}", spent <= most
        )

    return [
        row("a point of one-step frames from 512 ranks", ours.memory, "µs", 1.5),
        row("the same with `--store`", ours.store, "µs", 2.5),
        row("a step pulled by a first puller, in pages of 64", ours.first, "µs", 70),
        row("the same step, for each further puller", ours.further, "µs", 10),
        row("comparing 4,000 ranks", ours.ranks_ms, "ms", 300),
    ]


def line(row: Row) -> str:
    kept = {True: "yes", False: "**no**", None: ""}[row.kept]
    return f"| {row.what} | {row.ours} | {row.theirs} | {row.ratio} | {row.promise} | {kept} |"


def table(rows: list[Row]) -> str:
    lines = ["| what | ours | against | ratio | promised | kept |", "|---|---|---|---|---|---|", *map(line, rows)]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    machine = f"{os.cpu_count()} cores ({platform.machine()})"
    date = datetime.datetime.now(datetime.UTC).date()
    how = (
        "Recording: mean CPU of the whole process a step, the median of rounds in turns with the SDK; in brackets the "
        "time of calls. Other rows: both sides in turns, medians, and of a time alone the quietest round's."
    )
    return "\n".join([*lines, "", f"{date}, `{COMMAND}`, {machine}, {versions}. {how}"])


SECTIONS = (
    recording,
    inside_steps,
    pausing,
    exporting,
    other_gauges,
    gil,
    converting,
    conflict,
    ending,
    behind_a_gateway,
    in_others_loops,
    many_ranks_at_a_gateway,
)


def in_its_own_process(section: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a section; memory and collections do not carry over to the next one."""
    command = [sys.executable, __file__, "--section", section.__name__]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return [Row(*row) for row in json.loads(process.stdout)]


def main() -> int:
    """Measures, prints the table and writes it into costs.md; with ``--section``, prints one section's rows."""
    parser = argparse.ArgumentParser()
    by_name = {section.__name__: section for section in SECTIONS}
    parser.add_argument("--section", choices=by_name)
    section = parser.parse_args().section
    if section is not None:
        print(json.dumps(by_name[section]()))
        return 0
    rows = []
    for each in SECTIONS:
        found = in_its_own_process(each)
        print(*map(line, found), sep="\n", flush=True)  # known even if a later section fails
        rows += found
    text = table(rows)
    print(text)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
