"""Which kept prompts are on disk, and which one is stored next.

A file holds the cache of a block of tokens, or a whole cache that cannot be cut. Its name is a digest of all tokens up
to its end and of whose they are, so a sequence with the same tokens finds it by its name alone, after a restart too.
What is kept in memory is stored while the engine has nothing to do: the latest prompt first, its blocks in their order.

The file that was used least recently goes first. A use of a block is one of all before it, after it: none goes before
what continues it.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

BLOCK_TOKENS: Final = 64
"""A whole number of the pieces in which prompts of exact sequences are read."""

_MOST_DUE: Final = 64
"""So many of the latest kept prompts are remembered as not stored yet."""

_DIGEST_BYTES: Final = 16


class CacheFile(NamedTuple):
    """The cache of some tokens of a sequence, from `start` to `end`. That of a snapshot begins at 0."""

    name: str
    start: int
    end: int


class Due(NamedTuple):
    """A file to be stored, and the tokens up to its end."""

    scope: Hashable
    tokens: Sequence[int]
    file: CacheFile


class StoredPrompts:
    """The index of the files of one model. One writer: the batch's planner.

    Args:
        room: the most bytes that the files may have together; 0 stores nothing.
        snapshots: whether caches are stored whole.

    Attributes:
        nbytes: the size of all files.
    """

    def __init__(self, room: int = 0, *, snapshots: bool = False) -> None:
        self.nbytes = 0
        self._room = room
        self._snapshots = snapshots
        # By name: the size. The one that was used least recently is in front.
        self._files: OrderedDict[str, int] = OrderedDict()
        # How many snapshots there are of so many tokens.
        self._lengths: Counter[int] = Counter()
        self._due: deque[tuple[Hashable, Sequence[int]]] = deque(maxlen=_MOST_DUE)

    def __len__(self) -> int:
        return len(self._files)

    def found(self, name: str, nbytes: int) -> None:
        """A file is there. It was used after those that were found before."""
        self.forget(name)
        self._files[name] = nbytes
        self._lengths[_length(name)] += 1
        self.nbytes += nbytes

    def forget(self, name: str) -> None:
        """A file is not there any more. Unknown names are ignored."""
        if name in self._files:
            self.nbytes -= self._files.pop(name)
            self._lengths[_length(name)] -= 1

    def forget_all(self) -> None:
        """The files are not used any more, and no more are stored."""
        self._room = self.nbytes = 0
        self._files.clear()
        self._lengths.clear()
        self._due.clear()

    def shrink(self) -> list[str]:
        """Forget what was used least recently until the rest has room. Returns the names of the files to remove."""
        gone = []
        while self._files and self.nbytes > self._room:
            name = next(iter(self._files))
            self.forget(name)
            gone.append(name)
        return gone

    def head(self, scope: Hashable, tokens: Sequence[int]) -> list[CacheFile]:
        """The files of the longest head of tokens that is stored, from the first token on. It is no use."""
        if not self._files:
            return []
        if self._snapshots:
            there = [file for file in self._possible(scope, tokens) if file.name in self._files]
            return there[-1:]
        files = []
        for file in self._possible(scope, tokens):
            if file.name not in self._files:
                break
            files.append(file)
        return files

    def use(self, files: Sequence[CacheFile]) -> None:
        """The files of one head were used."""
        for file in reversed(files):
            self._files.move_to_end(file.name)

    # ---- what is stored next -----------------------------------------------------------------------------------------

    def kept(self, scope: Hashable, tokens: Sequence[int]) -> None:
        """The cache of these tokens is kept in memory."""
        if self._room:
            self._due.append((scope, tokens))

    def next(self) -> Due | None:
        """What is to be stored next; None if there is nothing."""
        while self._due:
            scope, tokens = self._due[-1]
            for file in self._wanted(scope, tokens):
                if file.name not in self._files:
                    return Due(scope, tokens[: file.end], file)
            self._due.pop()
        return None

    def wrote(self, due: Due, nbytes: int) -> list[str]:
        """The file of `next` was written. Returns the names of those to remove for it."""
        self.found(due.file.name, nbytes)
        self.use(self.head(due.scope, due.tokens))
        gone = self.shrink()
        if gone:  # no room for what is older
            self._due = deque([self._due.pop()], _MOST_DUE)
        if due.file.name in gone:
            self._due.pop()
        return gone

    def skip(self) -> None:
        """The prompt of the next file is not kept in memory any more, or cannot be stored."""
        self._due.pop()

    def clear(self) -> None:
        """Nothing is in memory any more. The files stay."""
        self._due.clear()

    # ---- names -------------------------------------------------------------------------------------------------------

    def _wanted(self, scope: Hashable, tokens: Sequence[int]) -> Iterator[CacheFile]:
        """The files that hold the cache of tokens together, or of the whole blocks of them."""
        if not self._snapshots:
            return _files(scope, tokens, _blocks(tokens), whole=False)
        return _files(scope, tokens, [len(tokens)] if len(tokens) >= BLOCK_TOKENS else [], whole=True)

    def _possible(self, scope: Hashable, tokens: Sequence[int]) -> Iterator[CacheFile]:
        """The files that could hold a head of tokens, the shortest head first."""
        if not self._snapshots:
            return _files(scope, tokens, _blocks(tokens), whole=False)
        lengths = sorted(length for length, count in self._lengths.items() if count and length <= len(tokens))
        return _files(scope, tokens, lengths, whole=True)


def _blocks(tokens: Sequence[int]) -> Sequence[int]:
    return range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)


def _files(scope: Hashable, tokens: Sequence[int], ends: Sequence[int], *, whole: bool) -> Iterator[CacheFile]:
    digest, at = blake2b(repr(scope).encode(), digest_size=_DIGEST_BYTES), 0
    for end in ends:
        digest.update(array("I", tokens[at:end]).tobytes())
        yield CacheFile(f"{end}-{digest.hexdigest()}", 0 if whole else at, end)
        at = end


def _length(name: str) -> int:
    return int(name.partition("-")[0])
