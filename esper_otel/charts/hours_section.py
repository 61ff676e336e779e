"""Where the hours of a run went, as HTML: a bar of the whole wall time, and what each part of it is."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from esper_otel.hours.bar import PRODUCTIVE, Bar, RunHours
from esper_otel.hours.output import duration, said, title

# Colours as attributes of SVG, since the pages' policy allows no style in HTML. They suit a light and a dark page.
_COLOURS = {
    PRODUCTIVE: "#2a9d5c",
    "redone": "#c8553d",
    "input_wait": "#d9a514",
    "hooks": "#8a63d2",
    "start_up": "#3d7dd8",
    "checkpoint": "#1f9aa8",
    "evaluation": "#5fae3b",
    "between_attempts": "#a23b72",
    "unknown": "#8b949e",
}
_OTHERS = ("#c77d2e", "#6f7f2f", "#b05fc4", "#4d6fa8", "#97694f")
_MOST_RANKS = 64
_HEIGHT = 22


def hours_html(hours: RunHours) -> str:
    """Returns the bar of the run, and those of its ranks if there are several; empty if no time is known."""
    if not hours.run.parts:
        return ""
    colours = _colours(hours)
    html = [f"<h2>Where the hours went</h2> <small>{escape(said(hours.run))}</small>", _bar(hours.run, colours)]
    html.append(f'<table class="hours-parts">{"".join(_rows(hours.run, colours))}</table>')
    if len(hours.ranks) > 1:
        # The ranks that were the least productive are the ones to look at.
        worst = sorted(hours.ranks, key=lambda rank: (hours.ranks[rank].share(PRODUCTIVE), rank))[:_MOST_RANKS]
        left_out = len(hours.ranks) - len(worst)
        more = f", without {left_out} more productive ones" if left_out else ""
        html.append(f"<details><summary>By rank{more}</summary>")
        html += [
            f"<small>rank {rank}: {escape(said(hours.ranks[rank]))}</small>" + _bar(hours.ranks[rank], colours)
            for rank in sorted(worst)
        ]
        html.append("</details>")
    return "".join(html)


def _colours(hours: RunHours) -> dict[str, str]:
    parts = {part: None for bar in (hours.run, *hours.ranks.values()) for part in bar.parts}
    others = (part for part in parts if part not in _COLOURS)
    return {**_COLOURS, **{part: _OTHERS[place % len(_OTHERS)] for place, part in enumerate(others)}}


def _bar(bar: Bar, colours: dict[str, str]) -> str:
    label = "; ".join(f"{title(part)} {bar.share(part):.1%}" for part in bar.parts)
    pieces, left = [], 0.0
    for part, spent_ms in bar.parts.items():
        share = 100 * bar.share(part)
        about = escape(f"{title(part)}: {share:.1f} %, {duration(spent_ms)}")
        place = f'x="{left:.4f}%" width="{share:.4f}%" height="{_HEIGHT}"'
        pieces.append(f'<rect {place} fill="{colours[part]}"><title>{about}</title></rect>')
        left += share
    head = f'<svg class="hours-bar" width="100%" height="{_HEIGHT}" role="img" aria-label="{escape(label)}">'
    return f"{head}{''.join(pieces)}</svg>"


def _rows(bar: Bar, colours: dict[str, str]) -> Iterator[str]:
    for part, spent_ms in bar.parts.items():
        swatch = f'<svg width="10" height="10"><rect width="10" height="10" rx="3" fill="{colours[part]}"/></svg>'
        cells = (f"{bar.share(part):.1%}", duration(spent_ms))
        yield f"<tr><td>{swatch} {escape(title(part))}</td><td>{cells[0]}</td><td>{cells[1]}</td></tr>"
