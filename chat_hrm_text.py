"""What `HrmTextTokenizer.apply_chat_template` does to messages and rendered chats; pure functions on plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any


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


def map_strings(value: Any, function: Any) -> Any:
    """`value` with every string in its lists and dicts (keys left out) replaced by `function(string)`."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: map_strings(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, function) for item in value]
    return value


def all_strings(value: Any) -> list[str]:
    """Every string in `value`'s lists and dicts, keys left out."""
    found: list[str] = []
    map_strings(value, found.append)
    return found


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
