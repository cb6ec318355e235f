"""The pages: what they may do, and that they do no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import gateway
from pipeline.broker.jetstream import Bus
from pipeline.gateway.identity import make_key
from tests.pipeline.gateway.conftest import Serve

FOLDER = Path(gateway.__file__).parent / "pages"
FILES = sorted(file.name for file in FOLDER.iterdir())


async def test_every_page_and_part_is_served_without_a_key_and_may_load_nothing_else(serve: Serve, bus: Bus):
    async with serve(http_keys=[make_key("alice")[1]]) as client:
        parts = [f"/pages/{name}" for name in FILES if not name.endswith(".html")]
        for path in ("/", "/docs", *parts):
            answer = await client.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
        assert (await client.get("/pages/dashboard.js")).headers["content-type"].startswith("text/javascript")
        assert (await client.get("/pages/..%2fapp.py")).status_code in (401, 404)


@pytest.mark.parametrize("name", FILES)
def test_a_page_asks_no_other_host_and_makes_no_text_into_markup(name: str):
    text = (FOLDER / name).read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=", "onclick="):
        assert word not in text, word


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_every_part_that_a_page_names_is_there(name: str):
    named = re.findall(r"pages/([\w.-]+)", (FOLDER / name).read_text(encoding="utf-8"))
    assert named
    assert set(named) <= set(FILES)
