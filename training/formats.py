"""The forms in which people keep questions and answers, read into one.

| form | fields |
| --- | --- |
| instruction | `instruction`, `response` or `output` (Alpaca), with `input` (after an empty line) and `system` |
| prompt | `prompt` and `completion`, both texts or both lists of messages (TRL) |
| messages | `messages` of `role` and `content`, with `weight` 0 for an answer that is not to be learned |
| conversations | `conversations` of `from` and `value` (ShareGPT), with `system` if there is one |

Each may also name its `condition`, its `tools`, and a `weight`: a row of weight 0 is left out. A field that is none of
these is an error, since a misspelt one would change what is learned without a word.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any


COMMON = ("condition", "tools", "weight")
# The field by which a form is known, and the fields that belong to it.
FORMS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "system", "response", "output"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "conversations": ("conversations", "system"),
}
MESSAGE_FIELDS = ("role", "content", "weight", "tool_calls")
TOOL_FIELDS = ("role", "content", "tool_call_id", "name")
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_FIELDS = ("from", "value", "weight")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Where a message goes that has the fields of the other form.
OTHER_FORM = {"from": "conversations", "value": "conversations", "role": "messages", "content": "messages"}
# What is not trained on questions and answers, and what trains on it.
ELSEWHERE = {
    "chosen": "preferences are for DPO: see training/recipes/dpo.py",
    "text": "a text alone has no prompt to read as a block: split it into `prompt` and `completion`",
    "input_ids": "ids are read from folders of the training repository alone (training/tokenized.py)",
}


@dataclass(frozen=True)
class Row:
    """One row in the form that all others are read into.

    Attributes:
        messages: of `role`, `content` and what tools add; `weight` is taken out of them.
        learned: for each answer (a message of the assistant) whether it is to be learned.
        condition: the condition that the row names, None for none. An empty one asks for a prompt without a condition.
        tools: what the row offers, None for nothing.
    """

    messages: list[dict[str, Any]]
    learned: list[bool]
    condition: str | None
    tools: Any


def read_row(row: Mapping[str, Any], ignored: Collection[str] = ()) -> Row | None:
    """Reads a row of any form; None where its weight is 0, or that of all its answers.

    Args:
        row: what a file or data set holds, of numpy's types too; fields that are None or NaN count as absent.
        ignored: fields that are left aside.

    Raises:
        ValueError: a field that is unknown, or not of its form; no form, or two; a value of the wrong type.
    """
    if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
        raise ValueError(f"a row names its fields, as in {{'instruction': ...}}, and this is {str(row)[:80]!r}")
    row = _present({name: value for name, value in row.items() if name not in ignored})
    form = _form(row)
    known = (*FORMS[form], *COMMON)
    for name in row:
        if name not in known:
            remedy = f"rename it, or leave it aside with --ignore-fields {name}"
            raise ValueError(
                f"the field `{name}` is unknown beside `{form}`{_nearest(name, known)}: "
                + (ELSEWHERE[name] if name == "chosen" else remedy)
            )
    condition = row.get("condition")
    if condition is not None and not isinstance(condition, str):
        raise ValueError(f"`condition` is {condition!r}: give tags in one string, as in 'synth,cot'")
    if not _weight(row):
        return None
    messages = {
        "instruction": _instruction,
        "prompt": _prompt,
        "messages": lambda row: _messages(row["messages"], "messages"),
        "conversations": _conversations,
    }[form](row)
    weights = [_weight(message) for message in messages]
    learned = [weight for weight, message in zip(weights, messages) if message.get("role") == "assistant"]
    if learned and not any(learned):
        return None
    messages = [{name: value for name, value in each.items() if name != "weight"} for each in messages]
    return Row(messages, learned, condition, _tools(row.get("tools")))


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are there, with lists and numbers of Python's own in place of numpy's."""
    plain = {name: _plain(value) for name, value in fields.items()}
    return {
        name: value
        for name, value in plain.items()
        if not (value is None or (isinstance(value, Real) and value != value))
    }


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _form(row: Mapping[str, Any]) -> str:
    forms = [name for name in FORMS if name in row]
    if len(forms) == 1:
        return forms[0]
    if forms:
        raise ValueError(
            f"a row is of one form, and this one has `{'` and `'.join(forms)}`: leave one aside with --ignore-fields"
        )
    for name, remedy in ELSEWHERE.items():
        if name in row:
            raise ValueError(f"`{name}`: {remedy}")
    guesses = [f"`{name}`{near}" for name in row if (near := _nearest(name, tuple(FORMS)))]
    raise ValueError(
        "a row needs `instruction` and `response`, `prompt` and `completion`, `messages`, or `conversations`; this "
        f"one has {sorted(row)}" + (f" ({', '.join(guesses)})" if guesses else "")
    )


def _nearest(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f", the nearest known is `{close[0]}`" if close else ""


def _weight(holder: Mapping[str, Any]) -> bool:
    weight = holder.get("weight")
    if weight is None:
        return True
    if isinstance(weight, str) or weight not in (0, 1):
        raise ValueError(f"`weight` is {weight!r}: an answer is learned (1) or not (0), there is nothing between")
    return bool(weight)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is a {type(value).__name__} and must be a string")
    return value


def _instruction(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "response" in row and "output" in row:
        raise ValueError("`response` and `output` are two names of one thing: give one")
    text = _text(row, "instruction")
    if given := _text(row, "input"):
        text += "\n\n" + given
    answer = _text(row, "response" if "response" in row else "output")
    return [*_system(row), *_exchange(text, answer)]


def _prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = row["prompt"], row.get("completion", "")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _exchange(prompt, completion)
    if isinstance(prompt, str) or (isinstance(completion, str) and completion):
        raise ValueError("`prompt` and `completion` are both texts or both lists of messages, and here one is of each")
    answers = _messages(completion or [], "completion")
    if not answers:
        return []
    # What the prompt holds is context: only the completion is learned.
    return [*({**each, "weight": 0} for each in _messages(prompt, "prompt")), *answers]


def _conversations(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = _list_of_messages(row["conversations"], "conversations", '{"from": ..., "value": ...}')
    messages = []
    for turn in turns:
        _known_fields(turn, SHAREGPT_FIELDS, "conversations")
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(
                f"`from` is {turn.get('from')!r} in `conversations`: known are {', '.join(SHAREGPT_ROLES)}; tools "
                "want `messages`"
            )
        messages.append({"role": role, "content": turn.get("value"), "weight": turn.get("weight")})
    return [*_system(row), *messages]


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    messages = _list_of_messages(value, field, '{"role": ..., "content": ...}')
    for message in messages:
        role = message.get("role")
        _known_fields(message, TOOL_FIELDS if role == "tool" else MESSAGE_FIELDS, field)
        if role not in ROLES:
            near = _nearest(str(role), ROLES)
            raise ValueError(f"Unknown role {role!r} in `{field}`{near}: known are {', '.join(ROLES)}")
    return messages


def _list_of_messages(value: Any, field: str, form: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"`{field}` must be a list of {form}")
    return [_present(each) for each in value]


def _known_fields(message: Mapping[str, Any], known: Collection[str], field: str) -> None:
    for name in message:
        if name not in known:
            other = OTHER_FORM.get(name, field)
            near = _nearest(name, known) if other == field else f": messages that have it go into `{other}`"
            raise ValueError(f"the field `{name}` of a message in `{field}` is unknown{near}")


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = _text(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _exchange(text: str, answer: str) -> list[dict[str, Any]]:
    if text.lstrip().startswith("<|im_start|>"):
        raise ValueError("the prompt has its envelope already: give the text alone, which is put into one here")
    # Alone, it is a text like others.
    if answer.strip().removesuffix("<|box_end|>") not in (answer.strip(), ""):
        raise ValueError("the response has its end token already: give the text alone, which is ended here")
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _tools(value: Any) -> Any:
    """Tools as a list; data sets that cannot hold them keep their JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is a string that is not JSON ({error})") from error
    if not (value is None or isinstance(value, list)):
        raise ValueError(f"`tools` is a {type(value).__name__} and must be a list of schemas")
    return value or None
