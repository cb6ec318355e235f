"""Tiny models in the shape of families: tokens of structure, a chat template, and a model that plays scripts.

The templates are written for these tests. Each does what its family's does where it matters here: how turns begin and
end, which arguments it takes, whether it opens the block of reasoning, how it writes tools, calls and results.

A message that contains `«3»` makes the model write the script with the index 3, up to the end of its turn. The last
such number in the prompt counts, so the result of a tool can choose how the second turn goes. A script is the raw text
of the model, with the tokens of structure in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SCRIPTED = Path(__file__).with_name("scripted")
CONTEXT_TOKENS = 8192


@dataclass(frozen=True)
class Family:
    """A family's shape.

    Attributes:
        special: tokens of structure that the tokenizer marks as special, and of which it leaves out the text.
        plain: tokens of structure that are ordinary ones to the tokenizer.
        template: the chat template.
        end: the token that ends a turn.
        ends: other tokens that do.
        sentencepiece: whether the vocabulary is one of SentencePiece's (a space is `▁`), else one of bytes.
    """

    name: str
    special: tuple[str, ...]
    plain: tuple[str, ...]
    template: str
    end: str
    ends: tuple[str, ...] = ()
    sentencepiece: bool = False

    def write(self, folder: Path, scripts: Sequence[str]) -> Path:
        """Write a model that plays these scripts, for `scripted_path`. Returns its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = _sentencepiece() if self.sentencepiece else _bytes()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.special])
        numbers = [f"«{index}»" for index in range(len(scripts))]
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*self.plain, *numbers)])
        tokenizer.save(str(folder / "tokenizer.json"))
        played = {
            tokenizer.token_to_id(number): tokenizer.encode(script, add_special_tokens=False).ids
            for number, script in zip(numbers, scripts, strict=True)
        }
        ends = [tokenizer.token_to_id(text) for text in (self.end, *self.ends)]
        config = {
            "model_type": "scripted",
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": CONTEXT_TOKENS,
            "end": ends[0],
            "eos_token_id": ends,
            "scripts": played,
        }
        stated = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT_TOKENS,
            "chat_template": self.template,
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": False}))
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        _write_weights(folder / "model.safetensors")
        return folder


def scripted_path() -> str:
    """The `PYTHONPATH` of a process that loads these models."""
    return os.pathsep.join(filter(None, [str(SCRIPTED), os.environ.get("PYTHONPATH", "")]))


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(code) for code in range(33, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _write_weights(path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(1, dtype=np.float32)}, path, metadata={"format": "mlx"})


# ---- the templates ---------------------------------------------------------------------------------------------------

_TOOLS_IN_SYSTEM = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools or first %}<|im_start|>system
{{ first }}{% if tools %}
You have these tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}HOW{% endif %}<|im_end|>
{% endif %}"""

_CHATML_TURNS = """\
{%- set ns = namespace(asked=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content and loop.index0 > ns.asked %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for called in message.tool_calls or [] %}{% set tool_call = called.function %}
CALL{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}"""

_JSON_CALL = """\
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>"""

_XML_CALL = """\
<tool_call>
<function={{ tool_call.name }}>
{% for name, value in tool_call.arguments.items() %}<parameter={{ name }}>
{{ value }}
</parameter>
{% endfor %}</function>
</tool_call>"""

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
_TOOL_CALL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Thinks by default. Off is an empty block in the prompt.
QWEN3 = Family(
    "qwen3",
    _CHATML,
    (*_THINK, *_TOOL_CALL),
    _TOOLS_IN_SYSTEM.replace("HOW", "Call them as JSON within <tool_call></tool_call>.")
    + _CHATML_TURNS.replace("CALL", _JSON_CALL)
    + """\
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}""",
    "<|im_end|>",
)

# The template opens the block.
QWEN35 = Family(
    "qwen35",
    _CHATML,
    (*_THINK, *_TOOL_CALL),
    _TOOLS_IN_SYSTEM.replace("HOW", "Call them as <tool_call>\n<function=NAME>.")
    + _CHATML_TURNS.replace("CALL", _XML_CALL)
    + """\
{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% if enable_thinking is defined and not enable_thinking %}
</think>

{% endif %}{% endif %}""",
    "<|im_end|>",
)

# Channels. Reasoning has amounts and no end: the template writes whatever word it is given.
GPT_OSS = Family(
    "gpt-oss",
    (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|return|>",
        "<|call|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
    ),
    (),
    """\
<|start|>system<|message|>You are a model.
Reasoning: {{ reasoning_effort | default('medium') }}
Valid channels: analysis, commentary, final.<|end|>
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}<|start|>developer<|message|>{{ first }}
{%- if tools %}
namespace functions {
{%- for tool in tools %}
{{ '// ' + tool.function.description }}
type {{ tool.function.name }} = (_: {{ tool.function.parameters | tojson }}) => any;
{%- endfor %}
}{% endif %}<|end|>{% endif %}
{%- set ns = namespace(called='') %}
{%- for message in messages %}
{%- if message.role == 'user' %}<|start|>user<|message|>{{ message.content }}<|end|>
{%- elif message.role == 'assistant' and message.tool_calls %}
{%- if message.thinking and message.content %}
{{- raise_exception('A message with a call has either content or thinking.') }}{% endif %}
{%- if message.thinking or message.content -%}
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking or message.content }}<|end|>{% endif %}
{%- set ns.called = message.tool_calls[0].function.name -%}
<|start|>assistant to=functions.{{ ns.called }}<|channel|>commentary json<|message|>
{{- message.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif message.role == 'assistant' -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- elif message.role == 'tool' -%}
<|start|>functions.{{ ns.called }} to=assistant<|channel|>commentary<|message|>{{ message.content | tojson }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}""",
    "<|return|>",
    ("<|call|>", "<|endoftext|>"),
)

# Thinks if it is told to. Without, larger ones get an empty block.
GEMMA4 = Family(
    "gemma4",
    (
        "<pad>",
        "<eos>",
        "<bos>",
        "<|turn>",
        "<turn|>",
        "<|channel>",
        "<channel|>",
        "<|think|>",
        "<|tool>",
        "<tool|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    ),
    (),
    """\
<bos>
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if enable_thinking or tools or first %}<|turn>system
{% if enable_thinking %}<|think|>{% endif %}{{ first }}
{%- for tool in tools or [] %}<|tool>declaration:{{ tool.function.name }}{}<tool|>{% endfor %}<turn|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}<|turn>user
{{ message.content }}<turn|>
{% elif message.role == 'assistant' %}<|turn>model
{% if message.reasoning and message.tool_calls %}<|channel>thought
{{ message.reasoning }}<channel|>{% endif %}
{%- for called in message.tool_calls or [] %}<|tool_call>call:{{ called.function.name }}{
{%- for name, value in called.function.arguments.items() -%}
{{ name }}:{% if value is string %}<|"|>{{ value }}<|"|>{% else %}{{ value | tojson }}{% endif %}
{%- if not loop.last %},{% endif %}{% endfor %}}<tool_call|>{% endfor %}
{{- message.content }}{% if not message.tool_calls %}<turn|>
{% endif %}
{%- elif message.role == 'tool' %}<|tool_response>response:{value:<|"|>{{ message.content }}<|"|>}<tool_response|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{% endif %}""",
    "<turn|>",
    ("<eos>",),
    sentencepiece=True,
)

# The template opens the block, or closes it at once.
GLM = Family(
    "glm",
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    (*_THINK, *_TOOL_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    """\
[gMASK]<sop>
{%- if tools %}<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}<|system|>
{{ message.content }}
{%- elif message.role == 'user' %}<|user|>{{ message.content }}
{%- elif message.role == 'assistant' %}<|assistant|>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% else %}</think>{% endif %}
{{- message.content }}
{%- for called in message.tool_calls or [] %}<tool_call>{{ called.function.name }}
{%- for name, value in called.function.arguments.items() -%}
<arg_key>{{ name }}</arg_key><arg_value>{{ value if value is string else value | tojson }}</arg_value>
{%- endfor %}</tool_call>{% endfor %}
{%- elif message.role == 'tool' %}<|observation|><tool_response>{{ message.content }}</tool_response>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}""",
    "<|user|>",
    ("<|endoftext|>", "<|observation|>"),
)

# Thinks only if it is told to, by an argument of its own name.
DEEPSEEK = Family(
    "deepseek",
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    (
        *_THINK,
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
    ),
    """\
{{- '<｜begin▁of▁sentence｜>' }}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}{{ first }}
{%- if tools %}

## Tools
{% for tool in tools %}
### {{ tool.function.name }}
{{ tool.function.parameters | tojson }}
{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}<｜User｜>{{ message.content }}
{%- elif message.role == 'assistant' %}<｜Assistant｜></think>{{ message.content or '' }}
{%- if message.tool_calls %}<｜tool▁calls▁begin｜>
{%- for called in message.tool_calls -%}
<｜tool▁call▁begin｜>{{ called.function.name }}<｜tool▁sep｜>{{ called.function.arguments | tojson }}<｜tool▁call▁end｜>
{%- endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>
{%- elif message.role == 'tool' %}<｜tool▁output▁begin｜>{{ message.content }}<｜tool▁output▁end｜>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}<｜Assistant｜>
{{- '<think>' if thinking is defined and thinking else '</think>' }}{% endif %}""",
    "<｜end▁of▁sentence｜>",
)

# Always thinks: the template opens the block and takes no argument.
DEEPSEEK_R1 = Family(
    "deepseek-r1",
    DEEPSEEK.special,
    DEEPSEEK.plain,
    """\
{{- '<｜begin▁of▁sentence｜>' }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }}
{%- elif message.role == 'user' %}<｜User｜>{{ message.content }}
{%- elif message.role == 'assistant' %}<｜Assistant｜>{{ message.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}""",
    DEEPSEEK.end,
)

# Thinks between marks that are special tokens, in two amounts.
MISTRAL = Family(
    "mistral",
    (
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[THINK]",
        "[/THINK]",
        "[MODEL_SETTINGS]",
        "[/MODEL_SETTINGS]",
    ),
    (),
    """\
<s>
{%- set effort = reasoning_effort | default('none') %}
{%- if effort not in ['none', 'high'] %}{{ raise_exception('reasoning_effort is none or high') }}{% endif %}
{%- if messages[0].role == 'system' %}[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]{% endif %}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[MODEL_SETTINGS]{"reasoning_effort": "{{ effort }}"}[/MODEL_SETTINGS]
{%- for message in messages %}
{%- if message.role == 'user' %}[INST]{{ message.content }}[/INST]
{%- elif message.role == 'assistant' %}
{%- if message.reasoning_content %}[THINK]{{ message.reasoning_content }}[/THINK]{% endif %}{{ message.content }}
{%- for called in message.tool_calls or [] %}
{%- if called.id | length != 9 %}{{ raise_exception('The id of a call has nine characters.') }}{% endif -%}
[TOOL_CALLS]{{ called.function.name }}[ARGS]{{ called.function.arguments | tojson }}{% endfor %}</s>
{%- elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- endif %}
{%- endfor %}""",
    "</s>",
)

LLAMA3 = Family(
    "llama3",
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    (),
    """\
<|begin_of_text|>
{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
<|start_header_id|>system<|end_header_id|>

{{ first }}<|eot_id|>
{%- for message in messages %}
{%- if message.role == 'user' %}<|start_header_id|>user<|end_header_id|>
{% if tools and loop.index0 == (1 if first else 0) %}
Answer with a call of one of these functions, as {"name": NAME, "parameters": {}}:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{{ message.content }}<|eot_id|>
{%- elif message.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>

{% if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('This model calls one tool at a time.') }}{% endif -%}
{% set called = message.tool_calls[0].function -%}
{"name": "{{ called.name }}", "parameters": {{ called.arguments | tojson }}}
{%- else %}{{ message.content }}{% endif %}<|eot_id|>
{%- elif message.role in ('tool', 'ipython') %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
    "<|eot_id|>",
    ("<|eom_id|>", "<|end_of_text|>"),
)

PHI = Family(
    "phi",
    (
        "<|endoftext|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<|tool|>",
        "<|/tool|>",
        "<|tool_call|>",
        "<|/tool_call|>",
        "<|tool_response|>",
    ),
    (),
    """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}<|system|>{{ first }}{% if tools %}<|tool|>{{ tools | tojson }}<|/tool|>{% endif %}<|end|>
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}<|assistant|><|tool_call|>[
{%- for called in message.tool_calls %}{{ called.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor -%}
]<|/tool_call|><|end|>
{%- elif message.role == 'tool' %}<|tool_response|>{{ message.content }}<|end|>
{%- elif message.role != 'system' %}<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""",
    "<|end|>",
    ("<|endoftext|>",),
)

# Always thinks: nothing in its template says so. Calls are part of an assistant's text.
LFM2 = Family(
    "lfm2",
    (*_CHATML, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    _THINK,
    """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}<|im_start|>system
{{ first }}{% if tools %}List of tools: <|tool_list_start|>{{ tools | tojson }}<|tool_list_end|>{% endif %}<|im_end|>
{% endif %}
{%- for message in messages %}{% if message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "<|im_end|>",
)

FAMILIES = (QWEN3, QWEN35, GPT_OSS, GEMMA4, GLM, DEEPSEEK, DEEPSEEK_R1, MISTRAL, LLAMA3, PHI, LFM2)
