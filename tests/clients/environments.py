"""What a client needs to run: an environment of its own with the versions of `versions.toml`, and its command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 900


class Unavailable(Exception):
    """The client cannot be installed on this machine."""


@dataclass(frozen=True, slots=True)
class Client:
    """One entry of `versions.toml`."""

    name: str
    script: str
    python: tuple[str, ...] = ()
    javascript: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The version of the client itself."""
        if self.command:
            done = subprocess.run(self.command, capture_output=True, text=True, check=True)
            return re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)[0]
        return re.split(r"==|(?<=.)@", (self.python or self.javascript)[0])[-1]

    def installed(self, folder: Path) -> Environment:
        """Install it below folder, unless it is there in these versions.

        Raises:
            Unavailable: a tool that installs or runs it is missing, or fails.
        """
        place = folder / re.sub(r"\W+", "-", self.name).strip("-").lower()
        if self.command and shutil.which(self.command[0]) is None:
            raise Unavailable(f"there is no {self.command[0]}")
        wanted = "\n".join((*self.python, *self.javascript))
        stamp = place / "installed"
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            if self.python:
                _install_python(place, self.python)
            if self.javascript:
                _install_javascript(place, self.javascript)
            stamp.write_text(wanted)
        return Environment(self, place)


@dataclass(frozen=True, slots=True)
class Environment:
    """An installed client.

    Args:
        client: what is installed.
        place: the folder that holds it.
    """

    client: Client
    place: Path

    def command(self) -> list[str]:
        """What runs the client's script."""
        script = HERE / self.client.script
        if script.suffix == ".java":
            return ["java", str(script)]
        if script.suffix == ".mjs":
            # Modules are found from the folder of the script that imports them.
            for module in script.parent.glob("*.mjs"):
                shutil.copy(module, self.place)
            return ["node", str(self.place / script.name)]
        return [str(self.place / "bin" / "python") if self.client.python else sys.executable, str(script)]

    def environ(self, more: Mapping[str, str]) -> dict[str, str]:
        """This process's environment with the client's commands on the path, and without settings of clients."""
        kept = {name: value for name, value in os.environ.items() if not _SETTING.match(name)}
        path = [str(self.place / "bin"), str(self.place / "node_modules" / ".bin"), os.environ["PATH"]]
        return {**kept, "PATH": os.pathsep.join(path), **more}


_SETTING = re.compile(
    r"(OPENAI|ANTHROPIC|OLLAMA|CLAUDE|CODEX|LITELLM|LLM|HEADRACE)_|(ALL|HTTPS?)_PROXY$", re.IGNORECASE
)


def clients() -> list[Client]:
    """All entries of `versions.toml`."""
    entries = tomllib.loads((HERE / "versions.toml").read_text())["client"]
    return [Client(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}) for entry in entries]


def _install_python(place: Path, packages: tuple[str, ...]) -> None:
    python = str(place / "bin" / "python")
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        _run([sys.executable, "-m", "venv", "--without-pip", str(place)])
        _run([uv, "pip", "install", "--quiet", "--python", python, *packages])
    else:
        _run([sys.executable, "-m", "venv", str(place)])
        _run([python, "-m", "pip", "install", "--quiet", *packages])


def _install_javascript(place: Path, packages: tuple[str, ...]) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("there is no npm")
    (place / "package.json").write_text('{"private": true, "type": "module"}')
    _run([npm, "install", "--prefix", str(place), "--no-audit", "--no-fund", "--save-exact", *packages])


def _run(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{words[0]} took too long") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(words[:3])}: {done.stderr.strip()[-300:]}")
