"""Fetching a GGUF file from an address. An interrupted download is resumed if the server can."""

from __future__ import annotations

import re
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final

from consumers.models.store import ModelError, check_room
from consumers.models.watched import Headway, Note

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S: Final = 30.0
_NOTE_EVERY: Final = 1 << 18


def download(address: str, target: Path, note: Note) -> None:
    """Write what is at an address to target.

    Raises:
        ModelError: the server does not answer, or not with the file.
    """
    import httpx  # noqa: PLC0415 - slow to import, and most models come otherwise

    part = target.with_name(f"{target.name}.part")
    try:
        with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=True) as client:
            _read(client, address, part, note)
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:
        what = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        raise ModelError(f"Cannot download {address}: {what}.") from None
    part.replace(target)
    _tag_of(part).unlink(missing_ok=True)


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _read(client: httpx.Client, address: str, part: Path, note: Note) -> None:
    """Append what is missing to part; begin again if the server sends the whole file, or a different one."""
    tag = _tag_of(part)
    have = part.stat().st_size if part.is_file() and tag.is_file() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    with client.stream("GET", address, headers=headers) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if _whole_size(response) == have:
                return  # stopped after the last byte
            part.unlink()
            raise ModelError(f"The download of {address} does not fit what is there of it. Try again.")
        response.raise_for_status()
        done = have if response.status_code == HTTPStatus.PARTIAL_CONTENT else 0
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
        # A weak tag does not promise the same bytes.
        if mark and not mark.startswith("W/"):
            tag.write_text(mark)
        else:
            tag.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = _whole_size(response) or (0 if length is None else done + int(length))
        check_room(part.parent, max(0, total - done) + total)  # it is converted
        with part.open("ab" if done else "wb") as out:
            for block in response.iter_bytes(_NOTE_EVERY):
                out.write(block)
                done += len(block)
                note(Headway("fetching", done, total))
    if total and done != total:
        raise ModelError(f"The download of {address} ended after {done} of {total} bytes. Try again.")


def _whole_size(response: httpx.Response) -> int:
    """The size of the whole file, of which the response is a part; 0 if the server does not tell."""
    found = re.fullmatch(r"bytes .*/([0-9]+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else 0
