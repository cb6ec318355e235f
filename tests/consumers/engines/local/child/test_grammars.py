"""The grammar of the form that a request asks for."""

import json

import pytest

from consumers.engines.local.child.forms.families import CallForm, call_form
from consumers.engines.local.child.forms.lark import quote
from consumers.engines.local.child.grammars import grammar_of, refusal
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

llguidance = pytest.importorskip("llguidance")

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
STRICT = {"type": "function", "function": {"name": "f", "parameters": CITY, "strict": True}}
LOOSE = {"type": "function", "function": {"name": "f", "parameters": CITY}}
NAMED = {"type": "function", "function": {"name": "f"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Rome"}}\n</tool_call>'
AS_TEXT = call_form("json_tools", quote, "<tool_call>", "</tool_call>")


class Characters:
    """A vocabulary of bytes, so that a text has one reading."""

    bos_token_id = None
    eos_token_id = 256
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def asking(**fields) -> ChatRequest:
    return decode_chat(json.dumps({"prompt": "x", **fields}).encode(), max_body_bytes=1 << 20)


def accepts(request: ChatRequest, text: str, form: CallForm | None = AS_TEXT) -> bool:
    """Whether a text is one that the grammar describes, from its first character to its last."""
    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Characters()), n_vocab=257)
    matcher = llguidance.LLMatcher(vocabulary, grammar_of(request, form), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "inside", "outside"),
    [
        (
            {"response_format": {"type": "json_object"}},
            ["{}", '{"a": [1]}', '{\n  "a": 1\n}'],
            ["[]", '{"a":  1}', "x"],
        ),
        ({"guided_json": CITY}, ['{"city":"Rome"}', '{"city": ""}'], ["{}", '{"city": 3}', '{"city":"","x":1}']),
        ({"guided_choice": ["a b", 'c"d']}, ["a b", 'c"d'], ["a", "a b ", "c"]),
        ({"guided_regex": "a/b+"}, ["a/b", "a/bb"], ["a/", "xa/b"]),
        ({"guided_grammar": 'root ::= "x" y\ny ::= [0-9]'}, ["x1"], ["x", "1"]),
        ({"guided_grammar": 'start: "x" DIGIT\nDIGIT: /[0-9]/'}, ["x1"], ["x", "1"]),
        ({"tools": [LOOSE], "tool_choice": "required"}, [CALL, f"{CALL}\n{CALL}"], ["Hello.", f"Well. {CALL}", ""]),
        ({"tools": [LOOSE], "tool_choice": NAMED}, [CALL], [f"{CALL}\n{CALL}", CALL.replace('"Rome"', "3")]),
        (
            {"tools": [LOOSE], "tool_choice": "required", "parallel_tool_calls": False},
            [CALL],
            [f"{CALL}\n{CALL}", CALL.replace('"f"', '"g"')],
        ),
        ({"tools": [STRICT]}, ["Hello.", "", CALL, f"Let me see. {CALL}"], [CALL.replace('"Rome"', "3")]),
        ({"tools": [LOOSE], "guided_json": CITY}, [CALL, '{"city": "Rome"}'], ["Hello."]),
        ({"tools": [LOOSE], "tool_choice": "none", "guided_json": CITY}, ['{"city": "Rome"}'], [CALL]),
    ],
)
def test_what_a_form_takes(fields, inside, outside):
    request = asking(**fields)
    assert [accepts(request, text) for text in inside] == [True] * len(inside)
    assert [accepts(request, text) for text in outside] == [False] * len(outside)


def test_the_name_of_a_function_is_text_in_json():
    tool = {"type": "function", "function": {"name": 'a "b"'}}
    request = asking(tools=[tool], tool_choice="required")
    assert accepts(request, '<tool_call>\n{"name": "a \\"b\\"", "arguments": {}}\n</tool_call>')


def test_a_marker_that_is_a_special_token_stands_for_it():
    form = call_form(
        "json_tools", {"<tool_call>": "<[7]>", "</tool_call>": "<[8]>"}.__getitem__, *CALL.split("\n")[::2]
    )
    assert grammar_of(asking(tools=[LOOSE], tool_choice="required"), form).count("<[7]>") == 2
    mistral = call_form("mistral", {"[TOOL_CALLS]": "<[7]>", "[ARGS]": "<[9]>", "": ""}.__getitem__, "[TOOL_CALLS]")
    assert mistral is not None
    assert mistral.special
    assert call_form("unheard-of", quote, "<tool_call>", "</tool_call>") is None


@pytest.mark.parametrize("fields", [{}, {"tools": [LOOSE]}, {"tools": [STRICT], "tool_choice": "none"}])
def test_any_text_will_do(fields):
    assert grammar_of(asking(**fields), AS_TEXT) == ""


def test_a_model_whose_calls_have_no_grammar():
    assert grammar_of(asking(tools=[STRICT]), None) == ""
    for fields, param in [
        ({"tools": [LOOSE], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOSE], "guided_json": CITY}, "response_format"),
    ]:
        with pytest.raises(HeadraceError) as caught:
            grammar_of(asking(**fields), None)
        assert (caught.value.code, caught.value.param) == (ErrorCode.UNSUPPORTED_PARAMETER, param)


@pytest.mark.parametrize("form", [{"guided_regex": "a"}, {"guided_grammar": "start: X"}])
def test_a_form_that_cannot_stand_beside_tools(form):
    with pytest.raises(HeadraceError) as caught:
        grammar_of(asking(tools=[LOOSE], **form), AS_TEXT)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "structured_outputs")


@pytest.mark.parametrize(
    ("reason", "stated"),
    [
        (
            'at 2(8): failed to compile JSON schema: Unimplemented keys: ["not"]\n   1 | start\n',
            'the JSON schema uses "not"',
        ),
        (
            "failed to compile JSON schema: Resource 'http://x' is not present in a registry and retrieving it failed",
            "the JSON schema refers to another document (http://x)",
        ),
        ("failed to compile JSON schema: Invalid type: foo", 'the JSON schema has the unknown type "foo"'),
        ('at 1(8): unknown name: "foo"', 'the grammar does not define "foo"'),
        (
            'at 1(8): invalid regex "(" (in regex): regex parse error:\n    (\n    ^\nerror: unclosed group',
            'the regular expression "(" has an error; unclosed group',
        ),
        ("something new", "something new"),
    ],
)
def test_a_reason_is_told_without_its_place_and_state(reason, stated):
    error = refusal(reason, "response_format")
    assert error.message == f"The form of answer that this request asks for is not supported: {stated}."
    assert error.param == "response_format"
