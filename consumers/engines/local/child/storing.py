"""Which prompts of one engine are stored, with their files: what the engine's loop does about them."""

from __future__ import annotations

import logging
from typing import Final

from consumers.engines.local.child.backend import Batch
from consumers.engines.local.child.prompt_files import PromptFiles
from pipeline.core.batch_plan import FetchKept, ReusablePrompt, StoreKept
from pipeline.core.stored import StoredPrompts

log = logging.getLogger(__name__)

_AGAIN_S: Final = 60.0
"""After a file could not be written, the next one is tried after so long."""


class StoredCaches:
    """The index of stored prompts, and their files, which it follows. Used by the loop. Times are monotonic.

    Args:
        files: where they are; None if nothing is stored.
        room: the most bytes of the files.
        snapshots: whether caches are stored whole.

    Attributes:
        index: of the files.
    """

    def __init__(self, files: PromptFiles | None, room: int, *, snapshots: bool) -> None:
        self._files = files
        self._writes_at = 0.0
        self.index = StoredPrompts(room if files else 0, snapshots=snapshots)
        if files is not None:
            for name, nbytes in files.names():
                self.index.found(name, nbytes)
            files.remove(self.index.shrink())

    def writes(self, now: float) -> bool:
        """Whether files are written at present."""
        return self._files is not None and now >= self._writes_at

    def write(self, batch: Batch, store: StoreKept, now: float) -> None:
        """Write what the batch keeps. If that fails, no file is written for a minute."""
        try:
            nbytes = batch.store(store)
        except OSError as error:
            log.warning("The KV cache of a prompt is not stored: %s. The next one is tried in a minute.", error)
            self._writes_at = now + _AGAIN_S
            return
        self._remove(self.index.wrote(store.due, nbytes))

    def fetch(self, batch: Batch, fetch: FetchKept) -> int:
        """Let the batch keep what is in files. Returns its size in bytes.

        If that fails, the error is raised, and this process uses no files any more: whatever is wrong with the disk or
        its files costs one step.
        """
        try:
            return batch.fetch(fetch)
        except Exception:
            log.warning("Stored prompts cannot be read. This process uses none of them any more.")
            self._remove([file.name for file in fetch.files])
            self.index.forget_all()
            raise

    def check(self, prompt: ReusablePrompt) -> None:
        """Forget files of a prompt that are there no longer."""
        if self._files is not None:
            for file in self.index.head(prompt.scope, prompt.tokens):
                if not self._files.has(file.name):
                    self.index.forget(file.name)

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self.index.forget(name)
        if self._files is not None:
            self._files.remove(names)
