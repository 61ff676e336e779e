"""Reasons why a metric is absent, worded for the user."""

from __future__ import annotations

from collections.abc import Mapping, Set

from esper_otel.frames.frame import Frame, is_absent
from esper_otel.schema import SEED_METRICS, STEP_METRICS, Metric, Need

_FLAG_OFF = "gated: tolaria_step_enrichment_enabled is False"

_OF_NEED = {
    Need.CUDA: "needs CUDA: no host-to-device copy was made by now.to()",
    Need.SEVERAL_SOURCES: "needs two or more gradient sources: now.gradients(model, sources=...)",
    Need.BLENDING: "no seed is in BLENDING",
    Need.ISOLATION_STATISTICS: "no isolation statistics were recorded",
}

_OF_NAME = {
    "loss": "not recorded: now.put(loss=...)",
    "accuracy": "not recorded: now.put(accuracy=...)",
    "gradient_norm": "not recorded: now.gradients(model)",
    "samples_per_s": "not recorded: telemetry.step(samples=...)",
    "hook_latency_ms": "not timed: with now.hook()",
    "tamiyo_latency_ms": "not timed: with now.tamiyo()",
    "kasmina.apply_ms": "not timed: with now.apply()",
    "kasmina.finalize_ms": "not timed: with now.finalize()",
    "step_latency_ms": "not timed: with telemetry.step()",
    "input_wait_ms": "not timed: telemetry.batches(loader)",
    "loss_delta": "needs two finite losses",
    "loss_volatility": "needs two finite losses",
    "loss_ewma": "needs a finite loss",
    "grad_norm_ewma": "needs a finite gradient_norm",
    "grad_var": "needs a finite gradient_norm",
}

_OF_WORK = {
    "esper.tokens_per_s": "not recorded: telemetry.step(tokens=...)",
    "esper.tflops_per_s": "not recorded: telemetry.step(flops=...)",
    "esper.mfu": "needs esper.tflops_per_s: telemetry.step(flops=...)",
}


def reasons(frame: Frame | None, *, left_out: Set[str], probes: Mapping[str, str], peak: str = "") -> dict[str, str]:
    """Returns why metrics of the original request and rates of work are missing from ``frame``, by metric name.

    Args:
        frame: the newest frame. A seed metric counts as present if any live seed has a known value of it.
        left_out: names of gated metrics that are off.
        probes: reasons given by the hardware probes.
        peak: why the highest rate of the training device is unknown; empty if it is known.
    """
    if frame is None:
        return {metric.name: "no step was recorded" for metric in (*STEP_METRICS, *SEED_METRICS)}
    values = frame.values()
    absent = {
        metric.name: _FLAG_OFF if metric.name in left_out else probes.get(metric.name) or _reason(metric)
        for metric in STEP_METRICS
        if metric.name not in values
    }
    for name, how in _OF_WORK.items():
        if name not in values:
            absent[name] = peak if name == "esper.mfu" and "esper.tflops_per_s" in values and peak else how
    missing = is_absent(frame.live.cells)
    for column, metric in enumerate(SEED_METRICS):  # the first of the seed cells
        if missing[:, column].all():
            absent[metric.name] = _reason(metric) if frame.live.ids else "no live seed"
    return absent


def _reason(metric: Metric) -> str:
    for need in metric.needs:
        if need in _OF_NEED:
            return _OF_NEED[need]
    return _OF_NAME.get(metric.name, f"not recorded: now.seed(id, {metric.field}=...)")
