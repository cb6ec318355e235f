"""How many requests are served before one of a tenant's, if tenants take turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.turns import requests_before


def test_a_tenant_alone_waits_for_all_that_were_stored_before():
    assert requests_before(17, "", {"": 18}) == 17
    assert requests_before(17, "ann", {"ann": 18, "bob": 0}) == 17
    assert requests_before(17, "ann", {}) == 17


@pytest.mark.parametrize(("own", "before"), [(1, 0), (2, 2), (15, 28)])
def test_behind_a_flood_a_tenant_waits_for_as_many_of_it_as_it_has_itself(own, before):
    assert requests_before(1499 + own, "ann", {"ann": own, "flood": 1500}) == before


def test_the_flood_waits_for_those_who_came_after_it():
    assert requests_before(1499, "flood", {"ann": 15, "flood": 1500}) == 1499 + 15


@given(st.integers(0, 1000), st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000)))
def test_it_is_never_negative_and_never_more_than_all(position, queued):
    found = requests_before(position, "a", queued)
    assert 0 <= found <= position + sum(queued.values())
