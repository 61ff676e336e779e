"""The live page's files, and the headers with which they and their data are served."""

from __future__ import annotations

from importlib import resources
from typing import Any

from aiohttp import web

_FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
}
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}
# The page loads nothing from other origins and cannot be embedded in a frame.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def add_files(app: web.Application) -> None:
    """Adds ``/`` and the files that it loads."""
    folder = resources.files(__package__).joinpath("page")
    for path, (name, kind) in _FILES.items():
        app.router.add_get(path, _file(folder.joinpath(name).read_bytes(), kind))


def check_local(request: web.Request) -> None:
    """Refuses requests with a foreign Host header, as from a web page that uses DNS rebinding."""
    host = request.headers.get("host", "").rpartition(":")
    name = host[0] if host[1] and host[2].isdecimal() else request.headers.get("host", "")
    if name not in _LOCAL:
        raise web.HTTPForbidden(text="this page is for this machine: use http://127.0.0.1 or http://localhost")


def _file(content: bytes, kind: str) -> Any:
    async def handler(request: web.Request) -> web.Response:
        check_local(request)
        return web.Response(body=content, content_type=kind, charset="utf-8", headers=HEADERS)

    return handler
