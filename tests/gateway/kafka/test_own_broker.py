"""A broker with TLS, passwords and rules that is killed while it works; and what is said to those without access."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm
from brokers import Broker, NoBroker
from certificates import Authority
from programs import ROOT, Collector, soak
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

    def allow(self, tier: Tier, *options: str) -> None:
        """Makes the rules for a tier's users."""
        given = [
            "--kafka",
            self.address,
            "--topics",
            tier.prefix,
            "--kafka-config",
            str(self.config("admin")),
            *options,
        ]
        acls = ROOT / "deploy" / "kafka" / "acls.py"
        done = warm.run(acls, *given, "--kafka-config", self.config("admin"), imported=warm.PACKAGE)
        assert done.returncode == 0, done.stderr

    def running(self, tier: Tier, command: str, user: str, *options: str, password: str = "") -> RunningTierProcess:
        """A member or a server that is a user of this broker."""
        given = ["--kafka", self.address, "--kafka-topics", tier.prefix]
        return RunningTierProcess(command, *given, "--kafka-config", str(self.config(user, password)), *options)

    def secrets(self) -> Path:
        """A folder with what the collector needs."""
        folder = self._where / "secrets"
        folder.mkdir(exist_ok=True)
        (folder / "kafka-ca.crt").write_bytes(self._ca.read_bytes())
        return folder

    def config(self, user: str, password: str = "") -> Path:
        """The file of a user."""
        text = CLIENT.read_text(encoding="utf-8").replace("/etc/esper-kafka/ca.crt", str(self._ca))
        text = text.replace("username=member", f"username={user}")
        path = self._where / f"client-{user}{password}.properties"
        path.write_text(text.replace("CHANGE-member", password or f"CHANGE-{user}"), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def secure_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    try:
        broker = SecureBroker(tmp_path_factory.mktemp("secure") / "broker")
    except NoBroker as reason:
        pytest.skip(f"no Kafka broker: {reason}")
    broker.format()
    broker.start()
    yield broker
    broker.kill()


@contextmanager
def member_and_server(broker: SecureBroker, tier: Tier) -> Iterator[RunningTierProcess]:
    """A member and a server, each with a user of its own; the latter is returned."""
    with (
        broker.running(tier, "gateway", "member", "--member", "one"),
        broker.running(tier, "serve", "server") as server,
    ):
        yield server


def test_a_broker_with_users_is_killed(secure_broker: SecureBroker) -> None:
    """Nothing is lost, nothing is there twice; strangers are told what they lack."""
    broker = secure_broker
    tier = Tier(broker.address, 2, str(broker.config("admin")))

    def said(command: str, user: str, *options: str, password: str = "") -> str:
        running = broker.running(tier, command, user, *options, password=password)
        try:
            with running:
                return running.said_at_last()
        except AssertionError as error:
            return str(error)

    wrong = said("serve", "server", password="wrong")
    assert "sasl.password in --kafka-config" in wrong or "Authentication failed" in wrong, wrong
    no_topic = said("serve", "server")
    assert "no access to the topic: allow this user what deploy/kafka/acls.py lists" in no_topic
    broker.allow(tier, "--member", "unknown")
    assert "no access to the topic" in said("gateway", "member")
    broker.allow(tier)
    ranks = Ranks(tier, "secure", 4)
    with member_and_server(broker, tier) as server:
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


@pytest.mark.collector
def test_the_queue_of_the_collector_takes_what_comes_while_the_broker_is_away(
    secure_broker: SecureBroker, tmp_path: Path
) -> None:
    """In small; in ``make soak`` it is away for ten minutes. The collector has a user, and TLS."""
    module, broker = soak("kafka_tier"), secure_broker
    tier = Tier(broker.address, 2, str(broker.config("admin")))
    broker.allow(tier)
    collector = Collector(
        tmp_path,
        *("agent.yaml", "to-kafka.yaml"),
        ESPER_KAFKA=broker.address,
        ESPER_KAFKA_TOPICS=tier.prefix,
        ESPER_KAFKA_PASSWORD="CHANGE-collector",
        ESPER_OTELCOL_SECRETS=str(broker.secrets()),
    )
    with collector, member_and_server(broker, tier) as server:
        found = module.outage(broker, collector, server, Ranks(tier, "outage", 3), 4.0, 0.2)
    assert found.pulled == found.expected
    assert found.gap == 0
    assert found.queued_bytes > 10_000
