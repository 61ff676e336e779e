"""The catalogue against the request: its 31 metrics, word for word."""

from __future__ import annotations

import pytest

from esper_otel.errors import InvalidCatalogue
from esper_otel.leyline import SeedLifecycleStage
from esper_otel.schema import (
    FRAME_POINTS,
    FRAME_SEQUENCE,
    METRICS,
    OWN_STEP,
    SEED_CELLS,
    SEED_FIELDS,
    SEED_METRICS,
    SESSION,
    STEP_METRICS,
    Metric,
    Need,
    Stage,
)

pytestmark = pytest.mark.own_code

# name, unit, gated, needs: as the request has them, in its order.
REQUESTED_STEP = [
    ("loss", "loss", False, ()),
    ("accuracy", "ratio", False, ()),
    ("gradient_norm", "grad", False, ()),
    ("samples_per_s", "rate", False, ()),
    ("hook_latency_ms", "ms", False, ()),
    ("tamiyo_latency_ms", "ms", False, ()),
    ("step_latency_ms", "ms", True, ()),
    ("kasmina.apply_ms", "ms", True, ()),
    ("kasmina.finalize_ms", "ms", True, ()),
    ("loss_delta", "loss", True, ()),
    ("loss_ewma", "loss", True, ()),
    ("loss_volatility", "loss", True, ()),
    ("grad_norm_ewma", "grad", True, ()),
    ("grad_var", "grad^2", True, ()),
    ("grad_conflict_rate", "ratio", True, ("several sources",)),
    ("input_wait_ms", "ms", True, ()),
    ("h2d_copy_ms", "ms", True, ("CUDA",)),
    ("gpu_mem_used_gb", "GB", True, ("CUDA",)),
    ("gpu_mem_free_gb", "GB", True, ("CUDA",)),
    ("gpu_util_percent", "%", True, ("NVML",)),
    ("cpu_util_percent", "%", True, ("psutil",)),
]
REQUESTED_SEED = [
    ("kasmina.seed.stage", "state", False, ()),
    ("kasmina.seed.alpha", "ratio", False, ()),
    ("kasmina.seed.alpha_steps", "count", False, ("BLENDING",)),
    ("kasmina.seed.kernel_attached", "flag", False, ()),
    ("kasmina.seed.last_kernel_latency_ms", "ms", False, ()),
    ("kasmina.seed.isolation_violations", "count", False, ()),
    ("kasmina.seed.fallback_used", "flag", False, ()),
    ("kasmina.seed.isolation.dot", "dot", False, ("isolation statistics",)),
    ("kasmina.seed.isolation.host_norm", "grad", False, ("isolation statistics",)),
    ("kasmina.seed.isolation.seed_norm", "grad", False, ("isolation statistics",)),
]


def as_requested(metrics: tuple[Metric, ...]) -> list[tuple[str, str, bool, tuple[Need, ...]]]:
    return [(metric.name, metric.unit, metric.gated, metric.needs) for metric in metrics]


def test_the_step_metrics_are_the_requests_21_in_its_order() -> None:
    """Names and units are stable: backends, dashboards and Tamiyo know them."""
    assert as_requested(STEP_METRICS) == REQUESTED_STEP
    assert len(STEP_METRICS) == 21


def test_the_seed_metrics_are_the_requests_10_in_its_order() -> None:
    """As above, for Kasmina's."""
    assert as_requested(SEED_METRICS) == REQUESTED_SEED
    assert len(SEED_METRICS) == 10


def test_the_catalogue_begins_with_the_requests_31() -> None:
    """Whoever shows METRICS shows the request's first."""
    assert METRICS[:31] == STEP_METRICS + SEED_METRICS


def test_names_are_unique_and_our_own_ones_say_that_they_are_ours() -> None:
    """No metric of ours can be taken for one of the request's."""
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("esper.") for name in names[31:])


def test_levels_are_those_of_the_groups() -> None:
    """What travels in frames and what does not follows from the level."""
    assert {metric.level for metric in (*STEP_METRICS, *OWN_STEP, FRAME_SEQUENCE, FRAME_POINTS)} == {"step"}
    assert {metric.level for metric in SEED_CELLS} == {"seed"}
    assert {metric.level for metric in SESSION} == {"session"}


def test_only_the_telemetrys_own_totals_are_counters() -> None:
    """Kasmina resets isolation_violations, and a counter that falls is a negative delta: so it is a gauge."""
    assert {metric.level for metric in METRICS if metric.kind == "counter"} == {"session"}


def test_each_of_the_31_has_its_whole_contract() -> None:
    """A number without its clock, its presence and its trap is half a metric."""
    for metric in STEP_METRICS + SEED_METRICS:
        said = (metric.source, metric.present, metric.misleads, metric.window, metric.error, metric.cost, metric.rise)
        for text in (metric.description, *said):
            assert text.endswith("."), metric.name
    for metric in METRICS:
        assert metric.description.endswith("."), metric.name


def test_packet_keys_are_unique_and_the_requests_names_are_their_own() -> None:
    """Two metrics under one key would be one in the packet."""
    keys = [metric.key for metric in METRICS if metric.key]
    assert len(set(keys)) == len(keys)
    assert all(metric.key == metric.name for metric in STEP_METRICS)
    assert {metric.key for metric in METRICS if metric.key and metric not in STEP_METRICS} == {
        *("training_loss", "validation_loss", "epochs_total", "optimizer_lr"),
        "kasmina.isolation.violations",
    }


def test_seed_fields_are_the_names_without_prefix_and_dots() -> None:
    """now.seed(id, isolation_dot=...) needs no table to look it up in."""
    assert SEED_FIELDS[:10] == (
        *("stage", "alpha", "alpha_steps", "kernel_attached", "last_kernel_latency_ms", "isolation_violations"),
        *("fallback_used", "isolation_dot", "isolation_host_norm", "isolation_seed_norm"),
    )
    assert len(set(SEED_FIELDS)) == len(SEED_FIELDS) == 19
    assert all(field.isidentifier() for field in SEED_FIELDS)


def test_stages_are_leylines() -> None:
    """The number is what is sent."""
    assert {f"SEED_STAGE_{stage.name}": int(stage) for stage in Stage} == dict(SeedLifecycleStage.items())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            {"name": "7th"},
            "'7th' is not valid in OpenTelemetry: it must be a letter, then at most 254 letters, digits and _ . - /",
        ),
        ({"name": ""}, "metric name '' is not valid in OpenTelemetry"),
        ({"name": "x" * 256}, "is not valid in OpenTelemetry"),
        ({"name": "loss of host"}, "metric name 'loss of host' is not valid in OpenTelemetry"),
        ({"name": "x", "unit": "µs"}, "unit 'µs' of 'x' is not ASCII text of at most 63 characters"),
        ({"name": "x", "unit": "s" * 64}, "of 'x' is not ASCII text of at most 63 characters"),
    ],
)
def test_a_declaration_that_opentelemetry_would_refuse_raises(declared: dict[str, str], message: str) -> None:
    """An SDK only logs it and drops the metric."""
    with pytest.raises(InvalidCatalogue) as raised:
        Metric(**declared)  # type: ignore[arg-type] # on purpose
    assert message in str(raised.value)


def test_all_faults_of_a_declaration_are_said_at_once() -> None:
    """One round of repair, not one per fault."""
    with pytest.raises(InvalidCatalogue) as raised:
        Metric("7th", unit="µs")
    assert len(raised.value.faults) == 2
