"""Chat templates: jinja2 programs that come with a checkpoint, run in the immutable sandbox.

They see the names that transformers gives them: messages, tools, documents, add_generation_prompt, the
special tokens, raise_exception, strftime_now, tojson without HTML escapes, break and continue, and generation
blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.json_file import read_json_object


class ChatTemplateError(ValueError):
    """A chat cannot be rendered: there is no template, it is broken, or it refuses these messages."""


_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
)


class ChatTemplate:
    """One compiled template.

    source: the jinja2 text. Raises ChatTemplateError, naming the line, when it does not parse.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template does not parse: line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a chat. Keys of a message whose value is None are left out, as transformers
        does.

        Raises ChatTemplateError when there is no message, a value is not plain JSON, or the template refuses.
        """
        if not messages:
            raise ChatTemplateError("a chat needs at least one message")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ChatTemplateError(f"a chat message must be a mapping, not {type(message).__name__}")
        names = {
            **variables,
            "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
        }
        # A copy of plain values: a template can neither call an object's methods nor change the caller's.
        try:
            names = json.loads(json.dumps(names))
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"chat messages must be plain JSON values: {error}") from error
        try:
            return self._template.render(**names, add_generation_prompt=add_generation_prompt)
        except _TEMPLATE_FAILURES as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source; "default" is the usual one. Empty when the checkpoint has none.

    Taken from the first there is of chat_template.jinja with additional_chat_templates/, chat_template.json,
    and the chat_template of tokenizer_config.json (a text, or a list of names and texts).
    """
    try:
        further = folder.glob("additional_chat_templates/*.jinja")
        templates = {path.stem: path.read_text(encoding="utf-8") for path in further}
        if (folder / "chat_template.jinja").exists():
            templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} has a chat template that cannot be read: {error}") from error
    if templates:
        return templates
    source, value = folder / "tokenizer_config.json", tokenizer_config.get("chat_template")
    if (folder / "chat_template.json").exists():
        source = folder / "chat_template.json"
        value = read_json_object(source).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {str(entry["name"]): entry["template"] for entry in value}
        well_formed = all(isinstance(text, str) for text in templates.values())
    except (TypeError, KeyError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(
            f"{source}: chat_template must be a text or a list of objects with name and template"
        )
    return templates


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks words to train on; here it renders as it is."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
