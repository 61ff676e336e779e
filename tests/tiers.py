"""A tier on Kafka for tests: its topics, members and servers as processes, and steps that say which they are."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests
import warm
from brokers import NoBroker, shared_broker
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from frame_examples import RUN, make_frame, seed_table
from gateways import RunningGateway
from programs import ROOT
from wire import encoder

from esper_otel.errors import GatewayUnavailable, UnknownRun
from esper_otel.frames.frame import Frame
from esper_otel.frames.ring import blocks_of
from esper_otel.pull.client import TamiyoClient
from esper_otel.schema.stage import Stage

# A broker of tests lets sessions be this short. Members of users have 10 s.
SESSION_MS = 3_000
_TOPICS = count(1)
_BEGIN = """
import os, signal, sys
import esper_otel.gateway.kafka.member as member, esper_otel.gateway.kafka.brokers as connection
member.SESSION_MS, connection.TRANSACTION_MS = {session}, {session}
{patch}
from esper_otel.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Tier:
    """A set of topics at a broker."""

    def __init__(self, address: str, partitions: int = 4, config: str | None = None, **options: Any) -> None:
        self.address, self.partitions = address, partitions
        self.prefix = f"t{os.getpid()}-{next(_TOPICS)}"
        self._config = () if config is None else ("--kafka-config", config)
        given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [
            *(ROOT / "deploy" / "kafka" / "topics.py", "--kafka", address, "--topics", self.prefix),
            *("--partitions", str(partitions), "--replication", "1", *self._config, *given),
        ]
        made = (
            warm.run(*command, imported=warm.PACKAGE)
            if warm.are_served()
            else subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        )
        assert made.returncode == 0, made.stdout + made.stderr
        self._producer: Producer | None = None
        lines = [] if config is None else Path(config).read_text(encoding="utf-8").splitlines()
        self._properties = dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    def options(self) -> list[str]:
        """What members and servers are told of it."""
        return ["--kafka", self.address, "--kafka-topics", self.prefix, *self._config]

    def member(self, name: str, *options: str, patch: str = "") -> RunningTierProcess:
        """A member; ``patch`` is Python that it runs first."""
        return RunningTierProcess("gateway", *self.options(), "--member", name, *options, patch=patch)

    def server(self, *options: str, patch: str = "") -> RunningTierProcess:
        """A pull server; ``patch`` is Python that it runs first."""
        return RunningTierProcess("serve", *self.options(), *options, patch=patch)

    def send(self, key: str, body: bytes, partition: int = -1, topic: str = "otlp") -> None:
        """A request, as the collector's exporter sends it."""
        if self._producer is None:
            own = {"log_level": 0, "linger.ms": 1, "enable.idempotence": True}
            self._producer = Producer({"bootstrap.servers": self.address, **own, **self._properties})
        self._producer.produce(f"{self.prefix}.{topic}", body, key, partition)
        self._producer.poll(0)

    def change(self, topic: str, **config: str) -> None:
        """Changes the configuration of a topic."""
        kind = AlterConfigOpType.SET
        entries = [
            ConfigEntry(name.replace("_", "."), value, incremental_operation=kind) for name, value in config.items()
        ]
        resource = ConfigResource(ConfigResource.Type.TOPIC, f"{self.prefix}.{topic}", incremental_configs=entries)
        admin = AdminClient({"bootstrap.servers": self.address, "log_level": 0, **self._properties})
        for future in admin.incremental_alter_configs([resource]).values():
            future.result()

    def flush(self) -> None:
        """Waits until everything is sent."""
        assert self._producer is not None
        assert not self._producer.flush(60)

    def records(self, topic: str, isolation: str = "read_committed") -> list[Any]:
        """All records of a topic."""
        own = {"group.id": "look", "isolation.level": isolation, "enable.partition.eof": True, "log_level": 0}
        consumer = Consumer({"bootstrap.servers": self.address, **own})
        partitions = 1 if topic in ("dead", "events") else self.partitions
        consumer.assign([TopicPartition(f"{self.prefix}.{topic}", each, 0) for each in range(partitions)])
        found, ends = [], 0
        while ends < partitions:
            for message in consumer.consume(1_000, 1.0):
                if message.error() is None:
                    found.append(message)
                else:
                    ends += 1
        consumer.close()
        return found

    def partitions_of(self, topic: str) -> set[int]:
        """The partitions in which a topic has records."""
        return {message.partition() for message in self.records(topic)}


class RunningTierProcess(RunningGateway):
    """A member or a server, as a process of its own."""

    def __init__(self, command: str, *options: str, patch: str = "") -> None:
        super().__init__(*options)
        self._begin = _BEGIN.format(session=SESSION_MS, patch=patch)
        self._what = command

    def command(self) -> list[str]:
        return [sys.executable, "-c", self._begin, self._what, "--json"]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends it by a signal. What it wrote is shown if the test fails."""
        status = super().end(number)
        print(self._what, *self._options, self.said, sep="\n")
        return status

    def metric(self, name: str) -> float:
        """One of its metrics."""
        text = requests.get(f"http://{self.http}/metrics", timeout=60).text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"esper_gateway_{name} "))

    def kill(self) -> None:
        """Kills it at once."""
        self.end(signal.SIGKILL)

    def stop(self) -> None:
        """Lets it stand still, as a machine that hangs."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Lets it go on."""
        self.process.send_signal(signal.SIGCONT)


class Ranks:
    """Ranks of a run that send steps which say which they are: the loss is ``rank * apart + step``.

    A packet has the loss with 24 bits: all of them are needed for 4,000 ranks.
    """

    def __init__(self, tier: Tier, run_id: str, ranks: int, together: int = 1, apart: float = 1e6) -> None:
        self.tier, self.run_id, self.ranks, self.together = tier, run_id, ranks, together
        self.step, self.apart = 0, apart
        self._begin_ns = time.time_ns()
        self.encoders = [encoder(f"process-{rank}") for rank in range(ranks)]

    def frame(self, rank: int, step: int) -> Frame:
        """One of its steps."""
        return make_frame(
            run=replace(RUN, run_id=self.run_id, rank=rank, world_size=self.ranks),
            sequence=step,
            global_step=step,
            time_unix_ns=self._begin_ns + step * 10**6,
            recorded={"loss": rank * self.apart + step, "step_latency_ms": 100.0 + rank, "input_wait_ms": 1.0},
        )

    def send(self, steps: int) -> None:
        """Lets each rank send so many further steps, ``together`` of them in a request."""
        last = self.step + steps
        for first in range(self.step + 1, last + 1, self.together):
            some = range(first, min(first + self.together, last + 1))
            for rank in range(self.ranks):
                self.tier.send(f"{self.run_id}/{rank}", self.body(rank, some))
        self.step = last

    def body(self, rank: int, steps: Iterable[int]) -> bytes:
        """A request with steps of a rank."""
        frames = [self.frame(rank, step) for step in steps]
        return b"".join(request.body for request in self.encoders[rank].requests(blocks_of(frames)))

    def large_body(self, rank: int, step: int) -> bytes:
        """A request with a step of very many seeds, whose values no compression makes smaller."""
        numbers = random.Random(step)
        seeds = seed_table(
            {f"seed-{each}": {"stage": Stage.TRAINING, "alpha": numbers.random()} for each in range(8_000)}
        )
        frame = self.frame(rank, step)._replace(seeds=seeds, live=seeds)
        return b"".join(request.body for request in self.encoders[rank].requests(blocks_of([frame])))

    def expected(self) -> dict[int, list[float]]:
        """The losses of each rank, in order."""
        return {rank: [rank * self.apart + step for step in range(1, self.step + 1)] for rank in range(self.ranks)}


class Puller:
    """Pulls all ranks of a run, each page from the next one of several servers."""

    def __init__(self, run_id: str, servers: Sequence[RunningGateway], **wanted: Any) -> None:
        self.run_id, self.servers, self.wanted = run_id, servers, wanted
        self.cursor: str | None = None
        self.gap = 0
        self.packets: list[Any] = []
        self._turn = 0

    def said(self) -> str:
        """What the server says that does not answer."""
        with pytest.raises(GatewayUnavailable) as raised, TamiyoClient(self.servers[0].grpc, timeout_s=5.0) as client:
            client.pull(self.run_id, self.cursor)
        return str(raised.value)

    @property
    def losses(self) -> dict[int, list[float]]:
        """What was pulled: the losses of each rank, in order."""
        found: dict[int, list[float]] = {}
        for packets in self.packets:
            found.setdefault(packets.rank, []).append(packets.state.training_loss)
        return found

    def pull(self, until: int, timeout_s: float = 60.0) -> None:
        """Pulls until so many steps are there, and no more come."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            before = len(self.packets)
            wait_s = 0.3 if before >= until else 2.0
            self._turn += 1
            server = self.servers[self._turn % len(self.servers)]
            try:
                with TamiyoClient(server.grpc, timeout_s=5.0) as client:
                    page = client.pull(self.run_id, self.cursor, max_packets=97, wait_s=wait_s, **self.wanted)
            except (GatewayUnavailable, UnknownRun):
                page = None
            if page is not None:
                self.cursor, self.gap = page.cursor, self.gap + page.gap
                self.packets += page
            if page is not None and len(self.packets) == before >= until:
                return
            assert time.monotonic() < deadline_s, f"{len(self.packets)} of {until} steps within {timeout_s:g} s"


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a broker that all processes of the test session share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    try:
        with shared_broker(folder / "kafka") as address:
            yield address
    except NoBroker as reason:
        pytest.skip(f"no Kafka broker: {reason}")
