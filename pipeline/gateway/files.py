"""The gateway's pages: their files, and what a browser may do with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# The files that the pages are made of stand under it; like the pages they hold nothing of anybody's.
PARTS = "/pages/"
_FOLDER = Path(__file__).parent / "pages"
_PAGES = {"/": "index.html", "/docs": "docs.html"}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Nothing comes from another host, nothing runs that is not a file of ours, and no text is ever made into markup.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """A route for each page, and for each file that the pages are made of."""
    parts = [file.name for file in sorted(_FOLDER.iterdir()) if file.suffix in (".css", ".js")]
    files = _PAGES | {PARTS + name: name for name in parts}
    return [Route(path, _sending(_FOLDER / name), methods=["GET"]) for path, name in files.items()]


def _sending(file: Path) -> Callable[[Request], object]:
    content = file.read_bytes()
    media_type = _MEDIA_TYPES[file.suffix]

    async def endpoint(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return endpoint
