"""Renders one HTML file with charts that works offline: Bokeh, our code and the data are all in it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from esper_otel.charts import files

_STYLE = """
body{margin:0 auto;max-width:1400px;padding:0 16px 32px}
h1{font-size:20px;margin:16px 0 2px}.sub{color:var(--dim);margin:2px 0}section>h2{display:block;margin:20px 0 4px}
dl{border:1px solid var(--line);border-radius:8px;padding:4px 16px;background:var(--card)}
dt{font-weight:600;margin-top:8px}dd{margin:0 0 8px;overflow-wrap:anywhere}
dd.bad{border-left:4px solid var(--bad);padding-left:10px;color:inherit}
.scroll{overflow-x:auto}table.plain{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.plain td,.plain th{padding:2px 10px;border-bottom:1px solid var(--line);text-align:right}
.plain td:first-child,.plain th:first-child,.plain td.text{text-align:left}
@media(max-width:500px){body{padding:0 8px 24px}dl{padding:2px 10px}}
@media print{body{background:#fff;max-width:none}}
"""


class PageContent(NamedTuple):
    """What a file contains.

    Attributes:
        title: its title; plain text.
        mark: HTML for its head, near the beginning; empty if there is none.
        body: HTML that stands above and below the charts, in the order (above, below).
        data: what the script reads; anything that JSON can express.
    """

    title: str
    mark: str
    body: tuple[str, str]
    data: Mapping[str, Any]


def document(page: PageContent, *, needed_by: str) -> str:
    """Returns the HTML of a whole file.

    The policy in it lets nothing be loaded, runs these scripts only, and applies this style sheet and those of Bokeh
    only, whatever else gets into the page.

    Raises:
        ConfigurationError: Bokeh is not installed.
    """
    scripts = [*files.scripts(needed_by=needed_by).values(), files.asset("figure.js")]
    data = _json(page.data)
    # Nobody who could write into the data can write its digest into it.
    nonce = _digest(f"{page.title}{page.body}{data}")
    hashes = " ".join(f"'sha256-{_digest(each)}'" for each in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; "
        f"style-src 'nonce-{nonce}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    above, below = page.body
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">{page.mark}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{escape(page.title)}</title><style nonce="{nonce}">{files.style()}{_STYLE}</style></head>',
            f'<body>{above}<div id="board"></div>{below}<script type="application/json" id="data">{data}</script>',
            *(f'<script nonce="{nonce}">{each}</script>' for each in scripts),
            "</body></html>\n",
        )
    )


def _json(data: Mapping[str, Any]) -> str:
    """Returns JSON that cannot end the element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
