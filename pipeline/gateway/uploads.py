"""`/v1/files`: the input and output files of batches. A caller sees its own."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pipeline.broker.files import Files, FileTraits, StoredFile
from pipeline.broker.jetstream import Bus, LaneFull
from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.gateway.endpoint import JSONL
from pipeline.gateway.intake import refused_by_store
from pipeline.gateway.paging import listed, page
from pipeline.gateway.queue import answered
from pipeline.gateway.responses import json_response
from pipeline.gateway.schemas import MOST_FILES
from pipeline.gateway.statuses import HttpError
from pipeline.wire.batches import MAX_FILE_BYTES, FileDeleted, FileObject, is_stored_id
from pipeline.wire.errors import ErrorCode, quoted

# Of an upload, beside the file.
_FORM_BYTES = 1 << 20
_MOST_NAME = 200


@dataclass(slots=True)
class Uploads:
    """The handlers of `/v1/files`."""

    bus: Bus
    peers: Peers
    config: Config

    async def create(self, request: Request) -> Response:
        """`POST /v1/files`: store a file. While it arrives it is on the disk of this machine, and not in memory."""
        if (refusal := refused_by_store(self.peers.store())) is not None:
            raise refusal
        form = await self._form(request)
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if purpose != "batch":
                raise _bad('`purpose` must be "batch".', "purpose")
            if not isinstance(file, UploadFile):
                raise _bad("`file` is required: send the file as multipart/form-data.", "file")
            if not file.size:
                raise _bad("The file is empty.", "file")
            name = (file.filename or "input.jsonl")[:_MOST_NAME]
            traits = FileTraits(name, "batch", int(self.bus.clock.wall()), request.state.caller.tenant)
            shown = await answered(self._put(file, traits))
        finally:
            await form.close()
        return json_response(shown)

    async def _put(self, file: UploadFile, traits: FileTraits) -> FileObject:
        try:
            return await Files(self.bus).put(_new_id(), file.file, traits)
        except LaneFull as error:
            raise HttpError(503, ErrorCode.QUEUE_FULL, f"{error}. Delete files, or retry later.") from None

    async def list_all(self, request: Request) -> Response:
        """`GET /v1/files`: newest first, unless `order` is `asc`."""
        caller, purpose = request.state.caller, request.query_params.get("purpose")
        found = [file.shown for file in await answered(self._all()) if caller.may_see(file.tenant)]
        wanted = [file for file in found if not purpose or file.purpose == purpose]
        if request.query_params.get("order", "desc") != "asc":
            wanted.reverse()
        entries, more = page(wanted, request.query_params, most=MOST_FILES, usual=MOST_FILES)
        return json_response(listed(entries, more=more))

    async def show(self, request: Request) -> Response:
        """`GET /v1/files/{id}`: one file."""
        return json_response((await self._found(request)).shown)

    async def content(self, request: Request) -> Response:
        """`GET /v1/files/{id}/content`: what is in a file."""
        file = await self._found(request)
        headers = {"content-length": str(file.shown.bytes)}
        return StreamingResponse(Files(self.bus).read(file), 200, headers, JSONL)

    async def delete(self, request: Request) -> Response:
        """`DELETE /v1/files/{id}`. A batch that still reads the file fails."""
        file = await self._found(request)
        await answered(Files(self.bus).delete(file.shown.id))
        return json_response(FileDeleted(file.shown.id))

    async def _all(self) -> list[StoredFile]:
        return [file async for file in Files(self.bus).everything()]

    async def _found(self, request: Request) -> StoredFile:
        return await own_file(self.bus, request, request.path_params["id"])

    async def _form(self, request: Request) -> FormData:
        """Read a form; raises HttpError 400, 408 or 413."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise _bad("Send the file as multipart/form-data.", "file")
        try:
            parser = MultiPartParser(request.headers, self._bounded(request), max_files=1, max_fields=10)
            return await parser.parse()
        except MultiPartException as error:
            raise _bad(f"The form cannot be read: {error.message}", "file") from None

    async def _bounded(self, request: Request) -> AsyncGenerator[bytes]:
        """The parts of a body, within a size. Each must arrive within the stall timeout."""
        size, parts = 0, aiter(request.stream())
        while True:
            try:
                async with asyncio.timeout(self.config.http_stall_timeout_s):
                    part = await anext(parts, None)
            except TimeoutError:
                raise HttpError(408, ErrorCode.INVALID_REQUEST, "The file did not arrive in time.") from None
            if part is None:
                return
            size += len(part)
            if size > MAX_FILE_BYTES + _FORM_BYTES:
                message = f"The file is too large. The limit is {MAX_FILE_BYTES} bytes."
                raise HttpError(413, ErrorCode.REQUEST_TOO_LARGE, message)
            yield part


async def own_file(bus: Bus, request: Request, file_id: str) -> StoredFile:
    """A file that the caller can see; raises HttpError 404."""
    file = await answered(Files(bus).find(file_id)) if is_stored_id(file_id) else None
    if file is None or not request.state.caller.may_see(file.tenant):
        raise HttpError(404, ErrorCode.INVALID_REQUEST, f"No file has the id {quoted(file_id, 128)}.", param="id")
    return file


def _new_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def _bad(message: str, param: str) -> HttpError:
    return HttpError(400, ErrorCode.INVALID_REQUEST, message, param=param)
