"""Every metric that esper_otel knows, declared once: in ``requested_metrics``, ``own_metrics`` and ``session_metrics``.

Instruments, packets, tables and tests are derived from these entries.
"""

from __future__ import annotations

from esper_otel.schema.metric import Metric
from esper_otel.schema.own_metrics import FRAME_POINTS, FRAME_SEQUENCE, OWN_SEED, OWN_STEP, SEED_RETIRED
from esper_otel.schema.requested_metrics import SEED_METRICS, STEP_METRICS
from esper_otel.schema.session_metrics import DEVICE_INFO, PHASES, SESSION

METRICS: tuple[Metric, ...] = (
    *STEP_METRICS,
    *SEED_METRICS,
    *OWN_STEP,
    FRAME_SEQUENCE,
    FRAME_POINTS,
    SEED_RETIRED,
    *OWN_SEED,
    *SESSION,
    *PHASES,
    DEVICE_INFO,
)

# The cells of a seed's row, in this order, everywhere.
SEED_CELLS: tuple[Metric, ...] = SEED_METRICS + OWN_SEED
SEED_FIELDS: tuple[str, ...] = tuple(metric.field for metric in SEED_CELLS)
