"""Dashboards for Grafana, of the catalogue: one run, its seeds, runs beside each other, and the telemetry itself."""

from __future__ import annotations

from collections.abc import Iterable

from panels import OF_DEVICE, OF_RESOURCE, Board, Query, Shown

from esper_otel.files.selectors import CATALOGUE, Naming


def boards(naming: Naming) -> list[Board]:
    """Every dashboard; each says last whose values it shows."""
    found = [_run(naming), _ranks(naming), _seeds(naming), _compare(naming), _health(naming)]
    for board in found:
        board.row("Identity")
        board.show(_who_is_it(naming))
    return found


def _who(naming: Naming, run: str = "$run", rank: str = "$rank", operator: str = "=~") -> str:
    if naming.has_labels:
        return f'run_id{operator}"{run}", rank{operator}"{rank}"'
    return f'instance{operator}"{run}/{rank}"'


def _choose(board: Board, naming: Naming, *, runs: bool = False) -> None:
    """Variables for the run, or for several, and the rank."""
    name = naming.name("esper.global_step")
    if naming.has_labels:
        board.variable("run", "run", f"label_values({name}{{{naming.runs}}}, run_id)", multi=runs)
        board.variable("rank", "rank", f'label_values({name}{{run_id=~"$run"}}, rank)', multi=True)
    else:
        board.variable("run", "run", f"label_values({name}{{{naming.runs}}}, instance)", "(.*)/[^/]*", multi=runs)
        board.variable(
            "rank", "rank", f'label_values({name}{{instance=~"$run/.*"}}, instance)', ".*/([^/]*)", multi=True
        )


def _lines_of(naming: Naming, *metrics: str, legend: str = "") -> list[Query]:
    """A line for each metric and rank."""
    who = _who(naming)
    return [Query(naming.select(metric, who), legend or f"{metric} {{{{rank}}}}") for metric in metrics]


def _described(metric: str) -> str:
    return CATALOGUE[metric].description


def _parts_of_a_step(naming: Naming, who: str) -> list[Query]:
    """What a cycle is made up of: its parts, and what is left of it."""
    step = naming.select("step_latency_ms", who)

    def known(metric: str) -> str:
        return f"(({naming.select(metric, who)}) or on (run_id, rank) 0 * ({step}))"

    def joined(operator: str, parts: Iterable[str]) -> str:
        return f" {operator} on (run_id, rank) ".join(parts)

    rest = joined("-", [f"({step})", known("hook_latency_ms"), known("kasmina.finalize_ms")])
    names = ("esper.forward_ms", "esper.backward_ms", "esper.optimizer_ms")
    inside = joined("+", map(known, names))
    fits = f"on (run_id, rank) (({inside}) <= on (run_id, rank) ({rest}))"
    left = f"(({rest}) - on (run_id, rank) (({inside}) and {fits})) or on (run_id, rank) ({rest})"
    return [
        *_lines_of(naming, "input_wait_ms"),
        *(Query(f"({naming.select(name, who)}) and {fits}", f"{name} {{{{rank}}}}") for name in names),
        *_lines_of(naming, "hook_latency_ms", "kasmina.finalize_ms"),
        Query(f"clamp_min({left}, 0)", "rest {{rank}}"),
    ]


_PHASES = ("start_up", "checkpoint", "evaluation")


def _hours(naming: Naming, who: str) -> Shown:
    """Where the time range that is chosen went: sums over the steps and phases in it, which are single samples."""

    def of_steps(metric: str) -> str:
        return f"sum by (run_id, rank) ({naming.select(metric, who, over='$__range', function='sum_over_time')})"

    def of_phases(metric: str, phases: str = "") -> str:
        matchers = f"{who}, {phases}" if phases else who
        return f"sum by (run_id, rank) ({naming.select(metric, matchers, over='$__range', function='sum_over_time')})"

    base = of_steps("step_latency_ms")

    def known(expression: str) -> str:
        return f"(({expression}) or on (run_id, rank) 0 * ({base}))"

    hooks = f"{known(of_steps('hook_latency_ms'))} + on (run_id, rank) {known(of_steps('kasmina.finalize_ms'))}"
    inside = known(of_phases("esper.phase.step_ms"))  # also in the latency of their steps
    others = "|".join(_PHASES)
    parts = {
        "productive": f"clamp_min(({base}) - on (run_id, rank) ({hooks}) - on (run_id, rank) {inside}, 0)",
        "input wait": known(of_steps("input_wait_ms")),
        "hooks": hooks,
        **{phase.replace("_", " "): known(of_phases("esper.phase.own_ms", f'phase="{phase}"')) for phase in _PHASES},
        "other phases": known(of_phases("esper.phase.own_ms", f'phase!~"{others}"')),
    }
    spent = " + on (run_id, rank) ".join(f"({each})" for each in parts.values())
    parts["not known"] = f"clamp_min($__range_ms - on (run_id, rank) ({spent}), 0)".replace(
        "$__range_ms", f"(0 * ({base}) + $__range_ms)"
    )
    return Shown(
        "Where the hours went",
        "Shares of the time range that is chosen, of each rank. What is not known lies between steps and phases: before "
        "the run, after it, or between two attempts. Steps done again after a resume are in the productive part; "
        "the gateway's page and report tell them apart. It needs every step as a sample, as OTLP sends them.",
        "bars",
        [Query(each, instant=True) for each in parts.values()],
        "ms",
        24,
        6,
        columns=tuple(parts),
    )


def _who_is_it(naming: Naming) -> Shown:
    """The join of each rank with its Resource and its device, of which the newest count: a resumed run has others."""

    def newest(metric: str, matchers: str) -> str:
        seen = f"max_over_time(timestamp({metric}{{{matchers}}})[$__range:$__interval])"
        return f"topk by (job, instance) (1, {seen})"

    resource = newest("target_info", 'esper_run_id=~"$run", esper_rank=~"$rank"')
    device = newest(naming.name("esper.device.info"), _who(naming))
    labels = ", ".join(OF_DEVICE)
    joined = f"{resource} * on (job, instance) group_left ({labels}) ({device}) ^ 0"
    every = f"max by ({', '.join((*OF_RESOURCE, *OF_DEVICE))}) (({joined}) or on (job, instance) {resource})"
    return Shown(
        "Who is it?",
        "Each rank with its experiment, host and device: target_info and esper_device_info, joined by job and instance. "
        "To show one of the labels on another panel, join it in the same way. Without a device, the device is not "
        "known, or the hardware probes are off.",
        "identity",
        [Query(f"1000 * {every}", instant=True)],
        "dateTimeAsIso",
        24,
        7,
    )


def _run(naming: Naming) -> Board:
    board = Board(naming, "run", "Esper / Run", "Is it learning, is it healthy, what is slow?")
    _choose(board, naming)
    who = _who(naming)
    last = naming.labelled(f"timestamp({naming.name('esper.global_step')}{{{who}}})")
    loss = naming.select("loss", who)
    newest = naming.select("loss", who, over="1m", function="last_over_time")
    nonfinite = naming.select("esper.values.nonfinite", who)
    board.row("Now")
    board.show(
        Shown(
            "Step",
            "The newest step, of each rank.",
            "stat",
            [Query(naming.select("esper.global_step", who), "{{rank}}")],
            width=4,
            height=5,
        ),
        Shown(
            "Age of the last step",
            "Grows while nothing comes. Above a few times the usual step time the run hangs or has gone.",
            "stat",
            [Query(f"time() - max by (run_id, rank) ({last})", "{{rank}}")],
            "s",
            4,
            5,
            (60, 300),
        ),
        Shown(
            "Loss", "Of the newest step; NaN is shown as NaN.", "stat", [Query(newest, "{{rank}}")], width=4, height=5
        ),
        Shown(
            "NaN and infinite values",
            "How many values of the run were not finite, the loss included. Any is worth a look.",
            "stat",
            [Query(nonfinite, "{{rank}}")],
            width=4,
            height=5,
            limits=(1,),
        ),
        Shown(
            "Samples a second",
            "Of the newest step, of each rank.",
            "stat",
            [Query(naming.select("samples_per_s", who), "{{rank}}")],
            width=4,
            height=5,
        ),
        Shown(
            "Live seeds",
            "Seeds that have not been retired.",
            "stat",
            [Query(naming.select("esper.seeds", who), "{{rank}}")],
            width=4,
            height=5,
        ),
    )
    ewma = naming.select("loss_ewma", who)
    volatility = naming.select("loss_volatility", who)
    board.row("Learning")
    board.show(
        Shown(
            "Loss",
            "The loss, its moving average, and a band of one volatility around that. A loss that leaves the band for good has changed its ways.",
            "lines",
            [
                Query(loss, "loss {{rank}}"),
                Query(ewma, "average {{rank}}"),
                Query(f"{ewma} + on (run_id, rank) {volatility}", "upper {{rank}}"),
                Query(f"{ewma} - on (run_id, rank) {volatility}", "lower {{rank}}"),
            ],
            width=16,
            height=9,
        ),
        Shown(
            "Validation",
            "Loss and accuracy on held-out data, as the trainer reported them last.",
            "lines",
            _lines_of(naming, "esper.validation.loss", "esper.validation.accuracy"),
            height=9,
        ),
        Shown(
            "Gradient norm",
            f"{_described('gradient_norm')} A spike before a NaN is the usual story.",
            "lines",
            _lines_of(naming, "gradient_norm", "grad_norm_ewma"),
        ),
        Shown(
            "Gradient conflict",
            f"{_described('grad_conflict_rate')} Above 0.5 the sources pull against each other.",
            "lines",
            _lines_of(naming, "grad_conflict_rate"),
            "percentunit",
        ),
        Shown(
            "Volatility",
            "How much the loss and the gradient norm jump about.",
            "lines",
            _lines_of(naming, "loss_volatility", "grad_var", "loss_delta"),
        ),
    )
    board.row("Where the time goes")
    board.show(
        Shown(
            "Where a step's time goes",
            "Shares of a cycle, which is the wait for input and the step. Forward, backward and optimizer are part of the "
            "rest where they are not recorded, or do not fit into it: a GPU's own times may go on after the step. Input "
            "wait above a third: the loader is the bottleneck.",
            "stack",
            _parts_of_a_step(naming, who),
            "ms",
            12,
            9,
        ),
        Shown(
            "Step latency",
            "The whole step, and what the controller takes of it.",
            "lines",
            _lines_of(naming, "step_latency_ms", "tamiyo_latency_ms", "kasmina.apply_ms", "h2d_copy_ms"),
            "ms",
            6,
            9,
        ),
        Shown(
            "Throughput",
            "Samples a second, of each rank.",
            "lines",
            _lines_of(naming, "samples_per_s"),
            width=6,
            height=9,
        ),
    )
    board.show(_hours(naming, who))
    board.row("Machine")
    board.show(
        Shown(
            "GPU memory",
            "Used and free. Free near zero: the next allocation may fail.",
            "lines",
            _lines_of(naming, "gpu_mem_used_gb", "gpu_mem_free_gb"),
            "decgbytes",
        ),
        Shown(
            "Utilization",
            "Of the GPU and of the CPU. A GPU far below 100 % waits for something: see where the time goes.",
            "lines",
            _lines_of(naming, "gpu_util_percent", "cpu_util_percent"),
            "percent",
        ),
        Shown(
            "Temperature",
            _described("esper.device.temperature_celsius"),
            "lines",
            _lines_of(naming, "esper.device.temperature_celsius"),
            "celsius",
        ),
    )
    _mark_events(board, naming)
    _mark_stages(board, naming)
    return board


def _ranks(naming: Naming) -> Board:
    board = Board(naming, "ranks", "Esper / Ranks", "Which rank holds up the others, and by how much?")
    _choose(board, naming)
    who = _who(naming)

    def mean(metric: str) -> str:
        return f"avg by (run_id, rank) ({naming.select(metric, who, over='1m', function='avg_over_time')})"

    step, nothing = mean("step_latency_ms"), f"{mean('step_latency_ms')} * 0"
    wait = f"({mean('input_wait_ms')} or {nothing})"
    cycle = f"({step} + {wait})"
    own = f"({wait} + ({mean('hook_latency_ms')} or {nothing}) + ({mean('kasmina.finalize_ms')} or {nothing}))"
    board.show(
        Shown(
            "Slowest rank by its cycle",
            "By how much the longest cycle (input wait and step, over a minute) is above the median of the run. Of ranks that run "
            "independently, this is the one that holds up the run.",
            "stat",
            [
                Query(
                    f"topk(1, {cycle} - on (run_id) group_left quantile by (run_id) (0.5, {cycle}))",
                    "rank {{rank}}",
                    instant=True,
                )
            ],
            "ms",
            width=6,
            height=6,
        ),
        Shown(
            "Slowest rank by its own time",
            "The same for the time that does not depend on other ranks: input wait, hook, finalizing. In lock-step, with a "
            "collective in each step, all cycles are equal and this one tells the ranks apart.",
            "stat",
            [
                Query(
                    f"topk(1, {own} - on (run_id) group_left quantile by (run_id) (0.5, {own}))",
                    "rank {{rank}}",
                    instant=True,
                )
            ],
            "ms",
            width=6,
            height=6,
        ),
        Shown(
            "Spread",
            "Longest minus shortest over the ranks. What cannot be told: a rank that is slow inside its step, before the "
            "collective, looks like those that wait for it, because all of them measure the same step.",
            "lines",
            [
                Query(f"max by (run_id) ({cycle}) - min by (run_id) ({cycle})", "cycle"),
                Query(f"max by (run_id) ({wait}) - min by (run_id) ({wait})", "input wait"),
                Query(f"max by (run_id) ({own}) - min by (run_id) ({own})", "own time"),
            ],
            "ms",
            width=12,
            height=6,
        ),
        Shown(
            "Cycle by rank",
            "Input wait and step, over a minute, a row for each rank.",
            "heat",
            [Query(f"sum by (rank) ({cycle})", "{{rank}}")],
            "ms",
            width=12,
            height=9,
        ),
        Shown(
            "Own time by rank",
            "Input wait, hook and finalizing, over a minute, a row for each rank.",
            "heat",
            [Query(f"sum by (rank) ({own})", "{{rank}}")],
            "ms",
            width=12,
            height=9,
        ),
        Shown(
            "Input wait",
            "The rank that waits for its data while the others wait for it.",
            "lines",
            _lines_of(naming, "input_wait_ms", legend="rank {{rank}}"),
            "ms",
            width=12,
        ),
        Shown(
            "Step",
            "With a collective in the step, all ranks have the same.",
            "lines",
            _lines_of(naming, "step_latency_ms", legend="rank {{rank}}"),
            "ms",
            width=12,
        ),
        Shown(
            "GPU",
            "Lower than that of the others: the rank waits, or its clocks are throttled.",
            "lines",
            _lines_of(naming, "gpu_util_percent", legend="rank {{rank}}"),
            "percent",
            width=12,
        ),
        Shown(
            "Memory of the processes",
            "A rank that swaps is slow.",
            "lines",
            _lines_of(naming, "esper.memory.process_gb", legend="rank {{rank}}"),
            "decgbytes",
            width=12,
        ),
    )
    return board


def _mark_events(board: Board, naming: Naming) -> None:
    """Marks what happens in a run, as its events say it, from metrics alone: no store of logs is needed."""

    def sent(metric: str, matchers: str = "") -> str:
        """When a point of a metric that is sent once arrived."""
        who = _who(naming) + matchers
        return f"{naming.select(metric, who, over='15s', function='count_over_time')} > 0"

    board.annotate("started", sent("esper.phase.length_ms", ', phase="start_up"'), "rank {{rank}} begins its steps")
    board.annotate("ended", sent("esper.run.ended"), "rank {{rank}} has ended: {{outcome}}")
    board.annotate("checkpoint", sent("esper.phase.length_ms", ', phase="checkpoint"'), "rank {{rank}}")
    firing = 'ALERTS{alertstate="firing", run_id=~"$run", rank=~"$rank"}'
    board.annotate("signal", firing, "{{alertname}} on rank {{rank}}")


def _mark_stages(board: Board, naming: Naming) -> None:
    stage = naming.select("kasmina.seed.stage", _who(naming))
    changed = naming.select("kasmina.seed.stage", _who(naming), over="15s", function="changes")
    board.annotate(
        "stage", f"({stage}) and on (run_id, rank, seed_id) ({changed}) > 0", "{{seed_id}} changed its stage"
    )


def _seeds(naming: Naming) -> Board:
    board = Board(naming, "seeds", "Esper / Seeds", "Which seed is in trouble?")
    _choose(board, naming)
    stage = naming.name("kasmina.seed.stage")
    board.variable("seed", "seed", f"label_values({stage}{{{_who(naming)}}}, seed_id)", multi=True)
    who = f'{_who(naming)}, seed_id=~"$seed"'

    def lines(metric: str) -> list[Query]:
        return [Query(naming.select(metric, who), "{{seed_id}} {{rank}}")]

    board.show(
        Shown(
            "Stages",
            "A row for each seed. Red is CULLED, green FOSSILIZED; a seed that stays GERMINATED or BLENDING for long is stuck.",
            "stages",
            lines("kasmina.seed.stage"),
            width=24,
            height=10,
        ),
        Shown(
            "Alpha",
            f"{_described('kasmina.seed.alpha')} It should rise steadily while a seed is BLENDING.",
            "lines",
            lines("kasmina.seed.alpha"),
            "percentunit",
        ),
        Shown(
            "Steps of blending",
            f"{_described('kasmina.seed.alpha_steps')} Flat while alpha rises: the schedule is not counted.",
            "lines",
            lines("kasmina.seed.alpha_steps"),
        ),
        Shown(
            "Kernel latency",
            f"{_described('kasmina.seed.last_kernel_latency_ms')} Above the budget, 10 ms by default, a seed is DEGRADED.",
            "lines",
            lines("kasmina.seed.last_kernel_latency_ms"),
            "ms",
        ),
        Shown(
            "Isolation violations",
            f"{_described('kasmina.seed.isolation_violations')} Any step up is a leak.",
            "lines",
            lines("kasmina.seed.isolation_violations"),
        ),
        Shown(
            "Isolation: dot product",
            f"{_described('kasmina.seed.isolation.dot')} Away from zero, the seed's gradient and the host's meet.",
            "lines",
            lines("kasmina.seed.isolation.dot"),
        ),
        Shown(
            "Isolation: norms",
            "Of the host's gradient and of the seed's.",
            "lines",
            [*lines("kasmina.seed.isolation.host_norm"), *lines("kasmina.seed.isolation.seed_norm")],
        ),
        Shown(
            "Fallback and kernels",
            "1 while a seed runs on its fallback, or has its kernel attached. A fallback for long: its kernel fails.",
            "lines",
            [*lines("kasmina.seed.fallback_used"), *lines("kasmina.seed.kernel_attached")],
        ),
    )
    _mark_stages(board, naming)
    return board


def _compare(naming: Naming) -> Board:
    board = Board(
        naming, "compare", "Esper / Compare runs", "Which run is better at the same step? Wall time compares nothing."
    )
    _choose(board, naming, runs=True)
    who = _who(naming)
    step = f"max by (run_id) ({naming.select('esper.global_step', who)})"

    def by_step(metric: str) -> list[Query]:
        return [Query(step), Query(f"avg by (run_id) ({naming.select(metric, who)})")]

    def last(metric: str) -> Query:
        return Query(
            f"avg by (run_id) ({naming.select(metric, who, over='$__range', function='last_over_time')})", instant=True
        )

    board.show(
        Shown(
            "Loss by step",
            "The loss over the step's number, a series for each run, mean over ranks.",
            "points",
            by_step("loss"),
            width=12,
            height=11,
            columns=("step", "loss"),
        ),
        Shown(
            "Smoothed loss by step",
            "The moving average instead of the loss.",
            "points",
            by_step("loss_ewma"),
            width=12,
            height=11,
            columns=("step", "average"),
        ),
        Shown(
            "Samples a second by step",
            "Who is faster.",
            "points",
            by_step("samples_per_s"),
            width=12,
            height=9,
            columns=("step", "samples/s"),
        ),
        Shown(
            "Gradient norm by step",
            "Who is calmer.",
            "points",
            by_step("gradient_norm"),
            width=12,
            height=9,
            columns=("step", "norm"),
        ),
        Shown(
            "Where each run is",
            "The last values in the time range.",
            "table",
            [last("esper.global_step"), last("loss"), last("loss_ewma"), last("accuracy"), last("samples_per_s")],
            width=24,
            columns=("step", "loss", "average", "accuracy", "samples/s"),
        ),
    )
    return board


def _health(naming: Naming) -> Board:
    board = Board(naming, "telemetry", "Esper / Telemetry health", "Can the other dashboards be trusted?")
    _choose(board, naming, runs=True)
    who = _who(naming)
    board.show(
        Shown(
            "Steps dropped",
            "Steps that never left the trainer, by reason. Should be empty.",
            "lines",
            [Query(naming.select("esper.frames.dropped", who), "{{run_id}} {{rank}} {{reason}}")],
        ),
        Shown(
            "Steps waiting",
            "Steps that the endpoint has not acknowledged. Grows during an outage, and falls after it.",
            "lines",
            [Query(naming.select("esper.export.queue", who), "{{run_id}} {{rank}}")],
        ),
        Shown(
            "Buffer",
            "Memory of the steps that are kept in the trainer.",
            "lines",
            [Query(naming.select("esper.buffer.bytes", who), "{{run_id}} {{rank}}")],
            "bytes",
        ),
        Shown(
            "Last request",
            "How long the endpoint took to acknowledge.",
            "lines",
            [Query(naming.select("esper.export.latency_ms", who), "{{run_id}} {{rank}}")],
            "ms",
        ),
        Shown(
            "Requests sent again",
            "Each one more is a refusal or a time-out.",
            "lines",
            [Query(naming.select("esper.export.retries", who), "{{run_id}} {{rank}}")],
        ),
        Shown(
            "Errors inside",
            "Faults of processors and of the telemetry itself. Should stay 0.",
            "lines",
            [Query(naming.select("esper.errors.internal", who), "{{run_id}} {{rank}}")],
        ),
        Shown(
            "Collector: queues",
            "How full each queue on disk is. Full: the collector refuses, and trainers keep the data.",
            "lines",
            [Query("otelcol_exporter_queue_size / otelcol_exporter_queue_capacity", "{{instance}} {{exporter}}")],
            "percentunit",
        ),
        Shown(
            "Collector: points",
            "In, out, and refused for good. The last should be 0.",
            "lines",
            [
                Query(
                    'sum by (instance) (rate({__name__=~"otelcol_receiver_accepted_metric_points(_total)?"}[1m]))',
                    "in {{instance}}",
                ),
                Query(
                    'sum by (instance, exporter) (rate({__name__=~"otelcol_exporter_sent_metric_points(_total)?"}[1m]))',
                    "out {{exporter}}",
                ),
                Query(
                    'sum by (instance, exporter) (rate({__name__=~"otelcol_exporter_send_failed_metric_points(_total)?"}[1m]))',
                    "lost {{exporter}}",
                ),
            ],
        ),
        Shown(
            "Gateway: steps",
            "Steps taken, incomplete ones among them, and those given to controllers, a second.",
            "lines",
            [
                Query(f"rate(esper_gateway_{name}_total[1m])", f"{name.replace('_', ' ')} {{{{instance}}}}")
                for name in ("steps", "incomplete_steps", "pulled_steps")
            ],
        ),
    )
    board.row("Scale: a tier on Kafka")
    board.show(
        Shown(
            "Requests behind",
            "Requests that members have not read yet. Grows for long: start further members.",
            "lines",
            [Query("sum by (instance) (esper_gateway_kafka_lag_records)", "{{instance}}")],
        ),
        Shown(
            "Steps of members",
            "Steps a second that each member puts together.",
            "lines",
            [Query("sum by (instance) (rate(esper_gateway_steps_total[1m]))", "{{instance}}")],
        ),
        Shown(
            "What members left out or did again",
            "Aborted transactions are done again. Poisoned, too large and expired records are left out: should stay 0.",
            "lines",
            [
                Query(
                    f"sum by (instance) (rate(esper_gateway_kafka_{name}_total[5m]))",
                    f"{name.replace('_', ' ')} {{{{instance}}}}",
                )
                for name in ("aborts", "poisoned", "too_large", "expired_records")
            ],
        ),
    )
    return board
