"""The gateway's pages: their files, and the headers that restrict what a browser does with them."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pipeline.gateway.endpoint import Handler

# The URL folder of the files that pages load. Like the pages, they contain no data.
PARTS = "/pages/"
_FOLDER = Path(__file__).parent / "pages"
_PAGES = {"/": "index.html", "/docs": "docs.html"}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# A page loads nothing from another host, runs no inline script, and cannot turn text into markup.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
    "vary": "accept",
}


def handlers() -> dict[str, Handler]:
    """The handler of each page, and of each file that the pages load, by path."""
    parts = [file.name for file in sorted(_FOLDER.iterdir()) if file.suffix in (".css", ".js")]
    files = _PAGES | {PARTS + name: name for name in parts}
    sending = {path: _sending(_FOLDER / name) for path, name in files.items()}
    return sending | {"/": _for_browsers(sending["/"])}


def _for_browsers(page: Handler) -> Handler:
    """The page for a client that asks for HTML, as browsers do; for others, what Ollama answers at its root."""

    async def send(request: Request) -> ASGIApp:
        if "text/html" in request.headers.get("accept", ""):
            return await page(request)
        return Response("Ollama is running", headers=_HEADERS, media_type="text/plain")

    return send


def _sending(file: Path) -> Handler:
    content = file.read_bytes()
    media_type = _MEDIA_TYPES[file.suffix]

    async def send(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return send
