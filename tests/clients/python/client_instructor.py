"""Instructor, over OpenAI's client. It reads answers of a form, by tool calls (its default) or by JSON."""

import instructor
import openai
from capital import Capital
from cell import ASK, HIGH, KEY, OPENAI, SLOW_OPENAI, UNKNOWN, answered_once, check, lacks, raises, run, urgent

made = openai.OpenAI(base_url=OPENAI, api_key="unused")
client = instructor.from_openai(made)
slow = openai.OpenAI(base_url=SLOW_OPENAI, api_key="unused", timeout=1, max_retries=9)
USUAL = {"model": "auto", "messages": ASK, "response_model": Capital}


@check("form")
def _():
    assert client.chat.completions.create(**USUAL).capital
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        assert instructor.from_openai(made, mode=mode).chat.completions.create(**USUAL).capital, mode
    return "Mode.JSON asks for any object, which the demo model does not end"


@check("stream")
def _():
    *_, last = client.chat.completions.create_partial(**USUAL)
    assert last.capital


@check("errors")
def _():
    with raises(Exception, UNKNOWN):
        client.chat.completions.create(**{**USUAL, "model": UNKNOWN})


@check("retry")
def _():
    # The simulated engine calls no tools.
    with answered_once():
        hasty = instructor.from_openai(slow, mode=instructor.Mode.JSON_SCHEMA)
        assert hasty.chat.completions.create(**USUAL, extra_headers=KEY).capital


@check("priority")
def _():
    with urgent():
        client.chat.completions.create(**USUAL, extra_headers=HIGH)


for name in ("chat", "tools", "embeddings", "cancel"):
    lacks(name, "not what it is for")

run()
