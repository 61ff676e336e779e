"""Delivery of notices to a webhook: in batches, retried, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from esper_otel.errors import ConfigurationError
from esper_otel.gateway.notify.notice import ALERTMANAGER, FORMS, Alerts, Notice, most_common
from esper_otel.log import Warnings

_MOST_WAITING = 1000
_MOST_AT_ONCE = 100
_EVERY_S = 2.0  # between two requests: at most 30 a minute
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
_TIMEOUT_S = 10.0
_REPEAT_S = 60.0  # how often Alertmanager is told what goes on
_ALERTS_PATH = "/api/v2/alerts"
_BUSY = (408, 425, 429)


class WebhookAddress(NamedTuple):
    """Where notices go.

    Attributes:
        url: the webhook, which may contain a secret.
        form: empty for our own JSON, ``slack`` or ``alertmanager``.
    """

    url: str
    form: str

    @classmethod
    def of(cls, text: str, option: str) -> WebhookAddress:
        """Reads a target: an URL, for other forms with a prefix, as in ``slack+https://...``.

        Raises:
            ConfigurationError: it is not an URL that can be used. The message does not show it, since it may be secret.
        """
        form, plus, rest = text.strip().partition("+")
        form, url = (form, rest) if plus and form in {"slack", ALERTMANAGER} else ("", text.strip())
        try:
            parts = urlsplit(url)
            is_usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            is_usable = False
        if not is_usable or not url.isprintable() or " " in url:
            raise ConfigurationError(
                f"{option}: give http://... or https://..., for other forms with slack+ or alertmanager+ before it"
            )
        if form == ALERTMANAGER and not parts.path.rstrip("/").endswith(_ALERTS_PATH):
            url = parts._replace(path=parts.path.rstrip("/") + _ALERTS_PATH).geturl()
        return cls(url, form)

    @property
    def shown(self) -> str:
        """The target without what may be secret: its host only."""
        return urlsplit(self.url).hostname or "?"


def targets_of(urls: Iterable[str], file: Path | None) -> tuple[WebhookAddress, ...]:
    """Returns the targets of ``--notify`` and ``--notify-file``.

    Raises:
        ConfigurationError: one cannot be used, or the file cannot be read.
    """
    found = [WebhookAddress.of(url, "--notify") for url in urls]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--notify-file {file}: {error}") from None
        found += [WebhookAddress.of(line, f"--notify-file {file}") for line in lines if line.strip()]
        if not any(line.strip() for line in lines):
            raise ConfigurationError(f"--notify-file {file}: the file is empty")
    return tuple(found)


class Webhook:
    """Sends notices to one target, at most 100 at once and 30 requests a minute.

    While the target cannot be reached or is busy, up to 1,000 notices wait; then the tenant that has most of them loses
    its oldest, and the next message says how many were dropped. What the target refuses for good is dropped.

    Args:
        target: where they go.
        counts: ``sent`` and ``dropped`` notices, and ``failures``.
        every_s: least time between two requests.
    """

    def __init__(self, target: WebhookAddress, counts: Counter[str], *, every_s: float = _EVERY_S) -> None:
        self._target = target
        self._counts = counts
        self._every_s = every_s
        self._waiting: deque[Notice] = deque()
        self._batch: list[Notice] = []  # what is being sent, and as which content
        self._content: Any = None
        self._dropped = self._reported = 0  # since the last message that said so
        self._news = asyncio.Event()
        self._alerts = Alerts() if target.form == ALERTMANAGER else None
        self._warnings = Warnings()

    def put(self, notices: Iterable[Notice]) -> None:
        """Adds notices to those that wait; does not block."""
        self._waiting.extend(notices)
        dropped = max(len(self._waiting) - _MOST_WAITING, 0)
        for _ in range(dropped):
            largest = most_common(notice.tenant for notice in self._waiting)
            place = next(place for place, notice in enumerate(self._waiting) if notice.tenant == largest)
            del self._waiting[place]
        self._drop(dropped)
        if self._waiting:
            self._news.set()

    async def run(self) -> None:
        """Sends until it is cancelled."""
        retry_s = _FIRST_RETRY_S
        async with self._session() as session:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), _REPEAT_S if self._alerts else None)
                wait_s = await self._send(session)
                await asyncio.sleep(self._every_s if wait_s is None else max(wait_s, retry_s))
                retry_s = _FIRST_RETRY_S if wait_s is None else min(retry_s * 2, _LAST_RETRY_S)

    async def close(self, timeout_s: float) -> None:
        """Sends what waits, once, in at most ``timeout_s``; the rest is dropped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._session() as session:
                while (self._batch or self._waiting) and await self._send(session) is None:
                    pass
        self._drop(len(self._batch) + len(self._waiting))

    @staticmethod
    def _session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), trust_env=True)

    def _drop(self, count: int) -> None:
        if count > 0:
            self._dropped += count
            self._counts["dropped"] += count
            self._warnings.say("dropped", "%d notices for %s were dropped", count, self._target.shown)

    async def _send(self, session: aiohttp.ClientSession) -> float | None:
        """Sends the oldest notices. Returns None if they are settled, or after how many seconds to retry."""
        if not self._batch:
            self._batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_AT_ONCE))]
        if not self._content:
            self._reported = self._dropped
            self._content = self._form(self._batch)
        if self._content:
            try:
                async with session.post(self._target.url, json=self._content, allow_redirects=False) as response:
                    status, hint = response.status, response.headers.get("Retry-After", "")
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                return self._failed(type(error).__name__, 0.0)
            if status in _BUSY or status >= 500:
                return self._failed(f"HTTP status {status}", _seconds(hint))
            if not 200 <= status < 300:
                self._failed(f"HTTP status {status}", 0.0)
                self._drop(len(self._batch))
                self._batch = []
        self._counts["sent"] += len(self._batch)
        self._dropped -= self._reported
        self._batch, self._content = [], None
        if not self._waiting:
            self._news.clear()
        return None

    def _form(self, some: list[Notice]) -> Any:
        if self._alerts is None:
            return FORMS[self._target.form](some, self._reported) if some else None
        alerts = self._alerts.of(some)
        ours = [alert["labels"] for alert in alerts]
        return alerts + [alert for alert in self._alerts.active() if alert["labels"] not in ours]

    def _failed(self, why: str, wait_s: float) -> float:
        self._counts["failures"] += 1
        self._warnings.say(
            "failed", "notices cannot be sent to %s: %s; what may succeed later is tried again", self._target.shown, why
        )
        return wait_s


def _seconds(hint: str) -> float:
    """Returns the seconds of a ``Retry-After`` header, at most five minutes; 0 if it cannot be used."""
    try:
        seconds = float(hint)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(hint).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), 300.0) if math.isfinite(seconds) else 0.0
