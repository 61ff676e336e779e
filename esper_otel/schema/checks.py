"""Checks: the run ids of ``esper-otel check``. Lists of runs, pages, alerts and Oona leave out what has one."""

from __future__ import annotations

import re
import secrets

# Prometheus, too, compares it with the whole of a label. Nobody gives a run of their own such a name by chance.
CHECK_PATTERN = "esper-otel-check-[0-9a-f]{8}"


def new_check_id() -> str:
    """A run id for one check."""
    return f"esper-otel-check-{secrets.token_hex(4)}"


def is_check(run_id: str) -> bool:
    """Whether what has this run id was sent by a check."""
    return re.fullmatch(CHECK_PATTERN, run_id) is not None
