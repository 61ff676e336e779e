"""A notebook: cells that are run again or interrupted, and a kernel that is restarted, leave no run open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateways import RunningGateway
from programs import until

from esper_otel import TamiyoClient

START = """
import time, esper_otel
telemetry = esper_otel.start(run_id={!r}, settings=esper_otel.EsperSettings(export_every_s=0))
telemetry.record_step({{"loss": 0.5}}, epoch=0)
"""
INTERRUPTED = """
with telemetry.step(epoch=1) as now:
    now.put(loss=0.25)
    print("in it", flush=True)
    time.sleep(60)
"""
AFTERWARDS = """
telemetry.record_step({"loss": 0.125}, epoch=1)
print(telemetry.health()["failed"])
"""
WHOLE = """
import time, esper_otel
with esper_otel.start(run_id="third") as telemetry, telemetry.step(epoch=0):
    print("in it", flush=True)
    time.sleep(60)
"""


class Notebook:
    """A kernel of Jupyter, which runs cells."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._connect()

    def _connect(self) -> None:
        self.client = self._manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=100)

    def run(self, cell: str, *, interrupt_at: str = "") -> str:
        """Runs a cell, interrupts it when it has printed something, and returns its output and its exception."""
        asked = self.client.execute(cell)
        shown = ""
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return shown
            shown += content.get("text", "") if kind == "stream" else content.get("ename", "")
            if interrupt_at and interrupt_at in shown:
                interrupt_at = ""
                self._manager.interrupt_kernel()

    def restart(self) -> None:
        """Restarts the kernel."""
        self.client.stop_channels()
        self._manager.restart_kernel()
        self._connect()


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway() as gateway:
        yield gateway


@pytest.fixture
def notebook(gateway: RunningGateway, tmp_path: Path) -> Iterator[Notebook]:
    jupyter = pytest.importorskip("jupyter_client")
    manager = jupyter.KernelManager()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{gateway.grpc}", "IPYTHONDIR": str(tmp_path)}
    manager.start_kernel(env=os.environ | environ, cwd=str(tmp_path))
    try:
        notebook = Notebook(manager)
        yield notebook
        notebook.client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)


def test_cells_run_again_or_interrupted_and_a_restart(gateway: RunningGateway, notebook: Notebook) -> None:
    """The first session is closed by the second, which an interrupted step leaves usable, and a restart ends it."""
    with TamiyoClient(gateway.grpc) as client:
        notebook.run(START.format("first"))
        until("the first run is there", lambda: any(run.run_id == "first" for run in client.runs()))
        said = notebook.run(START.format("second"))
        assert "closed: run first exit, frames recorded 1, exported 1, dropped 0" in said
        assert "notebook: run first was still open and is closed now, because a new session starts" in said
        assert client.ended("first") == "exit"
        assert notebook.run(INTERRUPTED, interrupt_at="in it").endswith("KeyboardInterrupt")
        assert notebook.run(AFTERWARDS) == "1\n"
        until("its steps are there", lambda: [run.last_step for run in client.runs() if run.run_id == "second"] == [3])
        assert client.ended("second") is None
        notebook.restart()
        until("the second run has ended", lambda: client.ended("second"))
        assert client.ended("second") == "exit"
        assert notebook.run(WHOLE, interrupt_at="in it").endswith("KeyboardInterrupt")
        until("the third run has ended", lambda: client.ended("third"))
        assert client.ended("third") == "KeyboardInterrupt"
