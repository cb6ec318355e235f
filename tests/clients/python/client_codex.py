"""Codex, without a terminal (`exec`). Its own prompt and tools are too long for the demo model."""

from cell import QUESTION, SLOW_OPENAI, UNKNOWN, check, lacks, run, says
from commands import HOME, SIMULATED, is_cancelled_by_its_end, output

COMMAND = ("codex", "exec", "--skip-git-repo-check", QUESTION)
CONFIG = """
model = "{model}"
model_provider = "headrace"

[model_providers.headrace]
name = "headrace"
base_url = "{base}"
wire_api = "responses"
http_headers = {{ "X-Priority" = "high" }}
"""


def configure(model="auto"):
    folder = HOME / ".codex"
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(model=model, base=SLOW_OPENAI))


@check("responses")
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
