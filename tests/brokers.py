"""A broker of Apache Kafka for tests: one for all processes of a test session, with topics of its own for each test."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from programs import ROOT, free_port

PROPERTIES = ROOT / "deploy" / "kafka" / "server.properties"
NO_PROPERTIES: Mapping[str, str] = {}
_START_S = 240.0


class NoBroker(Exception):
    """There is none on this machine; the text says why."""


class Broker:
    """A broker on loopback, as deploy/kafka/server.properties describes it.

    Args:
        folder: where its data and its log lie.
        added: further lines of its properties.
        client: what a client needs beside the address.

    Attributes:
        address: host and port for clients.
        process: the JVM, while it runs.
    """

    def __init__(self, folder: Path, added: str = "", client: Mapping[str, str] = NO_PROPERTIES) -> None:
        self._folder = folder
        self._program = program()
        broker, controller = free_port(), free_port()
        self.address = f"127.0.0.1:{broker}"
        text = PROPERTIES.read_text(encoding="utf-8").replace(":9092", f":{broker}").replace(":9093", f":{controller}")
        text = text.replace("/var/lib/esper-kafka", str(folder / "data"))
        # Tests write little: small segments and few threads keep the broker small as well.
        given = {
            "log.segment.bytes": "16777216",
            "group.min.session.timeout.ms": "1000",
            "num.io.threads": "2",
            "num.network.threads": "2",
        }
        given |= {"log.cleaner.dedupe.buffer.size": "2097152", "background.threads": "2"}
        text += "\n" + "\n".join(f"{name}={value}" for name, value in given.items()) + f"\n{added}"
        folder.mkdir(parents=True, exist_ok=True)
        self._properties = folder / "server.properties"
        self._properties.write_text(text, encoding="utf-8")
        self._client = dict(client)
        self.process: subprocess.Popen[bytes] | None = None

    def format(self, *options: str) -> None:
        """Makes its data folder."""
        cluster = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        made = subprocess.run(
            [
                *(self._program, "kafka.tools.StorageTool", "format", "--standalone"),
                *(f"--cluster-id={cluster}", "--config", str(self._properties), *options),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._program, "kafka.Kafka", self._properties],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.wait()

    def wait(self) -> None:
        """Waits until it answers."""
        from confluent_kafka.admin import AdminClient

        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s:
            assert self.process is None or self.process.poll() is None, (self._folder / "log").read_text()[-4_000:]
            with suppress(Exception):
                client = AdminClient({"bootstrap.servers": self.address, "log_level": 0, **self._client})
                client.list_topics(timeout=5)
                return
        raise AssertionError((self._folder / "log").read_text()[-4_000:])

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends it by a signal."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        self.process.wait()


def program() -> str:
    """The program that starts tools of Kafka.

    Raises:
        NoBroker: there is no Java or no Maven, or the jars cannot be had.
    """
    for name in ("java", "mvn"):
        if shutil.which(name) is None:
            raise NoBroker(f"there is no {name}")
    made = subprocess.run([ROOT / "tools" / "build", "kafka"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise NoBroker(f"tools/build kafka failed: {(made.stderr.strip() or 'no reason').splitlines()[-1][:200]}")
    return made.stdout.strip().splitlines()[-1]


@contextmanager
def shared_broker(folder: Path) -> Iterator[str]:
    """The address of one broker for all processes of a test session; the last one that leaves ends it.

    Args:
        folder: a folder that they have in common.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, state = folder / "lock", folder / "state.json"
    broker = None
    with _locked(lock):
        known = json.loads(state.read_text()) if state.exists() else {}
        if not known:
            broker = Broker(folder / "broker")
            broker.format()
            broker.start()
            assert broker.process is not None
            known = {"address": broker.address, "pid": broker.process.pid, "users": 0}
        known["users"] += 1
        state.write_text(json.dumps(known))
    try:
        yield known["address"]
    finally:
        with _locked(lock):
            known = json.loads(state.read_text())
            known["users"] -= 1
            if known["users"]:
                state.write_text(json.dumps(known))
            else:
                state.unlink()
                with suppress(ProcessLookupError):
                    os.kill(known["pid"], signal.SIGKILL)
                if broker is not None and broker.process is not None:
                    broker.process.wait()
        if broker is not None and broker.process is not None:
            broker.process.returncode = 0  # the last process that leaves ends it


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
