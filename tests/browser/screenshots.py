"""The dashboard's pictures in `docs/`: `python -m tests.browser.screenshots` overloads a pipeline and takes them.

Real MLX and llama.cpp with the default model, and two requests that crash the engine.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import tempfile
from pathlib import Path

import httpx
from PIL import Image

from tests.browser.chromium import chromium, find_chromium
from tests.e2e.conftest import running
from tests.support import ROOT

DOCS = ROOT / "docs"
OPTIONS = (
    "--model",
    "smollm2",
    "--slots",
    "2",
    "--engine-faults",
    "--http-answers-per-s",
    "0",
    "--http-statistics-per-s",
    "0",
)
PROMPTS = (
    ("high", "What is the capital of France?"),
    ("medium", "Tell me a story."),
    ("low", "What is 12 plus 7?"),
    ("medium", "Translate to Russian: good morning, my friends."),
    ("low", "Explain step by step why the tides follow the moon, and compare two theories of it."),
    ("high", "What is the capital of Japan?"),
    ("low", "Summarize: the river rose in the night, and by dawn the mill stood in water."),
    ("medium", "Prove that there are infinitely many primes."),
)
# How many ask at once, and for how long: a calm beginning, two waves, and the height of a third.
WAVES = ((2, 25), (14, 25), (3, 25), (10, 20), (2, 20), (22, 14))
VIEWS = {
    "dashboard-light": (1280, 1400, "light"),
    "dashboard-dark": (1280, 1400, "dark"),
    "dashboard-phone-light": (360, 1640, "light"),
    "dashboard-phone-dark": (360, 1640, "dark"),
}


async def ask(web: httpx.AsyncClient, prompts: itertools.cycle[tuple[str, str]], *, until: float) -> None:
    """One client that asks one thing after another."""
    while asyncio.get_running_loop().time() < until:
        priority, text = next(prompts)
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 60}
        await web.post("/v1/chat/completions", json=body, headers={"X-Priority": priority})


async def crash(web: httpx.AsyncClient, request_id: str, priority: str, text: str) -> None:
    """A request that brings the engine down, and becomes a dead letter."""
    body = {"messages": [{"role": "user", "content": f"{text} [[fault:abort]]"}]}
    headers = {"X-Priority": priority, "Idempotency-Key": request_id}
    assert (await web.post("/v1/chat/completions", json=body, headers=headers)).status_code == 502


async def take(http: str) -> None:
    """Overload the pipeline at http and take the pictures at the height of it."""
    async with httpx.AsyncClient(base_url=http, timeout=600) as web, chromium() as browser:
        for request_id, priority, text in (
            ("nightly-report-17", "low", "Compare the tables."),
            ("import-0042", "medium", "Why?"),
        ):
            await crash(web, request_id, priority, text)
        page = await browser.new_page()
        await page.goto(http + "/")
        prompts = itertools.cycle(PROMPTS)
        for clients, seconds in WAVES:
            until = asyncio.get_running_loop().time() + seconds
            asking = [asyncio.create_task(ask(web, prompts, until=until)) for _ in range(clients)]
            if (clients, seconds) == WAVES[-1]:
                break
            await asyncio.gather(*asking)
        await page.get_by_label("Prompt", exact=True).fill("What is the capital of Japan?")
        await page.get_by_role("radio", name="High").check()
        await page.get_by_role("button", name="Send").click()
        await page.locator("#try-account").wait_for()
        await page.evaluate("document.activeElement.blur()")
        for name, (width, height, scheme) in VIEWS.items():
            await page.set_viewport_size({"width": width, "height": height})
            await page.emulate_media(color_scheme=scheme)
            # Two frames: the chart is drawn anew for its width.
            await page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
            picture = await page.screenshot(clip={"x": 0, "y": 0, "width": width, "height": height})
            # 256 colours are as good for a page without photographs, and a third of the size.
            colours = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            colours.save(DOCS / f"{name}.png", optimize=True)
        await asyncio.gather(*asking)


def main() -> None:
    """Take them all."""
    if find_chromium() is None:
        raise SystemExit("no Chromium here: install one, or set $CHROMIUM")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), *OPTIONS) as pipeline:
        asyncio.run(take(pipeline.http))
    for name in VIEWS:
        print(name, (DOCS / f"{name}.png").stat().st_size >> 10, "KiB")


if __name__ == "__main__":
    main()
