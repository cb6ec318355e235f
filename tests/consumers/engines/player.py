"""Models in the shape of families in one process of their own, with the child's backend and loop: quick to start.

`Player` is the test's side. As a program, this module reads a line for each call and writes a line with the answers.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import msgspec

from consumers.engines.local.protocol import Rejected, Reset
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from tests.consumers.engines.conformance import Answer
from tests.consumers.engines.families import SCRIPTED, scripted_path
from tests.support import ROOT


class Refused(msgspec.Struct, tag=True):
    """A request that was refused."""

    code: ErrorCode
    message: str
    param: str | None


class Played(msgspec.Struct, tag=True):
    """The answer to a request, and the pieces that it came in."""

    answer: Answer


class Call(msgspec.Struct):
    """Requests that run together on the model in a folder."""

    folder: str
    works: list[Work]


_played = msgspec.json.Decoder(list[Refused | Played])
_call = msgspec.json.Decoder(Call)


class Player:
    """The process. A context manager."""

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(ROOT), scripted_path()])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.consumers.engines.player"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def together(self, folder: Path, works: list[Work]) -> list[Answer]:
        """The answers to requests that run together; raises the error of the first that is refused."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(Call(str(folder), works)) + b"\n")
        self._process.stdin.flush()
        played = _played.decode(self._process.stdout.readline())
        for one in played:
            if isinstance(one, Refused):
                raise HeadraceError(one.code, one.message, param=one.param)
        return [one.answer for one in played if isinstance(one, Played)]


class _Loaded:
    """One model."""

    def __init__(self, folder: str) -> None:
        from consumers.engines.local.child.loop import Command, EngineLoop
        from consumers.engines.local.child.mlx import MlxBackend

        config = Config(engine="mlx", model=folder)
        self.backend = MlxBackend(config, folder, lambda _: None)
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.sent: list[Any] = []
        self.loop = EngineLoop(self.backend, self.commands, self.sent.append, config)

    def play(self, works: list[Work]) -> list[Refused | Played]:
        from consumers.engines.local.child.loop import Begin

        played: dict[int, Refused | Played] = {}
        for key, work in enumerate(works):
            try:
                self.commands.put(Begin(0, self.backend.prepare(key, work), None))
                played[key] = Played(Answer())
            except HeadraceError as error:
                played[key] = Refused(error.code, error.message, error.param)
        while not all(isinstance(one, Refused) or one.answer.finish_reason for one in played.values()):
            self.loop.turn()
            for frame in self.sent:
                if isinstance(frame, Rejected):
                    played[frame.key] = Refused(frame.code, frame.message, frame.param)
                elif isinstance(frame, Reset):
                    raise RuntimeError(frame.error)  # noqa: TRY004 - a step failed
                for key, piece in getattr(frame, "pieces", []):
                    if isinstance(one := played[key], Played):
                        one.answer.add(piece)
            self.sent.clear()
        return list(played.values())


def main() -> None:
    loaded: dict[str, _Loaded] = {}
    for line in sys.stdin.buffer:
        call = _call.decode(line)
        if call.folder not in loaded:
            loaded[call.folder] = _Loaded(call.folder)
        answers = loaded[call.folder].play(call.works)
        sys.stdout.buffer.write(msgspec.json.encode(answers) + b"\n")
        sys.stdout.buffer.flush()
    for model in loaded.values():
        model.backend.close()


if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPTED))
    main()
