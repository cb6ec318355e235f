"""aider, without a terminal (`--message`). It calls through LiteLLM."""

import json

from cell import HIGH, OPENAI, QUESTION, SLOW_OPENAI, UNKNOWN, check, lacks, run, says, urgent
from commands import HOME, is_cancelled_by_its_end, output

QUIET = (
    "--no-git",
    "--yes-always",
    "--no-show-model-warnings",
    "--no-check-update",
    "--analytics-disable",
    "--chat-mode",
    "ask",
    "--map-tokens",
    "0",
    "--no-pretty",
    "--no-show-release-notes",
    "--message",
    QUESTION,
)


def words(*options, model="auto"):
    return "aider", "--model", f"openai/{model}", *QUIET, *options


def at(base=OPENAI):
    return {"OPENAI_API_BASE": base, "OPENAI_API_KEY": "unused", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@check("chat")
def _():
    says(output(*words("--no-stream"), **at()), "demo model")
    return "its own prompt hides the question from the demo model"


@check("stream")
def _():
    says(output(*words("--stream"), **at()), "demo model")


@check("errors")
def _():
    says(output(*words(model=UNKNOWN), **at()), UNKNOWN)


@check("cancel")
def _():
    is_cancelled_by_its_end(*words(), **at(SLOW_OPENAI))


@check("priority")
def _():
    settings = [{"name": "openai/auto", "extra_params": {"extra_headers": HIGH}}]
    (HOME / "settings.yml").write_text(json.dumps(settings))
    with urgent():
        output(*words("--model-settings-file", "settings.yml"), **at())


lacks("embeddings", "not what it is for")
run()
