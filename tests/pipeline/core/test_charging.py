"""A request is charged to a key only by a header that the pipeline made for it."""

from __future__ import annotations

import pytest

from pipeline.core.charging import charged, charged_key, charged_tenant

SECRET = b"s" * 32


def test_the_header_of_a_request_names_its_key():
    header = charged(SECRET, "t.acme.r1", "acme", "alice")
    assert charged_key(SECRET, "t.acme.r1", "acme", header) == "alice"


@pytest.mark.parametrize("header", ["", "alice", "alice:", "alice:x", ":", "alice:ключ", "alice:" + "A" * 20])
def test_a_header_that_was_not_made_here_charges_no_key(header):
    assert charged_key(SECRET, "r1", "acme", header) == ""


def test_a_header_is_worth_nothing_on_another_request_for_another_tenant_or_key_or_without_the_secret():
    header = charged(SECRET, "r1", "acme", "alice")
    code = header.partition(":")[2]
    assert charged_key(SECRET, "r2", "acme", header) == ""
    assert charged_key(SECRET, "r1", "bolt", header) == ""
    assert charged_key(SECRET, "r1", "acme", f"bob:{code}") == ""
    assert charged_key(b"t" * 32, "r1", "acme", header) == ""
    assert charged_key(b"", "r1", "acme", charged(b"", "r1", "acme", "alice")) == ""


def test_the_tenant_is_that_of_the_subject_or_of_the_key_and_a_claim_is_a_part_of_the_default_tenant():
    assert charged_tenant("acme", "bolt", "") == "acme"
    assert charged_tenant("", "team.a", "alice") == "team.a"
    assert charged_tenant("", "", "alice") == "default"
    assert charged_tenant("", "acme", "") == "default/acme"
    assert charged_tenant("", "", "") == "default"
