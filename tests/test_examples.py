"""Each example, run as a user runs it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import warm
from gateways import RunningGateway
from programs import until

from esper_otel import TamiyoClient

pytestmark = pytest.mark.lengthy

pytest.importorskip("torch")

EXAMPLES = Path(__file__).parent.parent / "examples"
# How many steps each records.
STEPS = {"loop.py": 40, "watch.py": 40, "lightning_fit.py": 40, "huggingface.py": 16, "accelerate_loop.py": 20}


def run(gateway: RunningGateway, *command: str | Path) -> str:
    environ = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}",
        "ESPER_RUN_ID": "untouched",
    }
    done = warm.run(*command, env=environ, imported=warm.FRAMEWORKS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_script_is_listed_and_has_its_test() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"draw_demo.py"}
    assert scripts == STEPS.keys() | {"untouched.py", "controller.py"}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(\./(\w+\.py)\)", readme)) == scripts


ALL = """
import os, runpy, sys
for path in sys.argv[1:]:
    os.environ["ESPER_RUN_ID"] = os.path.basename(path)
    runpy.run_path(path, run_name="__main__")
"""


def test_they_run_and_their_steps_arrive() -> None:
    """One after the other in one process, since importing torch is what takes long."""
    with RunningGateway() as gateway:
        run(gateway, "-c", ALL, *(EXAMPLES / name for name in STEPS))
        with TamiyoClient(gateway.grpc) as client:
            until("all have ended", lambda: all(state.ended for state in client.runs()))
            assert {state.ended for state in client.runs()} == {"completed"}  # watch.py does not close its session
            assert {state.run_id: state.stored for state in client.runs()} == STEPS
            for name in STEPS:
                packets = client.pull(name, max_packets=1)[0]
                expected = {"loss", "gradient_norm", "samples_per_s", "input_wait_ms", "step_latency_ms", "loss_ewma"}
                assert expected <= packets.names, name


def test_the_untouched_script_is_followed_and_a_controller_sees_its_steps() -> None:
    with RunningGateway() as gateway:
        out = run(gateway, "-m", "esper_otel", "run", EXAMPLES / "untouched.py")
        assert out.splitlines()[-1].startswith("epoch 1: loss ")
        seen = run(gateway, EXAMPLES / "controller.py", "--target", gateway.grpc, "untouched")
        assert len([line for line in seen.splitlines() if line.startswith("step ")]) == 40
