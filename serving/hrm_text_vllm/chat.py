"""Chats as token ids, such that the text of a message stays text.

vLLM renders a chat to a string and tokenizes that, so that a message which holds the name of a control token closes
its envelope. Here the template is rendered with a mark in front of everything from outside that could begin such a
name: what then still reads as a control token was written by the template.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import CachedHfTokenizer


# Unicode's noncharacters, which valid text does not hold.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to each string in its lists and dicts; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_text(item, change) for item in value]
    return value


def free_mark(*values: Any) -> str:
    """A mark that no string in `values` holds.

    Raises:
        ValueError: they hold all of them.
    """
    seen: list[str] = []
    map_text(list(values), lambda text: seen.append(text) or text)
    text = "".join(seen)
    for mark in MARKS:
        if mark not in text:
            return mark
    raise ValueError("the messages hold every noncharacter of Unicode (U+FDD0 to U+FDEF): remove one of them")


class SafeChat:
    """What is added to a tokenizer whose class does not keep messages and control tokens apart itself."""

    _plain: Any = None

    def __reduce__(self) -> Any:
        # vLLM keeps copies for its threads, and its own rule of copying knows nothing of this class.
        return _copied, super().__reduce__()

    def apply_chat_template(
        self, conversation: Any, *args: Any, tokenize: bool = True, return_dict: bool = False, **kwargs: Any
    ) -> Any:
        """As of the tokenizer; with `tokenize` and without `return_dict`, control tokens in messages are text.

        Args:
            conversation: messages, one list.
            tokenize: whether ids are asked for, or the string.
            return_dict: as of the tokenizer; vLLM asks for plain ids.
            kwargs: further arguments; strings in those that the template sees are text too.

        Raises:
            ValueError: a condition that names a tag twice.
        """
        if self.init_kwargs.get("default_condition") and kwargs.get("condition") is None:
            kwargs["condition"] = self.init_kwargs["default_condition"]
        _refuse_twice(kwargs.get("condition"))
        if not tokenize or return_dict:
            return super().apply_chat_template(
                conversation, *args, tokenize=tokenize, return_dict=return_dict, **kwargs
            )
        template = kwargs.pop("chat_template", None)
        mark = free_mark(conversation, kwargs)
        controls = [token.content for token in self.added_tokens_decoder.values() if token.special]
        beginnings = re.compile("[" + re.escape("".join({control[0] for control in controls})) + "]")

        def marked(value: Any) -> Any:
            return map_text(value, lambda text: beginnings.sub(lambda found: mark + found.group(), text))

        rendered = super().apply_chat_template(
            marked(conversation), *args, chat_template=template, tokenize=False, **marked(kwargs)
        )
        return self._encode_marked(rendered, mark, controls)

    def _encode_marked(self, rendered: str, mark: str, controls: list[str]) -> list[int]:
        longest_first = sorted(controls, key=len, reverse=True)
        control = re.compile(f"(?<!{mark})(" + "|".join(map(re.escape, longest_first)) + ")")
        if self._plain is None:
            # A copy, since the setting belongs to the tokenizer and completions do read control tokens.
            self._plain = copy.deepcopy(self._tokenizer)
            self._plain.no_truncation()
            self._plain.no_padding()
            self._plain.encode_special_tokens = True
        ids: list[int] = []
        for index, part in enumerate(control.split(rendered)):
            if index % 2:
                ids.append(self.convert_tokens_to_ids(part))
            elif part:
                ids += self._plain.encode(part.replace(mark, ""), add_special_tokens=False).ids
        return ids


def _refuse_twice(condition: Any) -> None:
    """Refuses a condition that names a tag twice, as the folder's own code does; the template sees to the rest."""
    tags = condition.split(",") if isinstance(condition, str) else condition
    if isinstance(tags, (list, tuple)) and all(isinstance(tag, str) for tag in tags):
        named = [tag.strip() for tag in tags if tag.strip()]
        if len(set(named)) < len(named):
            raise ValueError(f"condition {','.join(named)!r} names a tag twice: name each once")


class ChatTokenizer(CachedHfTokenizer):
    """Loads the folder's tokenizer; its chats are safe, with the folder's own code or without."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `CachedHfTokenizer.from_pretrained`."""
        tokenizer = super().from_pretrained(*args, **kwargs)
        # The tokenizer class of this project, loaded as remote code, does the same.
        return tokenizer if hasattr(tokenizer, "encode_prompt") else _made_safe(tokenizer)


def _made_safe(tokenizer: Any) -> Any:
    tokenizer.__class__ = type(f"Safe{type(tokenizer).__name__}", (SafeChat, type(tokenizer)), {})
    return tokenizer


def _copied(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return _made_safe(function(*arguments))


class ChatRenderer(HfRenderer):
    """vLLM's renderer, which always asks the tokenizer for ids: a string could not tell text from control tokens."""

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        """As of `HfRenderer`."""
        return super().render_messages(messages, _asking_for_ids(params))

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        """As of `HfRenderer`."""
        return await super().render_messages_async(messages, _asking_for_ids(params))


def _asking_for_ids(params: ChatParams) -> ChatParams:
    # A request may name arguments of the template; these are the tokenizer's, and undo what is done here.
    withheld = ("sanitize_control_tokens", "tokenizer_kwargs", "return_dict", "return_tensors")
    kwargs = {name: value for name, value in params.chat_template_kwargs.items() if name not in withheld}
    return replace(params, chat_template_kwargs={**kwargs, "tokenize": True})


__all__ = ["ChatRenderer", "ChatTokenizer", "SafeChat"]
