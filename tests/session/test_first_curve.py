"""From nothing to a curve: what is said without a receiver, ``esper-otel ui``, and ``start(ui=True)``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests
from programs import free_port, until

from esper_otel import local_ports
from esper_otel.local_ports import gateway_here, is_free, page_at

pytestmark = pytest.mark.own_code

# A network of its own, in which the default ports are free: others on this machine may use them.
NETWORK = ("unshare", "--map-root-user", "--net")
UP = """
import fcntl, socket, struct
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
"""
PROGRAM = f"""{UP}
import json, os, signal, sys, time, urllib.request
import esper_otel
from esper_otel.session import page_hint

def section(name):
    sys.stderr.write(f"== {{name}}\\n")

def trained(**arguments):
    with esper_otel.start(**arguments) as telemetry:
        sys.stderr.write("-- started\\n")
        telemetry.record_step({{"loss": 0.5}}, epoch=0)
        telemetry.close(timeout_s=float(os.environ["WAIT_S"]))

os.environ["WAIT_S"] = "0.1"
section("alone")
trained()
os.environ["WAIT_S"] = "5"
section("page")
trained(run_id="first", ui=True)
section("again")
os.environ["ESPER_UI"] = "true"
trained(run_id="second")
del os.environ["ESPER_UI"]
[page] = page_hint._opened
runs = json.load(urllib.request.urlopen("http://127.0.0.1:4318/page/runs"))["runs"]
print(json.dumps([sorted(run["run_id"] for run in runs), os.getsid(page.pid) == page.pid, page.poll()]))
section("received")
trained()
os.environ["WAIT_S"] = "0.1"
page.terminate()
page.wait()
section("taken")
with socket.create_server(("127.0.0.1", 4317)):
    trained(ui=True)
    time.sleep(0.5)
section("elsewhere")
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
trained(ui=True)
section("nowhere")
os.environ["OTEL_METRICS_EXPORTER"] = "none"
trained(ui=True)
"""


@cache
def needs_network() -> None:
    """The test is skipped where a process may not have a network of its own."""
    if subprocess.run([*NETWORK, sys.executable, "-c", UP], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here (unshare --map-root-user --net)")


def test_what_is_said_and_opened_on_the_default_ports(tmp_path: Path) -> None:
    """Nobody there: what to type, before the first step. A page: its address, once, also for the next session."""
    needs_network()
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [*NETWORK, sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[["first", "second"], true, null]'
    said = {part.partition("\n")[0]: part for part in done.stderr.split("== ")}
    before = {name: said[name].partition("-- started")[0] for name in said}
    type_this = "no receiver: nothing listens on localhost:4317, so no curve is shown yet: type 'esper-otel ui'"
    assert type_this in before["alone"]
    assert "live page: open http://127.0.0.1:4318/ in a browser, in a few seconds; it stays" in before["page"]
    assert "live page: open http://127.0.0.1:4318/ in a browser; the page was already there" in said["again"]
    assert "no live page: it was not opened: another program listens on port 4317; end it, or type" in said["taken"]
    assert "no live page: it was not opened: OTEL_EXPORTER_OTLP_ENDPOINT is set" in before["elsewhere"]
    assert "no live page: it was not opened: this session sends no steps over OTLP" in before["nowhere"]
    assert [name for name in said if "no receiver" in said[name]] == ["alone"]


def ui(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "esper_otel", "ui", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_command_says_where_the_page_is_and_opens_no_second() -> None:
    """A second call names the first page; another program on the port is named; an unused page may end by itself."""
    ports = ["--grpc", f"127.0.0.1:{free_port()}", "--http", f"127.0.0.1:{free_port()}"]
    free = ["--grpc", f"127.0.0.1:{free_port()}", "--http", f"127.0.0.1:{free_port()}"]
    with ExitStack() as ending:
        unused = ui(*free, "--idle-minutes", "0.001")
        first = ending.enter_context(ui(*ports))
        ending.callback(first.kill)
        address = f"http://{ports[3]}/"
        assert first.stdout is not None
        first.stdout.readline()
        assert first.stdout.readline() == f"esper_otel live page: open {address} in a browser\n"
        assert requests.get(address, timeout=10).status_code == 200
        assert page_at(ports[3]) == address
        second = ui(*ports)
        other = ui(ports[0], ports[1], "--http", f"127.0.0.1:{free_port()}", "--idle-minutes", "0.001")
        said, _ = second.communicate(timeout=60)
        assert (said, second.returncode) == (
            f"esper_otel live page: open {address} in a browser; the page was already there\n",
            0,
        )
        said, _ = other.communicate(timeout=60)
        assert other.returncode == 2
        assert f"{ports[1]}: the port is taken" in said
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 0
        said, _ = unused.communicate(timeout=60)
    assert (unused.returncode, "gateway ended" in said) == (0, True)


def test_run_says_that_nobody_receives_and_leaves_the_scripts_output_alone(tmp_path: Path) -> None:
    """In one line, before the script starts."""
    needs_network()
    (tmp_path / "script.py").write_text("print('hello')", encoding="utf-8")
    (tmp_path / "up.py").write_text(f"{UP}\nimport os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
    command: list[str | Path] = [
        *NETWORK,
        sys.executable,
        tmp_path / "up.py",
        "-m",
        "esper_otel",
        "run",
        tmp_path / "script.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=dict(os.environ))
    assert (done.stdout, done.returncode) == ("hello\n", 0)
    [line] = done.stderr.splitlines()
    assert line.startswith("esper_otel no receiver: nothing listens on localhost:4317")


def test_who_listens_on_a_port_of_this_machine() -> None:
    """At either address, also where the queue of connections is full; a foreign page is not taken for ours."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        port = listening.getsockname()[1]
        assert [is_free(port) for _ in range(4)] == [False] * 4
    assert is_free(port)
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert not is_free(port)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        assert page_at(f"127.0.0.1:{server.server_port}") is None
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert page_at(f"127.0.0.1:{server.server_port}") is None
    until("it is free again", lambda: is_free(server.server_port))


@pytest.mark.parametrize(
    ("taken", "expected"), [({4317}, 4317), ({4327}, 4327), ({4317, 4327}, 4327), (set[int](), 4327)]
)
def test_a_run_of_the_live_page_is_found_without_an_address(
    taken: set[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ESPER_UI=1 or esper-otel ui, nobody listens on the port of esper-otel gateway."""
    monkeypatch.setattr(local_ports, "is_free", lambda port: port not in taken)
    assert gateway_here() == f"127.0.0.1:{expected}"
