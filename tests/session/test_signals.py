"""Signals that a scheduler sends: what was recorded arrives, and the process does what it would do without us."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm

import esper_otel
from esper_otel.errors import ConfigurationError
from esper_otel.testing import MemoryCollector

pytestmark = pytest.mark.own_code

BEGIN = """
import os, resource, signal, sys, threading, time, warnings
import esper_otel

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
warnings.simplefilter("ignore")  # of forks beside threads

def record(telemetry):
    for _ in range(50):
        telemetry.record_step({"loss": 1.0}, epoch=0)

def send(name):
    os.kill(os.getpid(), signal.Signals[name])
"""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryCollector]:
    with MemoryCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.grpc_endpoint)
        monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "60")
        monkeypatch.setenv("ESPER_BLACK_BOX_FRAMES", "0")
        yield collector


def ended(script: str) -> warm.Done:
    return warm.run("-c", BEGIN + script, imported=warm.PACKAGE)


def outcomes(collector: MemoryCollector) -> list[str]:
    return [p.attributes["outcome"] for p in collector.points() if p.name == "esper.run.ended" and not p.flags]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_was_asked_for_flushes_and_then_ends_the_process(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ESPER_FLUSH_SIGNALS", f"SIGHUP, SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU,{name}")
    done = ended(f"record(esper_otel.start(run_id='run'))\nsend('{name}')\ntime.sleep(30)")
    assert done.returncode == -signal.Signals[name]
    assert collector.frames_received == 50
    assert outcomes(collector) == [name]


def test_by_default_only_sigterm_flushes(collector: MemoryCollector) -> None:
    done = ended("record(esper_otel.start(run_id='run'))\nsend('SIGUSR1')\ntime.sleep(30)")
    assert done.returncode == -signal.SIGUSR1
    assert collector.frames_received == 0


def test_the_users_own_handlers_run_and_training_goes_on(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they were there before, or came later and call the one that they found; once for each signal."""
    monkeypatch.setenv("ESPER_FLUSH_SIGNALS", "SIGUSR1,SIGUSR2,SIGHUP")
    done = ended("""
def later(number, frame):
    print("later")
    found(number, frame)

signal.signal(signal.SIGUSR1, lambda number, frame: print("earlier"))
signal.signal(signal.SIGHUP, signal.SIG_IGN)                     # as under nohup
telemetry = esper_otel.start(run_id="run")
found = signal.getsignal(signal.SIGUSR1)
signal.signal(signal.SIGUSR1, later)
another = esper_otel.start(run_id="another")
for number, name in enumerate(("SIGUSR1", "SIGHUP"), 1):
    record(telemetry)
    send(name)
    while telemetry.health()["exported"] < 50 * number:
        time.sleep(0.01)
signal.signal(signal.SIGUSR2, lambda number, frame: print("replaced"))
send("SIGUSR2")
""")
    assert (done.returncode, done.stdout) == (0, "later\nearlier\nreplaced\n"), done.stderr
    assert outcomes(collector) == ["completed"]


def test_a_chain_of_handlers_ends_in_death(collector: MemoryCollector) -> None:
    """The user's handler stands between those of two sessions."""
    done = ended("""
telemetry = esper_otel.start(run_id="run")
found = signal.getsignal(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda number, frame: (print("mine", flush=True), found(number, frame)))
record(esper_otel.start(run_id="another"))
send("SIGTERM")
time.sleep(30)
""")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "mine\n"), done.stderr
    assert collector.frames_received == 50


def test_a_session_of_another_thread_says_that_signals_do_not_flush_it(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless one of the main thread has set the handler."""
    monkeypatch.setenv("ESPER_FLUSH_SIGNALS", "SIGUSR1")
    in_thread = """
def train():
    record(esper_otel.start(run_id="run"))
    send("SIGTERM")

thread = threading.Thread(target=train)
thread.start()
thread.join()
time.sleep(30)
"""
    done = ended(in_thread)
    assert done.returncode == -signal.SIGTERM
    assert "no flush on SIGTERM or SIGUSR1" in done.stderr
    assert collector.frames_received == 0
    done = ended(f"first = esper_otel.start(run_id='first')\n{in_thread}")
    assert done.returncode == -signal.SIGTERM
    assert "no flush on" not in done.stderr
    assert collector.frames_received == 50


def test_a_forked_child_that_has_a_session_flushes_it(collector: MemoryCollector) -> None:
    done = ended("""
telemetry = esper_otel.start(run_id="run")
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGTERM)
record(esper_otel.start(run_id="child"))
send("SIGTERM")
time.sleep(30)
""")
    assert done.returncode == 0
    assert collector.frames_received == 50


def test_a_signal_in_the_middle_of_recording_ends_the_process_too(
    collector: MemoryCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the signal interrupts may hold a lock that closing needs."""
    monkeypatch.setenv("ESPER_EXPORT_EVERY_S", "0")
    monkeypatch.setenv("ESPER_SPOOL_DIR", str(tmp_path))
    monkeypatch.setenv("ESPER_FLUSH_SIGNALS", "SIGUSR1")
    done = ended("""
def busy():
    for _ in range(50):
        time.sleep(0.004)
        send("SIGUSR1")
    send("SIGTERM")

signal.signal(signal.SIGUSR1, lambda number, frame: None)
telemetry = esper_otel.start(run_id="run")
threading.Thread(target=busy).start()
while True:
    telemetry.record_step({"loss": 1.0}, epoch=0)
    ends_s = time.perf_counter() + 100e-6
    while time.perf_counter() < ends_s:
        pass
""")
    assert done.returncode == -signal.SIGTERM
    assert "dropped 0" in done.stderr
    assert outcomes(collector) == ["SIGTERM"]


@pytest.mark.parametrize("names", ["SIGKILL", "USR1", "SIGUSR1;SIGUSR2", "sigusr1"])
def test_a_name_that_cannot_be_followed_is_an_error_in_words(names: str) -> None:
    message = r"ESPER_FLUSH_SIGNALS\) = '[^']*': '[^']*' is not one of SIGHUP, SIGQUIT, SIGUSR1"
    with pytest.raises(ConfigurationError, match=message):
        esper_otel.EsperSettings(flush_signals=names)
