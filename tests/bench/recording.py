"""What recording costs a training process, for ``make bench``; alone: ``python tests/bench/recording.py``.

Each row is measured in a process of its own, with PyTorch imported and the default buffer. A round records 50,000
steps, then sets the gauges of the SDK for about as long. The cost of a step is the CPU time of the whole process, all
threads, divided by the steps. A round of ours ends when other threads have counted and, with export on, sent its steps.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from random import Random
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch  # noqa: F401 - imported, since a process that trains has its objects
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import esper_otel
from esper_otel import EsperSettings, Metric, Telemetry
from esper_otel.record.step import Step
from esper_otel.schema import SEED_METRICS, STEP_METRICS

NAMES = [metric.name for metric in STEP_METRICS]
DERIVED = ("loss_delta", "loss_ewma", "loss_volatility", "grad_norm_ewma", "grad_var")
DERIVED_FROM = ("loss", "gradient_norm")
GIVEN = {name: 0.5 for name in NAMES if name not in DERIVED}
PUT = {name: GIVEN[name] for name in list(GIVEN)[:14]}
FIELDS = [metric.field for metric in SEED_METRICS]
CELLS: dict[str, Any] = dict.fromkeys(FIELDS, 0.5) | {"stage": 4.0}
GATED_OFF = EsperSettings(tolaria_step_enrichment_enabled=False)

STEPS, ROUNDS = 50_000, 3
CALLS = 5_000
LONG, TURNS = 300_000, 3

Work = Callable[[int], object]


class Sdk:
    """Synchronous gauges of the SDK: 21 of the step, and 10 of each seed."""

    def __init__(self, seeds: int = 0) -> None:
        self.provider = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False)
        meter = self.provider.get_meter("bench")
        self._steps = [meter.create_gauge(name) for name in NAMES]
        self._seeds = [meter.create_gauge(metric.name) for metric in SEED_METRICS]
        self._ids = [{"seed_id": f"seed-{number}"} for number in range(seeds)]

    def set(self, attributes: Mapping[str, str] | None = None) -> None:
        """Sets each gauge once."""
        for gauge in self._steps:
            gauge.set(0.5, attributes)
        for of_seed in self._ids:
            for gauge in self._seeds:
                gauge.set(0.5, of_seed)


# -- streams of steps ------------------------------------------------------------------------------------


def plain(telemetry: Telemetry) -> Work:
    """A step in one call: 16 values, from which 5 are derived."""
    return lambda _: telemetry.record_step(GIVEN, epoch=0)


def all_given(telemetry: Telemetry) -> Work:
    """A step in one call: 21 values, which replace those that are derived."""
    values = dict.fromkeys(NAMES, 0.5)
    return lambda _: telemetry.record_step(values, epoch=0)


def scope(telemetry: Telemetry) -> Work:
    """A step scope with 14 values."""

    def work(_: int) -> None:
        with telemetry.step(epoch=0) as now:
            now.put(PUT)

    return work


def seed(now: Step, seed_id: str) -> None:
    """One seed's row, given as a trainer writes it."""
    now.seed(
        seed_id,
        stage=4.0,
        alpha=0.5,
        alpha_steps=0.5,
        kernel_attached=0.5,
        last_kernel_latency_ms=0.5,
        isolation_violations=0.5,
        fallback_used=0.5,
        isolation_dot=0.5,
        isolation_host_norm=0.5,
        isolation_seed_norm=0.5,
    )


def seeds_one_by_one(telemetry: Telemetry) -> Work:
    """The same with 8 seeds."""
    ids = [f"seed-{number}" for number in range(8)]

    def work(_: int) -> None:
        with telemetry.step(epoch=0) as now:
            now.put(PUT)
            for seed_id in ids:
                seed(now, seed_id)

    return work


def seeds_as_columns(telemetry: Telemetry) -> Work:
    """The same with 100 seeds in one call."""
    ids = [f"seed-{number}" for number in range(100)]
    columns: dict[str, Any] = {field: np.full(100, cell) for field, cell in CELLS.items()}

    def work(_: int) -> None:
        with telemetry.step(epoch=0) as now:
            now.put(PUT)
            telemetry.seeds(ids, **columns)

    return work


def alternating(telemetry: Telemetry) -> Work:
    """Two sets of names in turns."""
    few = {name: GIVEN[name] for name in list(GIVEN)[:15]}
    return lambda number: telemetry.record_step(few if number % 2 else GIVEN, epoch=0)


def in_turns(telemetry: Telemetry) -> Work:
    """Ten sets of names in a random order: optional metrics that come and go."""
    random = Random(0)
    given = [{name: GIVEN[name] for name in GIVEN if name in DERIVED_FROM or random.random() < 0.8} for _ in range(10)]
    order = random.choices(given, k=1_000)
    return lambda number: telemetry.record_step(order[number % 1_000], epoch=0)


def seeds_in_turns(telemetry: Telemetry) -> Work:
    """One of 8 seeds is silent in every other step."""
    ids = [f"seed-{number}" for number in range(8)]

    def work(number: int) -> None:
        with telemetry.step(epoch=0) as now:
            now.put(PUT)
            for seed_id in ids[number % 2 :]:
                seed(now, seed_id)

    return work


def with_an_int(telemetry: Telemetry) -> Work:
    """One value is an int."""
    values = GIVEN | {"gradient_norm": 1}
    return lambda _: telemetry.record_step(values, epoch=0)


def with_samples(telemetry: Telemetry) -> Work:
    """The rate of samples is computed."""
    values = {name: value for name, value in GIVEN.items() if name != "samples_per_s"}
    return lambda _: telemetry.record_step(values, epoch=0, samples=64)


def after_going_back(telemetry: Telemetry) -> Work:
    """After a step whose number was not above the highest."""
    telemetry.record_step(GIVEN, epoch=0, global_step=10)
    telemetry.record_step(GIVEN, epoch=0, global_step=5)
    return plain(telemetry)


def seeds_that_change(telemetry: Telemetry) -> Work:
    """Of 8 seeds, one is replaced by a new one in every tenth step."""
    ids = [f"seed-{number}" for number in range(8)]
    new = itertools.count(8)

    def work(number: int) -> None:
        if number % 10 == 9:
            telemetry.retire_seed(ids.pop(0))
            ids.append(f"seed-{next(new)}")
        with telemetry.step(epoch=0) as now:
            now.put(PUT)
            for seed_id in ids:
                seed(now, seed_id)

    return work


def validated(telemetry: Telemetry) -> Work:
    """Results of a validation before every step."""

    def work(number: int) -> None:
        telemetry.validation(loss=number * 0.001)
        telemetry.record_step(GIVEN, epoch=0)

    return work


class Doubled:
    """A user's processor: twice the loss."""

    needs = ("loss",)
    gives = (Metric("doubled", description="Twice the loss."),)

    def initial(self) -> float:
        """Before the first step."""
        return 0.0

    def advance(self, state: float, given: Mapping[str, float]) -> float:
        """The next state."""
        return 2.0 * given["loss"] if "loss" in given else state

    def readings(self, state: float) -> dict[str, float]:
        """The metric."""
        return {"doubled": state}


class Stream(NamedTuple):
    """A stream of steps.

    Attributes:
        what: its name in the table.
        begin: returns the function that records a step.
        seeds: how many seeds the SDK's gauges have that it is compared with.
        start: further arguments of ``start()``.
        like: the stream that may be half as expensive at least; empty if there is none.
        promise: how many times as much the SDK has to cost at least; 0 if nothing is promised.
    """

    what: str
    begin: Callable[[Telemetry], Work]
    seeds: int = 0
    start: Callable[[], dict[str, Any]] = dict
    like: str = ""
    promise: float = 0.0


STREAMS = {
    "record_step": Stream("`record_step`, 16 values, 5 derived", plain, promise=20),
    "all_given": Stream("the same, all 21 values given", all_given),
    "scope": Stream("step scope with `put` of 14 values", scope, promise=12),
    "seeds_8": Stream("the same and 8 seeds x 10, one by one", seeds_one_by_one, 8, promise=25),
    "seeds_100": Stream("the same and 100 seeds x 10, as columns", seeds_as_columns, 100, promise=300),
    "alternating": Stream("`record_step`, other names in every other step", alternating, like="record_step"),
    "turns": Stream("`record_step`, ten sets of names at random", in_turns, like="record_step"),
    "int": Stream("`record_step`, one value is an int", with_an_int, like="record_step"),
    "samples": Stream("`record_step` with `samples=`", with_samples, like="record_step"),
    "processor": Stream(
        "`record_step`, a user's processor", plain, 0, lambda: {"processors": [Doubled()]}, like="record_step"
    ),
    "flag_off": Stream("`record_step`, enrichment off", plain, 0, lambda: {"settings": GATED_OFF}, like="record_step"),
    "backwards": Stream("`record_step` after a step that went backwards", after_going_back, like="record_step"),
    "validation": Stream("`validation()` and `record_step` in every step", validated, like="record_step"),
    "seeds_in_turns": Stream("8 seeds, one silent in every other step", seeds_in_turns, 8, like="seeds_8"),
    "changing": Stream("8 seeds, one replaced in every tenth step", seeds_that_change, 8, like="seeds_8"),
}
EXPORTED = ("record_step", "scope", "seeds_8", "seeds_100", "alternating", "turns", "seeds_in_turns", "changing")


# -- in the process of a row -----------------------------------------------------------------------------


def started(stream: Stream, address: str) -> Telemetry:
    """A session that sends its steps to this address, or nowhere."""
    os.environ["OTEL_METRICS_EXPORTER"] = "otlp" if address else "none"
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{address}"
    return esper_otel.start(run_id="bench", **stream.start())


def settle(telemetry: Telemetry, *, is_exported: bool) -> None:
    """Waits until other threads have done what these steps make them do."""
    if is_exported:
        telemetry.interrupted()  # sends at once
        while telemetry.health()["queue"]:
            time.sleep(0.01)
    telemetry._recorder.publisher.tally.catch_up()


def cost(work: Work, first: int, count: int, then: Callable[[], object]) -> float:
    """Microseconds of CPU of this process for each of ``count`` steps."""
    started_s = time.process_time()
    for number in range(first, first + count):
        work(number)
    then()
    return (time.process_time() - started_s) / count * 1e6


def calls(work: Work, first: int) -> list[float]:
    """Microseconds of each call."""
    clock, spent = time.perf_counter_ns, []
    for number in range(first, first + CALLS):
        started_ns = clock()
        work(number)
        spent.append((clock() - started_ns) / 1e3)
    return spent


def row(stream: Stream, address: str) -> dict[str, float]:
    """Means of ours and theirs in turns, and the calls' median and 99th percentile."""
    sdk = Sdk(stream.seeds)
    sets = STEPS // 12 * 21 // (21 + 10 * stream.seeds)
    ours, theirs, spent = [], [], list[float]()
    steps = STEPS // 5 if stream.seeds == 100 else STEPS
    number = 0
    with started(stream, address) as telemetry:
        work = stream.begin(telemetry)
        cost(work, number, steps // 10, lambda: settle(telemetry, is_exported=bool(address)))
        number += steps // 10
        for _ in range(ROUNDS):
            mean = cost(work, number, steps, lambda: settle(telemetry, is_exported=bool(address)))
            of_sdk = cost(lambda _: sdk.set(), 0, sets, lambda: None)
            of_calls = calls(work, number + steps)
            settle(telemetry, is_exported=bool(address))
            number += steps + CALLS
            ours.append(mean)
            theirs.append(of_sdk)
            spent += of_calls
        dropped = telemetry.health()["dropped"] if address else 0
    assert not dropped, f"{dropped} steps were not sent"
    return {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "median": statistics.median(spent),
        "p99": float(np.quantile(spent, 0.99)),
    }


def pauses(*, recorded: bool) -> dict[str, float]:
    """The longest of 300,000 steps of some microseconds of other work, full collections, live objects and memory."""
    full = 0

    def collected(phase: str, info: dict[str, int]) -> None:
        nonlocal full
        full += phase == "start" and info["generation"] == 2

    def other_work(_: int) -> object:
        return sum(range(500))

    def steps(work: Work, count: int) -> int:
        clock, longest_ns = time.perf_counter_ns, 0
        for number in range(count):
            started_ns = clock()
            other_work(number)
            work(number)
            longest_ns = max(longest_ns, clock() - started_ns)
        return longest_ns

    with started(STREAMS["record_step"], "") if recorded else nullcontext() as telemetry:
        work = plain(telemetry) if telemetry is not None else other_work
        steps(work, LONG // 10)
        process = psutil.Process()
        ring = None if telemetry is None else telemetry._recorder.publisher.ring
        gc.collect()
        tracked, resident, held = len(gc.get_objects()), process.memory_info().rss, 0 if ring is None else ring.size
        gc.callbacks.append(collected)
        longest_ns = steps(work, LONG)
        gc.callbacks.remove(collected)
        grown = process.memory_info().rss - resident
        held = 0 if ring is None else ring.size - held
        return {
            "longest_ms": longest_ns / 1e6,
            "full": full,
            "tracked": len(gc.get_objects()) - tracked,
            "held": held / LONG,
            "resident": grown / LONG,
        }


# -- in the process that has the table -------------------------------------------------------------------


@contextmanager
def receiver() -> Any:
    """The address of a gRPC server in another process."""
    import gateway

    with gateway.bare() as address:
        yield address


def asked(*arguments: str) -> dict[str, float]:
    """What a process of its own found."""
    process = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(process.stdout)
    return found


def measured() -> dict[tuple[str, bool], dict[str, float]]:
    """Each row, by the stream's name and whether its steps are sent."""
    found = {(name, False): asked("--row", name) for name in STREAMS}
    with receiver() as address:
        found |= {(name, True): asked("--row", name, "--to", address) for name in EXPORTED}
    return found


def measured_pauses() -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """With recording and without, in turns."""
    ours, control = [], []
    for _ in range(TURNS):
        ours.append(asked("--pauses", "recorded"))
        control.append(asked("--pauses", "control"))
    return ours, control


def main() -> None:
    """Measures one row and prints it as JSON; or all of them, one a line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--row", choices=STREAMS)
    parser.add_argument("--to", default="")
    parser.add_argument("--pauses", choices=("recorded", "control"))
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(STREAMS[given.row], given.to)))
    elif given.pauses:
        print(json.dumps(pauses(recorded=given.pauses == "recorded")))
    else:
        for (name, is_exported), found in measured().items():
            numbers = " ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"{name}{' and export' * is_exported}: {numbers}")
        for found in itertools.chain(*measured_pauses()):
            print(" ".join(f"{key} {value:.2f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
