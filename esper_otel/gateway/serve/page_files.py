"""The live page's files, and the headers with which they and their data are served."""

from __future__ import annotations

import secrets
from importlib import resources
from typing import Any

from aiohttp import web

from esper_otel.charts import files

_SCRIPTS = ("runs.js", "page.js", "hours.js", "events.js")
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}
# Bokeh puts style sheets into its elements while it draws; this lets in those, and no others.
_NONCE = secrets.token_urlsafe(16)
# The page loads nothing from other origins and cannot be embedded in a frame. Images are Bokeh's, in its own code.
HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{_NONCE}'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def add_files(app: web.Application) -> None:
    """Adds ``/`` and the files that it loads.

    Raises:
        ConfigurationError: Bokeh is not installed.
    """
    charts = files.scripts(needed_by="the page (--ui)")
    names = [*charts, *_SCRIPTS]
    tags = "\n".join(f'<script src="/page/{name}" nonce="{_NONCE}" defer></script>' for name in names)
    for name, text in charts.items():
        app.router.add_get(f"/page/{name}", _file(text, "text/javascript"))
    app.router.add_get(f"/page/{files.STYLE}", _file(files.style(), "text/css"))
    app.router.add_get("/", _file(_own("index.html").replace("<!-- scripts -->", tags), "text/html"))
    app.router.add_get("/page/page.css", _file(_own("page.css"), "text/css"))
    for name in _SCRIPTS:
        app.router.add_get(f"/page/{name}", _file(_own(name), "text/javascript"))


def check_local(request: web.Request) -> None:
    """Refuses requests with a foreign Host header, as from a web page that uses DNS rebinding."""
    host = request.headers.get("host", "").rpartition(":")
    name = host[0] if host[1] and host[2].isdecimal() else request.headers.get("host", "")
    if name not in _LOCAL:
        raise web.HTTPForbidden(text="this page is for this machine: use http://127.0.0.1 or http://localhost")


def _own(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _file(content: str, kind: str) -> Any:
    body = content.encode()

    async def handler(request: web.Request) -> web.Response:
        check_local(request)
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    return handler
