"""A broker with TLS, passwords and rules that is killed while it works; and what is said to those without access."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import Broker, NoBroker
from certificates import Authority
from programs import ROOT
from tiers import Puller, Ranks, RunningTierProcess, Tier

pytestmark = pytest.mark.lengthy

SECURE = ROOT / "deploy" / "kafka" / "secure.properties"
CLIENT = ROOT / "deploy" / "kafka" / "client.properties"


class SecureBroker(Broker):
    """As the files in deploy/kafka say, with certificates of the test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        authority = Authority(folder)
        pair = authority.pair("broker")
        pem = folder / "broker.pem"
        pem.write_text(pair.key.read_text() + pair.certificate.read_text(), encoding="utf-8")
        self._ca = authority.certificate
        self._where = folder
        added = SECURE.read_text(encoding="utf-8").replace("/etc/esper-kafka/broker.pem", str(pem))
        properties = dict(
            line.split("=", 1) for line in self.config("admin").read_text().splitlines() if not line.startswith("#")
        )
        super().__init__(folder, added.replace("/etc/esper-kafka/ca.crt", str(self._ca)), properties)

    def config(self, user: str, password: str = "") -> Path:
        """The file of a user."""
        text = CLIENT.read_text(encoding="utf-8").replace("/etc/esper-kafka/ca.crt", str(self._ca))
        text = text.replace("username=member", f"username={user}")
        path = self._where / f"client-{user}{password}.properties"
        path.write_text(text.replace("CHANGE-member", password or f"CHANGE-{user}"), encoding="utf-8")
        return path


@pytest.fixture
def secure_broker(tmp_path: Path) -> Iterator[SecureBroker]:
    try:
        broker = SecureBroker(tmp_path / "broker")
    except NoBroker as reason:
        pytest.skip(f"no Kafka broker: {reason}")
    broker.format()
    broker.start()
    yield broker
    broker.kill()


def test_a_broker_with_users_is_killed(secure_broker: SecureBroker) -> None:
    """Nothing is lost, nothing is there twice; strangers are told what they lack."""
    broker = secure_broker
    tier = Tier(broker.address, 2, str(broker.config("admin")))

    def process(command: str, user: str, *options: str, password: str = "") -> RunningTierProcess:
        config = str(broker.config(user, password))
        given = ("--kafka", broker.address, "--kafka-topics", tier.prefix, "--kafka-config", config)
        return RunningTierProcess(command, *given, *options)

    def said(command: str, user: str, *options: str, password: str = "") -> str:
        running = process(command, user, *options, password=password)
        try:
            with running:
                return running.said_at_last()
        except AssertionError as error:
            return str(error)

    wrong = said("serve", "server", password="wrong")
    assert "sasl.password in --kafka-config" in wrong or "Authentication failed" in wrong, wrong
    no_topic = said("serve", "server")
    assert "no access to the topic: allow this user what deploy/kafka/acls.py lists" in no_topic
    acls: list[str | Path] = [
        sys.executable,
        ROOT / "deploy" / "kafka" / "acls.py",
        "--kafka",
        broker.address,
        "--topics",
        tier.prefix,
    ]
    subprocess.run([*acls, "--kafka-config", broker.config("admin"), "--member", "unknown"], check=True)
    assert "no access to the topic" in said("gateway", "member")
    subprocess.run([*acls, "--kafka-config", broker.config("admin")], check=True)
    ranks = Ranks(tier, "secure", 4)
    with process("gateway", "member", "--member", "one"), process("serve", "server") as server:
        puller = Puller("secure", [server])
        ranks.send(10)
        tier.flush()
        puller.pull(40)
        ranks.send(10)
        broker.kill()
        ranks.send(10)
        time.sleep(1)
        broker.start()
        ranks.send(10)
        tier.flush()
        puller.pull(160, timeout_s=120)
        assert puller.losses == ranks.expected()
        assert puller.gap == 0
