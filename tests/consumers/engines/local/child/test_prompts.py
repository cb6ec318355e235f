"""Prompts by chat templates that refuse things, in the shape of real families' templates."""

import pytest

from consumers.engines.local.child.backend import LoadError
from consumers.engines.local.child.prompts import heads, plain_prompt, read_template, templated
from pipeline.wire.errors import ErrorCode, HeadraceError

chat_templates = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")

S, U, A = "system", "user", "assistant"

GO = "{% if add_generation_prompt %}<assistant>{% endif %}"
TURN = "<{{ m.role }}>{{ m.content }}</>"
ANY = "{% for m in messages %}" + TURN + "{% endfor %}" + GO

# No system message, and the roles must alternate.
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}<model>{% else %}<user>{% endif %}{{ m.content | trim }}</>"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)

# A system message at the beginning only.
ONE_SYSTEM = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('System first') }}{% endif %}"
    "{% endfor %}" + ANY
)

# The system message is dropped without an error.
DROPS = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + GO

# Answers begin with a block of reasoning, which is empty in what was answered.
THINKS = (
    "{% for m in messages %}"
    "<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)

BLIND = "{% for m in messages if m.role == 'user' %}" + TURN + "{% endfor %}" + GO

NEVER = "{{ raise_exception('no luck today') }}"


def renderer(template):
    def render(turns, **variables):
        return chat_templates.render_jinja_template([turns], chat_template=template, **variables)[0][0]

    return render


def rendered(template, *given):
    return templated([{"role": role, "content": text} for role, text in given], renderer(template))


@pytest.mark.parametrize(
    ("template", "given", "text", "notes"),
    [
        pytest.param(ANY, [(S, "Be brief."), (U, "a")], "<system>Be brief.</><user>a</><assistant>", 0, id="as it is"),
        pytest.param(ANY, [(U, "a"), (U, "b")], "<user>a</><user>b</><assistant>", 0, id="neighbours that are taken"),
        pytest.param(STRICT, [(S, "Be brief."), (U, "a")], "<user>Be brief.\n\na</><model>", 1, id="a system message"),
        pytest.param(STRICT, [(U, "a"), (U, "b")], "<user>a\n\nb</><model>", 1, id="neighbours"),
        pytest.param(
            STRICT, [(A, "hi"), (U, "a")], "<user>Begin.</><model>hi</><user>a</><model>", 1, id="assistant first"
        ),
        pytest.param(
            STRICT,
            [(S, "Be brief."), (A, "hi"), (U, "a")],
            "<user>Be brief.</><model>hi</><user>a</><model>",
            1,
            id="after system",
        ),
        pytest.param(
            STRICT,
            [(S, "Be brief."), (U, "a"), (A, "It ")],
            "<user>Be brief.\n\na</><model>It ",
            2,
            id="and a last answer",
        ),
        pytest.param(
            ONE_SYSTEM,
            [(U, "a"), (S, "Be brief.")],
            "<user>a\n\nBe brief.</><assistant>",
            1,
            id="a later system message",
        ),
        pytest.param(
            DROPS, [(S, "Be brief."), (U, "a")], "<user>Be brief.\n\na</><assistant>", 1, id="a dropped system message"
        ),
        pytest.param(ANY, [(U, "a"), (A, "It is ")], "<user>a</><assistant>It is ", 1, id="the last answer goes on"),
        pytest.param(
            THINKS, [(U, "a"), (A, "It")], "<user>a</><assistant><think></think>It", 1, id="and thinks no more"
        ),
        pytest.param(BLIND, [(U, "a"), (A, "It")], "<user>a</><assistant>It", 1, id="also where the template drops it"),
        pytest.param(ANY, [(U, "a"), (A, "")], "<user>a</><assistant>", 0, id="an empty one is none"),
    ],
)
def test_a_conversation_is_written_as_its_template_takes_it(template, given, text, notes):
    prompt = rendered(template, *given)
    assert prompt.text == text
    assert len(prompt.notes) == notes
    assert not prompt.special
    assert prompt.goes_on == (given[-1][0] == A and given[-1][1] != "")


def test_the_templates_own_complaint_is_told_where_nothing_helps():
    with pytest.raises(HeadraceError) as refused:
        rendered(NEVER, (S, "Be brief."), (U, "a"))
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert refused.value.param == "messages"
    assert "no luck today" in refused.value.message


def test_a_base_model_continues_a_single_text():
    prompt = plain_prompt([{"role": U, "content": "Once"}])
    assert (prompt.text, prompt.special, prompt.stops) == ("Once", True, ())
    assert "no chat template" in prompt.notes[0]


def test_a_base_model_gets_a_conversation_as_a_script_and_writes_no_users_lines():
    prompt = plain_prompt([{"role": S, "content": "s"}, {"role": U, "content": "a"}])
    assert prompt.text == "s\n\nUser: a\n\nAssistant:"
    assert prompt.stops == ("\n\nUser:",)


@pytest.mark.parametrize("template", [ANY, STRICT, NEVER])
def test_a_template_is_read_from_a_file(tmp_path, template):
    (tmp_path / "t.jinja").write_text(template)
    assert read_template(str(tmp_path / "t.jinja")) == template


def test_a_template_that_is_none_ends_the_load_with_the_reason(tmp_path):
    with pytest.raises(LoadError, match=r"cannot be read \(No such file or directory\)\. Set --chat-template"):
        read_template(str(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(LoadError, match=r"cannot be read \(it is not UTF-8\)"):
        read_template(str(tmp_path / "binary"))
    (tmp_path / "broken").write_text("a\n{% if %}")
    with pytest.raises(LoadError, match="line 2"):
        read_template(str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("template", "given", "expected"),
    [
        pytest.param(ANY, [(S, "Be brief."), (U, "a")], ["<system>Be brief.</><user>a</>", "<system>Be brief.</>"]),
        pytest.param(ANY, [(U, "a"), (A, "b"), (U, "c")], ["<user>a</><assistant>b</><user>c</>"]),
        pytest.param(STRICT, [(S, "Be brief."), (U, "a")], ["<user>Be brief.\n\na</>"], id="as the template took it"),
    ],
)
def test_later_conversations_may_begin_like_the_heads_of_a_prompt(template, given, expected):
    found = list(heads(rendered(template, *given).turns, renderer(template)))
    assert found == expected
    assert all(rendered(template, *given).text.startswith(head) for head in found)


def test_a_prompt_without_a_template_has_no_heads():
    assert plain_prompt([{"role": U, "content": "a"}]).turns == ()
