"""Checks: the run ids of ``esper-otel check``. Its steps are no run's: lists, pages, alerts and Oona leave them out."""

from __future__ import annotations

import re
import secrets

# For Prometheus too, which looks for the whole of a label. Long enough that nobody else's run has such a name.
CHECK_PATTERN = "esper-otel-check-[0-9a-f]{8}"


def new_check_id() -> str:
    """A run id that marks what is sent under it as a check's."""
    return f"esper-otel-check-{secrets.token_hex(4)}"


def is_check(run_id: str) -> bool:
    """Whether what has this run id was sent by a check."""
    return re.fullmatch(CHECK_PATTERN, run_id) is not None
