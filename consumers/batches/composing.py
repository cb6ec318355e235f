"""The output and the error file of a batch, made from its journals."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from typing import IO

import msgspec

from pipeline.broker.batches import Journal
from pipeline.broker.files import Files, FileTraits
from pipeline.core.batch_lines import LinesEnded, read_line
from pipeline.wire.batches import BatchOrder, BatchPart, LineFault, LineResult, LineTrouble, line_id

# Results are gathered up to this size before they are written to the temporary file.
_WRITE_BYTES = 1 << 20


class Unrun:
    """The lines that have no result, because their batch was cancelled or its deadline passed.

    Args:
        lines: of the input file.
        order: the batch.
        ledger: which lines have a result.
        was_cancelled: whether the batch was cancelled.

    Attributes:
        count: how many there were, once they have been read.
    """

    def __init__(
        self, lines: AsyncIterator[tuple[int, bytes]], order: BatchOrder, ledger: LinesEnded, *, was_cancelled: bool
    ) -> None:
        self.count = 0
        self._lines = lines
        self._order = order
        self._ledger = ledger
        self._trouble = LineTrouble("batch_expired", "The batch's deadline passed before this line was answered.")
        if was_cancelled:
            self._trouble = LineTrouble("batch_cancelled", "The batch was cancelled before this line was answered.")

    async def results(self) -> AsyncIterator[bytes]:
        """An entry of the error file for each of them."""
        async for number, data in self._lines:
            if self._ledger.has(number):
                continue
            line = read_line(data)
            assert not isinstance(line, LineFault)  # noqa: S101 - the file was checked
            self.count += 1
            name = line_id(self._order.id, number).removeprefix("batch_")
            yield msgspec.json.encode(LineResult(f"batch_req_{name}", line.custom_id, error=self._trouble)) + b"\n"


async def compose(
    files: Files, order: BatchOrder, part: BatchPart, journal: Journal, unrun: Unrun | None = None
) -> str | None:
    """Store one file of a batch's results. Twice gives the same file.

    Args:
        files: where it is stored.
        order: the batch.
        part: output or error.
        journal: of the results.
        unrun: the lines without one, for the error file.

    Returns:
        The file's id; None if there is nothing in it.

    Raises:
        BusError: the broker did not store it.
    """
    with tempfile.TemporaryFile() as spool:
        await _spool(spool, _written(journal))
        if unrun is not None:
            await _spool(spool, unrun.results())
        if not spool.tell():
            return None
        spool.seek(0)
        file_id = f"file-{order.id}-{part}"
        created_at = int(files.bus.clock.wall())
        traits = FileTraits(f"{order.id}_{part}.jsonl", "batch_output", created_at, order.tenant)
        await files.put(file_id, spool, traits)
    return file_id


async def _written(journal: Journal) -> AsyncIterator[bytes]:
    async for _, data in journal.entries():
        yield data


async def _spool(spool: IO[bytes], results: AsyncIterator[bytes]) -> None:
    pieces, size = list[bytes](), 0
    async for data in results:
        pieces.append(data)
        size += len(data)
        if size >= _WRITE_BYTES:
            await asyncio.to_thread(spool.writelines, pieces)
            pieces, size = [], 0
    await asyncio.to_thread(spool.writelines, pieces)
