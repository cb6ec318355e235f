"""The closed set of error codes."""

from __future__ import annotations

import pytest

from pipeline.wire.errors import ErrorCode, HeadraceError

# Code, OpenAI's family, and whether the same request may succeed later.
CONTRACT = {
    "invalid_request": ("invalid_request_error", False),
    "unsupported_parameter": ("invalid_request_error", False),
    "context_length_exceeded": ("invalid_request_error", False),
    "request_too_large": ("invalid_request_error", False),
    "model_not_found": ("invalid_request_error", False),
    "model_internal": ("invalid_request_error", False),
    "reply_subject_denied": ("invalid_request_error", False),
    "queue_full": ("rate_limit_error", True),
    "rate_limited": ("rate_limit_error", True),
    "rate_limit_exceeded": ("rate_limit_error", True),
    "insufficient_quota": ("insufficient_quota", False),
    "unauthorized": ("authentication_error", False),
    "deadline_exceeded": ("timeout_error", False),
    "cancelled": ("cancelled_error", False),
    "engine_failed": ("server_error", False),
    "unavailable": ("server_error", True),
}


def test_the_codes_are_those_of_the_contract_and_no_others():
    assert {code.value for code in ErrorCode} == set(CONTRACT)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_a_family_and_says_whether_trying_again_helps(code):
    error = HeadraceError(code, "what happened", param="messages")
    assert (error.type, error.retryable) == CONTRACT[code.value]
    assert (error.code, error.message, error.param, str(error)) == (code, "what happened", "messages", "what happened")


def test_no_field_is_at_fault_unless_it_is_named():
    assert HeadraceError(ErrorCode.UNAVAILABLE, "gone").param is None
