"""Whatever the OpenAPI document allows, and what it does not, is answered as it says, and nothing fails at it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks

from pipeline.gateway.document import openapi
from pipeline.gateway.endpoints import ENDPOINTS
from tests.e2e.conftest import Pipeline, running

load_all_checks()
DESCRIBED = schemathesis.openapi.from_dict(openapi(ENDPOINTS, with_keys=False))
# What has no end is not read to its end.
ENDLESS = ("/load", "/queue/live")
ENDING = DESCRIBED.exclude(path=list(ENDLESS))
# Also a request of the right form may ask for what this engine cannot do.
FORM_IS_ENOUGH = CHECKS.get_one("positive_data_acceptance")
BRIEFLY = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """An engine that takes no time, and no limits."""
    engine = ("--engine", "simulated", "--simulated-tokens-per-s", "1e6", "--simulated-prefill-tokens-per-s", "1e9")
    limits = ("--http-answers-per-s", "0", "--http-lists-per-s", "0", "--http-statistics-per-s", "0")
    alone = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
    with running(tmp_path_factory.mktemp("described"), *engine, *limits, *alone) as pipeline:
        yield pipeline


def check(case: schemathesis.Case, pipeline: Pipeline) -> None:
    # A time too short for any answer may be asked for, and is no failure of the server's.
    if case.headers and case.headers.get("X-Request-Timeout", "").strip("0.") != "":
        case.headers.pop("X-Request-Timeout")
    case.call_and_validate(base_url=pipeline.http, timeout=20, excluded_checks=[FORM_IS_ENOUGH])


@ENDING.parametrize()
@settings(BRIEFLY, max_examples=10)
def test_what_is_described_is_what_is_served(case: schemathesis.Case, described: Pipeline):
    check(case, described)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@ENDING.parametrize()
@settings(BRIEFLY, max_examples=500)
def test_what_is_described_is_what_is_served_however_often_one_tries(case: schemathesis.Case, described: Pipeline):
    check(case, described)


@pytest.mark.parametrize("path", ENDLESS)
async def test_what_has_no_end_begins_as_it_is_described(described: Pipeline, path: str):
    operation = DESCRIBED[path]["GET"].definition.raw
    async with httpx.AsyncClient(base_url=described.http) as web, web.stream("GET", path) as response:
        assert str(response.status_code) in operation["responses"]
        assert list(operation["responses"]["200"]["content"]) == [response.headers["content-type"].partition(";")[0]]
        assert await anext(response.aiter_lines())


async def test_after_all_of_it_the_gateway_answers(described: Pipeline):
    async with httpx.AsyncClient(base_url=described.http) as web:
        assert (await web.get("/readyz")).status_code == 200
