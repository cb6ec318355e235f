"""The lines of a batch: cutting a file into them, checking them, and keeping account of which have ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from pipeline.wire.batches import MAX_LINES, LineBody, LineFault, RequestCounts
from pipeline.wire.errors import quoted
from pipeline.wire.habits import BYTE_ORDER_MARK, with_whole_characters
from pipeline.wire.validation import explain, untyped

# Of a file that is not valid, this many faults are shown.
MOST_FAULTS = 100
# Of a line, beside the request's body.
_FRAME_BYTES = 64 << 10
_MOST_CUSTOM_ID = 512
_line_decoder = msgspec.json.Decoder(LineBody)


def longest_line(limit: int) -> int:
    """The size of the longest line whose body can have `limit` bytes."""
    return limit + _FRAME_BYTES


@dataclass(slots=True)
class Cutter:
    """Cuts the chunks of a file into lines. It holds at most one line and one chunk.

    Args:
        limit: of a request's body, bytes. A longer line comes out cut, one byte longer than `longest_line`.
    """

    limit: int
    _rest: bytearray = field(init=False, default_factory=bytearray)
    _number: int = field(init=False, default=0)

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """The lines that the chunk completes, with their numbers from 1. Blank lines count and are left out."""
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            self._add(piece)
            yield from self._line()
        self._add(rest)

    def end(self) -> Iterator[tuple[int, bytes]]:
        """The last line, if no line break follows it."""
        yield from self._line()

    def _add(self, piece: bytes) -> None:
        self._rest += piece[: max(0, longest_line(self.limit) + 1 - len(self._rest))]

    def _line(self) -> Iterator[tuple[int, bytes]]:
        line, self._rest = bytes(self._rest).strip(), bytearray()
        self._number += 1
        if line:
            yield self._number, line


def read_line(data: bytes) -> LineBody | LineFault:
    """A line of an input file, or what is wrong with it. The fault has no line number yet."""
    line = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return _decoded(line)
    except msgspec.ValidationError as error:
        problem = explain(error, LineBody, untyped(line))
        code = "missing_required_parameter" if problem.missing else "invalid_request"
        return LineFault(code, problem.sentence(whole="The line"), param=problem.param)
    except (ValueError, RecursionError):
        return LineFault("invalid_json_line", "This line is not parseable as valid JSON.")


def _decoded(line: bytes) -> LineBody:
    """A line of JSON. Half a character in it is replaced, as in every other request."""
    try:
        return _line_decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        return _line_decoder.decode(with_whole_characters(line))


@dataclass(slots=True)
class Checking:
    """Checks the lines of one input file. Of each `custom_id` it keeps eight bytes.

    Attributes:
        endpoint: the one that every line must have.
        limit: of a request's body, bytes.
        faults: what is wrong, the first `MOST_FAULTS` of it.
        lines: how many lines were read.
    """

    endpoint: str
    limit: int
    faults: list[LineFault] = field(init=False, default_factory=list)
    lines: int = field(init=False, default=0)
    _known: set[int] = field(init=False, default_factory=set)

    def add(self, number: int, data: bytes) -> bool:
        """Check one line. Returns whether to go on."""
        self.lines += 1
        fault: LineFault | None
        if self.lines > MAX_LINES:
            fault = LineFault("too_many_requests", f"A batch has at most {MAX_LINES} lines. Split the file.")
        elif len(data) > longest_line(self.limit):
            message = f"The line has more than {longest_line(self.limit)} bytes. Its body can have {self.limit}."
            fault = LineFault("request_too_large", message)
        else:
            line = read_line(data)
            fault = line if isinstance(line, LineFault) else self._fault(line)
        if fault is not None:
            self.faults.append(msgspec.structs.replace(fault, line=number))
        return self.lines <= MAX_LINES and len(self.faults) < MOST_FAULTS

    def end(self) -> None:
        """The file has no more lines."""
        if not self.lines:
            self.faults.append(LineFault("empty_file", "The input file has no lines."))

    def _fault(self, line: LineBody) -> LineFault | None:
        if not 0 < len(line.custom_id) <= _MOST_CUSTOM_ID:
            message = f"`custom_id` must have 1 to {_MOST_CUSTOM_ID} characters."
            return LineFault("invalid_custom_id", message, param="custom_id")
        if line.method != "POST":
            return LineFault("invalid_method", f"`method` must be POST, not {quoted(line.method)}.", param="method")
        if line.url != self.endpoint:
            message = f"`url` must be the batch's endpoint {self.endpoint}, not {quoted(line.url)}."
            return LineFault("invalid_url", message, param="url")
        if not bytes(line.body).lstrip().startswith(b"{"):
            return LineFault("invalid_request", "`body` must be an object.", param="body")
        digest = blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "big")
        if key in self._known:
            message = f"The custom_id {quoted(line.custom_id)} was used by an earlier line. Give each line its own."
            return LineFault("duplicate_custom_id", message, param="custom_id")
        self._known.add(key)
        return None


class LinesEnded:
    """Which lines of a batch have ended, one bit each. One writer: the batch's run.

    Args:
        total: how many lines the batch has.
    """

    def __init__(self, total: int) -> None:
        self.counts = RequestCounts(total)
        self._bits = bytearray()

    def add(self, number: int, *, failed: bool) -> bool:
        """A line has ended. Returns whether it had not before."""
        place, bit = number >> 3, 1 << (number & 7)
        if len(self._bits) <= place:
            self._bits += bytes(place + 1 - len(self._bits))
        if self._bits[place] & bit:
            return False
        self._bits[place] |= bit
        if failed:
            self.counts.failed += 1
        else:
            self.counts.completed += 1
        return True

    @property
    def complete(self) -> bool:
        """Whether every line has ended."""
        return self.counts.completed + self.counts.failed >= self.counts.total

    def has(self, number: int) -> bool:
        """Whether the line with this number has ended."""
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] & (1 << (number & 7)))
