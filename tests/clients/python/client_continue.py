"""Continue's command (`cn -p`)."""

import json

from cell import HIGH, OPENAI, QUESTION, SLOW_OPENAI, UNKNOWN, check, lacks, run, says, urgent
from commands import HOME, is_cancelled_by_its_end, output

COMMAND = ("cn", "--config", "continue.yaml", "-p", QUESTION)


def configure(base=OPENAI, model="auto", headers=()):
    model = {
        "name": "auto",
        "provider": "openai",
        "model": model,
        "apiBase": base,
        "apiKey": "unused",
        "roles": ["chat"],
        "requestOptions": {"headers": dict(headers)},
    }
    # JSON is YAML.
    settings = {"name": "headrace", "version": "0.0.1", "schema": "v1", "models": [model]}
    (HOME / "continue.yaml").write_text(json.dumps(settings))


@check("chat")
def _():
    configure()
    says(output(*COMMAND), "demo model")
    return "its own prompt hides the question from the demo model"


@check("errors")
def _():
    configure(model=UNKNOWN)
    says(output(*COMMAND), UNKNOWN)


@check("cancel")
def _():
    configure(SLOW_OPENAI)
    is_cancelled_by_its_end(*COMMAND)


@check("priority")
def _():
    configure(headers=HIGH)
    with urgent():
        output(*COMMAND)


lacks("embeddings", "not what it is for")
run()
