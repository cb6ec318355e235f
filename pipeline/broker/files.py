"""Files in JetStream's object store. A file is read and written piece by piece, and is never in memory whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import IO, Any, cast

import msgspec
import nats.errors
from nats.js.api import ObjectMeta
from nats.js.errors import APIError, NotFoundError
from nats.js.object_store import ObjectStore

from pipeline.aio import cancellation_kept
from pipeline.broker.connection import BusError, Unreachable
from pipeline.broker.jetstream import Bus, LaneFull
from pipeline.broker.topology import FILES_KEPT_S
from pipeline.wire.batches import FileObject, chunks_subject, notes_subject
from pipeline.wire.subjects import BUCKET_FILES, STORED_SEQUENCE, STREAM_FILES
from pipeline.wire.validation import UNREADABLE

# Read from the store at once: eight chunks as nats-py writes them.
_READ_BYTES = 1 << 20


class FileIncomplete(BusError):
    """A file was deleted, or its age was reached, while it was read."""


class FileTraits(msgspec.Struct):
    """What the note on a file says beside what the object store needs."""

    filename: str
    purpose: str
    created_at: int
    tenant: str = ""


class FileNote(msgspec.Struct):
    """The object store's note on a file: the part of it that is read here."""

    name: str
    nuid: str
    size: int = 0
    description: str = ""
    deleted: bool = False


_note_decoder = msgspec.json.Decoder(FileNote)
_traits_decoder = msgspec.json.Decoder(FileTraits)


class StoredFile(msgspec.Struct, frozen=True):
    """A file in the store: what is shown of it, for whom it was stored, and the id of its content."""

    shown: FileObject
    tenant: str
    content_id: str


@dataclass(frozen=True, slots=True)
class Files:
    """The files on a broker."""

    bus: Bus

    async def put(self, file_id: str, content: IO[bytes], traits: FileTraits) -> FileObject:
        """Store a file. One that has the same id is replaced.

        Args:
            file_id: of the file.
            content: is read in a thread, piece by piece.
            traits: its name, its purpose, and for whom it is.

        Raises:
            LaneFull: the store has no room for it.
            Unreachable: the broker does not answer.
        """
        meta = ObjectMeta(name=file_id, description=msgspec.json.encode(traits).decode())
        try:
            with cancellation_kept():
                info = await (await self._store()).put(file_id, cast("Any", content), meta)
        except APIError as error:
            if error.description is None:  # nothing answers at its subjects
                raise Unreachable("The store of files does not answer") from error
            raise LaneFull(f"The store of files has no room: {error.description}") from error
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"The file cannot be stored: {str(error) or type(error).__name__}") from error
        return _shown(FileNote(file_id, info.nuid, info.size or 0), traits)

    async def find(self, file_id: str) -> StoredFile | None:
        """A file, or None if there is none with this id.

        Raises:
            Unreachable: the broker does not answer.
        """
        try:
            with cancellation_kept():
                info = await (await self._store()).get_info(file_id)
        except NotFoundError:
            return None
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"The file cannot be read: {str(error) or type(error).__name__}") from error
        return _stored(FileNote(info.name, info.nuid, info.size or 0, info.description or ""))

    async def everything(self) -> AsyncIterator[StoredFile]:
        """All files, oldest first; raises as `find`."""
        async for note in self._notes():
            if (file := _stored(note)) is not None:
                yield file

    async def read(self, file: StoredFile) -> AsyncGenerator[bytes]:
        """A file's content, in pieces.

        Raises:
            FileIncomplete: a part of it is gone.
            Unreachable: the broker does not answer.
        """
        start, left = 1, file.shown.bytes
        while left > 0:
            found = await self.bus.batch(STREAM_FILES, chunks_subject(file.content_id), start, max_bytes=_READ_BYTES)
            if not found:
                raise FileIncomplete(f"File {file.shown.id} was deleted while it was read.")
            for message in found:
                left -= len(message.data)
                yield message.data
            start = int(found[-1].headers[STORED_SEQUENCE]) + 1

    async def delete(self, file_id: str) -> bool:
        """Delete a file. Returns whether there was one; raises as `find`."""
        try:
            with cancellation_kept():
                await (await self._store()).delete(file_id)
        except NotFoundError:
            return False
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"The file cannot be deleted: {str(error) or type(error).__name__}") from error
        return True

    async def remove_unfinished(self, idle_s: float) -> int:
        """Remove the content of uploads that were broken off: the note on a file is stored after its last chunk.

        Args:
            idle_s: how old the newest chunk must be, seconds.

        Returns:
            Of how many uploads it was removed.

        Raises:
            Unreachable: the broker does not answer.
        """
        stored = await self.bus.subjects(STREAM_FILES, chunks_subject("*"))
        complete = {chunks_subject(note.nuid) async for note in self._notes()}
        return sum([await self._remove_idle(subject, idle_s) for subject in stored.keys() - complete])

    async def _remove_idle(self, subject: str, idle_s: float) -> bool:
        last = await self.bus.last_message(STREAM_FILES, subject)
        newest = None if last is None else await self.bus.stored(STREAM_FILES, last[0])
        if newest is None or self.bus.clock.wall() - newest.stored_at < idle_s:
            return False
        await self.bus.purge(STREAM_FILES, subject, up_to=newest.sequence)
        return True

    async def _notes(self) -> AsyncIterator[FileNote]:
        """The notes on all files, and on what other programs have put into the bucket."""
        async for message in self.bus.scan(STREAM_FILES, notes_subject()):
            try:
                note = _note_decoder.decode(message.data)
            except UNREADABLE:
                continue
            if not note.deleted:
                yield note

    async def _store(self) -> ObjectStore:
        return await self.bus.js.object_store(BUCKET_FILES)


def _stored(note: FileNote) -> StoredFile | None:
    """The file of a note; None if another program has put it into the bucket."""
    try:
        traits = _traits_decoder.decode(note.description)
    except UNREADABLE:
        return None
    return StoredFile(_shown(note, traits), traits.tenant, note.nuid)


def _shown(note: FileNote, traits: FileTraits) -> FileObject:
    expires_at = traits.created_at + int(FILES_KEPT_S)
    return FileObject(note.name, note.size, traits.created_at, traits.filename, traits.purpose, expires_at)
