"""The web page at `/`: a few static files of this package, held in memory.

The page needs no other host and allows none: its policy lets the browser load and call this gateway
only, and run no script or style that stands in the page itself. Trusted Types forbid to make HTML
of text, so what a model or a server writes can only be shown as text.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import FastAPI, Request, Response

from planetserve.gateway.errors import RequestError

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'",
        "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    )
)  # fmt: skip
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

INDEX = "index.html"


def add_page(app: FastAPI) -> None:
    """Serve the page at `/`, and its other files below `/web`."""
    folder = resources.files("planetserve.gateway").joinpath("web")
    files = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name.rpartition(".")[2] in _TYPES
    }
    tags = {name: f'"{hashlib.sha256(body).hexdigest()[:32]}"' for name, body in files.items()}

    def respond(name: str, request: Request) -> Response:
        if name not in files:
            raise RequestError("the page has no such file", status=404)
        headers = {**_HEADERS, "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=_TYPES[name.rpartition(".")[2]], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return respond(INDEX, request)

    @app.get("/web/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        return respond(name, request)
