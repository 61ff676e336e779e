"""The shipped rules: each alert fires on what it is for, and on nothing else; by promtool's own unit tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from programs import ROOT, SPARING, built

sys.path.insert(0, str(ROOT / "deploy" / "rendering"))

from esper_otel.files.rules import PIPELINE, Alert, others, risks
from esper_otel.files.selectors import BY_KEY, OURS, STOCK, Naming
from esper_otel.leyline.risk import LOSS_STEP, RULES
from esper_otel.schema import new_check_id

pytestmark = pytest.mark.collector

# An hour and a half of healthy training, a value each 15 s.
HEALTHY = {
    "esper.global_step": "0+5x360",
    "loss": "2.0-0.001x360",
    "loss_delta": "-0.001+0x360",
    "loss_volatility": "0.01+0x360",
    "grad_var": "0.5+0x360",
    "grad_conflict_rate": "0.1+0x360",
    "hook_latency_ms": "2+0x360",
    "step_latency_ms": "100+0x360",
    "kasmina.apply_ms": "3+0x360",
    "kasmina.finalize_ms": "3+0x360",
    "esper.isolation.violations": "0+0x360",
    "input_wait_ms": "5+0x360",
    "samples_per_s": "1000+0x360",
    "gpu_util_percent": "90+0x360",
    "gpu_mem_free_gb": "10+0x360",
    "gpu_mem_used_gb": "30+0x360",
    "cpu_util_percent": "50+0x360",
    "esper.frames.dropped": "0+0x360",
    "esper.values.nonfinite": "0+0x360",
    "esper.memory.process_gb": "4+0.001x360",
    "esper.memory.host_available_gb": "100-0.001x360",
}
AN_HOUR_THEN = "{before}+0x240 {then}+0x120"


class Case(NamedTuple):
    """What happens, and which alerts fire when."""

    series: dict[str, str]
    at: str
    fires: set[str]
    other_ranks: int = 0  # which are healthy


def cases() -> dict[str, Case]:
    """For each alert, what makes it fire."""
    found = {}
    for rule, alert in zip(RULES, risks(OURS), strict=True):
        metric = "loss_delta" if rule.metric == LOSS_STEP else BY_KEY[rule.metric].name
        usual = rule.threshold / 2
        beyond = rule.threshold * 1.6 + 0.001  # above three times what is usual for it
        series = {metric: f"{usual}+0x43 {beyond} {usual}+0x315"}
        if alert.pending != "0s":
            series = {metric: f"{usual}+0x20 {2 * usual}+0x340"}
        if rule.and_below is not None:
            series[BY_KEY[rule.and_below[0]].name] = "0.1+0x360"
        fires = {alert.name} | ({"EsperGpuMemoryNearlyFull"} if rule.and_below is not None else set())
        found[alert.name] = Case(series, "11m", fires)
    found["EsperRunStuck"] = Case(dict.fromkeys(HEALTHY, "1+0x200") | {"loss": "1+0x200"}, "70m", {"EsperRunStuck"})
    found["EsperRunWithoutSteps"] = Case(
        dict.fromkeys(HEALTHY, "1+0x200") | {"loss": "1+0x200", "esper.frames.recorded": "1+0x360"},
        *("58m", {"EsperRunWithoutSteps"}),
    )
    found["EsperLossNotFinite"] = Case({"loss": "1+0x43 NaN 1+0x315"}, "11m", {"EsperLossNotFinite"})
    found["EsperValuesNotFinite"] = Case(  # the backend drops NaN
        {"esper.values.nonfinite": "0+0x40 4+4x320"}, "30m", {"EsperValuesNotFinite"}
    )
    found["EsperMemoryGrowing"] = Case(  # 1 MB a step, 5 steps a second
        {"esper.memory.process_gb": "4+0.075x360", "esper.memory.host_available_gb": "60-0.075x360"},
        *("60m", {"EsperMemoryGrowing"}),
    )
    found["EsperRankSlow"] = Case({"step_latency_ms": "150+0x360"}, "30m", {"EsperRankSlow"}, 2)
    found["EsperThroughputDrop"] = Case(
        {"samples_per_s": AN_HOUR_THEN.format(before=1000, then=500)}, "72m", {"EsperThroughputDrop"}
    )
    found["EsperInputBound"] = Case(
        {"input_wait_ms": AN_HOUR_THEN.format(before=5, then=80)}, "75m", {"EsperInputBound"}
    )
    found["EsperGpuMemoryNearlyFull"] = Case(
        {"gpu_mem_free_gb": AN_HOUR_THEN.format(before=10, then=1)}, "65m", {"EsperGpuMemoryNearlyFull"}
    )
    found["EsperTelemetryDropping"] = Case(
        {"esper.frames.dropped": "0+0x40 7+0x320"}, "12m", {"EsperTelemetryDropping"}
    )
    return found


def series_of(
    naming: Naming, values: dict[str, str], run_id: str = "digits-7", rank: int = 0, more: str = ""
) -> list[dict[str, str]]:
    """Input series of one run and rank; ``more`` are further labels."""
    labels = f'run_id="{run_id}",rank="{rank}",' if naming.has_labels else ""
    found = []
    for metric, text in values.items():
        reason = ',reason="buffer full"' if metric == "esper.frames.dropped" else ""
        name = f'{naming.name(metric)}{{{labels}instance="{run_id}/{rank}",job="esper-tolaria"{reason}{more}}}'
        found.append({"series": name, "values": text})
    return found


def run(naming: Naming, folder: Path, tests: list[dict[str, Any]]) -> None:
    """Has promtool judge."""
    rules = ROOT / "deploy" / "prometheus" / naming.folder / "rules" / "esper.yml"
    content = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    tool = built("prometheus").with_name("promtool")
    done = subprocess.run([tool, "test", "rules", file], capture_output=True, text=True, check=False, env=SPARING)
    assert done.returncode == 0, done.stdout + done.stderr


def expecting(case: Case, naming: Naming, more: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """A test of promtool's: exactly these alerts fire."""
    more = [*(more or []), *(each for n in range(case.other_ranks) for each in series_of(naming, HEALTHY, rank=n + 1))]
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(case.fires)]
    return {
        "interval": "15s",
        "input_series": [*series_of(naming, case.series), *more],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": case.at,
                "exp_samples": samples,
            }
        ],
    }


@pytest.fixture(params=[OURS, STOCK], ids=["ours", "stock"])
def naming(request: pytest.FixtureRequest) -> Naming:
    found: Naming = request.param
    return found


def test_every_alert_has_a_case(naming: Naming) -> None:
    assert {alert.name for alert in [*risks(naming), *others(naming)]} == set(cases())


def test_each_alert_fires_on_what_it_is_for_and_alone(naming: Naming, tmp_path: Path) -> None:
    """In an otherwise healthy run."""
    run(naming, tmp_path, [expecting(c._replace(series=HEALTHY | c.series), naming) for c in cases().values()])


def test_a_healthy_run_and_no_run_at_all_are_silent(naming: Naming, tmp_path: Path) -> None:
    tests = []
    for series in (HEALTHY, {}):
        at_first, *later = [expecting(Case(series, at, set()), naming) for at in ("1m", "30m", "89m")]
        for each in later:
            at_first["promql_expr_test"] += each["promql_expr_test"]
        tests.append(at_first)
    run(naming, tmp_path, tests)


def test_a_busy_cpu_alarms_nobody_where_it_trains(naming: Naming, tmp_path: Path) -> None:
    """Such a run has no metric of a GPU; the same run with one fires."""
    busy = HEALTHY | {"cpu_util_percent": "99+0x360"}
    of_gpu = {name: busy.pop(name) for name in ("gpu_util_percent", "gpu_mem_free_gb", "gpu_mem_used_gb")}
    fires = {"EsperCpuPressureHigh"}
    run(
        *(naming, tmp_path),
        [expecting(Case(busy, "70m", set()), naming), expecting(Case(busy | of_gpu, "70m", fires), naming)],
    )


def test_large_steps_alarm_nobody_but_steps_that_grow_do(tmp_path: Path) -> None:
    """Steps of 2 s are what is usual for this run; a loss of 10 with its noise is, too."""
    large = HEALTHY | {"step_latency_ms": "2000+0x360", "loss_volatility": "0.6+0x360", "grad_var": "40+0x360"}
    grown = large | {"step_latency_ms": "2000+0x200 3500+0x160"}
    tests = [expecting(Case(large, at, set()), OURS) for at in ("5m", "70m")]
    run(OURS, tmp_path, [*tests, expecting(Case(grown, "55m", {"EsperStepLatencyHigh"}), OURS)])


def test_a_run_has_its_own_thresholds_and_can_be_muted(tmp_path: Path) -> None:
    slow = HEALTHY | {"hook_latency_ms": "90+0x360", "step_latency_ms": "200+0x360"}
    fires = {"EsperHookBudget"}

    def own(signal: str, value: str) -> list[dict[str, str]]:
        return series_of(OURS, {"esper.risk.threshold": f"{value}+0x360"}, more=f',signal="{signal}"')

    muted = slow | {"esper.alerts.muted": "1+0x360"}
    tests = [
        expecting(Case(slow, "30m", fires), OURS),
        expecting(Case(slow, "30m", set()), OURS, own("hook_budget", "100")),
        expecting(Case(slow, "30m", set()), OURS, own("hook_budget", "1e308")),
        expecting(Case(slow, "30m", fires), OURS, own("hook_budget", "80")),
        expecting(Case(slow, "30m", {*fires, "EsperStepLatencyHigh"}), OURS, own("step_latency_high", "150")),
        expecting(Case(muted, "30m", set()), OURS),
        expecting(Case(muted | {"loss": "1+0x43 NaN 1+0x315"}, "11m", set()), OURS),
    ]
    run(OURS, tmp_path, tests)


def test_ranks_in_lock_step_are_told_apart_by_their_own_time(tmp_path: Path) -> None:
    """All cycles are equal, because the others wait within their steps."""
    waits = HEALTHY | {"input_wait_ms": "40+0x360", "step_latency_ms": "65+0x360"}
    run(OURS, tmp_path, [expecting(Case(waits, "30m", {"EsperRankSlow", "EsperInputBound"}, 2), OURS)])


def test_a_run_that_has_ended_or_goes_on_is_not_stuck(naming: Naming, tmp_path: Path) -> None:
    """Ended: never again. Resumed after a pause: not stuck. Dead after it had been resumed: stuck again."""
    ended = {"esper.global_step": "0+5x100 stale", "esper.run.ended": "_x100 1 stale"}
    resumed = {"esper.global_step": "0+5x100 _x60 300+5x199"}
    paused = {"esper.global_step": "0+5x100", "esper.frames.recorded": "1+0x360"}
    again = {"esper.global_step": "0+5x100 stale _x60 300+5x100", "esper.run.ended": "_x100 1 stale _x258"}
    tests = [
        expecting(Case(ended, "60m", set()), naming),
        expecting(Case(resumed, "60m", set()), naming),
        expecting(Case(resumed, "36m", {"EsperRunStuck"}), naming),
        expecting(Case(again, "80m", {"EsperRunStuck"}), naming),
        expecting(Case(paused, "36m", {"EsperRunWithoutSteps"}), naming),
        expecting(Case(paused, "60m", {"EsperRunStuck"}), naming),  # half an hour: it may hang
    ]
    run(naming, tmp_path, tests)


def test_what_a_check_has_sent_fires_nothing(naming: Naming, tmp_path: Path) -> None:
    """Not even what would fire every alert of a run: the check was killed, or tried the limits."""
    series, tests = [], []
    for case in cases().values():
        series += series_of(naming, HEALTHY | case.series, new_check_id())
        tests += expecting(case._replace(series={}, fires=set()), naming)["promql_expr_test"]
    run(naming, tmp_path, [{"interval": "15s", "input_series": series, "promql_expr_test": tests}])


SERIES_OF_PIPELINE = {
    "EsperCollectorDropping": 'otelcol_exporter_send_failed_metric_points_total{exporter="otlp_grpc/tier"}',
    "EsperCollectorQueueFilling": 'otelcol_exporter_queue_size{exporter="otlp_grpc/tier"}',
    "EsperCollectorRefusing": 'otelcol_receiver_refused_metric_points_total{receiver="otlp"}',
    "EsperGatewayNotStoring": "esper_gateway_store_failures_total",
    "EsperGatewayRejecting": 'esper_gateway_rejected_points_total{reason="no time"}',
    "EsperGatewayOverLimit": 'esper_gateway_rejected_points_total{reason="too many runs"}',
    "EsperGatewayRefusingEvents": 'esper_gateway_refused_events_total{reason="too many events of the run"}',
    "EsperGatewayTooLate": "esper_gateway_too_late_steps",
    "EsperGatewayRefusing": 'esper_gateway_refused_requests_total{reason="malformed"}',
    "EsperTierLagging": "esper_gateway_kafka_lag_records",
    "EsperTierAborting": "esper_gateway_kafka_aborts_total",
    "EsperTierLosing": "esper_gateway_kafka_too_large_total",
    "EsperTierOlder": "esper_gateway_kafka_unreadable_partitions",
    "EsperGatewayDeferring": 'esper_gateway_deferred_requests_total{reason="too many runs"}',
}


OF_EVENTS = 'otelcol_exporter_send_failed_log_records_total{exporter="kafka/esper_events"}'


def test_each_alert_of_the_pipeline_fires(tmp_path: Path) -> None:
    """And is silent while its counter stands still."""
    assert set(SERIES_OF_PIPELINE) == {alert.name for alert in PIPELINE}
    capacity = {"series": 'otelcol_exporter_queue_capacity{exporter="otlp_grpc/tier"}', "values": "1000+0x360"}
    still = [{"series": series, "values": "0+0x360"} for series in SERIES_OF_PIPELINE.values()]
    tests = [expecting(Case({}, "30m", set()), OURS, [*still, capacity])]
    for name, series in [*SERIES_OF_PIPELINE.items(), ("EsperCollectorDropping", OF_EVENTS)]:
        rising = {"series": series, "values": "0+500x360"}
        tests.append(expecting(Case({}, "30m", {name}), OURS, [rising, capacity]))
    run(OURS, tmp_path, tests)


def test_each_alert_says_what_to_do() -> None:
    for alert in [*risks(OURS), *others(OURS), *PIPELINE]:
        assert isinstance(alert, Alert)
        assert alert.severity in {"warn", "high"}
        assert len(alert.to_do) > 30, alert.name
        assert "{{ $labels" in alert.summary or "EsperGateway" in alert.name


@pytest.mark.parametrize("file", ["prometheus.yml", "scrape.yml"])
def test_the_configurations_are_right(file: str) -> None:
    tool = built("prometheus").with_name("promtool")
    path = ROOT / "deploy" / "prometheus" / file
    done = subprocess.run([tool, "check", "config", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
