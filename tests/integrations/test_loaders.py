"""A watched loader is the loader: scripts that use theirs in every way do the same with and without us."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm
from later import needs
from patience import patience

from esper_otel.testing import MemoryCollector

pytest.importorskip("torch")
needs("accelerate")

TWINS = Path(__file__).parent / "loader_twins.py"
# Those whose loaders are PyTorch's: others are not followed by `esper-otel run`.
OF_DATA_LOADERS = (
    *("samplers", "random_numbers", "workers", "looks", "broken_off", "streams", "a_batch_ahead"),
    *("a_batch_ahead_by_a_class", "pairs", "the_next_batch_before_the_step"),
    *("in_another_thread", "a_generator_that_trains", "accelerates", "accelerates_streams", "accelerates_before"),
)


class Done(NamedTuple):
    said: dict[str, list[str]]  # on stdout, by way
    errors: list[str]  # on stderr, without what we say ourselves
    status: int | None
    counted: dict[str, dict[str, Any]]  # by the script, and what was recorded: by way and case


def started(folder: Path, ways: str, *names: str, **environment: str) -> tuple[warm.Process, Path]:
    counted = folder / f"{ways}-{environment.get('RANK', '')}.json"
    command = [str(TWINS), str(counted), "without" if ways == "run" else ways, *names]
    if ways == "run":
        command = ["-m", "esper_otel", "run", *command]
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "none", "ESPER_BLACK_BOX_FRAMES": "0", **environment}
    return warm.started(*command, env=environment), counted


def ended(process: warm.Process, counted: Path) -> Done:
    output, errors = process.communicate()
    said: dict[str, list[str]] = {}
    for line in output.splitlines():
        if " " in line:
            said[[*said][-1]].append(line)
        else:
            said[line] = []
    others = [
        line for line in errors.splitlines() if not line.startswith(("esper_otel started:", "esper_otel closed:"))
    ]
    found = json.loads(counted.read_text(encoding="utf-8")) if counted.is_file() else {}
    return Done(said, others, process.wait(), found)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Done]:
    """All cases without us; and with ``watch``, then with ``batches``."""
    folder = tmp_path_factory.mktemp("twins")
    without, ours = started(folder, "without"), started(folder, "watch+batches")
    return ended(*without), ended(*ours)


@pytest.fixture
def watched(both: tuple[Done, Done]) -> dict[str, Any]:
    return both[1].counted["watch"]


def measured(row: dict[str, float]) -> tuple[float, float]:
    return row.get("input_wait_ms", 0.0), row.get("step_latency_ms", 0.0)


def samples(row: dict[str, float]) -> int | None:
    return round(row["samples_per_s"] * sum(measured(row)) / 1e3) if "samples_per_s" in row else None


@pytest.mark.parametrize("way", ["watch", "batches"])
def test_a_script_does_with_our_loader_what_it_does_with_its_own(both: tuple[Done, Done], way: str) -> None:
    """Attributes, copies, random numbers, batches, exceptions, and the weights to the last bit."""
    without, ours = both
    assert len(without.said["without"]) > 10
    assert ours.said[way] == without.said["without"]
    assert (set(ours.errors), ours.status) == (set(without.errors), 0)


def test_each_step_has_the_samples_and_waits_of_the_batches_that_it_used(watched: dict[str, Any]) -> None:
    for name, found in watched.items():
        assert [samples(row) for row in found["rows"]] == found["expected"], name
        spent_ms = sum(sum(measured(row)) for row in found["rows"])
        assert spent_ms <= found["spent_ms"], name


def test_epochs_are_passes_that_train(watched: dict[str, Any]) -> None:
    """Neither looks at one batch nor validations; also where another loader is made of the watched one."""
    epochs = {name: [row["epoch"] for row in found["rows"]] for name, found in watched.items()}
    for name in ("random_numbers", "workers", "looks", "a_batch_ahead"):
        assert epochs[name] == [0] * 6 + [1] * 6, name
    assert epochs["accelerates"] == [0] * 6 + [1] * 3 + [2] * 4 + [3] * 6
    assert epochs["broken_off"] == [0, 0, 0, 1]


def test_waits_are_those_of_the_loop_also_where_batches_are_fetched_ahead(watched: dict[str, Any]) -> None:
    """The first step waits for two batches of at least 4 ms, the last one for none."""
    waits = [row["input_wait_ms"] for row in watched["a_batch_ahead"]["rows"]]
    assert min(waits[0], waits[6]) >= 8.0
    assert min(*waits[1:4], *waits[7:10]) >= 4.0
    assert max(waits[5], waits[11]) < patience(4.0)
    dispatched = [row["input_wait_ms"] for row in watched["accelerates_streams"]["rows"]]
    assert dispatched[0] >= 8.0
    assert sum(dispatched) >= 21.0


def test_a_loop_that_is_left_waits_no_longer(watched: dict[str, Any]) -> None:
    """The script sleeps for 200 ms after its break."""
    assert max(row["step_latency_ms"] for row in watched["broken_off"]["rows"]) < patience(150.0)


def test_run_changes_nothing_and_counts_what_each_step_used(both: tuple[Done, Done], tmp_path: Path) -> None:
    with MemoryCollector() as collector:
        more = {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.grpc_endpoint}
        done = ended(*started(tmp_path, "run", *OF_DATA_LOADERS, **more))
        same = [line for line in both[0].said["without"] if line.split(" ", 1)[0] in OF_DATA_LOADERS]
        assert (done.said["without"], done.errors, done.status) == (same, [], 0)
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for point in collector.points():
            if point.value is not None and not point.attributes.get("seed_id"):
                rows[point.time_unix_ns][point.name] = point.value
    steps = [row for _, row in sorted(rows.items()) if "gradient_norm" in row]
    expected = [number for name in OF_DATA_LOADERS for number in done.counted["without"][name]["expected"]]
    assert [samples(row) for row in steps] == expected


def test_accelerate_shards_a_watched_loader(tmp_path: Path) -> None:
    """24 numbers on two ranks: each has its half, and its steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(free.getsockname()[1])
    ranks = [started(tmp_path, "watch", "sharded", RANK=each, LOCAL_RANK=each, **group) for each in ("0", "1")]
    seen: list[int] = []
    for done in [ended(*each) for each in ranks]:
        assert done.status == 0, done.errors
        batches = json.loads(done.said["watch"][0].split(" ", 1)[1])[:3]
        seen += [number for batch in batches for number in batch]
        assert [samples(row) for row in done.counted["watch"]["sharded"]["rows"]] == [4] * 6
    assert sorted(seen) == [*range(24)]


ENDS = """
import sys
import esper_otel, torch

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.ones(16, 4), batch_size=4)

def train(loader, steps):
    for number, batch in enumerate(loader, start=1):
        model(batch).sum().backward()
        optimizer.step()
        if number == steps:
            break

with esper_otel.start(run_id="first") as telemetry:
    train(esper_otel.watch(model, optimizer, loader, telemetry=telemetry), 2)
try:
    with esper_otel.start(run_id="second") as telemetry:
        for batch in esper_otel.watch(model, optimizer, loader, telemetry=telemetry):
            optimizer.step()
            raise KeyError
except KeyError:
    print(telemetry.health()["failed"])
watched = esper_otel.watch(model, optimizer, loader, run_id="third")
train(watched, 3)
left = iter(watched)
train(left, 1)
if "raise" in sys.argv:
    raise KeyError("at the end")
"""


def test_the_end_of_the_interpreter_is_quiet_and_the_last_step_is_there(tmp_path: Path) -> None:
    """A break inside ``with start()``, and an iterator that is still alive."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS, encoding="utf-8")
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "none"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.stdout, done.returncode) == ("1\n", 0)
    closed = [line.partition(" closed: ")[2] for line in done.stderr.splitlines() if " closed: " in line]
    assert len(done.stderr.splitlines()) == 6, done.stderr
    assert closed == [
        "run first completed, frames recorded 2",
        "run second KeyError, frames recorded 1",
        "run third completed, frames recorded 4",
    ]
