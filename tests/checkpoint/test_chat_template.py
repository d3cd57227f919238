"""Chat templates against transformers' apply_chat_template, and what the sandbox refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastkernels.checkpoint import ChatTemplateError, CheckpointError, Tokenizer
from tests.checkpoint.tokenizers_made import byte_level

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
TOOLS = """{{ bos_token }}{% if tools is not none %}
{% for tool in tools %}
    {{ tool | tojson(indent=4) }}
{% endfor %}
{{ tools | tojson }}
{% endif %}
{% set found = namespace(count=0) %}
{% for message in messages %}
    {% if message.tool_calls is defined %}
        {% for call in message.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}
        {% set found.count = found.count + 1 %}
        {% continue %}
    {% endif %}
    {% generation %}[{{ message['role'] | upper }}] {{ message['content'] | trim }}{% endgeneration %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{{ found.count }}{{ eos_token }}"""
ALTERNATING = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: <user>, <assistant>') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""
DATED = (
    "{{ strftime_now('%Y') | length }} {{ custom }} {{ enable_thinking is defined and not enable_thinking }}"
)

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "  What is <2 & 3>?  "},
    {"role": "assistant", "content": "Größe: 5 \N{GRINNING FACE}"},
    {"role": "user", "content": "Thanks"},
]
TOOL_CHAT: list[dict[str, Any]] = [
    *CHAT,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": "é<", "y": [1, 2.5, None]}}}
        ],
    },
    {"role": "tool", "content": "7"},
]
WEATHER = {
    "type": "function",
    "function": {"name": "f", "description": "a <b>", "parameters": {"type": "object"}},
}


def _pair(folder: Path, template: Any) -> tuple[Tokenizer, Any]:
    from transformers import PreTrainedTokenizerFast

    byte_level(folder, chat_template=template)
    return Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "chat", "options"),
    [
        (CHATML, CHAT, {}),
        (CHATML, [{"role": "system", "content": "Be brief."}, *CHAT], {}),
        (ALTERNATING, CHAT, {}),
        (TOOLS, TOOL_CHAT, {}),
        (TOOLS, TOOL_CHAT, {"tools": [WEATHER]}),
        (DATED, CHAT, {"custom": "abc", "enable_thinking": False}),
        (DATED, CHAT, {}),
    ],
    ids=["chatml", "chatml-system", "alternating", "no-tools", "tools", "variables", "no-variables"],
)
def test_renders_as_transformers(
    template: str,
    chat: list[dict[str, Any]],
    options: dict[str, Any],
    add_generation_prompt: bool,
    tmp_path: Path,
) -> None:
    ours, reference = _pair(tmp_path, template)
    options = {**options, "add_generation_prompt": add_generation_prompt}
    expected = reference.apply_chat_template(chat, tokenize=False, **options)
    assert ours.render_chat(chat, **options) == expected
    assert len(expected) > 3
    token_ids = reference.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
    assert ours.encode_chat(chat, **options) == token_ids, "the bos token is not put twice"


def test_template_files_and_their_order(tmp_path: Path) -> None:
    byte_level(tmp_path, chat_template="config")
    assert Tokenizer(tmp_path).render_chat(CHAT) == "config"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer(tmp_path).render_chat(CHAT) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer(tmp_path).render_chat(CHAT) == "jinja"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ documents[0].title }}")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.render_chat(CHAT) == "jinja"
    assert tokenizer.render_chat(CHAT, template="rag", documents=[{"title": "T"}]) == "T"
    with pytest.raises(ChatTemplateError, match="has no chat template 'other'; it has default, rag"):
        tokenizer.render_chat(CHAT, template="other")


def test_a_list_of_templates(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }}"},
    ]
    ours, reference = _pair(tmp_path, templates)
    for tools in (None, [WEATHER]):
        expected = reference.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert ours.render_chat(CHAT, tools=tools) == expected


def test_what_templates_refuse(tmp_path: Path) -> None:
    ours, _ = _pair(tmp_path, ALTERNATING)
    with pytest.raises(
        ChatTemplateError, match="refuses these messages: Roles must alternate: <user>, <assistant>"
    ):
        ours.render_chat([CHAT[0], CHAT[0]])
    with pytest.raises(ChatTemplateError, match="a chat needs at least one message"):
        ours.render_chat([])
    with pytest.raises(ChatTemplateError, match="a chat message must be a mapping, not str"):
        ours.render_chat(["hello"])  # type: ignore[list-item]
    with pytest.raises(ChatTemplateError, match=r"must be plain JSON values: .*bytes"):
        ours.render_chat([{"role": "user", "content": b"x"}])
    with pytest.raises(
        ChatTemplateError, match="refuses these messages: 'dict object' has no attribute 'content'"
    ):
        Tokenizer(byte_level(tmp_path, chat_template="{{ messages[0].content + 'x' }}")).render_chat(
            [{"role": "a"}]
        )


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ range(10000000) | length }}",
        "{% include '/etc/hostname' %}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_the_sandbox_holds(attack: str, tmp_path: Path) -> None:
    chat = [dict(CHAT[0])]
    tokenizer = Tokenizer(byte_level(tmp_path, chat_template=attack))
    with pytest.raises(ChatTemplateError, match="the chat template refuses these messages"):
        tokenizer.render_chat(chat)
    assert chat == [CHAT[0]]


def test_broken_templates(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="does not parse: line 2: "):
        Tokenizer(byte_level(tmp_path, chat_template="\n{% if %}")).render_chat(CHAT)
    with pytest.raises(ChatTemplateError, match="has no chat template; give a prompt instead"):
        Tokenizer(byte_level(tmp_path)).render_chat(CHAT)
    for broken in (7, [{"name": "default"}], [{"name": "default", "template": 3}]):
        with pytest.raises(
            CheckpointError, match=r"tokenizer_config\.json: chat_template must be a text or a list"
        ):
            Tokenizer(byte_level(tmp_path, chat_template=broken))
