"""The catalogue of all metrics, each with name, unit, gate, needs and meaning."""

from esper_otel.schema.catalogue import METRICS, SEED_CELLS, SEED_FIELDS
from esper_otel.schema.checks import CHECK_PATTERN, is_check, new_check_id
from esper_otel.schema.hardware import TWINS, Twin
from esper_otel.schema.metric import Metric, Need
from esper_otel.schema.own_metrics import FRAME_POINTS, FRAME_SEQUENCE, OWN_STEP, SEED_RETIRED
from esper_otel.schema.requested_metrics import SEED_METRICS, STEP_METRICS
from esper_otel.schema.session_metrics import DEVICE_INFO, PHASES, SESSION
from esper_otel.schema.stage import Stage

__all__ = [
    "CHECK_PATTERN",
    "DEVICE_INFO",
    "FRAME_POINTS",
    "FRAME_SEQUENCE",
    "METRICS",
    "OWN_STEP",
    "PHASES",
    "SEED_CELLS",
    "SEED_FIELDS",
    "SEED_METRICS",
    "SEED_RETIRED",
    "SESSION",
    "STEP_METRICS",
    "TWINS",
    "Metric",
    "Need",
    "Stage",
    "Twin",
    "is_check",
    "new_check_id",
]
