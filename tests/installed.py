"""Tries the installed wheel in an environment without torch; run by ``make test-wheel``, no part of the suite."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import esper_otel
from esper_otel import Stage
from esper_otel.cli import main as main_of_commands
from esper_otel.testing import MemoryCollector

PACKAGED = (
    *("py.typed", "schema/METRICS.md"),
    *("leyline/leyline.proto", "leyline/leyline.binpb", "leyline/messages.pyi"),
    *(f"gateway/serve/page/{name}" for name in ("index.html", "page.css", "page.js")),
    *("pull/pull.proto", "pull/pull.binpb", "pull/messages.pyi"),
)


def main() -> None:
    """Raises when something is not as it should be."""
    assert Path(esper_otel.__file__).is_relative_to(sys.prefix), f"{esper_otel.__file__} is not the installed package"
    assert find_spec("torch") is None, "this environment is to have no torch"
    for name in PACKAGED:
        assert resources.files(esper_otel).joinpath(name).is_file(), f"{name} is not in the wheel"

    with TemporaryDirectory() as folder:
        assert main_of_commands(["files", "--threshold", "hook_budget=80", folder]) == 0
        assert (Path(folder) / "grafana/dashboards/run.json").is_file()
        assert "> 80" in (Path(folder) / "prometheus/rules/esper.yml").read_text(encoding="utf-8")

    with MemoryCollector() as collector:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.grpc_endpoint
        os.environ["ESPER_RISK_THRESHOLDS"] = '{"cpu_pressure_high": Infinity}'  # this machine may be busy
        with esper_otel.start(run_id="wheel") as telemetry:
            with telemetry.step(epoch=0) as now:
                now.put(loss=0.5)
                now.seed("seed-1", stage=Stage.TRAINING)
                state: Any = now.state()
                assert state.packet_id == "wheel-step-1"
            [packets] = telemetry.pull()
            assert [packet.packet_id for packet in packets.telemetry] == ["kasmina-seed-seed-1-1"]
    assert collector.frames_received == 1

    command = [str(Path(sys.executable).with_name("esper-otel"))]
    schema = subprocess.run([*command, "schema"], capture_output=True, text=True, check=True)
    assert "kasmina.seed.isolation.seed_norm" in schema.stdout
    demo = subprocess.run([*command, "demo"], capture_output=True, text=True, check=False)
    assert demo.returncode == 2
    assert 'pip install "esper-otel[demo]"' in demo.stderr, demo.stderr
    print(f"the wheel of {esper_otel.__version__} works without torch")


if __name__ == "__main__":
    main()
