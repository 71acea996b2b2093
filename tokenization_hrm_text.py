"""Tokenizer of HRM-Text.

A prompt is `<|im_start|>` + condition tokens + text + `<|im_end|>`; the response follows and ends with `<|box_end|>`.
What this adds to a fast tokenizer over the same `tokenizer.json`:

- `token_type_ids` mark the prompts (1), which the model reads in both directions, by the rule that the model follows
  when nobody passes it any;
- `build_prompt` and `encode_prompt` write the envelope;
- `apply_chat_template(tokenize=True)` reads special tokens in the template's own text alone, never in a message.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_hrm_text import all_strings, map_strings, mask_inside, plain_chats, split_controls
from .versions_hrm_text import as_expected_tokenizer_class


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

# Unicode's noncharacters: never valid in text that is exchanged, so one that a chat does not hold is always at hand.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def prefix_token_types(input_ids: Sequence[int], start_id: int | None, end_id: int | None) -> list[int]:
    """Marks the prefix blocks of one row: each span from a `start_id` up to and including the next `end_id`.

    Returns:
        A list as long as `input_ids`, 1 inside a block and 0 elsewhere. A start that no end follows opens nothing.
    """
    input_ids = list(input_ids)
    types = [0] * len(input_ids)
    position = 0
    try:
        while True:
            start = input_ids.index(start_id, position)
            position = input_ids.index(end_id, start) + 1
            types[start:position] = [1] * (position - start)
    except ValueError:  # no further start, or no end after it
        return types


class HrmTextTokenizer(PreTrainedTokenizerFast):
    """Fast tokenizer with prompts, conditions, `token_type_ids` and chats that a message cannot break out of.

    Args:
        tokenizer_file: path of a `tokenizer.json`; all of the tokenization is in it.
        default_condition: condition tags of a prompt or chat that names none: comma-separated, or a list. Kept in
            `tokenizer_config.json`.
        kwargs: as for `PreTrainedTokenizerFast`.

    Raises:
        ValueError: `default_condition` names an unknown tag.
    """

    padding_side = "left"
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    _plain: Any = None

    def __init__(
        self, tokenizer_file: str | None = None, *, default_condition: str | Iterable[str] = "direct", **kwargs: Any
    ):
        kwargs.setdefault("bos_token", PROMPT_START)
        kwargs.setdefault("eos_token", RESPONSE_END)
        kwargs.setdefault("pad_token", PADDING)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        # A saved config speaks to plain fast classes, which cannot compute token_type_ids: see `_save_pretrained`.
        kwargs["model_input_names"] = list(type(self).model_input_names)
        if isinstance(kwargs.get("extra_special_tokens"), list):  # transformers 5 writes it, 4 reads the other name
            kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
        self.default_condition = ",".join(_condition_tags(default_condition))
        super().__init__(tokenizer_file=tokenizer_file, default_condition=self.default_condition, **kwargs)
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
        # Here already: without protobuf, transformers hides an error of the constructor behind one about protobuf.
        _condition_tags(kwargs.get("default_condition", ""))
        with as_expected_tokenizer_class():
            return super().from_pretrained(*args, **kwargs)

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
        config["model_input_names"] = [name for name in self.model_input_names if name != "token_type_ids"]
        if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 fails on a list under this name
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)

    # ---------------------------------------------------------------- token_type_ids

    @property
    def prefix_end_token_id(self) -> int:
        """Id of the token that closes a prompt, the `prefix_end_token_id` of the model's config."""
        return self.convert_tokens_to_ids(PROMPT_END)

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
            condition: any of direct, cot, noisy, synth, in the order wanted: comma-separated, or a list. None is
                `default_condition`, an empty one writes no condition token.

        Returns:
            The prompt. Encode it with `tokenizer(prompt)`, whose `token_type_ids` mark it as one block.

        Raises:
            ValueError: an unknown tag, or a text that contains a special token.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, not {type(text).__name__}")
        if found := self._control_pattern().search(text):
            raise ValueError(
                f"text contains the special token {found.group()!r}, which would be read as one in a string: use "
                "encode_prompt(text), which encodes it as plain text"
            )
        return self._opening(condition) + text + PROMPT_END

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
            ValueError: an unknown tag.
        """
        batched = not isinstance(text, str)
        if batched and not (isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text)):
            raise TypeError("text must be a string or a list of strings")
        texts = text if batched else [text]
        opening = self._control_pattern().findall(self._opening(condition))
        rows = [[*((token, True) for token in opening), (item, False), (PROMPT_END, True)] for item in texts]
        return self._collate(
            [self._encode_segments(row)[0] for row in rows], batched, padding=padding, return_tensors=return_tensors
        )

    def _opening(self, condition: str | Iterable[str] | None) -> str:
        tags = _condition_tags(self.default_condition if condition is None else condition)
        return PROMPT_START + "".join(CONDITION_TOKENS[tag] for tag in tags)

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
        """As `PreTrainedTokenizerFast.apply_chat_template`, with two arguments more.

        Args:
            condition: condition tags of every prompt, as in `build_prompt`; None is `default_condition`.
            sanitize_control_tokens: with `tokenize=True`, special tokens in messages, tools, documents and template
                arguments are encoded as plain text, so that a message cannot close its envelope. A string
                (`tokenize=False`) cannot keep the two apart: do not encode one that holds text of strangers.
            return_dict: None is the default of the installed transformers.
            kwargs: further arguments of the template.

        Raises:
            ValueError: an unknown tag; `continue_final_message` where the last message is not the assistant's.
            jinja2.TemplateError: roles that do not alternate, content that is not text, tools.
        """
        chats, batched = plain_chats(conversation)
        if continue_final_message and any(chat and chat[-1].get("role") != "assistant" for chat in chats):
            raise ValueError(
                "continue_final_message goes on with an answer, but the last message is not the assistant's: pass "
                "add_generation_prompt=True to have the last message answered"
            )
        arguments = {
            "tools": tools,
            "documents": documents,
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "condition": ",".join(_condition_tags(self.default_condition if condition is None else condition)),
            **kwargs,
        }
        conversation = chats if batched else chats[0]
        if not tokenize:
            return super().apply_chat_template(conversation, tokenize=False, **arguments)
        if return_dict is None:
            signature = inspect.signature(PreTrainedTokenizerFast.apply_chat_template)
            return_dict = signature.parameters["return_dict"].default
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError("return_assistant_tokens_mask=True needs return_dict=True, there is no place for it else")
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
        """Renders chats so that text from outside can be told from the template's own.

        Every character from outside that could begin a special token gets a marker in front of it before the template
        is rendered: what then still matches was written by the template, however it joined its strings.

        Returns:
            For each chat its texts (False) and special tokens (True), or None where encoding the plain string gives
            the same; and for each chat the spans [begin, end) of the answers in that string.
        """
        tokens = self._control_tokens()
        marked = {name: value for name, value in arguments.items() if name != "chat_template"}
        strings = "\0".join(all_strings([chats, marked]))
        if not with_spans and not any(token[0] in strings for token in tokens):
            return None, []
        marker = next((sign for sign in _NONCHARACTERS if sign not in strings), None)
        if marker is None:
            raise ValueError("the messages hold every noncharacter of Unicode (U+FDD0 to U+FDEF): remove one of them")
        beginnings = re.compile("[" + "".join(map(re.escape, {token[0] for token in tokens})) + "]")

        def mark(text: str) -> str:
            return beginnings.sub(marker + r"\g<0>", text)

        texts, spans = render_jinja_template(
            conversations=map_strings(chats, mark),
            chat_template=self.get_chat_template(arguments["chat_template"], arguments["tools"]),
            return_assistant_tokens_mask=with_spans,
            **{**self.special_tokens_map, **map_strings(marked, mark)},
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


def _condition_tags(condition: str | Iterable[str]) -> list[str]:
    """Tags of a condition, comma-separated or a list; raises ValueError on one that is unknown or given twice."""
    tags = [tag.strip() for tag in (condition.split(",") if isinstance(condition, str) else condition)]
    tags = [tag for tag in tags if tag]
    for tag in tags:
        if tag not in CONDITION_TOKENS:
            raise ValueError(f"unknown condition {tag!r}: known are {', '.join(CONDITION_TOKENS)}")
    if len(set(tags)) != len(tags):
        raise ValueError(f"condition {','.join(tags)!r} names a tag twice: name each once")
    return tags
