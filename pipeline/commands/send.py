"""`headrace send`: publish a prompt on the queue and print the answer as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from functools import partial

import msgspec

from pipeline.aio import Background
from pipeline.broker.asker import Asker, Outgoing, RecordReader
from pipeline.broker.connection import BusError, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, say_json, tell
from pipeline.commands.holding import cancelled_if_interrupted
from pipeline.commands.stats import queue_statistics
from pipeline.config import ConfigError
from pipeline.core.envelope import MAX_TIMEOUT_S
from pipeline.core.triage import classify
from pipeline.process.terminal import visible_answer
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Account, Answer, Chunk, Completion, ErrorAnswer, Status
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import StoreReport
from pipeline.wire.subjects import TIMEOUT, Lane, Priority, Task

# A broker stores a request within milliseconds. A longer wait would look like a hang at a terminal.
_STORE_PATIENCE_S = 3.0
# Of a terminal: ECMA-48's faint text, and back to normal intensity.
_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"
# How often to ask meanwhile whether the broker can store requests.
_LOOK_EVERY_S = 0.3
# How often to ask, until the request begins, whether an operator has paused it.
_PAUSED_EVERY_S = 1.0


class Sending(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and its options."""

    text: str
    priority: str = "medium"
    model: str | None = None
    task: str | None = None
    max_tokens: int | None = None
    timeout_s: float | None = None
    stream: bool = True
    verbose: bool = False

    def body(self) -> bytes:
        """Return the body of the request."""
        fields = {
            "messages": [{"role": "user", "content": self.text}],
            "model": self.model,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
        }
        return msgspec.json.encode({key: value for key, value in fields.items() if value is not None})

    def subject(self) -> str:
        """Return the subject of the lane. It has a class if triage here is certain, which saves the router the work.

        Raises:
            HeadraceError: as `decode_chat`.
        """
        body = self.body()
        request = decode_chat(body, max_body_bytes=len(body))
        verdict = classify(request, Task(self.task) if self.task else None)
        return Lane(Priority(self.priority), verdict.task if verdict.certain else Task.UNTRIAGED).subject

    def request(self, request_id: str) -> Outgoing:
        """Return the message, with a timeout if there is one."""
        headers = {} if self.timeout_s is None else {TIMEOUT: f"{self.timeout_s:g}"}
        return Outgoing(request_id, self.subject(), self.body(), headers)


def send(sending: Sending, url: str) -> int:
    """Send the prompt. Print the answer to stdout and return 0, or print the error to stderr and return 1.

    Raises:
        ConfigError: the timeout is not one that a request can have.
    """
    if sending.timeout_s is not None and not 0 < sending.timeout_s <= MAX_TIMEOUT_S:
        accepted = f"a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}"
        raise ConfigError(f"--timeout must be {accepted}, not {sending.timeout_s:.15g}.")
    return run_client(partial(_send, sending), url, name="headrace send")


async def _send(sending: Sending, bus: Bus) -> int:
    client = Asker(bus, Tracing())
    try:
        request = sending.request(secrets.token_hex(10))
        record = await _stored(client, request, bus)
    except HeadraceError as error:
        if error.code is ErrorCode.UNAVAILABLE:
            raise Unreachable(error.message) from error
        return _fail(error.code, error.message)
    if sending.verbose:
        tell(f"[{request.name} queued on {request.subject}]")
    printer = Printer(verbose=sending.verbose, terminal=sys.stdout.isatty())
    beside = Background()
    beside.start(_tell_pause(client, request.name), what="asking whether the request is paused")
    async with record, cancelled_if_interrupted(client, request.name):
        try:
            while printer.code is None:
                printer.take((await record.next()).answer)
                beside.cancel()
        finally:
            beside.cancel()
    return printer.code


async def _tell_pause(client: Asker, name: str) -> None:
    """Write to stderr, once, that a request waits for an operator. Cancel it when the request has begun."""
    while True:
        await asyncio.sleep(_PAUSED_EVERY_S)
        with contextlib.suppress(BusError):
            if (await client.position(name)).paused is True:
                tell("headrace: An operator has paused this request. It is queued and begins after the resume.")
                return


async def _stored(client: Asker, request: Outgoing, bus: Bus) -> RecordReader:
    """The record of the request once it is stored.

    Raises:
        HeadraceError: as `Asker.submit`, or because the pipeline reports meanwhile that the broker stores nothing.
    """
    storing = asyncio.ensure_future(client.submit(request, patience_s=_STORE_PATIENCE_S))
    looking = asyncio.ensure_future(_store_that_refuses(bus))
    try:
        await asyncio.wait((storing, looking), return_when=asyncio.FIRST_COMPLETED)
        if storing.done():
            return storing.result()
        store = looking.result()
        code = ErrorCode.QUEUE_FULL if store.state == "full" else ErrorCode.UNAVAILABLE
        raise HeadraceError(code, store.reason)
    finally:
        for task in (storing, looking):
            task.cancel()


async def _store_that_refuses(bus: Bus) -> StoreReport:
    """The report on the store, as soon as it says that new requests are refused."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        with contextlib.suppress(Unreachable):
            store = (await queue_statistics(bus)).store
            if store is not None and store.refuses:
                return store


class Printer:
    """Prints each part of an answer once: chunks in order, then the text of the last message that no chunk had.

    Args:
        verbose: whether it prints the progress to stderr.
        terminal: whether stdout is a terminal. Then it prints the model's reasoning, dim and before the answer, and
            escapes control characters.

    Attributes:
        code: the exit code after the last message; None before.
    """

    def __init__(self, *, verbose: bool, terminal: bool = False) -> None:
        self.code: int | None = None
        self._verbose = verbose
        self._terminal = terminal
        self._next_seq = 0
        self._printed = ""
        self._reasoned = ""

    def take(self, answer: Answer) -> None:
        """Print the text that a message adds."""
        if isinstance(answer, Chunk):
            if answer.seq == self._next_seq:
                self._next_seq += 1
                self._reason(answer.choices[0].delta.reasoning_content or "")
                self._print(answer.choices[0].delta.content or "")
        elif isinstance(answer, Status):
            if self._verbose:
                tell(_status_line(answer))
        elif isinstance(answer, ErrorAnswer):
            if self._printed or self._reasoned:
                say()
            self.code = _fail(answer.error.code, answer.error.message)
        elif isinstance(answer, Completion):
            self._finish(answer)

    def _finish(self, answer: Completion) -> None:
        message = answer.choices[0].message
        whole = message.content or ""
        # If chunks were missed, the printed text is still the beginning of the whole text.
        if not self._printed:
            self._reason((message.reasoning_content or "").removeprefix(self._reasoned))
        self._print(whole.removeprefix(self._printed))
        if not self._printed.endswith("\n"):
            say()
        for call in message.tool_calls or []:
            say_json(msgspec.json.encode(call))
        if self._verbose:
            tell(_account_line(answer, answer.headrace))
        self.code = 0

    def _reason(self, text: str) -> None:
        if text and self._terminal:
            say(f"{_DIM}{visible_answer(text)}{_NOT_DIM}", end="")
            self._reasoned += text

    def _print(self, text: str) -> None:
        if text:
            shown = visible_answer(text) if self._terminal else text
            say("\n\n" + shown if self._reasoned and not self._printed else shown, end="")
            self._printed += text


def _status_line(status: Status) -> str:
    reason = f": {status.reason}" if status.reason else ""
    return (
        f"[{status.state} on {status.engine}, {status.model}, attempt {status.attempt}, "
        f"after {status.queue_ms:.0f} ms in the queue{reason}]"
    )


def _account_line(answer: Completion, account: Account) -> str:
    simulated = ", simulated" if account.simulated is True else ""
    spilled = ", spilled" if account.spilled else ""
    return (
        f"[{account.engine}, {answer.model}{simulated}{spilled}: queue {account.queue_ms:.0f} ms, "
        f"first token {account.ttft_ms:.0f} ms, total {account.total_ms:.0f} ms, "
        f"{answer.usage.completion_tokens} tokens, {account.task}; {account.reason}]"
    )


def _fail(code: ErrorCode, message: str) -> int:
    tell(f"headrace: {code}: {message}")
    return 1
