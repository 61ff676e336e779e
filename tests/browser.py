"""A browser for tests: Chromium, driven over the DevTools protocol, in real time."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import requests

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S = 120.0


class Browser:
    """Runs while the ``with`` block lasts.

    Args:
        folder: an empty folder for its profile.

    Attributes:
        uncaught: exceptions of the open page's scripts that nothing caught.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._hurrying = ""
        self.uncaught: list[str] = []

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={self._folder}", "--window-size=1400,1300", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._loop.run_until_complete(self._connect())
            self._call("Runtime.enable")
            self._call("Page.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def open(self, url: str, hurry: int = 1) -> None:
        """Shows a page.

        Args:
            url: its address.
            hurry: by how much the timers of its scripts are faster than they say.
        """
        if self._hurrying:
            self._call("Page.removeScriptToEvaluateOnNewDocument", identifier=self._hurrying)
        timers = "".join(
            f"{{ const timer = window.{name}; window.{name} = (work, ms) => timer(work, ms / {hurry}); }}"
            for name in ("setTimeout", "setInterval")
        )
        self._hurrying = self._call("Page.addScriptToEvaluateOnNewDocument", source=timers)["identifier"]
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")
        self.uncaught.clear()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, timeout_s: float = TIMEOUT_S) -> None:
        """Waits until an expression is true."""
        deadline_s = time.monotonic() + timeout_s
        while not self.value(expression):
            assert time.monotonic() < deadline_s, f"{expression} is not so: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    @contextmanager
    def as_a_phone(self) -> Iterator[None]:
        """A screen of 390 by 844 pixels that is touched."""
        self._call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        self._call("Emulation.setTouchEmulationEnabled", enabled=True)
        yield
        self._call("Emulation.setTouchEmulationEnabled", enabled=False)
        self._call("Emulation.clearDeviceMetricsOverride")

    def touch(self, element: str) -> None:
        """Touches the middle of what a JavaScript expression gives."""
        box = self.value(f"(({element}).getBoundingClientRect().toJSON())")
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def _end(self) -> None:
        if hasattr(self, "_session"):
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(TIMEOUT_S)

    async def _connect(self) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        port_file = self._folder / "DevToolsActivePort"
        while not port_file.is_file() or "\n" not in port_file.read_text():
            assert time.monotonic() < deadline_s, "Chromium does not start"
            await asyncio.sleep(0.02)
        port = port_file.read_text().split()[0]
        [target, *_] = [
            each
            for each in requests.get(f"http://127.0.0.1:{port}/json/list", timeout=TIMEOUT_S).json()
            if each["type"] == "page"
        ]
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._answer(method, parameters), TIMEOUT_S))

    async def _answer(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self._socket.receive_str())
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.uncaught.append(details.get("exception", {}).get("description", details["text"]))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
