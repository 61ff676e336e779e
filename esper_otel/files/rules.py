"""Rules for Prometheus: what a run must not do unnoticed, from the table of risks and from what people ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from esper_otel.files.selectors import BY_KEY, Naming
from esper_otel.leyline.risk import LOSS_STEP, RULES, Rule

_BY = "(run_id, rank)"
THRESHOLD = "esper.risk.threshold"
_HEADER = """\
# Rendered by `make docs`; change esper_otel/files/rules.py instead.
"""

# What to do about a risk, by the name of its signal.
_TO_DO = {
    "loss_spike": "Look at the step's batch and learning rate; Tamiyo pauses seeds. Repeated: go back to a checkpoint.",
    "loss_warning": "Watch it: a second rise in a row is a trend. Lower the learning rate if it goes on.",
    "hook_budget": "The hook takes longer than its budget: see which seeds are alive, and what Tamiyo's latency is.",
    "step_latency_high": "See where the step's time goes on the Run dashboard; compare with input wait and kasmina.apply_ms.",
    "kasmina_apply_slow": "Applying seeds is slow: see kernel latencies on the Seeds dashboard; cull or fossilize.",
    "kasmina_finalize_slow": "Finalizing is slow: see how many seeds change stage at once.",
    "isolation_violations": "A seed's gradients reach the host: see which one on the Seeds dashboard, and detach or cull it.",
    "loss_volatility_high": "The loss jumps about: a smaller learning rate or a larger batch.",
    "grad_variance_high": "Gradients vary: clip them, or warm up longer.",
    "grad_conflict_high": "Tasks or seeds pull against each other: see which seed on the Seeds dashboard.",
    "device_pressure_high": "The GPU is busy and its memory full: a smaller batch, or fewer seeds.",
    "cpu_pressure_high": "The CPU is the bottleneck: fewer loader workers, or more cores.",
}


@dataclass(frozen=True, slots=True)
class UsualLevels:
    """What is usual for a run, by its last hour, and how far above it a value alarms.

    Attributes:
        share: a quantile of the hour.
        times: a value alarms above this multiple of the quantile.
        has_floor: whether it must be above the table's threshold as well.
        function: what is compared: the mean or the largest value of the last minute.
        pending: for how long it must hold.
    """

    share: float
    times: float
    has_floor: bool = True
    function: str = "max_over_time"
    pending: str = "0s"


# Fixed thresholds of these signals fit one model only: losses and gradients have a scale of their own, and a large model
# has slow steps. A threshold that the run sets itself is used as it is.
_USUAL = {
    "loss_spike": UsualLevels(0.99, 3.0),
    "loss_warning": UsualLevels(0.99, 2.0),
    "loss_volatility_high": UsualLevels(0.99, 2.0),
    "grad_variance_high": UsualLevels(0.99, 3.0),
    "step_latency_high": UsualLevels(0.5, 1.5, has_floor=False, function="avg_over_time", pending="2m"),
}


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert.

    Attributes:
        name: as Prometheus shows it.
        expression: when it fires.
        severity: ``warn`` or ``high``.
        summary: what is wrong, with the run's name.
        to_do: what to do about it.
        pending: for how long it must hold.
    """

    name: str
    expression: str
    severity: str
    summary: str
    to_do: str
    pending: str = "0s"


_WHO = "{{ $labels.run_id }} (rank {{ $labels.rank }})"


def risks(naming: Naming, rules: Sequence[Rule] = RULES) -> list[Alert]:
    """An alert for each row of the table of risks.

    Args:
        naming: how metrics are asked for.
        rules: the table; a rule with another threshold than the default has that one, whatever is usual for a run, and
            with infinity no alert.
    """
    return [_audible(_risk(rule, naming, rules), naming) for rule in rules if rule.threshold < math.inf]


def _audible(alert: Alert, naming: Naming) -> Alert:
    """Leaves out runs that do not want to be heard."""
    muted = naming.select("esper.alerts.muted", naming.runs, over="6h", function="max_over_time")
    return replace(alert, expression=f"({alert.expression}) unless on {_BY} (max by {_BY} ({muted}) > 0)")


def _risk(rule: Rule, naming: Naming, rules: Sequence[Rule]) -> Alert:
    name = "Esper" + "".join(word.capitalize() for word in rule.name.split("_"))
    usual = None if rule not in RULES else _USUAL.get(rule.name)
    expression = _beyond(rule, usual, naming)
    if rule.and_below is not None:
        other, limit = rule.and_below
        low = naming.select(BY_KEY[other].name, naming.runs, over="1m", function="min_over_time")
        expression += f" and on {_BY} min by {_BY} ({low}) <= {limit:g}"
    if rule.only_note_on_cpu:  # such a run has no metric of a GPU
        trains_on_gpu = naming.select("gpu_mem_used_gb", naming.runs, over="1m", function="max_over_time")
        expression += f" and on {_BY} max by {_BY} ({trains_on_gpu})"
    for silencing in rules[: list(rules).index(rule)]:
        if silencing.name == rule.unless or silencing.metric == rule.metric:
            expression += f" unless on {_BY} ({_risk(silencing, naming, rules).expression})"
    what = "the loss rose by" if rule.metric == LOSS_STEP else f"{rule.metric} is"
    bound = f"{'at least' if rule.is_inclusive else 'above'} {rule.threshold:g}"
    if usual is not None:
        bound = f"far above what is usual for it{f', and {bound}' if usual.has_floor else ''}"
    summary = f"{what} {{{{ $value | humanize }}}} in {_WHO}: {bound}, or above the run's own threshold"
    pending = "0s" if usual is None else usual.pending
    return Alert(name, expression, rule.level.lower(), summary, _TO_DO[rule.name], pending)


def _beyond(rule: Rule, usual: UsualLevels | None, naming: Naming) -> str:
    """The runs whose metric is beyond its threshold: the run's own, or else what is usual for it, or the table's."""
    metric = "loss_delta" if rule.metric == LOSS_STEP else BY_KEY[rule.metric].name
    compare = ">=" if rule.is_inclusive else ">"
    function = "max_over_time" if usual is None else usual.function
    value = f"max by {_BY} ({naming.select(metric, naming.runs, over='1m', function=function)})"
    own = naming.select(THRESHOLD, f'{naming.runs},signal="{rule.name}"', over="5m", function="last_over_time")
    own = f"max by {_BY} ({own})"
    limit = f"{rule.threshold:g}"
    if usual is not None:
        past = naming.select(*(metric, naming.runs, "1h", "quantile_over_time"), offset="2m", first=f"{usual.share:g}")
        limit = f"{usual.times:g} * max by {_BY} ({past})"
        limit = f"clamp_min({limit}, {rule.threshold:g})" if usual.has_floor else f"({limit})"
    return f"({value} {compare} {own} or ({value} unless {own}) {compare} {limit})"


def recorded(naming: Naming) -> list[tuple[str, str]]:
    """Recording rules that keep the last time of something for longer than Prometheus looks back."""
    step = naming.labelled(f"timestamp({naming.name('esper.global_step')}{{{naming.runs}}})")
    ended = naming.labelled(f"timestamp({naming.name('esper.run.ended')}{{{naming.runs}}})")
    counts = naming.labelled(f"timestamp({naming.name('esper.frames.recorded')}{{{naming.runs}}})")
    wait = naming.select("input_wait_ms", naming.runs, over="5m", function="avg_over_time")
    step_ms = naming.select("step_latency_ms", naming.runs, over="5m", function="avg_over_time")
    cycle, own = _against_median("esper:cycle_ms:avg5m"), _against_median("esper:own_ms:avg5m")
    return [
        ("esper:last_step:timestamp_seconds", f"max by {_BY} ({step})"),
        ("esper:ended:timestamp_seconds", f"max by {_BY} ({ended})"),
        ("esper:alive:timestamp_seconds", f"max by {_BY} ({counts})"),
        (
            "esper:input_wait:ratio5m",
            f"sum by {_BY} ({wait}) / on {_BY} (sum by {_BY} ({wait}) + on {_BY} sum by {_BY} ({step_ms}))",
        ),
        (
            "esper:samples_per_s:avg5m",
            f"avg by {_BY} ({naming.select('samples_per_s', naming.runs, over='5m', function='avg_over_time')})",
        ),
        # Of ranks that run independently, the slow one has the longest cycle. In lock-step all cycles are equal, and the
        # slow one has the most time of its own.
        (
            "esper:cycle_ms:avg5m",
            f"sum by {_BY} ({step_ms}) + on {_BY} (sum by {_BY} ({wait}) or sum by {_BY} ({step_ms}) * 0)",
        ),
        ("esper:own_ms:avg5m", _sum_of_parts(naming)),
        (
            "esper:rank_behind:ratio5m",
            f"({cycle} > {own} or {own}) / on (run_id) group_left quantile by (run_id) (0.5, esper:cycle_ms:avg5m)",
        ),
    ]


def _against_median(record: str) -> str:
    """By how much each rank is above the median of its run."""
    return f"({record} - on (run_id) group_left quantile by (run_id) (0.5, {record}))"


def _sum_of_parts(naming: Naming) -> str:
    """The measured time of a rank's own work: what is not recorded counts as nothing."""
    parts = [
        f"sum by {_BY} ({naming.select(name, naming.runs, over='5m', function='avg_over_time')})"
        for name in ("input_wait_ms", "hook_latency_ms", "kasmina.finalize_ms")
    ]
    step = f"sum by {_BY} ({naming.select('step_latency_ms', naming.runs, over='5m', function='avg_over_time')}) * 0"
    return " + ".join(f"({part} or {step})" for part in parts)


def others(naming: Naming) -> list[Alert]:
    """Alerts that people ask for in addition to the risks."""
    return [
        _audible(alert, naming) for alert in (*_on_steps(), *_on_learning(naming), *_on_speed(), *_on_memory(naming))
    ]


def _on_steps() -> list[Alert]:
    """Runs that take no steps."""
    last = "max_over_time(esper:last_step:timestamp_seconds[6h])"
    ended = "max_over_time(esper:ended:timestamp_seconds[6h])"
    without = f"time() - {last} > 300 unless on {_BY} ({ended} >= on {_BY} {last})"
    # Counts of the trainer go on during an evaluation; after half an hour without a step, a run may hang all the same.
    paused = f"{last} > time() - 1800 and on {_BY} esper:alive:timestamp_seconds > time() - 120"
    return [
        Alert(
            "EsperRunStuck",
            f"{without} unless on {_BY} ({paused})",
            "high",
            f"no step of {_WHO} for {{{{ $value | humanizeDuration }}}}, and no word that it has ended",
            "See whether its process lives. If it does: py-spy dump, or the collective that a rank waits in. If not: its log, "
            "dmesg (out of memory), the scheduler.",
        ),
        Alert(
            "EsperRunWithoutSteps",
            f"{without} and on {_BY} ({paused})",
            "warn",
            f"no step of {_WHO} for {{{{ $value | humanizeDuration }}}}, but its process lives",
            "An evaluation or a checkpoint may take as long. If it is neither: py-spy dump, or the collective that a rank "
            "waits in.",
        ),
    ]


def _on_learning(naming: Naming) -> list[Alert]:
    """Runs that no longer learn, or of which that cannot be told."""
    total = naming.select("loss", naming.runs, over="1m", function="sum_over_time")
    not_finite = f"max by {_BY} ({total}) * 0 != 0"
    nonfinite = naming.select("esper.values.nonfinite", naming.runs, over="10m", function="increase")
    dropped = f"{naming.name('esper.frames.dropped')}{{{naming.runs}}}"
    grown = naming.labelled(f"increase({dropped}[10m])")
    new = naming.labelled(f"({dropped} unless {dropped} offset 10m)")
    return [
        Alert(
            "EsperLossNotFinite",
            not_finite,
            "high",
            f"the loss of {_WHO} is NaN or infinite",
            "Stop it and go back to a checkpoint; look for the first such step (esper.values.nonfinite), its batch and its "
            "gradient norm before that.",
        ),
        Alert(
            "EsperValuesNotFinite",
            f"max by {_BY} ({nonfinite}) > 2 unless on {_BY} ({not_finite})",
            "warn",
            f"{_WHO} has recorded {{{{ $value | humanize }}}} values that are NaN or infinite",
            "See which metric it is: the loss, where the backend drops NaN; a gradient norm, where mixed precision skips steps.",
        ),
        Alert(
            "EsperTelemetryDropping",
            f"max by (run_id, rank, reason) ({grown} > 0 or {new} > 0)",
            "high",
            f"{_WHO} dropped {{{{ $value | humanize }}}} steps of telemetry: {{{{ $labels.reason }}}}",
            "The endpoint has been away for longer than the buffer lasts: see the collector; set ESPER_SPOOL_DIR.",
        ),
    ]


def _on_speed() -> list[Alert]:
    """Runs that are slower than they could be."""
    return [
        Alert(
            "EsperRankSlow",
            "esper:rank_behind:ratio5m > 0.2 and on (run_id) count by (run_id) (esper:cycle_ms:avg5m) > 1",
            "warn",
            f"{_WHO} is slower than the median of its run by {{{{ $value | humanizePercentage }}}} of a cycle",
            "See the dashboard Ranks, and compare its host, its input wait and its GPU's clocks with those of the others.",
            "10m",
        ),
        Alert(
            "EsperThroughputDrop",
            "esper:samples_per_s:avg5m < 0.7 * avg_over_time(esper:samples_per_s:avg5m[1h] offset 10m)",
            "warn",
            f"{_WHO} does {{{{ $value | humanize }}}} samples a second, less than 70 % of what it did in the hour before",
            "See on the Run dashboard which part of the step grew; a slow disk, a throttled GPU and a busy neighbour are usual.",
            "5m",
        ),
        Alert(
            "EsperInputBound",
            "esper:input_wait:ratio5m > 0.3",
            "warn",
            f"{_WHO} waits for input {{{{ $value | humanizePercentage }}}} of the time",
            "More loader workers, prefetching, a faster disk, or less work per sample on the CPU.",
            "5m",
        ),
    ]


def _on_memory(naming: Naming) -> list[Alert]:
    """Runs that are about to run out of memory."""
    free, used = naming.select("gpu_mem_free_gb", naming.runs), naming.select("gpu_mem_used_gb", naming.runs)
    rss = "esper.memory.process_gb"
    growth = {over: naming.select(rss, naming.runs, over=over, function="deriv") for over in ("10m", "30m")}
    host_free = naming.select("esper.memory.host_available_gb", naming.runs, over="5m", function="min_over_time")
    before = naming.select(rss, naming.runs, offset="30m")
    return [
        Alert(
            "EsperMemoryGrowing",
            f"max by {_BY} ({growth['30m']}) * 21600 > max by {_BY} ({host_free}) "
            f"and max by {_BY} ({growth['10m']}) > 0.5 * max by {_BY} ({growth['30m']}) and on {_BY} max by {_BY} ({before})",
            "warn",
            f"at this rate, {_WHO} uses up the memory of its host within six hours",
            "Tensors that are kept with their graph (loss without .item()), a growing list, or loader workers: compare "
            "esper.memory.process_gb with the step at which it began to grow.",
            "5m",
        ),
        Alert(
            "EsperGpuMemoryNearlyFull",
            f"min by {_BY} ({free} / ({free} + {used})) < 0.05",
            "warn",
            f"the GPU of {_WHO} has {{{{ $value | humanizePercentage }}}} of its memory left",
            "A smaller batch, activation checkpointing, or fewer seeds: the next allocation may fail.",
            "2m",
        ),
    ]


# Reasons of the gateway that say that a run of ours needs more than it may have.
_OVER_LIMIT = "too many (attributes|live seeds|metrics|points|runs|seeds).*"

PIPELINE = [
    Alert(
        "EsperCollectorDropping",
        'sum by (job, instance, exporter) (rate({__name__=~"otelcol_exporter_send_failed_(metric_points|log_records)(_total)?"}[5m])) > 0',
        "high",
        "the collector {{ $labels.instance }} drops {{ $value | humanize }} points or log records a second: {{ $labels.exporter }} refuses them",
        "Its log says why. A wrong token is refused for good: let the receiving side accept both tokens while they change.",
    ),
    Alert(
        "EsperCollectorQueueFilling",
        "max by (job, instance, exporter) (otelcol_exporter_queue_size / otelcol_exporter_queue_capacity) > 0.6",
        "warn",
        "the queue of {{ $labels.exporter }} in the collector {{ $labels.instance }} is {{ $value | humanizePercentage }} full",
        "Its backend is away or too slow. Nothing is lost yet: bring it back, or give the queue more room.",
        "1m",
    ),
    Alert(
        "EsperCollectorRefusing",
        'sum by (job, instance) (rate({__name__=~"otelcol_receiver_refused_metric_points(_total)?"}[5m])) > 0',
        "warn",
        "the collector {{ $labels.instance }} refuses {{ $value | humanize }} points a second",
        "It is short of memory, or a queue is full; trainers keep the data and send it again.",
        "1m",
    ),
    Alert(
        "EsperGatewayNotStoring",
        "sum by (job, instance) (increase(esper_gateway_store_failures_total[5m])) > 0",
        "high",
        "the esper gateway {{ $labels.instance }} cannot store",
        "See the disk of its --store; senders keep the data and send it again.",
    ),
    Alert(
        "EsperGatewayRejecting",
        "sum by (job, instance, reason) "
        f'(increase(esper_gateway_rejected_points_total{{reason!~"{_OVER_LIMIT}"}}[5m])) > 0',
        "warn",
        "the esper gateway {{ $labels.instance }} refuses points: {{ $labels.reason }}",
        "Its log names the metrics. A sender that is not esper_otel reaches it, or a processor on the way changes points.",
    ),
    Alert(
        "EsperGatewayOverLimit",
        "sum by (job, instance, reason) "
        f'(increase(esper_gateway_rejected_points_total{{reason=~"{_OVER_LIMIT}"}}[5m])) > 0',
        "high",
        "the esper gateway {{ $labels.instance }} loses points of runs: {{ $labels.reason }}",
        "Too many runs: send some of them to another gateway, or raise --limit runs. Too many points: let the collector "
        "send smaller batches. Too many seeds: retire those that are over. Its log names the limit.",
    ),
    Alert(
        "EsperGatewayRefusingEvents",
        "sum by (job, instance, reason) (increase(esper_gateway_refused_events_total[5m])) > 0",
        "warn",
        "the esper gateway {{ $labels.instance }} refuses events of runs: {{ $labels.reason }}",
        "Too many: raise --limit events or all_events. Otherwise a processor on the way changes log records.",
    ),
    Alert(
        "EsperGatewayTooLate",
        "max by (job, instance) (delta(esper_gateway_too_late_steps[5m])) > 0",
        "warn",
        "{{ $value | humanize }} steps came to the esper gateway {{ $labels.instance }} twice, or too late to be taken",
        "Two processes may number the steps of one run: see esper-otel pull. Otherwise a collector delivers very late: give "
        "the gateway a longer --hold, and a larger limit kept_bytes.",
    ),
    Alert(
        "EsperGatewayRefusing",
        "sum by (job, instance, reason) (increase(esper_gateway_refused_requests_total[5m])) > 0",
        "high",
        "the esper gateway {{ $labels.instance }} refuses requests for good: {{ $labels.reason }}",
        "Its log says what was wrong. A wrong token: let the gateway accept both tokens while they change.",
    ),
    Alert(
        "EsperGatewayDeferring",
        "sum by (job, instance, reason) (increase(esper_gateway_deferred_requests_total[1m])) > 0",
        "warn",
        "the esper gateway {{ $labels.instance }} asks senders to retry: {{ $labels.reason }}",
        "They keep the data. Too many runs: raise --limit runs, or send some to another gateway before their buffers are "
        "full.",
        "2m",
    ),
    Alert(
        "EsperTierLagging",
        "sum by (job) (esper_gateway_kafka_lag_records) > 10000",
        "warn",
        "the members of {{ $labels.job }} are {{ $value | humanize }} requests behind",
        "Start further members, up to one for each partition; see whether one of them begins anew again and again.",
        "5m",
    ),
    Alert(
        "EsperTierAborting",
        "sum by (job, instance) (increase(esper_gateway_kafka_aborts_total[10m])) > 3",
        "warn",
        "the member {{ $labels.instance }} aborts transactions",
        "Its log says why. Nothing is lost: its requests are read again. Brokers that are slow or change often cause it.",
    ),
    Alert(
        "EsperTierLosing",
        'sum by (job, instance) (increase({__name__=~"esper_gateway_kafka_(poisoned|too_large|expired_records)_total"}[10m])) > 0',
        "high",
        "the member {{ $labels.instance }} leaves out records: it cannot read them, they are too large, or they expired unread",
        "Its log names each. Records that cannot be read are in the topic esper.dead; too large: raise max.message.bytes of "
        "the topic that it names; expired: start further members, or keep requests for longer.",
    ),
    Alert(
        "EsperTierOlder",
        "sum by (job, instance) (esper_gateway_kafka_unreadable_partitions) > 0",
        "warn",
        "the member {{ $labels.instance }} leaves {{ $value | humanize }} partitions alone: a newer version has written there",
        "Update this member as well. Requests of these partitions wait until then, for as long as esper.otlp keeps them.",
        "5m",
    ),
]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _alert(alert: Alert) -> list[str]:
    return [
        f"      - alert: {alert.name}",
        f"        expr: {_quoted(alert.expression)}",
        f"        for: {alert.pending}",
        "        labels:",
        f"          severity: {alert.severity}",
        "        annotations:",
        f"          summary: {_quoted(alert.summary)}",
        f"          action: {_quoted(alert.to_do)}",
    ]


def rendered(naming: Naming, rules: Sequence[Rule] = RULES) -> str:
    """The file of rules; see ``risks``."""
    lines = [_HEADER + "groups:", "  - name: esper-recorded", "    rules:"]
    for name, expression in recorded(naming):
        lines += [f"      - record: {name}", f"        expr: {_quoted(expression)}"]
    for group, alerts in (
        ("esper-risks", risks(naming, rules)),
        ("esper-runs", others(naming)),
        ("esper-pipeline", PIPELINE),
    ):
        lines += [f"  - name: {group}", "    rules:"]
        for alert in alerts:
            lines += _alert(alert)
    return "\n".join(lines) + "\n"
