"""Comparisons as text for a terminal, as Markdown for a pull request, and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from esper_otel.compare.condition import Condition, Verdict
from esper_otel.compare.statistic import CONFIDENCE, Change, Statistic
from esper_otel.text import printable

_HEAD = ("metric", "run", "baseline", "ratio", f"{CONFIDENCE:.0%} interval", "verdict")
_WORDS = {
    Verdict.PASSED: "passed: no condition is met",
    Verdict.FAILED: "failed",
    Verdict.NONE: "no verdict: too little is known for at least one condition",
}


@dataclass(frozen=True, slots=True)
class TableLine:
    """One line of a comparison.

    Attributes:
        metric: name of the metric.
        unit: its unit, for example ``ms``.
        statistic: what is compared.
        change: the numbers.
        condition: the condition that is judged; None if the line is only shown.
        verdict: what the condition says; None without one.
        reason: why, in a few words.
    """

    metric: str
    unit: str
    statistic: Statistic
    change: Change
    condition: Condition | None = None
    verdict: Verdict | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs, line by line.

    Attributes:
        run: name of the run in question.
        baseline: name of the run that it is compared with.
        lines: the lines, those with a condition first.
    """

    run: str
    baseline: str
    lines: tuple[TableLine, ...]

    @property
    def verdict(self) -> Verdict:
        """Failed if a condition failed; otherwise without a verdict if a condition has none; otherwise passed."""
        verdicts = {line.verdict for line in self.lines}
        return next((each for each in (Verdict.FAILED, Verdict.NONE) if each in verdicts), Verdict.PASSED)

    @property
    def summary(self) -> str:
        """The result in a sentence."""
        if not any(line.condition for line in self.lines):
            return 'nothing was judged: add conditions, for example --fail-if "step_latency_ms.p50 > 1.05x"'
        failed = [line.condition.text for line in self.lines if line.condition and line.verdict is Verdict.FAILED]
        return ": ".join([_WORDS[self.verdict], *(["; ".join(failed)] if failed else [])])


def as_text(comparison: Comparison) -> str:
    """Returns a table for a terminal, with the result in the last line."""
    rows = [_HEAD, *map(_cells, comparison.lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = f"{printable(comparison.run)} against {printable(comparison.baseline)}"
    return "\n".join([title, "", *lines, "", comparison.summary])


def as_markdown(comparison: Comparison) -> str:
    """Returns a table in Markdown."""
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_cells, comparison.lines)]
    lines = [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
    title = f"**{_escaped(printable(comparison.run))}** against **{_escaped(printable(comparison.baseline))}**"
    return "\n".join([title, "", *lines, "", f"**{_escaped(comparison.summary)}**"])


def as_json(comparison: Comparison) -> str:
    """Returns one JSON object; numbers that are not finite are the words ``NaN``, ``Infinity`` and ``-Infinity``."""
    content = {
        "run": comparison.run,
        "baseline": comparison.baseline,
        "verdict": comparison.verdict.value,
        "confidence": CONFIDENCE,
        "lines": [_as_object(line) for line in comparison.lines],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _as_object(line: TableLine) -> dict[str, object]:
    change = line.change
    return {
        "metric": line.metric,
        "unit": line.unit,
        "statistic": line.statistic.name,
        "run": _number(change.run),
        "baseline": _number(change.baseline),
        "ratio": _number(change.ratio),
        "interval": change.interval,
        "steps": {"run": change.steps[0], "baseline": change.steps[1]},
        "condition": line.condition and line.condition.text,
        "verdict": line.verdict and line.verdict.value,
        "reason": line.reason,
    }


def _number(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cells(line: TableLine) -> tuple[str, ...]:
    change = line.change
    unit = "" if line.unit == "1" else f" {line.unit}"
    interval = "" if change.interval is None else "{:.4f} to {:.4f}".format(*change.interval)
    judged = "" if line.verdict is None or line.condition is None else f"{line.verdict.value}: {line.reason}"
    if line.condition is not None:
        judged += f" ({line.condition.sign} {line.condition.limit:g}{'x' if line.condition.is_ratio else ''})"
    return (
        f"{printable(line.metric)}.{line.statistic.name}",
        _value(change.run, change.steps[0], unit),
        _value(change.baseline, change.steps[1], unit),
        "" if change.ratio is None else f"{change.ratio:.4f}",
        interval,
        judged,
    )


def _value(value: float, steps: int, unit: str) -> str:
    return f"{value:.6g}{unit}" if steps else "absent"


def _escaped(text: str) -> str:
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#" else each for each in text)
