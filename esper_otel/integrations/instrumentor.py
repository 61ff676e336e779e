"""What ``opentelemetry-instrument`` and the OpenTelemetry Operator load: records a training script without changes."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined] # it is there

from esper_otel.integrations.script import FOLLOWED, follow_process
from esper_otel.log import logger

_LEVELS = {"trace": logging.DEBUG, "debug": logging.DEBUG, "info": logging.INFO, "error": logging.ERROR}


class EsperInstrumentor(BaseInstrumentor):  # type: ignore[misc] # its package has no types for mypy
    """Records the steps of every optimizer of the process, as ``esper-otel run`` does.

    ``opentelemetry-instrument`` calls it in the script and in every Python process that the script starts, such as the
    workers of ``torchrun``. Processes that a recorded one starts are not recorded: its DataLoader workers, or a script
    that evaluates. A script that records by a session of its own is left to it.

    Warnings are logged, or written to standard error where nothing shows them. ``OTEL_LOG_LEVEL=info`` also shows when
    a session starts and ends.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """Returns nothing: torch is followed when, and if, the script imports it."""
        return ()

    def _instrument(self, **_options: Any) -> None:
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return
        if os.environ.get(FOLLOWED, str(os.getpid())) != str(os.getpid()):
            return
        if logger.level == logging.NOTSET:
            logger.setLevel(_LEVELS.get(os.environ.get("OTEL_LOG_LEVEL", "").strip().lower(), logging.WARNING))
        follow_process().marks_children = True

    def _uninstrument(self, **_options: Any) -> None:
        follow_process().unfollow()
