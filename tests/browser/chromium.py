"""Chromium as the system has it, driven by Playwright: nothing of it is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.async_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
OPTIONS = (
    "--no-sandbox",  # a container's root may not make one, and only pages of ours are opened
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Where it is: `$CHROMIUM`, or one of its usual names."""
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), MAC if Path(MAC).exists() else None]
    return next(filter(None, found), None)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A headless one, for the time of the block."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), headless=True, args=list(OPTIONS))
        try:
            yield browser
        finally:
            await browser.close()
