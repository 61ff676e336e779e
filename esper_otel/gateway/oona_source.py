"""The gateway as a source of packets for Oona: a bridge from the publisher's thread to the gateway's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from esper_otel.errors import GatewayUnavailable
from esper_otel.gateway.pull_core import PullCore
from esper_otel.leyline.packets import Page

_TIMEOUT_S = 10.0
Result = TypeVar("Result")


class GatewaySource:
    """A ``PacketSource``. Create it in the event loop; call it from another thread."""

    def __init__(self, core: PullCore) -> None:
        self._core = core
        self._loop = asyncio.get_running_loop()

    def runs(self) -> Sequence[str]:
        """See ``PacketSource``."""

        async def ask() -> list[str]:
            return list(dict.fromkeys(run.run_id for run in self._core.runs().runs if run.stored))

        return self._asked(ask())

    def tenant(self, run_id: str) -> str:
        """See ``PacketSource``. This is safe from another thread: it is a single lookup in a dictionary."""
        return self._core.tenant(run_id)

    def page(self, run_id: str, cursor: str | None, most: int) -> Page:
        """See ``PacketSource``."""
        return self._asked(self._core.packets(run_id, cursor or "", most))

    def _asked(self, question: Coroutine[Any, Any, Result]) -> Result:
        if self._loop.is_closed():
            question.close()
            raise GatewayUnavailable("the gateway has ended")
        answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return answer.result(_TIMEOUT_S)
        except (CancelledError, TimeoutError):
            answer.cancel()
            raise GatewayUnavailable("the gateway is about to stop") from None
