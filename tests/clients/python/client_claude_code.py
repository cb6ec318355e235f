"""Claude Code, without a terminal (`-p`). Its own prompt and tools are too long for the demo model."""

from cell import QUESTION, SLOW, UNKNOWN, URL, check, counts, lacks, run, says, until, urgent
from commands import SIMULATED, is_cancelled_by_its_end, output

COMMAND = ("claude", "-p", QUESTION)
BRIEFLY = (*COMMAND, "--system-prompt", "You are a model.", "--tools", "")


def settings(base=URL, model="auto", **more):
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_SMALL_FAST_MODEL")
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "IS_SANDBOX": "1"}
    at = {"ANTHROPIC_BASE_URL": base, "ANTHROPIC_API_KEY": "unused"}
    return {**dict.fromkeys(names, model), **quiet, **at, **more}


@check("chat")
def _():
    says(output(*BRIEFLY, **settings()))
    says(output(*COMMAND, **settings(SLOW)), SIMULATED)
    return "with its own prompt and tools: the simulated engine"


@check("errors")
def _():
    says(output(*BRIEFLY, **settings(model=UNKNOWN)), UNKNOWN)


@check("cancel")
def _():
    until(lambda: counts(SLOW)["running"] == 0, "idle")
    is_cancelled_by_its_end(*COMMAND, **settings(SLOW))


@check("priority")
def _():
    with urgent():
        output(*BRIEFLY, **settings(ANTHROPIC_CUSTOM_HEADERS="X-Priority: high"))


lacks("embeddings", "not what it is for")
run()
