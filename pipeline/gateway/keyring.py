"""The API keys in force. They are read again when their file changes, without a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config import Config, ConfigError, HttpKey, load

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5

Signature = tuple[int, int, int]


class KeyRing:
    """The keys, and whether calls need one. One writer: this object.

    A file that cannot be read, or has an invalid setting, leaves the keys as they are. Once there was a key, calls need
    one: a gateway whose last key is removed lets no one in until it is started again without keys.

    Args:
        config: has the keys at the start, and names the file. Without a file the keys stay.

    Attributes:
        keys: in force.
        locked: whether a call needs a key.
        trouble: why the file was not read; empty if it was.
        on_change: called with the new keys.
    """

    def __init__(self, config: Config) -> None:
        self.keys: Sequence[HttpKey] = config.http_keys
        self.locked = bool(self.keys)
        self.trouble = ""
        self.on_change: Callable[[Sequence[HttpKey]], None] = lambda _: None
        self._file = Path(config.http_keys_file) if config.http_keys_file else None
        self._read: Signature | None = None
        self._now = asyncio.Event()

    def reread(self) -> None:
        """Read the file at once, as on SIGHUP."""
        self._read = None
        self._now.set()

    async def run(self) -> None:
        """Follow the file until cancelled."""
        if self._file is None:
            return
        seen: Signature | None = None
        while True:
            found = _signature(self._file)
            # An editor may write the file in steps: it is read once it has stayed as it is.
            if found != self._read and (found == seen or self._now.is_set()):
                self._now.clear()
                self._read = found
                self._take(self._file)
            seen = found
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._now.wait()
            except TimeoutError:
                pass

    def _take(self, file: Path) -> None:
        try:
            keys = load(environ={}, file=file).http_keys
        except ConfigError as error:
            self.trouble = f"The API keys stay as they were: {error}"
            log.warning("%s", self.trouble)
            return
        if self.trouble:
            log.info("%s can be read again.", file)
        self.trouble = ""
        if keys == self.keys:
            return
        self.keys, self.locked = keys, self.locked or bool(keys)
        log.info("Read %d API keys from %s.", len(keys), file)
        if not keys:
            log.warning("The last API key was removed. No call is served until a key is added.")
        self.on_change(keys)


def _signature(file: Path) -> Signature:
    """What changes if the file does; zeros if there is no file."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
