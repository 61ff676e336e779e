"""``esper-otel check --through``: says that a step came, or which part of the way lost, renamed or changed it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm
from gateways import RunningGateway
from programs import ROOT, Collector, Prometheus

pytestmark = pytest.mark.collector

PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"


class Stack(NamedTuple):
    """What stands behind the trainer."""

    gateway: RunningGateway
    prometheus: Prometheus
    folder: Path

    def agent(self, more: str = "") -> Collector:
        """A collector as shipped, or with something changed."""
        configs: list[str | Path] = ["agent.yaml"]
        if more:
            (self.folder / "more.yaml").write_text(more, encoding="utf-8")
            configs.append(self.folder / "more.yaml")
        variables = {"ESPER_PROMETHEUS_OTLP": self.prometheus.otlp, "ESPER_GATEWAY": self.gateway.grpc}
        return Collector(self.folder / "agent", *configs, **variables)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with RunningGateway() as gateway, Prometheus(folder / "prometheus", PROMETHEUS) as prometheus:
        yield Stack(gateway, prometheus, folder)


def checked(endpoint: str, *options: str, environ: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """The exit status, and the stages by name, of a check."""
    done = warm.run(
        *("-m", "esper_otel", "check", "--through", "--json", *options),
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **(environ or {})},
        imported=warm.PACKAGE,
    )
    assert done.stdout, done.stderr
    return done.returncode, {stage["name"].split()[0]: stage for stage in json.loads(done.stdout)["stages"]}


def asking(stack: Stack) -> list[str]:
    return ["--prometheus", f"http://{stack.prometheus.address}", "--gateway", stack.gateway.grpc, "--within", "8"]


def test_the_shipped_stack_lets_everything_through(stack: Stack) -> None:
    with stack.agent() as agent:
        status, stages = checked(f"http://{agent.grpc}", *asking(stack))
    assert status == 0, stages["Prometheus"]
    assert "NaN as NaN, missing values still missing" in stages["gateway"]["message"]
    assert "names as in the catalogue, labels run_id and rank" in stages["Prometheus"]["message"]
    assert stages["gateway"]["message"].endswith("; the run's end and its number of ranks arrived")
    assert stages["Prometheus"]["message"].endswith("; the run's end arrived")


def test_a_stock_prometheus_is_understood(tmp_path: Path) -> None:
    (tmp_path / "stock.yml").write_text("global: {}\n", encoding="utf-8")
    with Prometheus(tmp_path / "prometheus", tmp_path / "stock.yml") as prometheus:
        environ = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{prometheus.otlp}/v1/metrics",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }
        status, stages = checked("http://unused:1", "--prometheus", f"http://{prometheus.address}", environ=environ)
    assert status == 0, stages["Prometheus"]
    assert "`stock`" in stages["Prometheus"]["message"]
    assert "the run only in the label instance" in stages["Prometheus"]["message"]


TRANSFORM = """
processors:
  transform/prometheus:
    metric_statements:
      - context: {context}
        statements: ['{statement}']
"""


@pytest.mark.parametrize(
    ("context", "statement", "message"),
    [
        ("metric", 'set(metric.name, "cost") where metric.name == "loss"', "there is no loss"),
        ("datapoint", 'set(datapoint.value_double, 0.0) where metric.name == "gradient_norm"', "arrived as 0"),
        ("datapoint", 'set(datapoint.value_double, 0.5) where metric.name == "loss"', "arrived as 0.5"),
        ("metric", 'set(metric.name, "took") where metric.name == "step_latency_ms"', "was renamed on the way"),
        ("metric", 'set(metric.name, "over") where metric.name == "esper.run.ended"', "esper.run.ended did not arrive"),
    ],
)
def test_what_a_processor_does_to_it_is_said(stack: Stack, context: str, statement: str, message: str) -> None:
    """On the way to Prometheus; the gateway, beside it, has everything."""
    with stack.agent(TRANSFORM.format(context=context, statement=statement)) as agent:
        status, stages = checked(f"http://{agent.grpc}", *asking(stack))
    assert status == 1
    assert stages["gateway"]["ok"]
    assert message in stages["Prometheus"]["message"], stages["Prometheus"]
    assert stages["Prometheus"]["fix"]


TRUNCATION = """
processors:
  transform/time:
    metric_statements:
      - context: datapoint
        statements: ['set(datapoint.time, TruncateTime(datapoint.time, Duration("1s")))']
service:
  pipelines:
    metrics/esper:
      processors: [memory_limiter, transform/time]
    metrics/prometheus:
      processors: [memory_limiter, transform/time, transform/prometheus]
"""


def test_times_that_are_cut_are_said(stack: Stack) -> None:
    """Of two steps within a second one is lost. More of what processors do: ``gateway/rebuild/test_processors.py``."""
    with stack.agent(TRUNCATION) as agent:
        status, stages = checked(f"http://{agent.grpc}", *asking(stack))
    assert status == 1
    for stage in stages["gateway"], stages["Prometheus"]:
        assert "cut to whole seconds" in stage["message"], stage
        assert "steps within one such unit become one" in stage["fix"]


ONE_RANK = """
      - context: resource
        statements: ['set(resource.attributes["esper.rank"], 0)']
"""


def test_times_that_are_cut_are_said_where_a_rank_is_missing(stack: Stack) -> None:
    """Prometheus may refuse all of a request in which two steps have one time, and with it a rank."""
    with stack.agent(TRUNCATION.replace("\nservice:", ONE_RANK.rstrip() + "\nservice:")) as agent:
        status, stages = checked(f"http://{agent.grpc}", *asking(stack))
    assert status == 1
    assert "cut to whole seconds" in stages["Prometheus"]["message"], stages["Prometheus"]


def test_the_part_of_the_way_that_is_cut_is_named(stack: Stack) -> None:
    """Prometheus is elsewhere: the gateway has it, so the cut is behind the collector."""
    with stack.agent() as agent:
        agent.end()
        agent.variables["ESPER_PROMETHEUS_OTLP"] = "http://127.0.0.1:1/api/v1/otlp"
        agent.start()
        status, stages = checked(f"http://{agent.grpc}", *asking(stack)[:4], "--within", "3")
        assert status == 1
        assert stages["gateway"]["ok"]
        assert "look between the collector and Prometheus" in stages["Prometheus"]["message"]
        status, stages = checked(f"http://{agent.grpc}", "--gateway", "127.0.0.1:1", "--within", "3")
        assert status == 1
        assert "no gateway answered there" in stages["gateway"]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "give --prometheus URL, --gateway ADDRESS, or both"), (["--prometheus", "localhost:9090"], "give a URL")],
)
def test_a_mistake_is_said(stack: Stack, options: list[str], message: str) -> None:
    with stack.agent() as agent:
        environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{agent.grpc}"}
        done = warm.run("-m", "esper_otel", "check", "--through", *options, env=environ, imported=warm.PACKAGE)
    assert done.returncode == 2
    assert message in done.stderr
