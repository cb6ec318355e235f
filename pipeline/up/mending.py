"""Starts on a damaged store: what nats-server cannot load is set aside, never deleted, and what is lost is listed.

The server itself rebuilds its indexes, and recovers the messages of a stream without a description once the stream is
created again. It drops the rest of a block from its first unreadable record on, and a consumer whose state is damaged
keeps its stream's lane shut. A power failure leaves such files.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.broker import topology
from pipeline.broker.bulk import readable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.core.blocks import Block, Extent, Gap, gaps, ranges, read_block, read_index
from pipeline.wire.subjects import STREAM_BATCH, STREAM_DEAD, STREAM_OLLAMA, STREAM_REQUESTS

# The newest blocks of each stream are read first. The others are read within this time.
_READING_S = 2.0
# The streams of the pipeline, in the order in which their blocks are read.
_OURS = tuple(stream.name for stream in topology.streams(Config()))
# The streams of which each message is read once, up to this many: a damaged body is found only so.
_ACCEPTED = (STREAM_REQUESTS, STREAM_OLLAMA, STREAM_DEAD, STREAM_BATCH)
_MOST_COMPARED = 20_000
_REBUILT = re.compile(r"Filestore \[([^\]]+)\] Recovering stream state from index errored")
_MISSING = re.compile(r"Filestore \[([^\]]+)\] .*could not locate msg block (\d+)")


@dataclass(slots=True)
class _Before:
    """A stream's files before the server starts."""

    blocks: list[Block] = field(default_factory=list)
    index: Extent | None = None


@dataclass(slots=True)
class Mending:
    """One start of the server on one store. Call `look`, start the server, then call `mend` before streams are created.

    Args:
        store: the server's store.
        log: the server's log.
    """

    store: Path
    log: Path
    _streams: dict[str, _Before] = field(init=False, default_factory=dict)
    _said: list[str] = field(init=False, default_factory=list)
    _aside: Path = field(init=False)
    _log_from: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._aside = self.store / "set-aside" / time.strftime("%Y%m%d-%H%M%S")

    def look(self) -> None:
        """Read the blocks, and copy the damaged ones: the server cuts them off.

        Raises:
            OSError: a block cannot be read or copied.
        """
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        give_up_at = time.monotonic() + _READING_S
        for folder in self._folders():
            before = self._streams[folder.name] = _Before(index=_index(folder / "msgs" / "index.db"))
            for file in sorted(folder.glob("msgs/*.blk"), key=_number, reverse=True):
                if before.blocks and time.monotonic() > give_up_at:
                    break
                block = read_block(_number(file), file.read_bytes())
                before.blocks.append(block)
                if block.damaged:
                    self._copy(file)
                    self._said.append(
                        f"Block {file.name} of stream {folder.name} was damaged. The broker kept its readable part; a "
                        f"copy is in {self._aside}."
                    )

    async def mend(self, bus: Bus) -> list[str]:
        """Set aside what the server did not load. Returns what was found and done, as sentences.

        Raises:
            Unreachable: the broker does not answer.
            OSError: a file cannot be set aside.
        """
        for folder in self._folders():
            if not await bus.has(folder.name):
                for name in ("meta.inf", "meta.sum"):
                    self._copy(folder / name)
                self._said.append(
                    f"The description of stream {folder.name} was damaged. The stream is created again with its "
                    f"messages; the damaged files are in {self._aside}."
                )
            for consumer in sorted(folder.glob("obs/*")):
                if consumer.is_dir() and not await bus.has(folder.name, consumer.name):
                    self._move(consumer)
                    self._said.append(
                        f"The consumer {consumer.name} of stream {folder.name} was damaged. headrace creates its own "
                        f"consumers again, and no request is lost; the damaged files are in {self._aside}."
                    )
        return self._said

    async def losses(self, bus: Bus) -> list[str]:
        """Which sequences were lost, as sentences. Call it once the streams exist.

        Raises:
            Unreachable: the broker does not answer.
        """
        logged = self._logged()
        rebuilt = set(_REBUILT.findall(logged))
        said = []
        for name, before in self._streams.items():
            found: list[Gap] = []
            missing = [int(number) for stream, number in _MISSING.findall(logged) if stream == name]
            if missing or name in rebuilt or any(block.damaged for block in before.blocks):
                found += gaps(before.blocks, missing, await self._extent(bus, name, before))
            elif name in _ACCEPTED:
                found += ranges(await self._unreadable(bus, name, before))
            if found:
                said.append(_lost(name, sorted(found)))
        return said

    async def _extent(self, bus: Bus, name: str, before: _Before) -> Extent:
        state = await bus.stream_state(name)
        readable_to = max((block.last for block in before.blocks), default=0)
        extent = before.index or Extent(1, min(state.first_seq, readable_to or 1), state.last_seq)
        return extent._replace(last=max(extent.last, state.last_seq))

    async def _unreadable(self, bus: Bus, name: str, before: _Before) -> set[int]:
        """The sequences of messages that are there, by the server's own index, and that it does not give out."""
        held = {sequence for block in before.blocks for sequence in block.held}
        if not held or len(held) > _MOST_COMPARED:
            return set()
        lost = held - await readable(bus, name)
        if not lost:
            return lost
        first = (await bus.stream_state(name)).first_seq
        return {sequence for sequence in lost - await bus.removed(name) if sequence >= first}

    def _folders(self) -> Iterator[Path]:
        """The folders of our streams; those of others are left as they are."""
        found = (path for path in self.store.glob("jetstream/*/streams/*") if path.name in _OURS)
        yield from sorted(found, key=lambda path: _OURS.index(path.name))

    def _logged(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(self._log_from)
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _copy(self, file: Path) -> None:
        target = self._target(file)
        if file.exists():
            shutil.copy2(file, target)

    def _move(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # removed by the server meanwhile
            shutil.move(folder, self._target(folder))

    def _target(self, path: Path) -> Path:
        target = self._aside / path.relative_to(self.store / "jetstream")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def _lost(stream: str, found: list[Gap]) -> str:
    count = sum(gap.last - gap.first + 1 for gap in found)
    return (
        f"Stream {stream} lost what its sequences {', '.join(map(str, found))} held: at most {count} messages, "
        "fewer if some of them had been removed before."
    )


def _number(file: Path) -> int:
    return int(file.stem) if file.stem.isdecimal() else 0


def _index(file: Path) -> Extent | None:
    try:
        return read_index(file.read_bytes())
    except OSError:
        return None
