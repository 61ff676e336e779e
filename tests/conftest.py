"""What holds for every test: a clean environment, settings as shipped, no thread left behind."""

from __future__ import annotations

import fcntl
import gc
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import warm
from browser import CHROMIUM, Browser
from dealing import dealt
from hypothesis import HealthCheck, settings

from esper_otel.settings import EsperSettings

_FOREIGN_PREFIXES = ("OTEL_", "ESPER_", "SLURM_", "TORCHELASTIC_")
_FOREIGN_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "GRPC_PROXY"),
}
_THREAD_END_TIMEOUT_S = 60.0

# For PyTorch, here and in what a test starts: models as small as those of tests only wait for more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes, or the making of one, says on a busy machine nothing about us. A test that needs more
# examples than these says how many; `make fuzz` looks at thousands.
_STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20)
settings.register_profile("steady", _STEADY)
settings.register_profile("fuzz", _STEADY, max_examples=2_000)
# The same examples each time: newer versions of Hypothesis do this by themselves.
settings.register_profile("same", _STEADY, derandomize=True, database=None)
settings.load_profile("same" if os.environ.get("CI") else "steady")


@pytest.fixture(autouse=True)
def _environment_of_our_own() -> Iterator[None]:
    """The machine's launcher, proxies and OpenTelemetry settings do not reach a test, nor one test the next."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_FOREIGN_PREFIXES) or name.upper() in _FOREIGN_NAMES:
            del os.environ[name]
    os.environ["ESPER_BLACK_BOX_FRAMES"] = "0"  # but for its own tests: many a test ends badly on purpose
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _settings_as_shipped() -> Iterator[None]:
    """A default assigned to the class in one test is not the next test's."""
    yield
    for name in EsperSettings.settings:
        delattr(EsperSettings, name)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Whoever starts a thread of ours also ends it: a training process starts and closes many sessions."""
    before = set(threading.enumerate())
    yield
    deadline_s = time.monotonic() + _THREAD_END_TIMEOUT_S
    ours = [each for each in threading.enumerate() if each not in before and each.name.startswith("esper-otel")]
    for thread in ours:
        thread.join(max(deadline_s - time.monotonic(), 0.0))
    left = [thread.name for thread in ours if thread.is_alive()]
    assert not left, f"threads left running: {', '.join(left)}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def pytest_configure(config: pytest.Config) -> None:
    """Processes that have PyTorch already: see ``warm``. Test processes that run side by side share its server."""
    if not hasattr(config, "workerinput"):
        warm.serve_tests()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """In a fresh clone the first process compiles what all of them import, while the others wait; else none waits."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None or any(Path(__file__).parent.glob("__pycache__/test_warm.*.pyc")):  # among the last
        return (yield)
    path = Path(tempfile.gettempdir()) / f"collecting-{run}"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)
            return (yield)
        result = yield
        path.unlink()
        return result


def pytest_collection_finish() -> None:
    """Thousands of tests and all that they import stay: nobody looks through them for garbage again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs a program may have to build it, for minutes; what takes long comes first."""
    for item in items:
        if item.get_closest_marker("collector") is not None:
            item.add_marker(pytest.mark.timeout(900))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = dealt(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Closes with what could not run here, and why."""
    yield
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    for reason, tests in sorted(reasons.items()):
        terminalreporter.write_line(f"not run here: {tests} {'test' if tests == 1 else 'tests'}: {reason}")
    if not reasons:
        terminalreporter.write_line("not run here: nothing")


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """The garbage collector stands still: for what else there is in this process it takes as long as a long turn."""
    gc.collect()
    gc.freeze()  # as the gateway's command does
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as small as those of tests only wait for more of PyTorch's threads, above all beside another test."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
