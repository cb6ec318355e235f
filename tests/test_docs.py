"""The documentation keeps up with the code: settings, error codes, links, snippets."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from pipeline import __version__
from pipeline.config import ENV_PREFIX, KEYS, SETTINGS, Config
from pipeline.gateway.document import openapi
from pipeline.gateway.endpoints import ENDPOINTS
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import (
    STREAM_BATCH,
    STREAM_DEAD,
    STREAM_FILES,
    STREAM_OLLAMA,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    STREAM_STATE,
    STREAM_USAGE,
    STREAM_USED,
)
from tests import settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PACKAGES = ("pipeline", "consumers")
PAGES = [README, *sorted(DOCS.glob("*.md"))]


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def checked_in() -> set[str]:
    """The files that belong to the repository; without git, all of its packages."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True)
        return set(listed.stdout.splitlines())
    return {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def rows(page: Path, columns: int) -> dict[str, list[str]]:
    """The rows of a page's tables with so many columns, by the code in their first cell."""
    lines = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text(page), re.MULTILINE)
    cells = {key: rest.split(" | ") for key, rest in lines if rest.count(" | ") == columns - 2}
    return {key: [cell.strip() for cell in rest] for key, rest in cells.items()}


def test_the_tables_of_settings_are_those_of_the_declarations():
    assert settings.written(text(settings.PAGE)) == settings.tables(), "`python -m tests.settings` writes them"


def test_every_setting_is_in_a_section_and_has_a_text_of_one_line():
    first, *_ = SETTINGS.values()
    assert first.setting.section
    for key in SETTINGS.values():
        texts = (key.setting.help, key.setting.more, key.kind.phrase)
        assert not any("\n" in each or " | " in each for each in texts), key.name
        assert key.setting.help
        assert not key.setting.help.endswith(".")
        assert key.setting.more.endswith(".") or not key.setting.more


def test_no_setting_is_documented_that_does_not_exist():
    variables = set(re.findall(rf"`{ENV_PREFIX}([A-Z0-9_]+)", text(DOCS / "configuration.md")))
    assert {name.lower() for name in variables} - {"config"} <= set(KEYS)


def test_the_example_file_is_a_configuration():
    (example,) = re.findall(r"^```toml\n(.*?)^```", text(DOCS / "configuration.md"), re.MULTILINE | re.DOTALL)
    msgspec.convert(tomllib.loads(example), Config, strict=False)


@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_code_is_documented_with_its_family_and_whether_to_try_again(code: ErrorCode):
    error = HeadraceError(code, "")
    family, retryable, meaning = rows(DOCS / "protocol.md", 4)[code]
    assert family == f"`{error.type}`"
    assert retryable == ("yes" if error.retryable else "no")
    assert meaning


def test_every_parameter_of_a_request_is_documented():
    protocol = text(DOCS / "protocol.md")
    assert [name for name in ChatRequest.__struct_encode_fields__ if f"`{name}`" not in protocol] == []


STREAMS = [STREAM_REQUESTS, STREAM_OLLAMA, STREAM_REPLIES, STREAM_STATE, STREAM_DEAD, STREAM_BATCH, STREAM_FILES]
STREAMS += [STREAM_USED, STREAM_USAGE]


@pytest.mark.parametrize("stream", STREAMS)
def test_every_stream_is_documented(stream: str):
    assert stream in rows(DOCS / "architecture.md", 4)


def test_every_module_is_on_the_map():
    modules = {name for name in checked_in() if re.match(r"(pipeline|consumers)/.*(?<!__init__)\.py$", name)}
    missing = modules - set(re.findall(r"^\| \[`([^`]+)`\]", text(DOCS / "architecture.md"), re.MULTILINE))
    assert not missing, "give each a line in the module map of docs/architecture.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text(page))
    for target in (one or other for one, other in targets):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there), target


def headings(page: Path) -> set[str]:
    """The anchors of a page, as they are made from its headings."""
    titles = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_snippet_compiles(page: Path):
    for snippet in re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        compile(snippet, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_json_example_is_json(page: Path):
    for example in re.findall(r"^```json\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        msgspec.json.decode(example)


def test_the_readme_begins_with_how_to_run_and_how_to_test():
    beginning = "\n".join(text(README).splitlines()[:10])
    assert "make run" in beginning
    assert "make test" in beginning


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_run_as_they_are_written(page: Path):
    """`nats req` waits five seconds, prints nothing and exits 0. The benchmarks need what is installed in .venv."""
    said = text(page)
    asks = re.findall(r"nats (?:-s \S+ )?req [^\n`]*llm\.ask", said)
    assert [ask for ask in asks if " --timeout 2m " not in ask] == []
    assert re.findall(r"(?<!\.venv/bin/)python -m bench", said) == []


def test_what_the_package_says_of_itself_holds():
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    typed = [(ROOT / package / "py.typed").exists() for package in PACKAGES]
    assert typed == [True, True]
    assert "Typing :: Typed" in project["classifiers"]
    assert openapi(ENDPOINTS, with_keys=False)["info"]["version"] == __version__
