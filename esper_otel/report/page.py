"""Renders a recording as one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from esper_otel.report.findings import PHASES, Finding, compared, findings, first_bad, phases, stage_name
from esper_otel.report.recording import Recording, names_of
from esper_otel.text import printable

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 920, 200, 64, 24
_MOST_POINTS = 1_500
_MOST_MARKS = 8
_COLORS = ("#1f6feb", "#d29922", "#2da44e", "#8250df", "#cf222e", "#57606a")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:960px;padding:0 1rem;color:#1f2328;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:1.6rem 0 .3rem}p.sub{color:#57606a;margin-top:0}
dl{border:1px solid #d0d7de;border-radius:8px;padding:.4rem 1rem}
dt{font-weight:600;margin-top:.6rem}dd{margin:0 0 .6rem}
dd.bad{border-left:4px solid #cf222e;padding-left:.6rem}svg{width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#57606a}table{border-collapse:collapse;font-size:13px}
td,th{padding:.15rem .6rem;border-bottom:1px solid #d0d7de;text-align:right}
td:first-child,th:first-child{text-align:left}
"""
# The policy forbids the page to load or run anything, whatever it contains; it allows this style sheet and style
# attributes.
_OUR_STYLE = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    f"style-src-elem 'sha256-{_OUR_STYLE}'; style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
)
_MADE = '<meta name="esper-otel-report"'
_BEGINNING = 4096  # bytes of a file that are searched for the mark above
_MOST_SHOWN = 2_000
_MOST_CHANGES = 100

Points = Sequence[tuple[float, float | None]]


class Line(NamedTuple):
    """One curve, or the upper edge of one area in a stacked chart."""

    name: str
    points: Points


class Mark(NamedTuple):
    """A step that is marked in each chart, and the reason."""

    step: int
    reason: str


def page(recording: Recording, other: Recording | None = None) -> str:
    """Renders the whole file.

    Args:
        recording: the run.
        other: another run to compare with.
    """
    found = findings(recording) + ([] if other is None else compared(recording, other))
    bad = first_bad(recording)
    mark = None if bad is None else Mark(recording.rows[bad[0]].step, f"{recording.title} went wrong")
    parts = [_answers(found)]
    if other is None:
        losses = [_line("loss", recording, "loss"), _line("EWMA", recording, "loss_ewma")]
    else:
        both = zip((recording, other), names_of(recording, other), strict=True)
        losses = [_line(f"loss of {name}", each, "loss") for each, name in both]
    parts.append(_chart("Loss", losses, mark))
    parts.append(_chart("Gradient norm", [_line("gradient_norm", recording, "gradient_norm")], mark))
    parts.append(_times(recording, mark))
    if other is not None:
        both = zip((recording, other), names_of(recording, other), strict=True)
        cycles = [Line(name, _cycle(each)) for each, name in both]
        parts.append(_chart("Step and input wait, ms", cycles, mark))
    parts += [_seeds(recording), _last_steps(recording)]
    title = _shown(recording.title)
    sub = f"attempt {_shown(recording.attempt)}, rank {_shown(recording.rank)}; esper-otel report"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{_POLICY}{_made_of(recording)}<title>{title}</title>'
        f'<style>{_STYLE}</style><h1>{title}</h1><p class="sub">{sub}</p>' + "".join(parts) + "</html>\n"
    )


def is_page(path: Path, recording: Recording | None = None) -> bool:
    """Whether a file is a page that this module wrote; if a recording is given, whether it is that recording's page."""
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    return (_MADE if recording is None else _made_of(recording)).encode() in beginning


def _made_of(recording: Recording) -> str:
    """Returns the mark that identifies the page of a recording."""
    return f'{_MADE} content="{_shown(recording.source)}">'


def _shown(text: object) -> str:
    """Escapes untrusted text for the page's text or an attribute's value."""
    return escape(printable(text, _MOST_SHOWN))


def _answers(found: Iterable[Finding]) -> str:
    rows = []
    for each in found:
        answer = "<br>".join(map(_shown, (each.answer, *each.lines)))
        rows.append(f"<dt>{_shown(each.question)}</dt><dd{' class=bad' if each.is_bad else ''}>{answer}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _line(name: str, recording: Recording, metric: str) -> Line:
    return Line(name, [(row.step, row.values.get(metric)) for row in recording.rows])


def _cycle(recording: Recording) -> Points:
    return [(row.step, sum(parts.values()) if (parts := phases(row)) else None) for row in recording.rows]


def _thinned(points: Points) -> Points:
    """Reduces the points to a number that a chart can show: the minimum, maximum and first gap of each stretch."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-len(points) // (_MOST_POINTS // 3))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if point[1] is not None and math.isfinite(point[1])]
        chosen = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()  # type: ignore[arg-type, return-value]
        odd = [point for point in stretch if point[1] is None or not math.isfinite(point[1])]
        kept += sorted({*chosen, *odd[:1]}, key=lambda p: p[0])
    return kept


def _chart(title: str, lines: Sequence[Line], mark: Mark | None, *, is_stacked: bool = False) -> str:
    odd = [stretch for line in lines for stretch in _odd(line)]
    lines = [Line(line.name, _thinned(line.points)) for line in lines]
    finite = [y for line in lines for _, y in line.points if y is not None and math.isfinite(y)]
    if not finite:
        return ""
    low, high = (0.0 if is_stacked else min(finite)), max(finite)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin if low < 0 else max(low - margin, 0.0), high + margin
    steps = [x for line in lines for x, _ in line.points]
    first, last = min(steps), max(steps)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - 8), (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8) + 8

    drawn = [_axes(low, high, first, last)]
    colored = list(zip(_COLORS, lines, strict=False))
    if is_stacked:  # from the top of the stack downwards, so that each area ends where the next one begins
        drawn += [
            f'<path d="{_area(line.points, at)}" fill="{color}" stroke="{color}"/>' for color, line in reversed(colored)
        ]
    else:
        drawn += [
            f'<path d="{_path(line.points, at)}" fill="none" stroke="{color}" stroke-width="1.4"/>'
            for color, line in colored
        ]
    for place, (x, text) in enumerate(odd[:_MOST_MARKS]):
        here, _ = at(x, low)
        anchor = "start" if here < _WIDTH / 2 else "end"
        where = f'x="{here:.1f}" y="{16 + place * 12}" text-anchor="{anchor}"'
        drawn.append(f'<text {where} style="fill:#cf222e">{_shown(text)}</text>')
    more = [f"and {len(odd) - _MOST_MARKS} more stretches that are not finite"] if len(odd) > _MOST_MARKS else []
    if mark is not None and first <= mark.step <= last:
        here, _ = at(mark.step, low)
        ends = f'x1="{here:.1f}" x2="{here:.1f}" y1="8" y2="{_HEIGHT - _BOTTOM}"'
        drawn.append(f'<line {ends} stroke="#cf222e" stroke-dasharray="3 3"/>')
        more.append(f"dashed: step {mark.step}, where {mark.reason}")
    return f"<h2>{_shown(title)}</h2>{_svg(drawn)}{_legend([line.name for line in lines], more)}"


def _odd(line: Line) -> list[tuple[float, str]]:
    """Returns where a curve is not finite, and the text to write there; one entry per stretch of equal values."""
    found = []
    for value, stretch in groupby(line.points, key=lambda point: _if_not_finite(point[1])):
        first, *rest = [x for x, _ in stretch]
        if value:
            steps = f"in steps {first:g} to {rest[-1]:g}" if rest else f"in step {first:g}"
            found.append((first, f"{line.name}: {value} {steps}"))
    return found


def _if_not_finite(value: float | None) -> str:
    return "" if value is None or math.isfinite(value) else f"{value:g}"


def _path(points: Points, at: Callable[[float, float], tuple[float, float]]) -> str:
    words, is_down = [], False
    for x, y in points:
        if y is None or not math.isfinite(y):
            is_down = False
            continue
        here = at(x, y)
        words.append(f"{'L' if is_down else 'M'}{here[0]:.1f} {here[1]:.1f}")
        is_down = True
    return "".join(words)


def _area(points: Points, at: Callable[[float, float], tuple[float, float]]) -> str:
    """Returns the path of the area between a curve and 0."""
    words = []
    for is_there, stretch in groupby(points, key=lambda point: point[1] is not None):
        if is_there:
            upper = [at(x, y) for x, y in stretch if y is not None]
            lower = [(across, at(0.0, 0.0)[1]) for across in (upper[-1][0], upper[0][0])]
            words.append("M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in (*upper, *lower)) + "Z")
    return "".join(words)


def _axes(low: float, high: float, first: float, last: float) -> str:
    bottom = _HEIGHT - _BOTTOM
    lines = [f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{bottom}" y2="{bottom}" stroke="#d0d7de"/>']
    for share in (0.0, 0.5, 1.0):
        y = 8 + share * (bottom - 8)
        lines.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{high - share * (high - low):.4g}</text>'
        )
        x = _LEFT + share * (_WIDTH - _LEFT - 8)
        anchor = ("start", "middle", "end")[round(share * 2)]
        lines.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{first + share * (last - first):.0f}</text>'
        )
    return "".join(lines)


def _svg(drawn: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _legend(names: Sequence[str], more: Sequence[str]) -> str:
    entries = [
        f'<span style="color:{color}">■</span> {_shown(name)}'
        for color, name in zip(_COLORS, names, strict=False)
        if name
    ]
    entries += map(_shown, more)
    return f'<p class="sub">{" &nbsp; ".join(entries)} &nbsp; by step</p>'


def _times(recording: Recording, mark: Mark | None) -> str:
    """Draws the time of each step by phase, stacked; phases that were never recorded are left out."""
    timed = [(row.step, phases(row)) for row in recording.rows]
    total = [(step, sum(parts.values()) if parts else None) for step, parts in timed]
    kept = {step for step, _ in _thinned(total)}
    recorded = [phase for phase in PHASES if any(phase in parts for _, parts in timed)]
    lines = []
    for place, phase in enumerate(recorded):
        below = recorded[: place + 1]
        points = [
            (step, sum(parts.get(each, 0.0) for each in below) if parts else None)
            for step, parts in timed
            if step in kept
        ]
        lines.append(Line(phase, points))
    return _chart("Where a step's time goes, ms, one upon the other", lines, mark, is_stacked=True)


def _seeds(recording: Recording) -> str:
    lives: dict[str, list[tuple[int, float]]] = {}
    for row in recording.rows:
        for seed_id, cells in row.seeds.items():
            stage = cells.get("stage")
            of_seed = lives.setdefault(seed_id, [])
            if stage is not None and (not of_seed or _differ(of_seed[-1][1], stage)):
                of_seed.append((row.step, stage))
    if not lives:
        return ""
    rows = [
        f"<tr><td>{_shown(seed_id)}</td><td>"
        + ", ".join(_shown(f"{stage_name(stage)} from {step}") for step, stage in changes[:_MOST_CHANGES])
        + "</td></tr>"
        for seed_id, changes in sorted(lives.items())
    ]
    return f"<h2>Seeds</h2><table><tr><th>seed</th><th>stages, from step</th></tr>{''.join(rows[:200])}</table>"


def _differ(one: float, other: float) -> bool:
    return one != other and not (math.isnan(one) and math.isnan(other))


def _last_steps(recording: Recording) -> str:
    names = [
        name
        for name in ("loss", "gradient_norm", "accuracy", "step_latency_ms", "input_wait_ms", "samples_per_s")
        if any(name in row.values for row in recording.rows)
    ]
    head = "".join(f"<th>{_shown(name)}</th>" for name in names)
    rows = []
    for row in recording.rows[-12:]:
        cells = "".join(f"<td>{row.values[name]:.5g}</td>" if name in row.values else "<td></td>" for name in names)
        rows.append(f"<tr><td>{_shown(row.step)}</td>{cells}</tr>")
    return f"<h2>The last steps</h2><table><tr><th>step</th>{head}</tr>{''.join(rows)}</table>"
