"""Tokenizer of HRM-Text.

A prompt is `<|im_start|>` + condition tokens + text + `<|im_end|>`; the response follows and ends with `<|box_end|>`.
What this adds to a fast tokenizer over the same `tokenizer.json`:

- `token_type_ids` mark the prompts (1), which the model reads in both directions, by the same rule by which the model
  infers them;
- `build_prompt` and `encode_prompt` write the envelope;
- `apply_chat_template(tokenize=True)` reads special tokens only in the template's own text, never in a message;
- other tokens of the envelope, other conditions and training on tools are read from `tokenizer_config.json`.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_hrm_text import (
    all_strings,
    map_strings,
    mark_messages,
    mask_inside,
    plain_chats,
    response_template,
    split_controls,
)
from .versions_hrm_text import as_expected_tokenizer_class


logger = logging.get_logger(__name__)

PROMPT_START = "<|im_start|>"
PROMPT_END = "<|im_end|>"
RESPONSE_END = "<|box_end|>"
PADDING = "<|endoftext|>"
CONDITION_TOKENS = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}

# What the model writes around a call of a tool.
TOOL_CALL = ("<tool_call>", "</tool_call>")

# Unicode's noncharacters: never valid in text that is exchanged, so one that a chat does not hold is always at hand.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def prefix_token_types(input_ids: Sequence[int], start_id: int | None, end_id: int | None) -> list[int]:
    """Marks the prefix blocks of a row: each span from a `start_id` up to and including the next `end_id`.

    Args:
        input_ids: ids of the row, -1 at padding.
        start_id: opens a block.
        end_id: closes it.

    Returns:
        A list as long as `input_ids`: 1 inside a block, 2 on the first token of a block that directly follows another,
        0 elsewhere. A start that no end follows opens nothing.
    """
    input_ids = list(input_ids)
    types = [0] * len(input_ids)
    position, follows = 0, False
    try:
        while True:
            start = input_ids.index(start_id, position)
            follows = follows and all(token == -1 for token in input_ids[position:start])
            position = input_ids.index(end_id, start) + 1
            types[start:position] = [int(token != -1) for token in input_ids[start:position]]
            types[start] += follows
            follows = True
    except ValueError:  # no further start, or no end after it
        return types


class HrmTextTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with prompts, conditions, `token_type_ids`, and chats in which a message stays a message.

    Args:
        tokenizer_file: path of a `tokenizer.json`, which defines the tokenization.
        default_condition: condition tags of a prompt or chat that names none: comma-separated, or a list.
        condition_tokens: the token of each condition tag; None means those of HRM-Text-1B.
        prompt_end: the token that closes a prompt; `bos_token` opens it.
        trained_on_tools: whether the model was trained to call tools. Only then does the tokenizer accept `tools=` and
            tool messages, and reads `<tool_call>` in an answer as the token.
        kwargs: as for `PreTrainedTokenizerFast`.

    `tokenizer_config.json` holds all of these.

    Raises:
        ValueError: `default_condition` names an unknown tag, or `tokenizer.json` has no token that closes a prompt.
    """

    padding_side = "left"
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    _plain: Any = None

    def __init__(
        self,
        tokenizer_file: str | None = None,
        *,
        default_condition: str | Iterable[str] = "direct",
        condition_tokens: Mapping[str, str] | None = None,
        prompt_end: str = PROMPT_END,
        trained_on_tools: bool = False,
        **kwargs: Any,
    ):
        kwargs.setdefault("bos_token", PROMPT_START)
        kwargs.setdefault("eos_token", RESPONSE_END)
        kwargs.setdefault("pad_token", PADDING)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        # A saved config speaks to plain fast classes, which cannot compute token_type_ids: see `_save_pretrained`.
        kwargs["model_input_names"] = list(type(self).model_input_names)
        if isinstance(kwargs.get("extra_special_tokens"), list):  # transformers 5 writes it, 4 reads the other name
            kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
        self.condition_tokens = dict(CONDITION_TOKENS if condition_tokens is None else condition_tokens)
        self.prompt_end = prompt_end
        self.default_condition = default_condition
        super().__init__(tokenizer_file=tokenizer_file, **kwargs)
        if prompt_end not in self.get_vocab():
            raise ValueError(
                f"tokenizer.json has no token {prompt_end!r}, which closes a prompt, so this is not an HRM-Text "
                "tokenizer: load it as its own class, without trust_remote_code"
            )
        self.trained_on_tools = trained_on_tools
        # Where tools of transformers look for what a tokenizer was made with.
        self.init_kwargs |= {
            "default_condition": self.default_condition,
            "condition_tokens": self.condition_tokens,
            "prompt_end": prompt_end,
            "trained_on_tools": self.trained_on_tools,
        }
        known = set(self.all_special_tokens)
        others = [
            token.content for token in self.added_tokens_decoder.values() if token.special and str(token) not in known
        ]
        if others:
            self.add_special_tokens({"additional_special_tokens": others}, False)

    def __getstate__(self) -> dict[str, Any]:
        # A copied backend forgets that it is to read special tokens as text.
        return {**self.__dict__, "_plain": None}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> HrmTextTokenizer:
        """As `PreTrainedTokenizerFast.from_pretrained`."""
        # Set afterwards: without protobuf, transformers hides an error of the constructor behind one about protobuf.
        default_condition = kwargs.pop("default_condition", None)
        with as_expected_tokenizer_class():
            tokenizer = super().from_pretrained(*args, **kwargs)
        if default_condition is not None:
            tokenizer.default_condition = default_condition
        return tokenizer

    @property
    def default_condition(self) -> str:
        """Condition tags of a prompt or chat that names none, comma-separated."""
        return self._default_condition

    @default_condition.setter
    def default_condition(self, value: str | Iterable[str]) -> None:
        self._default_condition = ",".join(self._condition_tags(value))

    @property
    def trained_on_tools(self) -> bool:
        """Whether the model was trained to call tools; see the class."""
        return self._trained_on_tools

    @trained_on_tools.setter
    def trained_on_tools(self, value: bool) -> None:
        missing = [token for token in TOOL_CALL if token not in self.get_vocab()] if value else []
        if missing:
            raise ValueError(f"trained_on_tools is set, but tokenizer.json has no token {missing[0]!r}")
        self._trained_on_tools = bool(value)
        if value and getattr(self, "response_template", None) is None:
            self.response_template = response_template(self.prompt_end, *TOOL_CALL, str(self.eos_token))

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leaves `tokenizer.json` to be loaded whole; transformers 5 would rebuild it from its vocabulary."""
        return kwargs

    def _save_pretrained(
        self,
        save_directory: str,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # The folder must also serve who does not run its code: AutoTokenizer then takes the plain fast class, which
        # would fill token_type_ids with zeros, and these ask the model for plain causal attention.
        name = (filename_prefix + "-" if filename_prefix else "") + "tokenizer_config.json"
        path = Path(save_directory) / name
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings = {
            "default_condition": (self.default_condition, None),
            "condition_tokens": (self.condition_tokens, CONDITION_TOKENS),
            "prompt_end": (self.prompt_end, PROMPT_END),
            "trained_on_tools": (self.trained_on_tools, False),
        }
        for setting, (value, usual) in settings.items():
            config.pop(setting, None)
            if value != usual:
                config[setting] = value
        config["model_input_names"] = [name for name in self.model_input_names if name != "token_type_ids"]
        if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 fails on a list under this name
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)

    # ---------------------------------------------------------------- token_type_ids

    @property
    def prefix_end_token_id(self) -> int:
        """Id of the token that closes a prompt, the `prefix_end_token_id` of the model's config."""
        return self.convert_tokens_to_ids(self.prompt_end)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`token_type_ids` of the ids of a text, or of a pair one after the other."""
        return self._token_types(token_ids_0 + (token_ids_1 or []))

    if hasattr(PreTrainedTokenizerFast, "prepare_for_model"):  # transformers 4

        def prepare_for_model(
            self,
            ids: list[int],
            pair_ids: list[int] | None = None,
            add_special_tokens: bool = True,
            *,
            return_token_type_ids: bool | None = None,
            return_tensors: str | None = None,
            prepend_batch_axis: bool = False,
            **kwargs: Any,
        ) -> BatchEncoding:
            """As `PreTrainedTokenizerFast.prepare_for_model`; there are no automatic special tokens to add."""
            output = super().prepare_for_model(
                ids, pair_ids, add_special_tokens=False, return_token_type_ids=False, **kwargs
            )
            if return_token_type_ids or return_token_type_ids is None:
                output["token_type_ids"] = self._token_types(output["input_ids"], output.get("attention_mask"))
            else:
                output.pop("token_type_ids", None)
            return BatchEncoding(dict(output), tensor_type=return_tensors, prepend_batch_axis=prepend_batch_axis)

    def _token_types(self, input_ids: Sequence[int], attention_mask: Sequence[int] | None = None) -> list[int]:
        if attention_mask is not None and 0 in attention_mask:
            input_ids = [token if real else -1 for token, real in zip(input_ids, attention_mask)]
        return prefix_token_types(input_ids, self.bos_token_id, self.prefix_end_token_id)

    def _convert_encoding(
        self, encoding: Any, return_token_type_ids: bool | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], list[Any]]:
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        values, encodings = super()._convert_encoding(encoding, return_token_type_ids=False, **kwargs)
        if return_token_type_ids:
            values["token_type_ids"] = [self._token_types(e.ids, e.attention_mask) for e in encodings]
        return values, encodings

    def _pad(self, encoded_inputs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "token_type_ids" in self.model_input_names and "token_type_ids" not in encoded_inputs:
            encoded_inputs["token_type_ids"] = self._token_types(
                encoded_inputs["input_ids"], encoded_inputs.get("attention_mask")
            )
        return super()._pad(encoded_inputs, *args, **kwargs)

    # ---------------------------------------------------------------- prompts

    def build_prompt(self, text: str, condition: str | Iterable[str] | None = None) -> str:
        """Writes a prompt: `<|im_start|>`, the condition's tokens, the text, `<|im_end|>`.

        Args:
            text: the user's text, without special tokens.
            condition: tags of `condition_tokens` (direct, cot, noisy, synth), comma-separated or a list, in the order
                used in training: `synth,cot`. None means `default_condition`; an empty one writes no token.

        Returns:
            The prompt. Encode it with `tokenizer(prompt)`, whose `token_type_ids` mark it as one block.

        Raises:
            ValueError: an unknown tag, a token that the vocabulary lacks, or a text that contains a special token.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        if found := self._control_pattern().search(text):
            raise ValueError(
                f"text contains the special token {found.group()!r}, which would be read as one in a string: use "
                "encode_prompt(text), which encodes it as plain text"
            )
        return "".join(self._opening(condition)) + text + self.prompt_end

    def encode_prompt(
        self,
        text: str | Sequence[str],
        condition: str | Iterable[str] | None = None,
        *,
        padding: bool | str = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Encodes one prompt or several; special tokens in a text are plain text.

        Args:
            text: the user's text, or a list of texts.
            condition: as in `build_prompt`; the same for all texts.
            padding: as in `tokenizer(...)`; needed for tensors of several texts.
            return_tensors: `"pt"`, `"np"`, or None for lists. Tensors are [texts, tokens].

        Returns:
            `input_ids`, `token_type_ids` (1 on all of the prompt) and `attention_mask`, ready for `generate`.

        Raises:
            ValueError: an unknown tag, or a token that the vocabulary lacks.
        """
        batched = not isinstance(text, str)
        if batched and not (isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text)):
            raise TypeError("text must be a string or a list of strings")
        texts = text if batched else [text]
        opening = [(token, True) for token in self._opening(condition)]
        rows = [[*opening, (item, False), (self.prompt_end, True)] for item in texts]
        return self._collate(
            [self._encode_segments(row)[0] for row in rows], batched, padding=padding, return_tensors=return_tensors
        )

    def _opening(self, condition: str | Iterable[str] | None) -> list[str]:
        tags = self._condition_tags(self.default_condition if condition is None else condition)
        tokens = [str(self.bos_token), *(self.condition_tokens[tag] for tag in tags)]
        if absent := [token for token in tokens if token not in self.get_vocab()]:
            raise ValueError(f"tokenizer.json has no token {absent[0]!r}: this tokenizer cannot write such a prompt")
        return tokens

    def _condition_tags(self, condition: str | Iterable[str]) -> list[str]:
        """Tags of a condition, comma-separated or a list; raises ValueError on one that is unknown or given twice."""
        tags = [tag.strip() for tag in (condition.split(",") if isinstance(condition, str) else condition)]
        tags = [tag for tag in tags if tag]
        for tag in tags:
            if tag not in self.condition_tokens:
                raise ValueError(f"unknown condition {tag!r}: known are {', '.join(self.condition_tokens)}")
        if len(set(tags)) != len(tags):
            raise ValueError(f"condition {','.join(tags)!r} names a tag twice: name each once")
        if "synth" in tags and "cot" in tags[: tags.index("synth")]:
            logger.warning_once(
                f"the condition {','.join(tags)!r} puts cot before synth: HRM-Text was trained on 'synth,cot'. Write "
                "it in this order."
            )
        return tags

    # ---------------------------------------------------------------- chats

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        condition: str | Iterable[str] | None = None,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `PreTrainedTokenizerFast.apply_chat_template`, with two more arguments.

        Args:
            tools: functions that the model may call, as JSON schemas or Python functions; for a checkpoint that was
                trained on tools.
            condition: condition tags of every prompt, as in `build_prompt`; None means `default_condition`.
            sanitize_control_tokens: with `tokenize=True`, special tokens in messages, tools, documents and template
                arguments are encoded as plain text, so that a message cannot close its envelope. A string
                (`tokenize=False`) cannot keep the two apart: do not encode one that holds untrusted text. In an
                answer, `<tool_call>` and `</tool_call>` are tokens if the model was trained on tools.
            continue_final_message: leaves the last message open, to be continued. An open prompt is not a prefix
                block: the model reads it causally.
            return_dict: None means the default of the installed transformers.
            kwargs: further arguments of the template.

        Raises:
            ValueError: an unknown tag, or arguments of a tool call that are not JSON.
            jinja2.TemplateError: roles that do not alternate, content that is not text, tools that the model was not
                trained on.
        """
        chats, batched = plain_chats(conversation)
        arguments = {
            "tools": tools,
            "documents": documents,
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "condition": ",".join(self._condition_tags(self.default_condition if condition is None else condition)),
            "trained_on_tools": self.trained_on_tools,
            **kwargs,
        }
        conversation = chats if batched else chats[0]
        if not tokenize:
            return super().apply_chat_template(conversation, tokenize=False, **arguments)
        if return_dict is None:
            signature = inspect.signature(PreTrainedTokenizerFast.apply_chat_template)
            return_dict = signature.parameters["return_dict"].default
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError("return_assistant_tokens_mask=True needs return_dict=True, which holds the mask")
        encoding = {
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "return_tensors": return_tensors,
        }
        if not sanitize_control_tokens:
            return super().apply_chat_template(
                conversation,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                tokenizer_kwargs=tokenizer_kwargs,
                **encoding,
                **arguments,
            )
        segments, spans = self._render(chats, arguments, with_spans=return_assistant_tokens_mask)
        if segments is not None:
            ids, starts = zip(*map(self._encode_segments, segments))
            masks = [mask_inside(*pair) for pair in zip(starts, spans)] if return_assistant_tokens_mask else None
            output = self._collate(ids, batched, masks=masks, **encoding, **(tokenizer_kwargs or {}))
        else:
            output = super().apply_chat_template(
                conversation, return_dict=True, tokenizer_kwargs=tokenizer_kwargs, **encoding, **arguments
            )
            if return_assistant_tokens_mask:
                chat_of = output.get("overflow_to_sample_mapping", range(len(output.encodings)))
                masks = [
                    mask_inside([start for start, _ in row.offsets], spans[int(chat)], row.attention_mask)
                    for row, chat in zip(output.encodings, chat_of)
                ]
                output["assistant_masks"] = masks if batched or return_tensors else masks[0]
                output.convert_to_tensors(tensor_type=return_tensors)
        return output if return_dict else output["input_ids"]

    def _render(
        self, chats: list[list[dict[str, Any]]], arguments: dict[str, Any], with_spans: bool
    ) -> tuple[list[list[tuple[str, bool]]] | None, list[list[tuple[int, int]]]]:
        """Renders chats so that text from outside can be distinguished from the template's own.

        Every character from outside that could begin a special token gets a marker in front of it before the template
        is rendered: what then still matches was written by the template, however it joined its strings.

        Returns:
            For each chat its texts (False) and special tokens (True), or None where encoding the plain string gives
            the same; and for each chat the spans [begin, end) of the answers in that string.
        """
        tokens = self._control_tokens()
        # The condition has been checked, and templates compare its tags.
        marked = {name: value for name, value in arguments.items() if name not in ("chat_template", "condition")}
        strings = "\0".join(all_strings([chats, marked]))
        if not with_spans and not any(token[0] in strings for token in tokens):
            return None, []
        own = TOOL_CALL if self.trained_on_tools else ()
        marker = next((sign for sign in _NONCHARACTERS if sign not in strings), None)
        if marker is None:
            raise ValueError("the messages hold every noncharacter of Unicode (U+FDD0 to U+FDEF): remove one of them")
        beginnings = "([" + "".join(map(re.escape, {token[0] for token in tokens})) + "])"
        from_outside = re.compile(beginnings)
        from_model = re.compile("|".join([*map(re.escape, own), beginnings]))

        def mark(text: str) -> str:
            return from_outside.sub(marker + r"\1", text)

        def mark_answer(text: str) -> str:
            return from_model.sub(lambda match: marker + match[1] if match[1] else match[0], text)

        def is_plain(text: str) -> bool:
            return not any(token in text for token in tokens)

        texts, spans = render_jinja_template(
            conversations=[mark_messages(chat, mark, mark_answer, is_plain) for chat in chats],
            chat_template=self.get_chat_template(arguments["chat_template"], arguments["tools"]),
            return_assistant_tokens_mask=with_spans,
            condition=arguments["condition"],
            **{**self.special_tokens_map, **{name: map_strings(value, mark) for name, value in marked.items()}},
        )
        spans = [
            [tuple(stop - text.count(marker, 0, stop) for stop in span) for span in found]
            for text, found in zip(texts, spans)
        ]
        pattern, plain = self._control_pattern(marker), self._control_pattern()
        segments = [split_controls(text, pattern, marker) for text in texts]
        harmless = segments == [split_controls(text.replace(marker, ""), plain) for text in texts]
        return None if harmless else segments, spans

    # ---------------------------------------------------------------- plain text and control tokens

    def _control_tokens(self) -> list[str]:
        return [token.content for token in self.added_tokens_decoder.values() if token.special]

    def _control_pattern(self, marker: str | None = None) -> re.Pattern[str]:
        tokens = sorted(self._control_tokens(), key=len, reverse=True)
        return re.compile((f"(?<!{marker})" if marker else "") + "(?:" + "|".join(map(re.escape, tokens)) + ")")

    def _encode_segments(self, segments: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Ids of texts (False: read no special token in it) and special tokens (True), one after the other.

        Returns:
            The ids, and for each the position of its first character in the joined segments.
        """
        # A copy of its own, because the setting belongs to the tokenizer and other threads may be using that.
        if self._plain is None or self._plain.get_vocab_size() != len(self):
            plain = copy.deepcopy(self._tokenizer)
            plain.no_truncation()
            plain.no_padding()
            plain.encode_special_tokens = True
            self._plain = plain
        ids, starts, position = [], [], 0
        for text, is_control in segments:
            if is_control:
                ids.append(self.convert_tokens_to_ids(text))
                starts.append(position)
            elif text:
                encoding = self._plain.encode(text, add_special_tokens=False)
                if special := set(encoding.ids).intersection(self.all_special_ids):
                    raise ValueError(
                        f"the vocabulary makes {self.convert_ids_to_tokens(sorted(special))} out of plain text: this "
                        "tokenizer.json cannot tell the two apart"
                    )
                ids += encoding.ids
                starts += [position + start for start, _ in encoding.offsets]
            position += len(text)
        return ids, starts

    def _collate(
        self,
        rows: Sequence[list[int]],
        batched: bool,
        *,
        masks: Sequence[list[int]] | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
    ) -> BatchEncoding:
        padding, truncation, max_length, _ = self._get_padding_truncation_strategies(
            padding=padding, truncation=truncation, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of
        )
        if truncation.value != "do_not_truncate" and max_length is not None:
            kept = slice(max_length) if self.truncation_side == "right" else slice(-max_length, None)
            rows = [row[kept] for row in rows]
            masks = masks and [mask[kept] for mask in masks]
        output = self.pad(
            {"input_ids": list(rows)},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        if masks is not None:
            right = (padding_side or self.padding_side) == "right"
            gaps = [[0] * (len(padded) - len(row)) for padded, row in zip(output["input_ids"], rows)]
            output["assistant_masks"] = [
                list(mask) + gap if right else gap + list(mask) for mask, gap in zip(masks, gaps)
            ]
        if return_token_type_ids is False:
            output.pop("token_type_ids", None)
        if not batched and return_tensors is None:
            output = {name: value[0] for name, value in output.items()}
        return BatchEncoding(dict(output), tensor_type=return_tensors)
