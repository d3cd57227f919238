"""Text to token ids and back, and chats to prompts, as the checkpoint's tokenizer files say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from fastkernels.checkpoint.chat_template import ChatTemplate, ChatTemplateError, read_chat_templates
from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.json_file import read_json_object
from fastkernels.checkpoint.text_stream import TextStream

_SPECIAL_TOKEN_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json, with tokenizer_config.json for names and chat
    templates.

    special_tokens: role ("bos_token", "eos_token", ...) -> text
    Raises CheckpointError when tokenizer.json is missing or broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json, the only tokenizer file fastkernels reads"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        # Both may have been saved from training; neither belongs to a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config_path = self.folder / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.exists() else {}
        self.special_tokens = _special_tokens(config_path, config)
        self._template_sources = read_chat_templates(self.folder, config)
        self._templates: dict[str, ChatTemplate] = {}

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token given as it is in the vocabulary; None when there is none."""
        return self._tokenizer.token_to_id(token)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that ``decode`` leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; None when the checkpoint names none."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text; None when the checkpoint names none."""
        return self._id_of("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """text -> token ids.

        add_special_tokens: put what tokenizer.json's post-processor puts (the bos token, for Llama); a
        rendered chat
                            has its own and wants False
        Raises ValueError for text that is not Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has a lone surrogate at index {error.start}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """token ids -> text. An id past the vocabulary (a padded embedding has some) gives no text."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder that is given one token at a time."""

        def decode(token_ids: Sequence[int]) -> str:
            return self.decode(token_ids, skip_special_tokens=False)

        return TextStream(decode, self.special_token_ids if skip_special_tokens else ())

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` has a template to render with."""
        return bool(self._template_sources)

    @property
    def chat_template(self) -> str | None:
        """The source of the default template; None where there is none."""
        return self._template_sources.get("default")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a chat, as text.

        template:  the name of one of the checkpoint's templates; None: "tool_use" when there are tools and
        such a
                   template, else "default"
        variables: further names for the template (documents, enable_thinking, ...)
        Raises ChatTemplateError when there is no such template or it refuses the messages.
        """
        sources = self._template_sources
        if not sources:
            raise ChatTemplateError(f"{self.folder} has no chat template; give a prompt instead of messages")
        name = template or ("tool_use" if tools is not None and "tool_use" in sources else "default")
        if name not in sources:
            known = ", ".join(sorted(sources))
            raise ChatTemplateError(f"{self.folder} has no chat template {name!r}; it has {known}")
        if name not in self._templates:
            self._templates[name] = ChatTemplate(sources[name])
        return self._templates[name].render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The prompt of a chat, as token ids; options as of ``render_chat``."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.token_id(token)


def _special_tokens(config_path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer_config.json names a token by its text or by an object with ``content``."""
    found = {}
    for key in _SPECIAL_TOKEN_KEYS:
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise CheckpointError(
                f"{config_path} has {key} = {value!r}; it must be a text or hold one as content"
            )
        found[key] = value
    return found
