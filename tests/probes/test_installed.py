"""Probes of other packages: a real entry point of a package on the path, and those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import esper_otel
from esper_otel.probes.installed import GROUP, installed_probes
from esper_otel.settings import EsperSettings

VENDOR = """
from esper_otel import Metric

class Watts:
    gives = ("gpu_util_percent", Metric("acme.power_w", unit="W"))
    def __init__(self, device): self.device = device
    def sample(self): return {"gpu_util_percent": 50.0, "acme.power_w": 250.0}
    def close(self): pass

def unknown(device): probe = Watts(device); probe.gives = ("acme.nothing",); return probe
def taken(device): probe = Watts(device); probe.gives = (Metric("esper.mine"),); return probe
def no_probe(device): return object()
def raises(device): raise RuntimeError("no licence")
"""


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_probe.py").write_text(VENDOR, encoding="utf-8")
    about = tmp_path / "acme_probe-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-probe\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\nacme = acme_probe:Watts\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("vendor")
def test_a_package_adds_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    with esper_otel.start(run_id="vendor", settings=EsperSettings(probe_period_s=0.01)) as telemetry:
        found: Mapping[str, float] = {}
        while "acme.power_w" not in found:
            with telemetry.step(epoch=0) as now:
                now.put(loss=1.0)
            found = telemetry.pull(max_packets=10_000)[-1].state.training_metrics
    assert found["acme.power_w"] == 250.0
    assert found["gpu_util_percent"] == 50.0
    monkeypatch.setenv("ESPER_TOLARIA_STEP_ENRICHMENT_ENABLED", "false")
    with esper_otel.start(run_id="off") as telemetry:  # no probe, and nothing of theirs is declared
        telemetry.record_step({"loss": 1.0}, epoch=0)


@pytest.mark.usefixtures("vendor")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unknown", "'acme.nothing' is not a step metric of the catalogue"),
        ("taken", "'esper.mine' is taken"),
        ("no_probe", "no method sample()"),
        ("raises", "RuntimeError: no licence"),
        ("absent", "AttributeError"),
    ],
)
def test_one_that_cannot_be_used_is_left_out_in_words(name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    good = EntryPoint("good", "acme_probe:Watts", GROUP)
    with caplog.at_level(logging.WARNING, "esper_otel"):
        found = installed_probes(lambda: "cpu", found=[EntryPoint("bad", f"acme_probe:{name}", GROUP), good, good])
    assert len(found) == 1  # the second declares the same name again
    assert f"the probe bad (acme_probe:{name}) is left out" in caplog.text
    assert reason in caplog.text
    assert "'acme.power_w' is taken" in caplog.text
