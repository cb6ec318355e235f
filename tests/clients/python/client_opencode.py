"""opencode, without a terminal (`run`). Its own prompt and tools are too long for the demo model."""

import json

from cell import HIGH, QUESTION, SLOW_OPENAI, UNKNOWN, check, lacks, run, says
from commands import HOME, SIMULATED, is_cancelled_by_its_end, output

COMMAND = ("opencode", "run", QUESTION)


def configure(model="auto"):
    options = {"baseURL": SLOW_OPENAI, "apiKey": "unused", "headers": HIGH}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "headrace", "options": options, "models": {model: {}}}
    name = f"headrace/{model}"
    settings = {"autoupdate": False, "model": name, "small_model": name, "provider": {"headrace": provider}}
    (HOME / "opencode.json").write_text(json.dumps(settings))


@check("chat")
def _():
    configure()
    says(output(*COMMAND), SIMULATED)
    return "the simulated engine"


@check("errors")
def _():
    configure(UNKNOWN)
    says(output(*COMMAND), UNKNOWN)


@check("cancel")
def _():
    configure()
    is_cancelled_by_its_end(*COMMAND)


lacks("embeddings", "not what it is for")
run()
