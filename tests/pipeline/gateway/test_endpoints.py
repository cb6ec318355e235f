"""One declaration per endpoint: what is made from it agrees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from starlette.routing import Match, Route

from pipeline.gateway.document import ERRORS, openapi
from pipeline.gateway.endpoint import Access, Directory, Kind
from pipeline.gateway.endpoints import ENDPOINTS
from pipeline.gateway.statuses import STATUS_OF

HTTP_MD = Path(__file__).parents[3] / "docs" / "http.md"
DESCRIBED = [endpoint for endpoint in ENDPOINTS if endpoint.summary]


def example(path: str) -> str:
    return re.sub(r"\{id(:path)?\}", "some-id", path)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda each: f"{each.method} {each.path}")
def test_a_path_has_one_kind_and_one_access_and_is_found_as_it_is_routed(endpoint):
    async def handler(_):
        raise NotImplementedError

    found = Directory(ENDPOINTS).find(example(endpoint.path))
    assert found is not None
    assert (found.kind, found.access) == (endpoint.kind, endpoint.access)
    route = Route(endpoint.path, handler, methods=[endpoint.method])
    scope = {"type": "http", "path": example(found.path), "method": endpoint.method}
    assert route.matches(scope)[0] is Match.FULL


@pytest.mark.parametrize("path", ["/", "/queue", "/queue/requests/a/b", "/v1", "/pages/none.js", "/healthz/x", ""])
def test_an_unknown_path_has_no_endpoint_but_the_dashboard_has(path: str):
    assert (Directory(ENDPOINTS).find(path) is not None) is (path == "/")


def test_a_line_feed_at_the_end_is_routed_to_the_same_handler_and_so_counts_as_the_same_kind():
    found = Directory(ENDPOINTS).find("/v1/chat/completions\n")
    assert found is not None
    assert found.kind is Kind.ANSWERS


def test_only_probes_pages_and_the_document_need_no_key():
    described = {endpoint.path for endpoint in DESCRIBED if endpoint.access is Access.OPEN}
    assert described == {"/healthz", "/readyz", "/openapi.json"}
    assert all(endpoint.access is Access.OPEN for endpoint in ENDPOINTS if not endpoint.summary)


def test_every_endpoint_is_in_the_document_and_every_error_status_is_described():
    paths = openapi(ENDPOINTS, with_keys=True)["paths"]
    described = {(method, path) for path, operations in paths.items() for method in operations}
    assert described == {(each.method.lower(), each.path.replace(":path", "")) for each in DESCRIBED}
    assert set(STATUS_OF.values()) <= set(ERRORS)
    assert all(endpoint.errors <= set(ERRORS) for endpoint in ENDPOINTS)


@pytest.mark.parametrize("endpoint", DESCRIBED, ids=lambda each: f"{each.method} {each.path}")
def test_every_endpoint_is_in_the_documentation(endpoint):
    path = endpoint.path.replace(":path", "")
    assert f"{endpoint.method} {path}" in HTTP_MD.read_text() or path == "/openapi.json"


def test_no_endpoint_is_documented_that_does_not_exist():
    table = HTTP_MD.read_text().split("## Endpoints")[1].split("\n## ")[0]
    documented = set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", table))
    assert documented == {
        f"{each.method} {each.path.replace(':path', '')}" for each in DESCRIBED if each.path != "/openapi.json"
    }
