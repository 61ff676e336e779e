"""Notifier: the tasks of ``--notify``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper_otel.gateway.notify.watcher import Watcher
from esper_otel.gateway.notify.webhook import Webhook, WebhookAddress

if TYPE_CHECKING:
    from esper_otel.gateway.pull_core import PullCore


class Notifier:
    """Tells webhooks about runs, from when it is created until it is closed. Create it in the event loop.

    Args:
        runs: the runs to watch.
        targets: the webhooks.
        counts: ``sent`` and ``dropped`` notices, and ``failures``.
    """

    def __init__(self, runs: PullCore, targets: Sequence[WebhookAddress], counts: Counter[str]) -> None:
        self._webhooks = [Webhook(target, counts) for target in targets]
        self._watcher = Watcher(runs, self._webhooks)
        self._watching = asyncio.create_task(self._watcher.run())
        self._sending = [asyncio.create_task(webhook.run()) for webhook in self._webhooks]

    async def close(self, timeout_s: float) -> None:
        """Looks once more, and sends what waits, in at most about ``timeout_s``."""
        tasks = [self._watching, *self._sending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._watcher.look()
        await asyncio.gather(*(webhook.close(timeout_s) for webhook in self._webhooks))
