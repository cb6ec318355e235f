"""A browser, pages in it that must keep to themselves, and pipelines for them to look at."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio

from tests.browser.chromium import chromium, find_chromium
from tests.e2e.conftest import Pipeline, running

TIMEOUT_MS = 45_000
SCOPE = {"scope": "module", "loop_scope": "module"}


def missing() -> str:
    """What these tests need and is not here, or nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed: `make browser-test` does it"
    return (
        "" if find_chromium() else "no Chromium here: install one (Debian: apt-get install chromium), or set $CHROMIUM"
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Everything on its embedded defaults but for a small engine, which is soon saturated."""
    if why := missing():
        pytest.skip(why)
    options = ("--slots", "1", "--http-statistics-per-s", "0", "--http-answers-per-s", "0")
    with running(tmp_path_factory.mktemp("dashboard"), *options) as up:
        yield up


@pytest_asyncio.fixture(**SCOPE)
async def browser():
    if why := missing():
        pytest.skip(why)
    async with chromium() as browser:
        yield browser


@pytest.fixture
async def web(pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=pipeline.http, timeout=60) as client:
        yield client


class Watched:
    """What a page asked for and complained of."""

    def __init__(self, page, url: str) -> None:
        self.page = page
        self.host = urlsplit(url).netloc
        self.foreign: list[str] = []
        self.errors: list[str] = []
        # A test that has something refused on purpose says so here.
        self.may_fail: tuple[str, ...] = ()
        page.on("request", self._on_request)
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _on_request(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self.host:
            self.foreign.append(request.url)

    def check(self) -> None:
        assert self.foreign == []
        assert [e for e in self.errors if not any(word in e for word in self.may_fail)] == []


@pytest.fixture
def open_page(browser):
    """Opens a page at a URL; in the end all of them have asked no other host and complained of nothing."""
    pages: list[Watched] = []

    async def opening(url: str, *, width: int = 1280, height: int = 900, scheme: str = "light"):
        page = await browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(TIMEOUT_MS)
        pages.append(Watched(page, url))
        page.watched = pages[-1]
        await page.goto(url)
        return page

    yield opening
    for watched in pages:
        watched.check()


@pytest_asyncio.fixture(loop_scope="module")
async def page(open_page, pipeline: Pipeline):
    opened = await open_page(pipeline.http + "/")
    await opened.wait_for_selector("#connection[data-state=live]")
    yield opened
    await opened.close()
