"""The run ids of ``esper-otel check``. Lists of runs, pages, alerts and Oona leave out runs with such an id."""

from __future__ import annotations

import re
import secrets

# Prometheus also matches this pattern against the whole label. A user is unlikely to give a run such a name by chance.
CHECK_PATTERN = "esper-otel-check-[0-9a-f]{8}"


def new_check_id() -> str:
    """Returns a new run id for one check."""
    return f"esper-otel-check-{secrets.token_hex(4)}"


def is_check(run_id: str) -> bool:
    """Whether this is the run id of a check."""
    return re.fullmatch(CHECK_PATTERN, run_id) is not None
