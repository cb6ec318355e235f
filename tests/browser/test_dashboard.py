"""The dashboard in a real browser, in front of a real pipeline."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from pipeline.broker.jetstream import Bus
from pipeline.core.envelope import Envelope
from pipeline.core.letters import letter_headers
from pipeline.gateway.identity import make_key
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import StoreReport, encode
from pipeline.wire.subjects import DEAD, STORE, Priority, Task
from tests.browser.conftest import missing
from tests.e2e.conftest import Pipeline, running
from tests.waiting import eventually

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

PRIORITIES = ("high", "medium", "low")
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
FRANCE = "What is the capital of France?"
STORY = "Tell me a story."
FAR_MS = 60_000
# So many different statistics are "lately".
WINDOW = 25
# Of the deliveries that died, each a letter of its own.
SEQUENCES = itertools.count(1)
# The same numbers under the names that the page and the statistics have for them.
COUNTS = ("done", "failed", "spilled", "cancelled", "expired")


async def ask(web: httpx.AsyncClient, text: str, priority: str, **more: Any) -> str:
    """Queue a request and go away; returns its id."""
    body = {"messages": [{"role": "user", "content": text}], **more}
    headers = {"X-Priority": priority, "Prefer": "respond-async"}
    answer = await web.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


async def overload(web: httpx.AsyncClient, each: int) -> None:
    await asyncio.gather(*(ask(web, [FRANCE, STORY][i % 2], p) for i in range(each) for p in PRIORITIES))


async def stats(web: httpx.AsyncClient) -> dict[str, Any]:
    return (await web.get("/queue/stats")).json()


async def newer(web: httpx.AsyncClient, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics that were made after the last ones of before."""
    at = before[-1]["uptime_s"] if before else -1.0

    async def found() -> dict[str, Any] | None:
        now = await stats(web)
        return now if now["uptime_s"] > at else None

    return await eventually(found, what="newer statistics", every_s=0.1)


async def idle(web: httpx.AsyncClient) -> bool:
    now = await stats(web)
    return not any(now[p]["queued"] + now[p]["running"] for p in PRIORITIES)


NUMBERS = """() => Object.fromEntries(["high", "medium", "low"].map(lane => {
  const part = document.querySelector(`[data-lane=${lane}]`);
  const number = field => Number(part.querySelector(`[data-field=${field}]`).textContent.replace(",", ""));
  const told = name => Number((part.querySelector(".more").textContent.match(
    new RegExp(`([0-9,]+) ${name}`)) || [0, "0"])[1].replace(",", ""));
  return [lane, { queued: number("queued"), running: number("running"),
    ...Object.fromEntries(["done", "failed", "spilled", "cancelled", "expired"].map(name => [name, told(name)])) }];
}))"""


async def test_under_overload_the_page_says_what_the_statistics_say(page, pipeline: Pipeline, web: httpx.AsyncClient):
    flood = asyncio.create_task(overload(web, 40))
    # All that was true within the last seconds: the page is drawn a moment after its numbers were.
    lately: list[dict[str, Any]] = []
    looks, most = 0, 0
    await eventually(lambda: _is_saturated(web), what="saturation", timeout_s=60)
    while looks < 20 or not flood.done():
        # A statistic is kept for a tenth of a second, so each look waits for a newer one.
        lately = [*lately[-WINDOW:], await newer(web, lately)]
        shown = await page.evaluate(NUMBERS)
        # The first may have been kept since before the page was read, the second was not.
        after = [await stats(web)]
        after.append(await newer(web, after))
        if len(lately) < WINDOW:
            continue
        looks += 1
        for lane in PRIORITIES:
            for field in ("queued", "running", *COUNTS):
                said = [each[lane][field] for each in (*lately, *after)]
                assert min(said) <= shown[lane][field] <= max(said), (lane, field)
        most = max(most, sum(shown[lane]["queued"] for lane in PRIORITIES))
    assert most > 20
    await flood
    assert await page.locator(".engine[data-engine=mlx] .chip", has_text="saturated").count() == 1
    assert "of 1" in await page.locator(".engine[data-engine=mlx] [data-field=slots]").inner_text()
    assert "stand-in" in await page.locator(".engine[data-engine=ollama]").inner_text()
    assert await page.locator("#chart path.line.mlx").get_attribute("d")
    assert await page.locator("#chart path.area").count() >= 1
    # And in the end exactly, spills among them.
    await eventually(lambda: idle(web), what="the end of the overload", timeout_s=100)
    final = await eventually(lambda: _what_both_say(page, web), what="the page says what they say", every_s=0.1)
    assert sum(final[lane]["spilled"] for lane in PRIORITIES) > 0
    assert "mlx is saturated" in await page.locator("#moves-reasons").inner_text()
    await page.locator("#requests-filter").select_option("spilled")
    parts = await page.locator("#requests-list .bar").first.get_attribute("aria-label")
    assert "triage" in parts
    assert "queued for Ollama" in parts
    assert "tinyllama" not in (await page.content()).lower()


async def _is_saturated(web: httpx.AsyncClient) -> bool:
    return (await stats(web))["engines"].get("mlx", {}).get("level") == "saturated"


async def _what_both_say(page, web: httpx.AsyncClient) -> dict[str, Any] | None:
    """The numbers of the statistics if the page shows the same; the last requests are counted after they have ended."""
    said = await stats(web)
    wanted = {lane: {field: said[lane][field] for field in ("queued", "running", *COUNTS)} for lane in PRIORITIES}
    return wanted if await page.evaluate(NUMBERS) == wanted else None


async def test_a_waterfall_adds_up_to_the_times_of_the_answer(page, web: httpx.AsyncClient):
    request_id = await ask(web, FRANCE, "high")
    row = page.locator(f'#requests-list li[data-id="{request_id}"]')
    await page.locator(f'#requests-list li[data-id="{request_id}"][data-state=done]').wait_for()
    account = (await web.get(f"/queue/requests/{request_id}")).json()["answer"]["headrace"]
    await row.locator("summary").click()
    parts = await row.locator(".bar").get_attribute("aria-label")
    assert "generating" in parts
    assert (await row.locator(".bar i").count()) == parts.count(",") + 1
    took = await row.locator(".took").inner_text()
    whole = account["total_ms"]
    assert took == (f"{whole:.0f} ms" if whole < 999.5 else f"{whole / 1000:.2f} s")
    assert account["reason"] in await row.locator(".request-more").inner_text()


# A request, and the parts of its waterfall 900 ms after it was queued.
WATERFALLS: list[tuple[dict[str, Any], list[list[Any]]]] = [
    ({"state": "queued"}, [["queued", 0, 900]]),
    ({"state": "running", "started_ms": 5}, [["queued", 0, 5], ["running", 5, 900]]),
    (
        {"state": "done", "engine": "mlx", "started_ms": 5, "first_ms": 30, "ended_ms": 80},
        [["queued", 0, 5], ["first", 5, 30], ["generating", 30, 80]],
    ),
    (
        {"state": "done", "engine": "ollama", "triage_ms": 10, "moved_ms": 12, "started_ms": 40}
        | {"first_ms": 50, "ended_ms": 90},
        [["queued", 0, 10], ["triage", 10, 12], ["for-ollama", 12, 40], ["first", 40, 50], ["generating", 50, 90]],
    ),
    (
        {"state": "triaged", "triage_ms": 10, "moved_ms": 12},
        [["queued", 0, 10], ["triage", 10, 12], ["for-mlx", 12, 900]],
    ),
    ({"state": "cancelled", "ended_ms": 70}, [["queued", 0, 70]]),
    # Clocks of two machines may disagree: no part is negative, and nothing goes beyond the end.
    (
        {"state": "done", "engine": "mlx", "started_ms": 90, "first_ms": 40, "ended_ms": 80},
        [["queued", 0, 80]],
    ),
    ({"state": "running", "started_ms": 1200}, [["queued", 0, 1200]]),
]


async def test_a_waterfalls_parts_follow_on_each_other(page):
    drawn = await page.evaluate(
        """async requests => {
          const { segments } = await import("/pages/requests.js");
          return requests.map(each => segments(each, 900).map(([, kind, from, to]) => [kind, from, to]));
        }""",
        [request for request, _ in WATERFALLS],
    )
    assert drawn == [parts for _, parts in WATERFALLS]


async def test_a_prompt_is_answered_in_the_box_and_it_says_where_and_why(page):
    await page.get_by_label("Prompt", exact=True).fill(FRANCE)
    await page.get_by_role("radio", name="High").check()
    await page.get_by_role("button", name="Send").click()
    await page.locator("#try-account").wait_for()
    assert await page.locator("#try-answer").inner_text() == "The capital of France is Paris."
    assert await page.locator("#try-status").inner_text() == "Answered by MLX."
    account = await page.locator("#try-account").inner_text()
    assert "headrace-demo" in account
    assert "high" in account
    assert "Reason" in account
    assert await page.get_by_role("button", name="Send").is_enabled()


async def test_a_prompt_that_waits_can_be_cancelled(page, web: httpx.AsyncClient):
    before = (await stats(web))["low"]["cancelled"]
    # In its own lane, so that it is not served in between.
    await asyncio.gather(*(ask(web, STORY, "low") for _ in range(40)))
    await page.get_by_label("Prompt", exact=True).fill("Explain step by step why the sky is blue.")
    await page.get_by_role("radio", name="Low").check()
    await page.keyboard.press("Tab")
    await page.get_by_label("Prompt", exact=True).press("Control+Enter")
    await page.locator("#try-status", has_text="Queued").wait_for()
    await page.get_by_role("button", name="Cancel", exact=True).click()
    await page.locator("#try-status", has_text="Cancelled.").wait_for()
    page.watched.may_fail = ("status of 499",)

    async def counted() -> bool:
        return (await stats(web))["low"]["cancelled"] == before + 1

    await eventually(counted, what="the cancelled request, and no other, is counted", every_s=0.1)
    await eventually(lambda: idle(web), timeout_s=100)


async def test_the_use_of_each_tenant_is_shown_for_the_chosen_period(page, web: httpx.AsyncClient):
    before = (await web.get("/queue/usage")).json()["month"]["total"]["requests"].get("done", 0)
    await ask(web, FRANCE, "high")

    async def counted() -> int:
        done = (await web.get("/queue/usage")).json()["month"]["total"]["requests"].get("done", 0)
        return done if done > before else 0

    done = await eventually(counted, what="the request is counted", every_s=0.1)
    await page.get_by_label("Period (UTC)").select_option("month")
    row = page.locator('#usage-rows tr[data-tenant=default][data-key=""]')

    async def shown() -> bool:
        if not await row.count():
            return False
        requests, failed = [int(cell.replace(",", "")) for cell in (await row.locator("td").all_inner_texts())[1:3]]
        return requests - failed >= done

    await eventually(shown, what="the page shows it", every_s=0.1)
    assert "tokens" in await page.locator("#usage-sum").inner_text()


async def test_an_error_is_told_in_the_box(page):
    page.watched.may_fail = ("status of 4",)
    await page.evaluate("""() => { const model = document.getElementById("model");
      model.append(new Option("ghost", "ghost", true, true)); }""")
    await page.get_by_label("Prompt", exact=True).fill(FRANCE)
    await page.get_by_role("button", name="Send").click()
    await page.locator("#try-status[data-tone=bad]", has_text="ghost").wait_for()


# ---- the store


async def test_a_notice_says_what_is_wrong_with_the_store_for_as_long_as_it_is(open_page, pipeline: Pipeline):
    """The reports of `headrace up`, whose store has room, come between those of the test, and follow them."""
    page = await open_page(pipeline.http + "/")
    await page.locator("#store").wait_for(state="hidden")
    report = encode(StoreReport("full", "The disk has <b>9 MiB</b> free. Make room."))

    async def repeat(bus: Bus) -> None:
        while True:
            await bus.publish(STORE, report)
            await asyncio.sleep(0.02)

    async with Bus.connect(pipeline.url, name="test") as bus:
        repeating = asyncio.create_task(repeat(bus))
        await page.locator("#store", has_text="The disk has <b>9 MiB</b> free. Make room.").wait_for()
        repeating.cancel()
    await page.locator("#store").wait_for(state="hidden")


# ---- dead letters


async def bury(url: str, request_id: str, body: bytes, message: str = "it crashed the engine") -> None:
    """As a worker does with a request that brings down the engine."""
    error = HeadraceError(ErrorCode.ENGINE_FAILED, message)
    envelope = Envelope(request_id, Priority.MEDIUM, Task.UNTRIAGED, time.time() - 30, 3)
    headers = letter_headers(
        envelope, {}, subject="llm.request.medium", sequence=next(SEQUENCES), error=error, attempts=3, trace_id=""
    )
    async with Bus.connect(url, name="test") as bus:
        await bus.store(f"{DEAD}.medium", body, headers=headers)


async def test_a_dead_letter_is_shown_and_replayed_to_its_answer(open_page, pipeline: Pipeline, web: httpx.AsyncClient):
    await bury(pipeline.url, "died-once", json.dumps({"prompt": FRANCE}).encode())
    page = await open_page(pipeline.http + "/")
    row = page.locator('#dead-list li[data-id="died-once"]')
    await row.wait_for()
    assert "engine_failed: it crashed the engine" in await row.inner_text()
    await page.get_by_role("button", name="Show died-once").click()
    await page.locator("#letter-request", has_text=FRANCE).wait_for()
    await page.keyboard.press("Escape")
    await page.get_by_role("button", name="Replay died-once").click()
    await page.locator("#dead-status", has_text="died-once was queued again").wait_for()
    await row.wait_for(state="detached")
    await page.locator('#requests-list li[data-id="died-once"][data-state=done]').wait_for()
    answered = (await web.get("/queue/requests/died-once")).json()
    assert answered["answer"]["choices"][0]["message"]["content"] == "The capital of France is Paris."


async def test_a_letter_that_cannot_be_reached_says_so(open_page, pipeline: Pipeline, web: httpx.AsyncClient):
    await bury(pipeline.url, "cut-off", b"hello")
    page = await open_page(pipeline.http + "/")
    page.watched.may_fail = ("ERR_FAILED",)
    await page.locator('#dead-list li[data-id="cut-off"]').wait_for()
    await page.route("**/queue/dead/**", lambda route: route.abort())
    await page.get_by_role("button", name="Show cut-off").click()
    await page.locator("#dead-status", has_text="cut-off could not be read. The gateway does not answer.").wait_for()
    await page.get_by_role("button", name="Replay cut-off").click()
    await page.locator("#dead-status", has_text="cut-off was not replayed. The gateway does not answer.").wait_for()
    await web.delete("/queue/dead/cut-off")


async def test_a_dead_letter_is_purged_only_after_a_second_word(open_page, pipeline: Pipeline, web: httpx.AsyncClient):
    await bury(pipeline.url, "unwanted", b"hello")
    page = await open_page(pipeline.http + "/")
    for answer, left in (("Cancel", ["unwanted"]), ("Delete", [])):
        await page.get_by_role("button", name="Delete unwanted").click()
        await page.locator("#purge-dialog").get_by_role("button", name=answer).click()
        await page.locator("#purge-dialog").wait_for(state="hidden")
        if not left:
            await page.locator("#dead-status", has_text="unwanted was deleted").wait_for()
        assert [row["id"] for row in (await web.get("/queue/dead")).json()["data"] if row["id"] == "unwanted"] == left


async def test_what_strangers_wrote_is_text(open_page, pipeline: Pipeline, web: httpx.AsyncClient):
    hostile = '<img src=x onerror="document.title=1"><script>document.title=1</script>'
    await bury(pipeline.url, "hostile", hostile.encode(), hostile)
    page = await open_page(pipeline.http + "/")
    await page.get_by_role("button", name="Show hostile").click()
    await page.locator("#letter-dialog[open]").wait_for()
    assert await page.locator("#letter-request").inner_text() == hostile
    assert hostile in await page.locator('#dead-list li[data-id="hostile"]').inner_text()
    await page.keyboard.press("Escape")
    await page.get_by_label("Prompt", exact=True).fill(hostile)
    await page.get_by_role("button", name="Send").click()
    await page.locator("#try-account").wait_for()
    assert await page.locator("img").count() == 0
    assert await page.title() == "headrace"
    # The browser itself makes no text into markup here.
    refused = await page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError"
    page.watched.may_fail = ("TrustedHTML", "Trusted Type")
    await web.delete("/queue/dead/hostile")


# ---- for everybody


async def test_everything_is_reached_by_keyboard_in_the_order_of_reading_and_the_focus_is_seen(page):
    order: list[str] = []
    while "requests-filter" not in order and len(order) < 60:
        await page.keyboard.press("Tab")
        name, outlined = await page.evaluate("""() => {
          const at = document.activeElement;
          const seen = at.matches("input[type=radio]") ? at.nextElementSibling : at;
          return [at.id || at.textContent.trim() || at.value, getComputedStyle(seen).outlineStyle !== "none"];
        }""")
        assert outlined, name
        order.append(name)
    pauses = ["Pause", "Pause", "Pause", "pause-tenant"]
    assert order[:8] == ["Skip to the content", "HTTP API", "theme", *pauses, "chart"]
    wanted = ["chart", "prompt", "medium", "model", "try-send"]
    assert [name for name in order if name in wanted] == wanted
    assert order.index("requests-filter") > order.index("try-send")
    await page.focus("#chart")
    await page.keyboard.press("ArrowLeft")
    assert not (await page.locator("#chart-reading").inner_text()).startswith("Now")
    # What a screen reader says of the chart is what is read off it.
    assert await page.get_by_role("group", name=re.compile(r"^Saturation \d\d:\d\d:\d\d: MLX ")).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
async def test_at_every_width_it_needs_no_scrolling_sideways_and_can_be_read(
    open_page, pipeline: Pipeline, web: httpx.AsyncClient, width: int, scheme: str
):
    await bury(pipeline.url, "a-long-id-" + "x" * 100, b"hello", "a-long-word-" + "y" * 200)
    await asyncio.gather(*(ask(web, STORY, priority) for priority in PRIORITIES for _ in range(3)))
    page = await open_page(pipeline.http + "/", width=width, scheme=scheme)
    await page.locator("#requests-list li summary").first.wait_for()
    await page.locator("#dead-list li").first.wait_for()
    await page.locator("#requests-list li summary").last.click()
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    # WCAG 2.2, 1.4.3: 4.5 to 1.
    assert await page.evaluate(CONTRAST) == []
    unnamed = await page.evaluate("""() => [...document.querySelectorAll("button, select, textarea, input")]
      .filter(e => !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).map(e => e.id)""")
    assert unnamed == []
    await web.delete("/queue/dead/a-long-id-" + "x" * 100)


async def test_the_theme_is_chosen_and_remembered(page):
    async def background() -> str:
        return await page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = await background()
    for name in ("light", "dark"):
        await page.get_by_role("button", name="Theme").click()
        assert await page.locator("#theme").inner_text() == f"Theme: {name}"
    dark = await background()
    assert dark != light
    await page.reload()
    assert await background() == dark


async def test_it_says_when_it_is_cut_off_and_comes_back_by_itself(page, pipeline: Pipeline):
    page.watched.may_fail = ("ERR_", "Failed to load")
    await asyncio.to_thread(pipeline.kill, "gateway")
    await page.locator("#connection[data-state=off]", has_text="Disconnected").wait_for()
    await page.locator("#connection[data-state=live]").wait_for(timeout=FAR_MS)
    assert await page.locator("#connection").inner_text() == "live"


# ---- with keys


SECRET, KEY = make_key("alice")
OTHER_SECRET, OTHER = make_key("bob")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def locked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    if why := missing():
        pytest.skip(why)
    keys = msgspec.json.encode([msgspec.structs.replace(KEY, highest=Priority.MEDIUM), OTHER]).decode()
    options = ("--engine", "simulated", "--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
    with running(tmp_path_factory.mktemp("locked"), *options, environ={"HEADRACE_HTTP_KEYS": keys}) as up:
        yield up


async def test_with_keys_it_asks_for_one_and_shows_what_that_may_see(open_page, locked: Pipeline):
    async with httpx.AsyncClient(base_url=locked.http, timeout=60) as web:
        web.headers["authorization"] = f"Bearer {OTHER_SECRET}"
        others = await ask(web, FRANCE, "high")
    page = await open_page(locked.http + "/")
    page.watched.may_fail = ("status of 401",)
    for secret in ("hr-wrong", SECRET):
        await page.get_by_label("Key", exact=True).fill(secret)
        await page.get_by_role("button", name="Use this key").click()
        if secret != SECRET:
            await page.locator("#key-why", has_text="Unknown API key").wait_for()
    await page.locator("#connection[data-state=live]").wait_for()
    assert await page.locator("#who").inner_text() == "tenant alice"
    assert await page.get_by_role("radio", name="High").is_disabled()
    await page.get_by_label("Prompt", exact=True).fill(FRANCE)
    await page.get_by_role("button", name="Send").click()
    await page.locator("#try-status", has_text="simulated, no model").wait_for()
    await page.locator("#requests-list li[data-state=done]").wait_for()
    listed = await page.locator("#requests-list li").evaluate_all("rows => rows.map(row => row.dataset.id)")
    assert len(listed) == 1
    assert others not in listed
    assert "simulated" in await page.locator(".engine[data-engine=mlx]").inner_text()
    # The key is this tab's alone, and outlives a reload of it.
    await page.reload()
    await page.locator("#connection[data-state=live]").wait_for()
    assert SECRET not in await page.content()


async def test_the_page_of_the_interface_says_what_every_field_may_be(open_page, pipeline: Pipeline):
    page = await open_page(pipeline.http + "/docs")
    await page.get_by_text("/v1/chat/completions").first.click()
    for field, type_ in {
        "messages": "list of ChatMessage",
        "model": "string",
        "stop": "string or list of string",
        "response_format": "ResponseFormat",
        "X-Priority": "header, high, medium, low",
    }.items():
        row = page.get_by_role("row").filter(has=page.get_by_role("cell", name=field, exact=True)).first
        assert (await row.get_by_role("cell").nth(1).inner_text()).startswith(type_)


async def test_an_operator_pauses_a_lane_moves_a_request_and_resumes(open_page, web, pipeline):
    await eventually(lambda: idle(web), what="nothing is queued", every_s=0.1)
    page = await open_page(pipeline.http)
    lane = page.locator('[data-lane="low"]')
    await lane.get_by_role("button", name="Pause lane low").click()
    dialog = page.locator("#operate-dialog")
    await dialog.get_by_text("0 queued requests; 0 running.").wait_for()
    await dialog.get_by_label("Reason").fill("the demo")
    await dialog.get_by_role("button", name="Pause").click()
    await lane.get_by_text("paused", exact=True).wait_for()
    await page.locator("#pause-list").get_by_text("(the demo)").wait_for()
    request = await ask(web, FRANCE, "low")
    row = page.locator(f'#requests-list li[data-id="{request}"]')
    await row.locator("summary").click()
    await row.get_by_role("button", name="Move to high").click()
    await dialog.get_by_text("waits at the end of lane high").wait_for()
    await dialog.get_by_role("button", name="Move").click()
    await page.locator(f'#requests-list li[data-id="{request}"][data-state="done"]').wait_for()
    assert (await web.get(f"/queue/requests/{request}")).json()["answer"]["headrace"]["priority"] == "high"
    await lane.get_by_role("button", name="Resume lane low").click()
    await dialog.get_by_role("button", name="Resume").click()
    await lane.get_by_text("paused", exact=True).wait_for(state="hidden")
    assert (await web.get("/queue/paused")).json()["pauses"] == []


async def test_an_operator_pauses_a_tenant(open_page, web, pipeline):
    page = await open_page(pipeline.http)
    await page.get_by_role("button", name="Pause a tenant").click()
    dialog = page.locator("#operate-dialog")
    await dialog.get_by_label("Tenant").fill("acme")
    await dialog.get_by_label("Lanes").select_option("medium")
    await dialog.get_by_text("in lane medium").wait_for()
    await dialog.get_by_role("button", name="Pause").click()
    await page.get_by_text("Lane medium of tenant acme: paused").wait_for()
    await page.get_by_role("button", name="Resume lane medium of tenant acme").click()
    await dialog.get_by_role("button", name="Resume").click()
    await page.locator("#pause-list li").wait_for(state="detached")
