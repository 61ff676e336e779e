"""Tells a user who has no endpoint how to see a curve, and opens the live page (``start(ui=True)``)."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import IO, Any

from esper_otel.export.endpoint import Endpoint, is_endpoint_named
from esper_otel.local_ports import GRPC_PORT, HTTP_PORT, is_free, page_at
from esper_otel.log import announce
from esper_otel.native import threads
from esper_otel.text import printable

# Like a page in a browser, the process stays when the training has ended; it ends when nobody uses it any more.
_IDLE_MINUTES = 30
_OPENING_S = 60.0
_LOOK_EVERY_S = 0.25
_NEEDED = {
    "aiohttp": "aiohttp",
    "bokeh": "bokeh",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
}
_PAGE = f"127.0.0.1:{HTTP_PORT}"
_OTHER_PORTS = (
    "esper-otel ui --grpc 127.0.0.1:4327 --http 127.0.0.1:4328 (and set "
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4327)"
)
LONGEST_WAIT_S = 20.0
_opening: list[Any] = []  # the thread that waits until the page answers
_opened: list[subprocess.Popen[bytes]] = []  # an object without a reference would warn that its process still runs


def show_the_way(endpoint: Endpoint | None, rank: int, *, wants_page: bool, waits: bool = False) -> bool:
    """Opens the live page if it is wanted, or says what to type if nobody would see the run.

    Args:
        endpoint: where the session sends its steps; None if it sends none.
        rank: the session's rank; only rank 0 opens a page or says something.
        wants_page: whether the user wants a page.
        waits: see ``open_page``.

    Returns:
        Whether the user has been told that nothing listens yet.
    """
    if rank:
        return False
    return open_page(endpoint, waits=waits) if wants_page else say_if_nobody_listens(endpoint)


def say_if_nobody_listens(endpoint: Endpoint | None) -> bool:
    """Says what to type if no endpoint is set and nobody listens on the default one. Never waits for the network.

    Returns:
        Whether it said that.
    """
    if endpoint is None or endpoint.protocol == "file" or is_endpoint_named() or not is_free(_port_of(endpoint)):
        return False
    message = (
        f"nothing listens on {endpoint.target}, so no curve is shown yet: type 'esper-otel ui' in another terminal, "
        "or call start(ui=True); or set OTEL_EXPORTER_OTLP_ENDPOINT to the receiver that you have, or "
        "OTEL_METRICS_EXPORTER=none to send nothing. Steps wait in memory until then"
    )
    announce("no receiver", message, logging.WARNING)
    return True


def open_page(endpoint: Endpoint | None, *, waits: bool = False) -> bool:
    """Opens the live page in a process of its own, unless it is already open, and says where it is.

    What prevents that is only reported. Does not wait for the process.

    Args:
        endpoint: where the session sends its steps; None if it sends none.
        waits: whether a program that listens on a port may be waited for, 2 s at most; otherwise a thread waits.

    Returns:
        Whether a process has been started, in which the page will listen.
    """
    if endpoint is None or endpoint.protocol == "file":
        _say_unopened("this session sends no steps over OTLP")
    elif is_endpoint_named():
        _say_unopened(f"OTEL_EXPORTER_OTLP_ENDPOINT is set, and steps go to {endpoint.target}: look at them there")
    elif is_free(GRPC_PORT) and is_free(HTTP_PORT):
        return _start_page()
    elif waits:
        _find_page()
    else:
        _thread(_find_page)
    return False


def _port_of(endpoint: Endpoint) -> int:
    return GRPC_PORT if endpoint.protocol == "grpc" else HTTP_PORT


def _say_unopened(why: str) -> None:
    announce("no live page", f"it was not opened: {why}", logging.WARNING)


def _find_page() -> None:
    page = page_at(_PAGE)
    if page is None:
        taken = HTTP_PORT if is_free(GRPC_PORT) else GRPC_PORT
        _say_unopened(f"another program listens on port {taken}; end it, or type {_OTHER_PORTS}")
    else:
        announce("live page", f"open {page} in a browser; the page was already there")


def _start_page() -> bool:
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        _say_unopened(f'it needs {", ".join(missing)}: pip install "esper-otel[ui]"')
        return False
    command = [sys.executable, "-m", "esper_otel", "ui", "--idle-minutes", str(_IDLE_MINUTES)]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the thread closes it
    try:
        # A session of its own, so that Ctrl-C in the terminal ends the training alone.
        page = subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        log.close()
        _say_unopened(str(error))
        return False
    _opened.append(page)
    idle = f"it stays until nobody has used it for {_IDLE_MINUTES} minutes"
    announce("live page", f"open http://{_PAGE}/ in a browser, in a few seconds; {idle} (process {page.pid})")
    _opening[:] = [_thread(_wait_for_page, page, log)]
    return True


def wait_for_page() -> float:
    """Waits until a page that has just been opened answers, 20 s at most. Returns how long that took, in seconds.

    Otherwise the steps of a short run would be dropped before the page can show them.
    """
    started_s = time.monotonic()
    for thread in _opening:
        thread.join(LONGEST_WAIT_S)
    return time.monotonic() - started_s


def _thread(work: Any, *arguments: object) -> Any:
    thread = threads().Thread(target=work, args=arguments, name="esper-otel-page", daemon=True)
    thread.start()
    return thread


def _wait_for_page(page: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Says why the page does not answer."""
    deadline_s = time.monotonic() + _OPENING_S
    with log:
        while time.monotonic() < deadline_s:
            if page_at(_PAGE) is not None:
                return
            if page.poll() is not None:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()
                _say_unopened(printable(said[-1] if said else f"its process ended with status {page.returncode}", 500))
                return
            time.sleep(_LOOK_EVERY_S)
    _say_unopened(f"{_PAGE} does not answer")
