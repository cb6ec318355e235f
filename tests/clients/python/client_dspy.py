"""DSPy, which calls through LiteLLM."""

import dspy
from cell import (
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
    UNKNOWN,
    answered_once,
    check,
    lacks,
    raises,
    run,
    says,
    urgent,
)


def model(name="openai/auto", base=OPENAI, **options):
    return dspy.LM(name, api_base=base, api_key="unused", cache=False, **options)


@check("chat")
def _():
    [text] = model()(QUESTION)
    says(text)


# LiteLLM knows nothing of this model, so DSPy describes the form in the prompt and sends no `response_format`.
lacks("form", "asks for it in the prompt alone, which the demo model does not follow")


@check("errors")
def _():
    with raises(Exception, UNKNOWN):
        model(f"openai/{UNKNOWN}")(QUESTION)


@check("retry")
def _():
    with answered_once():
        [text] = model(base=SLOW_OPENAI, timeout=1, num_retries=9, extra_headers=KEY)(QUESTION)
    assert text


@check("priority")
def _():
    with urgent():
        model(extra_headers=HIGH)(QUESTION)


for name in ("stream", "tools", "embeddings", "cancel"):
    lacks(name, "not tried")
run()
