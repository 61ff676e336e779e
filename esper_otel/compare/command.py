"""The command ``esper-otel compare``: a gate between two runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial

import numpy as np

from esper_otel.compare.comparison import Comparison, TableLine, as_json, as_markdown, as_text
from esper_otel.compare.condition import Condition, Verdict
from esper_otel.compare.readings import Readings, read
from esper_otel.compare.statistic import Statistic, Values, change
from esper_otel.errors import ConfigurationError, UnknownMetric
from esper_otel.pull.command import rank_number
from esper_otel.report.command import add_gateway_arguments, gateway_client
from esper_otel.schema import METRICS

_UNITS = {metric.name: metric.unit for metric in METRICS}
_EMPTY: Values = np.zeros(0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``esper-otel compare``."""
    what = "a run at the gateway, STORE:RUN for a gateway's --store directory, a black box, or a Parquet or CSV file"
    parser.add_argument("run", metavar="RUN", help=what)
    parser.add_argument("baseline", metavar="BASELINE", help="the run to compare it with, in the same forms")
    parser.add_argument(
        *("--fail-if",),
        action="append",
        default=[],
        metavar="CONDITION",
        help='METRIC.STATISTIC, a sign, and a limit: "step_latency_ms.p50 > 1.05x" is a multiple of the baseline, '
        '"gradient_norm.p99 > 10" a value; statistics are mean, last, min, max, p50, p99 and so on; may be repeated',
    )
    parser.add_argument(
        "--skip", type=_steps, default=0, metavar="N", help="leave out the first N steps of each run (%(default)s)"
    )
    parser.add_argument("--rank", type=rank_number, default=0, metavar="N", help="rank of the runs (%(default)s)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a table in Markdown, for a pull request")
    form.add_argument("--json", action="store_true", help="print JSON")
    add_gateway_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """Prints the comparison. Returns 1 if a condition is met, otherwise 0."""
    conditions = [Condition.of(text) for text in options.fail_if]
    run, baseline = (
        read(what, options.rank, partial(gateway_client, options)) for what in (options.run, options.baseline)
    )
    comparison = compared(run, baseline, conditions, options.skip)
    form = as_json if options.json else as_markdown if options.markdown else as_text
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(form(comparison).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    return 1 if comparison.verdict is Verdict.FAILED else 0


def compared(run: Readings, baseline: Readings, conditions: Iterable[Condition], skip: int = 0) -> Comparison:
    """Judges the conditions, and shows the median of every other metric that both runs have.

    Raises:
        UnknownMetric: neither run has the metric of a condition.
        ConfigurationError: one of the two runs lacks it.
    """
    judged = tuple(_judged(condition, run, baseline, skip) for condition in conditions)
    names = sorted((run.series.keys() & baseline.series.keys()) - {line.metric for line in judged})
    median = Statistic.of("p50")
    shown = tuple(
        TableLine(name, _unit(name), median, change(median, run.series[name][skip:], baseline.series[name][skip:]))
        for name in names
        if len(run.series[name]) > skip and len(baseline.series[name]) > skip
    )
    return Comparison(run.name, baseline.name, judged + shown)


def _judged(condition: Condition, run: Readings, baseline: Readings, skip: int) -> TableLine:
    needed = [run, baseline] if condition.is_ratio else [run]
    name = condition.metric
    lacking = [each for each in needed if name not in each.series]
    if len(lacking) == len(needed):
        raise UnknownMetric(name, run.series.keys())
    if lacking:
        raise ConfigurationError(
            f"{lacking[0].name} has no value of {name!r} in {lacking[0].steps} steps, so that {condition.text!r} "
            "cannot be judged: record it in both runs, or leave the condition out"
        )
    values, others = (each.series.get(name, _EMPTY)[skip:] for each in (run, baseline))
    found = change(condition.statistic, values, others)
    verdict, reason = condition.judge(found)
    return TableLine(name, _unit(name), condition.statistic, found, condition, verdict, reason)


def _unit(name: str) -> str:
    return _UNITS.get(name, "1")


def _steps(text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        steps = -1
    if steps < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps")
    return steps
