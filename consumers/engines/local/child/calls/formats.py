"""How a model writes tool calls, by its tokenizer and chat template.

mlx-lm has parsers for many families, and finds the one of a model. The others are found here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from consumers.engines.local.child.calls.nested import GEMMA, PYTHON, Brackets, parse_function_gemma, read_bracketed
from consumers.engines.local.child.calls.objects import read_headed, read_objects
from consumers.engines.local.child.calls.reading import Parser, Reader, Written, read_whole
from consumers.engines.local.child.calls.stream import Section
from consumers.engines.local.child.calls.tagged import TaggedReader, Tags
from consumers.engines.local.child.calls.writing import Writer, write_each, write_list, write_python

Tools = list[dict[str, Any]]
IdStyle = Literal["", "nine", "model"]


@dataclass(frozen=True)
class CallFormat:
    """How a family of models writes tool calls.

    Attributes:
        name: of mlx-lm's parser, or ours.
        sections: the sections with calls, for the tools of a request.
        marks: special tokens that belong in such a section, beside its own markers.
        ids: `nine`: the template takes nine letters and digits as the id of a call. `model`: the model writes the ids.
        bare: whether the family writes calls without marks, so that it needs no note.
        write: writes calls as the model does, where a template is known that takes none; None otherwise.
    """

    name: str
    sections: Callable[[Tools], list[Section]]
    marks: tuple[str, ...] = ()
    ids: IdStyle = ""
    bare: bool = False
    write: Writer | None = None


_DEEPSEEK: Final = {"call": "<｜tool▁call▁begin｜>", "end": "<｜tool▁call▁end｜>", "sep": "<｜tool▁sep｜>"}

_TAGS: Final[Mapping[str, Tags]] = {
    "qwen3_coder": Tags(
        r"<function=\s*(?P<name>[^\s<>]+)\s*>",
        "</function>",
        r"<parameter=\s*(?P<key>[^\s<>]+)\s*>",
        "</parameter>",
        strip=False,
    ),
    "glm47": Tags(
        r"\A\s*(?P<name>[^\s<{]+)\s*(?=<arg_key>)",
        "",
        r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>",
        "</arg_value>",
    ),
    "longcat": Tags(
        r"\A\s*(?P<name>[^\s<{]+)\s*(?=<longcat_arg_key>)",
        "",
        r"<longcat_arg_key>(?P<key>[^<]*)</longcat_arg_key>\s*<longcat_arg_value>",
        "</longcat_arg_value>",
    ),
    "minimax_m2": Tags(
        r"""<invoke name=["']?(?P<name>[^"'>]+)["']?>""",
        "</invoke>",
        r"""<parameter name=["']?(?P<key>[^"'>]+)["']?>""",
        "</parameter>",
    ),
    "minicpm5": Tags(
        r"""\A\s*["']?(?P<name>[^"'>]+)["']?\s*>""",
        "",
        r"""<param\s+name\s*=\s*["']?(?P<key>[^"'>]+)["']?\s*>""",
        "</param>",
    ),
    "muse_spark": Tags(
        r"""<atem:invoke\b[^>]*?\bname="(?P<name>[^"]+)">""",
        "</atem:invoke>",
        r"""<atem:parameter\b[^>]*?\bname="(?P<key>[^"]+)"[^>]*?>""",
        "</atem:parameter>",
        strings=False,
    ),
    "kimi_k3": Tags(
        r"""<\|open\|>call(?:(?!<\|sep\|>).)*?\btool="(?P<name>[^"]+)"(?:(?!<\|sep\|>).)*<\|sep\|>""",
        "<|close|>call<|sep|>",
        r"""<\|open\|>argument(?:(?!<\|sep\|>).)*?\bkey="(?P<key>[^"]+)"(?:(?!<\|sep\|>).)*<\|sep\|>""",
        "<|close|>argument<|sep|>",
        strings=False,
    ),
    "deepseek_v32": Tags(
        r'<｜DSML｜invoke name="(?P<name>[^"]+)">',
        "</｜DSML｜invoke>",
        r'<｜DSML｜parameter name="(?P<key>[^"]+)"[^>]*>',
        "</｜DSML｜parameter>",
        strings=False,
    ),
}
_NAME_ALONE: Final = frozenset({"glm47", "longcat"})
_KIMI_ARGUMENTS: Final = "<|tool_call_argument_begin|>"
_MISTRAL_HEADER: Final = r"(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*(?P<id>[\w-]+)\s*)?\[ARGS\]"
_KIMI_HEADER: Final = rf"(?P<id>(?:functions\.)?(?P<name>[\w.-]+):\d+)\s*{re.escape(_KIMI_ARGUMENTS)}"
_HARMONY_HEADER: Final = r"\A\s*(?:functions\.)?(?P<name>[\w.-]+)[^{]*?<\|message\|>"
_DEEPSEEK_HEADER: Final = (
    rf"{_DEEPSEEK['call']}(?:function{_DEEPSEEK['sep']}(?P<old>)|(?!function{_DEEPSEEK['sep']}))(?P<name>[^\s{{}}<]+?)\s*"
    rf"(?:(?(old)```(?:json)?|{_DEEPSEEK['sep']}))"
)
_NEEDS_SPECIAL: Final = ("[ARGS]", "[CALL_ID]", '<|"|>', "<escape>")


def read_mistral(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
    """As `Reader`: Mistral's older models write a list of objects, the newer ones a header before the arguments."""
    return (read_objects if body.lstrip()[:1] in ("[", "{") else read_headed(_MISTRAL_HEADER))(body, ended)


def read_python_tag(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
    """As `Reader`: after its tag, Llama 3 writes an object, or calls a built-in tool as `name.call(key="value")`."""
    found = read_objects(body, ended)
    if found or body.lstrip().startswith("{"):
        return found
    return [call._replace(name=call.name.removesuffix(".call")) for call in _read_python(body, ended)]


def _read_python(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
    from mlx_lm.tool_parsers.pythonic import parse_tool_call

    return read_bracketed(PYTHON, parse_tool_call)(body, ended)


def parse_dsml(text: str) -> dict[str, Any]:
    """As `Parser`, for one call of DeepSeek V3.2: `string="false"` marks values that are JSON."""
    name = re.search(r'<｜DSML｜invoke name="([^"]+)">', text)
    values = re.findall(
        r'<｜DSML｜parameter name="([^"]+)"(?: string="(true|false)")?>(.*?)</｜DSML｜parameter>', text, re.DOTALL
    )
    arguments = {key: json.loads(value) if kind == "false" else value for key, kind, value in values}
    return {"name": name[1] if name else "", "arguments": arguments}


# ---- mlx-lm's --------------------------------------------------------------------------------------------------------


def format_of(tokenizer: Any) -> CallFormat | None:
    """How the model of a tokenizer (mlx-lm's wrapper) writes calls; None if its template takes no tools."""
    if tokenizer.has_tool_calling:
        return _of_parser(tokenizer)
    template, vocabulary = tokenizer.chat_template, tokenizer.get_vocab()
    text = template if isinstance(template, str) else "\n".join((template or {}).values()) if template else ""
    if not re.search(r"\btools\b", text):
        return None
    for found in _OURS:
        if all(needle in text or needle in vocabulary for needle in found.needles):
            return found.format
    # Its marks are not known: calls are plain JSON.
    return CallFormat("json", lambda _: [], bare=True, write=write_each("", ""))


def _of_parser(tokenizer: Any) -> CallFormat:
    module = tokenizer.tool_parser.__module__.rpartition(".")[2]
    start, end, parser = tokenizer.tool_call_start, tokenizer.tool_call_end or "", tokenizer.tool_parser

    def sections(tools: Tools) -> list[Section]:
        return [Section(start, end, _reader(module, partial(_parse, parser, tools), tools))]

    marks = tuple(mark for mark in _NEEDS_SPECIAL if mark in tokenizer.get_vocab())
    if module == "kimi_k2":
        marks += ("<|tool_call_begin|>", _KIMI_ARGUMENTS, "<|tool_call_end|>")
    ids: IdStyle = "nine" if module == "mistral" else "model" if module == "kimi_k2" else ""
    write = {"pythonic": write_python(start, end), "json_tools": write_each(f"{start}\n", f"\n{end}")}.get(module)
    return CallFormat(module, sections, marks, ids, write=write)


def _parse(parser: Callable[[str, Any], Any], tools: Tools, text: str) -> Any:
    return parser(text, tools)


def _reader(module: str, parse: Parser, tools: Tools) -> Reader:
    module = "glm47" if module == "laguna" else module
    if module in _TAGS:
        read = _with_objects(TaggedReader(_TAGS[module], parse, partial(string_keys, tools)))
        return _with_names(read, tools) if module in _NAME_ALONE else read
    match module:
        case "json_tools":
            return read_objects
        case "mistral":
            return read_mistral
        case "kimi_k2":
            return read_headed(_KIMI_HEADER)
        case "pythonic":
            return read_bracketed(PYTHON, parse)
        case "gemma4":
            return read_bracketed(GEMMA, parse)
        case "function_gemma":
            from mlx_lm.tool_parsers.gemma4 import parse_tool_call

            escaped = Brackets(GEMMA.call, r"<escape>.*?(?:<escape>|\Z)")
            return read_bracketed(escaped, parse_function_gemma(parse_tool_call, parse))
    return read_whole(parse)


def _with_objects(read: Reader) -> Reader:
    """A reader of tags that also reads JSON, as models of such families sometimes write it."""

    def both(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
        return (read_objects if body.lstrip().startswith("{") else read)(body, ended)

    return both


def _with_names(read: Reader, tools: Tools) -> Reader:
    """A reader that also reads a call without arguments, where that is the name of a tool alone."""
    names = {str((tool.get("function") or {}).get("name")) for tool in tools}

    def both(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
        name = body.strip()
        return [Written(name, "{}")] if ended and name in names else read(body, ended)

    return both


def string_keys(tools: Tools, name: str) -> frozenset[str]:
    """The arguments of a function that are strings by its schema."""
    for tool in tools:
        function = tool.get("function") or {}
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return frozenset(
                key for key, schema in properties.items() if isinstance(schema, dict) and schema.get("type") == "string"
            )
    return frozenset()


# ---- ours ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """A format that mlx-lm has no parser for, and what its tokenizer or template contains."""

    needles: tuple[str, ...]
    format: CallFormat


def _objects_between(name: str, start: str, end: str) -> CallFormat:
    return CallFormat(name, lambda _: [Section(start, end, read_objects)], write=write_list(start, end))


def _python_tag(_: Tools) -> list[Section]:
    return [
        Section("<|python_tag|>", "", read_python_tag),
        Section("<function=", "</function>", read_headed(r"\A(?P<name>[\w.-]+)>")),
    ]


def _dsml(name: str, tools: Tools) -> list[Section]:
    read = TaggedReader(_TAGS["deepseek_v32"], parse_dsml, partial(string_keys, tools))
    return [Section(f"<｜DSML｜{name}>", f"</｜DSML｜{name}>", read)]


def _seed_oss(tools: Tools) -> list[Section]:
    from mlx_lm.tool_parsers.qwen3_coder import parse_tool_call

    parse = partial(_parse, parse_tool_call, tools)
    read = TaggedReader(_TAGS["qwen3_coder"], parse, partial(string_keys, tools))
    return [Section("<seed:tool_call>", "</seed:tool_call>", read)]


def _deepseek(_: Tools) -> list[Section]:
    return [Section("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", read_headed(_DEEPSEEK_HEADER))]


def _harmony(_: Tools) -> list[Section]:
    return [Section("<|channel|>commentary to=", "<|call|>", read_headed(_HARMONY_HEADER))]


_OURS: Final = [
    _Known(("｜DSML｜", "function_calls>"), CallFormat("deepseek_v32", partial(_dsml, "function_calls"))),
    _Known(("｜DSML｜",), CallFormat("deepseek_v32", partial(_dsml, "tool_calls"))),  # V4
    _Known(("<｜tool▁calls▁begin｜>",), CallFormat("deepseek", _deepseek, tuple(_DEEPSEEK.values()))),
    _Known(("<|channel|>", "<|message|>", "<|call|>"), CallFormat("harmony", _harmony, ("<|constrain|>",))),
    _Known(("<seed:tool_call>",), CallFormat("seed_oss", _seed_oss)),
    _Known(
        ("<|/tool_call|>",),
        _objects_between("phi4_mini", "<|tool_call|>", "<|/tool_call|>"),
    ),
    _Known(("<|tool_call|>",), _objects_between("granite", "<|tool_call|>", "")),
    _Known(("functools",), _objects_between("phi4", "functools", "")),
    _Known(("<TOOLCALL>",), _objects_between("nemotron", "<TOOLCALL>", "</TOOLCALL>")),
    _Known(("<|START_ACTION|>",), _objects_between("command", "<|START_ACTION|>", "<|END_ACTION|>")),
    _Known(("<|action_start|>",), _objects_between("internlm", "<|action_start|>", "<|action_end|>")),
    _Known(("<tool_calls>",), _objects_between("jamba", "<tool_calls>", "</tool_calls>")),
    _Known(("<tool_call>",), _objects_between("hermes", "<tool_call>", "</tool_call>")),
    _Known(("<|python_tag|>",), CallFormat("llama3", _python_tag, bare=True)),
]
