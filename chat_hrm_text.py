"""What `HrmTextTokenizer.apply_chat_template` does to messages and rendered chats; pure functions on plain data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


# Keys that templates look up in messages, tools and calls. They are left alone where text from outside is marked.
_TEMPLATE_KEYS = frozenset(
    """role content type text name tool_calls tool_call_id function arguments id index reasoning_content thinking
    description parameters properties required items enum title""".split()  # noqa: SIM905
)
_ROLES = ("system", "developer", "user", "assistant", "tool")


def plain_chats(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """A conversation or a batch of them as lists of dicts, contents as strings, and whether it was a batch."""
    if not isinstance(conversation, (list, tuple)) and not hasattr(conversation, "messages"):
        raise TypeError(f"conversation must be a list of messages, not {type(conversation).__name__}")
    if isinstance(conversation, (list, tuple)) and not conversation:
        raise ValueError("conversation is empty: give it at least one message")
    batched = isinstance(conversation, (list, tuple)) and (
        isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    )
    chats = []
    for chat in conversation if batched else [conversation]:
        messages = [plain_data(message) for message in getattr(chat, "messages", chat)]
        for message in messages:
            if not isinstance(message, dict):
                raise TypeError(f"a message must be a dict with role and content, not {type(message).__name__}")
            content = message.get("content")
            if isinstance(content, list) and all(
                isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
                for part in content
            ):
                message["content"] = "".join(part["text"] for part in content)
            for call in message.get("tool_calls") or []:
                _read_arguments(call)
        chats.append([{key: value for key, value in message.items() if value is not None} for message in messages])
    return chats, batched


def plain_data(value: Any) -> Any:
    """Mappings, sequences, dataclasses and pydantic models as dicts and lists."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return value


def _read_arguments(call: Any) -> None:
    """Parses the arguments of a tool call, which clients give as a JSON string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of a tool call are not JSON ({error}): {arguments[:80]!r}") from None


def map_strings(value: Any, function: Callable[[str], Any]) -> Any:
    """`value` with every string in its lists and dicts replaced by `function(string)`.

    Keys that templates do not look up are replaced too: a tool's schema is written with its keys.
    """
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {
            function(key) if isinstance(key, str) and key not in _TEMPLATE_KEYS else key: map_strings(item, function)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [map_strings(item, function) for item in value]
    return value


def all_strings(value: Any) -> list[str]:
    """Every string in `value`'s lists and dicts, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in all_strings(item)] if isinstance(value, (list, tuple)) else []


def mark_messages(
    chat: list[dict[str, Any]],
    mark: Callable[[str], str],
    mark_answer: Callable[[str], str],
    is_plain: Callable[[str], bool],
) -> list[dict[str, Any]]:
    """A chat with marks in every text from outside.

    Args:
        chat: messages.
        mark: marks what could begin a special token in a text from outside.
        mark_answer: the same for the text of an answer, in which the model's own tokens stay.
        is_plain: whether a text holds no special token. A role that holds none, or is a usual one, stays as it is,
            because templates compare it.
    """
    marked = []
    for message in chat:
        role = message.get("role")
        new = map_strings(message, mark)
        if isinstance(role, str) and (role in _ROLES or is_plain(role)):
            new["role"] = role
        if role == "assistant" and isinstance(message.get("content"), str):
            new["content"] = mark_answer(message["content"])
        marked.append(new)
    return marked


def mask_inside(
    starts: Sequence[int], spans: Sequence[tuple[int, int]], real: Sequence[int] | None = None
) -> list[int]:
    """1 for each token whose first character lies in one of the spans [begin, end) and that is no padding, else 0."""
    mask = [int(any(begin <= start < end for begin, end in spans)) for start in starts]
    return mask if real is None else [inside & token for inside, token in zip(mask, real)]


def split_controls(text: str, control: re.Pattern[str], marker: str = "") -> list[tuple[str, bool]]:
    """Splits a rendered chat into texts (False, markers removed) and special tokens (True)."""
    segments, position = [], 0
    for match in control.finditer(text):
        segments += [(text[position : match.start()].replace(marker, ""), False), (match.group(), True)]
        position = match.end()
    return [*segments, (text[position:].replace(marker, ""), False)]


def response_template(prompt_end: str, call_start: str, call_end: str, answer_end: str) -> dict[str, Any]:
    """How transformers' `parse_response` and its server read an answer: calls of tools as JSON, and the text."""
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": prompt_end,
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*" + re.escape(call_start),
                "close": call_end,
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"\s*" + re.escape(answer_end), "content": "text"},
        },
    }
