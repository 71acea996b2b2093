"""The entrance of `generate`, and its hooks.

`generate` of transformers extends `token_type_ids` with the text: it copies the last type onto every new token, passes
the extended types to assistants, and cuts a long prompt wherever a chunk ends. Each of these breaks prefix blocks. So
the layout of the prompt is taken out once, at the entrance, and passes through `generate` as `prompt_layout`, which
assistants inherit. Every forward call gets the part that belongs to its tokens; generated tokens are never prefix.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .cache_hrm_text import Facts, History, HrmTextCache, rows_of
from .layout_hrm_text import PromptLayout, StepLayout, choose_cuts, find_sequences, last_true
from .reading_hrm_text import (
    INFERRED_BLOCK_AGAIN,
    Call,
    follow_changes,
    infers_blocks,
    last_border,
    read_prompt,
    read_step,
    warn_nothing_says_what_is_prompt,
    warn_types_are_ignored,
    warn_without_block,
)
from .versions_hrm_text import (
    CACHE_NAME,
    NO_CONTINUOUS_BATCHING,
    VersionedGenerationMixin,
    cached_length,
    one_cache,
    static_capacity,
)


logger = logging.get_logger(__name__)


class HrmTextGenerationMixin(VersionedGenerationMixin):
    """GenerationMixin for PrefixLM: the same tokens in every mode, or an error where a mode cannot give them."""

    # ---- the entrance ------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates as transformers' `generate` does, and keeps the prefix blocks of the prompt.

        Args:
            inputs: token ids [batch, prompt]; `input_ids=` and `inputs_embeds=` work too.
            token_type_ids: int [batch, prompt], 1 inside prefix blocks, 2 where one opens directly behind another.
                None means that the blocks are inferred where `config.prefix_end_token_id` is set.
            past_key_values: a cache that holds the beginning of the conversation; `cache` is another name for it.
                `input_ids` are then the whole conversation, if they begin with the cached ids, and else only what
                follows. Ids that resemble the cached ones without beginning with them are refused, unless an
                `attention_mask` that covers cache and input says that they follow. `token_type_ids` may cover the
                conversation or only what is new. If a cache was cropped inside a block and the block now continues
                differently, it is cropped again, to where the block begins.
            args, kwargs: everything else that transformers' `generate` takes.

        Returns:
            What transformers' `generate` returns.

        Raises:
            ValueError: `token_type_ids` or `attention_mask` do not have the shape of the tokens; the cache already
                holds the whole input, holds other tokens than the input begins with, or has too few positions; or the
                mode is not supported (the message says what to use instead).
        """
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if kwargs.get("max_length") is not None and kwargs.get("generation_config") is None:
            # The library would let the folder's `max_new_tokens` win over what the caller says (lm-eval says it so).
            kwargs.setdefault("max_new_tokens", None)
        self._take_out_layout(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _take_out_layout(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Replaces `token_type_ids` in `kwargs` by `prompt_layout`, the types of cached and new prompt tokens."""
        types = kwargs.pop("token_type_ids", None)
        handed = kwargs.get("prompt_layout")
        if handed is not None:
            # A call from inside `generate`: the main model hands its layout to an assistant, which may come from
            # another folder and then has its own copy of the class; transformers 5.0 adds that of a forward call.
            kwargs.pop("layout", None)
            kwargs["prompt_layout"] = PromptLayout(handed.types, handed.stated, handed.padded)
            return
        if types is not None and not self.config.prefix_lm:
            warn_types_are_ignored()
            types = None
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        tokens = input_ids if embeds is None else embeds
        if tokens is None:
            # The library starts from a lone bos token, which is no block.
            nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            kwargs["prompt_layout"] = PromptLayout(nothing, stated=True, padded=False)
            return
        kwargs["prompt_layout"] = self._read_prompt(tokens, input_ids, types, kwargs)

    def _read_prompt(
        self,
        tokens: torch.Tensor,
        input_ids: torch.Tensor | None,
        types: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> PromptLayout:
        """The types of cached and new prompt tokens; completes mask and positions, and cuts a cache, where it must.

        Args:
            tokens: ids [batch, given] or embeddings [batch, given, hidden].
            input_ids: where they are known.
            types: `token_type_ids` as they were given.
            kwargs: of `generate`.
        """
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        past = int(cached_length(cache))
        # A cache for beams holds several rows for each row of the prompt.
        copies = _copies_of_rows(cache, tokens.shape[0])
        ids = input_ids if input_ids is not None and input_ids.shape[:2] == tokens.shape[:2] else None
        ids, mask, types = (_repeated(tensor, copies) for tensor in (ids, mask, types))
        batch, given = tokens.shape[0] * copies, tokens.shape[1]
        if past:
            follow_changes(cache, batch)
            _refuse_packed(cache, past)
        whole = _holds_whole_conversation(ids, (batch, given), cache, mask)
        if ids is None and not whole:
            raise ValueError(
                f"`inputs_embeds` holds {given} tokens and the cache {past}: give the embeddings of the whole "
                "conversation, cached tokens included, or `input_ids`."
            )
        if types is not None:
            types = _checked_types(types, batch, given, past, whole)
            _refuse_other_types(types, cache, past, given if whole else past + given)
        positions = None
        if whole and past and ids is not None:
            border = last_border(cache, ids.to(self.device))
            if border < past:
                # What is read again stays where it was.
                positions = _continued_positions(cache, past, given - past, mask)
                if types is not None and types.shape[1] < given:
                    known = History.of(cache).facts(border, past)
                    if not bool((known.stated | ~known.real).all()):
                        raise ValueError(INFERRED_BLOCK_AGAIN)
                    types = torch.cat([known.types.to(types), types], dim=1)
                cache.crop(border - past)
                past = border
        new = given - past if whole else given
        if not whole and (mask is None or mask.shape[1] == given):
            mask = _continued_mask(cache, past, (batch, given), mask, tokens.device)
            kwargs["attention_mask"] = mask[::copies]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _checked_positions(kwargs["position_ids"], given, past + new, mask)
        else:
            if past and positions is None:
                positions = _continued_positions(cache, past, new, mask)
            if positions is not None:
                kwargs["position_ids"] = positions[::copies]
        new_ids, new_types = (None if tensor is None else tensor[:, -new:] for tensor in (ids, types))
        shape = (batch, new)
        call = Call(shape, tokens.device, new_ids, mask, token_type_ids=new_types, cache=cache)
        if ids is None and types is None:
            call.embedded = self.base_model.recognise(_repeated(tokens[:, -new:], copies))
        layout = read_prompt(self.config, call)
        history = History.of(cache)
        layout.padded = layout.padded or (history is not None and history.padded is not False)
        layout.types = F.pad(layout.types, (past, 0))
        if past == 0:
            self._warn_of_prompt(layout.types, mask, recognised=call.embedded is not None)
            if types is None and self.config.prefix_lm and not self.config.prefix_end:
                warn_nothing_says_what_is_prompt()
        return layout

    def _warn_of_prompt(self, types: torch.Tensor, mask: torch.Tensor | None, recognised: bool) -> None:
        without = ~(types > 0).any(dim=1)
        if mask is not None:
            without = without & (mask != 0).any(dim=1).to(without.device)
            if bool(((mask[:, -1] == 0) & (mask != 0).any(dim=1)).any()):
                logger.warning_once(
                    "The prompts are padded on the right: `generate` continues after the padding and answers worse. "
                    "Pad on the left (`tokenizer.padding_side = 'left'`)."
                )
        if infers_blocks(self.config) and (recognised or bool(without.any())):
            warn_without_block(self.config, has_no_ids=recognised)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # Adapters put a `prepare_inputs_for_generation` of theirs before ours, which does not name it.
        named = {name: value for name, value in model_kwargs.items() if name != "prompt_layout"}
        super()._validate_model_kwargs(named)

    # ---- from step to step -------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_layout: PromptLayout | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of one forward call, with what is known of its tokens."""
        cache = one_cache(past_key_values, cache)
        length = self.known_length({**kwargs, "prompt_layout": prompt_layout})
        kwargs = self.prepare_step(input_ids, cache, length, inputs_embeds, kwargs)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE_NAME: cache}, **kwargs
        )
        if prompt_layout is None:
            return model_inputs
        new = model_inputs.get("inputs_embeds")
        new = model_inputs["input_ids"] if new is None else new
        rows, count = new.shape[:2]
        start = self._first_new_position(count, cache, kwargs)
        if start < prompt_layout.types.shape[1] or cache is None:
            model_inputs["layout"] = prompt_layout.part(start, count, rows)
        else:
            model_inputs["layout"] = StepLayout(prompt_layout.padded)
        if "prepare_inputs_for_generation" in vars(self):
            # An adapter stands before this method, and puts its virtual tokens where it finds the older names.
            model_inputs["past_key_values"] = model_inputs.pop(CACHE_NAME, None)
            model_inputs["cache_position"] = torch.arange(start, start + count, device=new.device)
        return model_inputs

    @staticmethod
    def _first_new_position(count: int, cache: Any, kwargs: dict[str, Any]) -> int:
        """Index in the conversation of the first of `count` new tokens."""
        if cache is None:
            return 0
        if not cache.is_compileable:
            return cache.get_seq_length()
        # The length of a static cache lies on the device, but the mask or the positions are as long as the text.
        known = kwargs.get("attention_mask")
        known = kwargs["position_ids"] if known is None else known
        return known.shape[1] - count

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None, past_key_values: Any = None, cache: Any = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """The 2-D mask as it is: our forward builds its own mask, and needs the layout for it.

        With a static cache it is padded to the capacity, so that its shape, and with it the compiled graph, is the
        same at every step.
        """
        capacity = static_capacity(one_cache(past_key_values, cache))
        if attention_mask is None or attention_mask.ndim != 2 or capacity is None:
            return attention_mask
        return F.pad(attention_mask, (0, max(0, capacity - attention_mask.shape[1])))

    # ---- caches ------------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        # "dynamic_full" is how assistants ask for a cache without sliding windows; ours has none. Transformers 5.0
        # makes no cache by default and leaves it to the model, which is too late for chunks.
        default = getattr(generation_config, "cache_implementation", None) in (None, "dynamic_full")
        wanted = generation_config.use_cache is not False and (cache is None or type(cache) is DynamicCache)
        if given is None and default and wanted:
            model_kwargs[CACHE_NAME] = HrmTextCache(config=self.config)
        captured = self._captured_cache(generation_config, given)
        if captured is not None:
            model_kwargs[CACHE_NAME] = captured
        capacity = static_capacity(cache)
        if capacity is None or generation_config.max_length is None:
            return
        needed = generation_config.max_length - 1
        if generation_config.max_new_tokens is not None:
            needed = max(needed, self.known_length(model_kwargs) + generation_config.max_new_tokens - 1)
        if needed > capacity:
            raise ValueError(
                f"the static cache holds {capacity} positions and this call may need {needed}: create it with "
                f"`max_cache_len={needed}` or more, or lower `max_new_tokens`."
            )

    @staticmethod
    def _reorder_cache(cache: Any, beam_idx: torch.Tensor) -> Any:
        """Takes the rows of the beams, and with them the history of a cache that does not carry it along itself."""
        cache.reorder_cache(beam_idx)
        history = History.of(cache)
        if history is not None and not isinstance(cache, HrmTextCache):
            history.select(beam_idx)
        return cache

    @staticmethod
    def _note_captured_step(
        cache: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> None:
        """Tells the history of a cache what a captured step has just appended; reads nothing from the device."""
        start = cache.get_seq_length() - 1
        call = Call(tuple(input_ids.shape), input_ids.device, input_ids, attention_mask, position_ids, cache=cache)
        read_step(call, StepLayout(padded=False), start)
        History.of(cache).note_marks(cache, start, start + 1)

    # ---- chunked prefill ---------------------------------------------------------------------------------------

    def prefill_leading_chunks(self, tokens: torch.Tensor, model_kwargs: dict[str, Any], chunk_size: int) -> int:
        """Runs the prompt into the cache chunk by chunk, up to the last chunk.

        Args:
            tokens: what is not in the cache yet, ids [batch, new] or embeddings [batch, new, hidden].
            model_kwargs: of `generate`; the cache in it is written to.
            chunk_size: how many tokens a forward call takes. A cut that would fall inside a prefix block of any row
                moves to before the block, or where there is no room before it, to its end.

        Returns:
            How many tokens are left for the last chunk, at least one.
        """
        cache = model_kwargs[CACHE_NAME]
        (rows, new), start = tokens.shape[:2], int(cached_length(cache))
        total = start + new
        prompt, mask = model_kwargs.get("prompt_layout"), model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        types = None if prompt is None else prompt.part(0, total, rows).types
        name = "input_ids" if tokens.ndim == 2 else "inputs_embeds"

        cuts = choose_cuts(types, mask, start, total, chunk_size)
        for begin, end in zip([start, *cuts], cuts):
            call = {name: tokens[:, begin - start : end - start], CACHE_NAME: cache, "use_cache": True}
            if prompt is not None:
                call["layout"] = prompt.part(begin, end - begin, rows)
            if mask is not None:
                call["attention_mask"] = mask[:, :end]
            if positions is not None:
                last = positions.shape[1] - total
                call["position_ids"] = positions[:, begin + last : end + last]
            self(**{key: _to(value, self.device) for key, value in call.items()}, logits_to_keep=1)
        return total - cuts[-1] if cuts else new

    # ---- what is served elsewhere, or nowhere --------------------------------------------------------------------

    def _get_candidate_generator(
        self, generation_config: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` is not supported: no intermediate state of HRM-Text can be read as logits. "
                "Use `prompt_lookup_num_tokens`, or a smaller HRM-Text as `assistant_model`."
            )
        model_kwargs = kwargs["model_kwargs"]
        if model_kwargs.get("inputs_embeds") is not None or self.known_length(model_kwargs) > input_ids.shape[1]:
            raise ValueError(
                "assisted decoding needs the ids of the whole conversation, because it compares drafts with them: "
                "pass `input_ids` in full (no `inputs_embeds`, and not only the tokens that follow the cache), or "
                "leave the assistant out."
            )
        assistant = kwargs.get("assistant_model")
        tokenizers = (kwargs.get("target_tokenizer"), kwargs.get("assistant_tokenizer"))
        if assistant is not None and not _takes_layout(assistant):
            model_kwargs = {key: value for key, value in model_kwargs.items() if key != "prompt_layout"}
        elif assistant is not None and all(tokenizer is not None for tokenizer in tokenizers):
            # Another vocabulary: the prompt reaches the assistant as plain text, without its envelope.
            nothing = torch.zeros(1, 0, dtype=torch.long, device=input_ids.device)
            model_kwargs = {**model_kwargs, "prompt_layout": PromptLayout(nothing, stated=True, padded=False)}
        return super()._get_candidate_generator(
            generation_config, input_ids, *args, **{**kwargs, "model_kwargs": model_kwargs}
        )

    def heal_tokens(self, input_ids: torch.Tensor, tokenizer: Any = None) -> torch.Tensor:
        """Refused with PrefixLM: it rewrites the prompt as text without special tokens, and so without envelope."""
        if self.config.prefix_lm:
            raise ValueError(
                "`token_healing` rewrites the prompt without its special tokens, and HRM-Text would lose the envelope "
                "of its prefix block: call `generate` with `token_healing=False`."
            )
        return super().heal_tokens(input_ids, tokenizer)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `generate`."""
        raise ValueError(NO_CONTINUOUS_BATCHING)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `generate`."""
        raise ValueError(NO_CONTINUOUS_BATCHING)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `generate`."""
        raise ValueError(NO_CONTINUOUS_BATCHING)


def _copies_of_rows(cache: Any, batch: int) -> int:
    """How many rows of a cache there are for each row of the prompt."""
    history = History.of(cache)
    rows = batch if history is None or not int(cached_length(cache)) else rows_of(cache) or history.rows
    return rows // batch if rows > batch and rows % batch == 0 else 1


def _repeated(tensor: torch.Tensor | None, copies: int) -> torch.Tensor | None:
    return tensor if tensor is None or copies == 1 else tensor.repeat_interleave(copies, dim=0)


def _holds_whole_conversation(
    ids: torch.Tensor | None, shape: tuple[int, int], cache: Any, mask: torch.Tensor | None
) -> bool:
    """Whether the tokens of this shape include those of the cache, rather than only what follows them.

    Raises:
        ValueError: the tokens do not show it, or they continue other tokens than the cache holds.
    """
    given, past = shape[1], int(cached_length(cache))
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"`attention_mask` has {mask.ndim} dimensions: `generate` takes one of 2, [batch, tokens], with 0 at "
            "padding."
        )
    covered = None if mask is None else mask.shape[1]
    if covered not in (None, given, past + given):
        raise ValueError(
            f"`attention_mask` has {covered} columns for {given} tokens"
            + (
                f" on a cache of {past}: give it {given} (whole conversation) or {past + given} (only new tokens)."
                if past
                else ": it needs one column for each token."
            )
        )
    if past == 0:
        return True
    if covered == past + given:
        return False
    if ids is None:
        # Embeddings are the whole conversation.
        return given > past
    history = History.of(cache)
    known = None if history is None else history.facts(0, past)
    if known is None or bool(((known.ids < 0) & known.real).any()):
        raise ValueError(
            f"the cache holds {past} tokens whose ids are not known (embeddings, or another model wrote them), so "
            f"`generate` cannot tell whether the {given} given ids include them: pass only what follows the cache, "
            f"with an `attention_mask` of {past + given} columns."
        )
    ids = ids.to(known.ids.device)
    if given > past and not bool(((ids[:, :past] != known.ids) & known.real).any()):
        return True
    if _resemble(ids, mask, known):
        raise ValueError(
            f"the cache already holds {past} tokens, and the {given} of `input_ids` resemble them but do not continue "
            "them: pass the whole conversation and a cache that is cropped to what they have in common, or only "
            f"what follows the cache together with an `attention_mask` of {past + given} columns."
        )
    return False


def _resemble(ids: torch.Tensor, mask: torch.Tensor | None, known: Facts) -> bool:
    """Whether some row of the ids repeats half of what some cached row holds: no new turn then, but an edit."""
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :] != 0
    given = [row[keep].tolist() for row, keep in zip(ids, real.to(ids.device))]
    cached = [row[keep].tolist() for row, keep in zip(known.ids, known.real)]
    for before in cached:
        for now in given:
            matcher = difflib.SequenceMatcher(None, before, now, autojunk=False)
            shared = sum(block.size for block in matcher.get_matching_blocks() if block.size > 1 or len(before) < 4)
            if 2 * shared >= len(before) > 0:
                return True
    return False


def _continued_mask(
    cache: Any, past: int, shape: tuple[int, int], mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """A mask [batch, past + given] for new tokens whose own mask [batch, given], if any, leaves the cache out."""
    history = History.of(cache)
    cached = torch.ones(shape[0], past, dtype=torch.long, device=device)
    if history is not None and history.rows == shape[0]:
        cached = history.facts(0, past).real.to(device, torch.long)
    new = torch.ones(shape, dtype=torch.long, device=device) if mask is None else mask.to(device, torch.long)
    return torch.cat([cached, new], dim=1)


def _refuse_packed(cache: Any, past: int) -> None:
    history = History.of(cache)
    if not past or history is None or history.packed is False:
        return
    known = history.facts(0, past)
    if bool((find_sequences(known.positions, known.real) > 0).any()):
        raise ValueError(
            "the cache holds rows of several packed sequences, and `generate` continues one sequence per row: give "
            "each its own row, padded on the left, and a new cache."
        )


def _continued_positions(cache: Any, past: int, new: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Positions [batch, past + new] that go on from the cached ones; None where `generate` counts them rightly."""
    history = History.of(cache)
    if history is None or history.is_plain:
        return None
    cached = history.facts(0, past)
    real = F.pad(cached.real, (0, new), value=True) if mask is None else (mask != 0).to(cached.real.device)
    counted = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    shift = torch.where(cached.real, cached.positions - counted[:, :past], 0)
    shift = shift.gather(1, last_true(cached.real)[:, -1:].clamp(min=0))
    return counted + shift if bool((shift != 0).any()) else None


def _checked_types(types: Any, batch: int, given: int, past: int, whole: bool) -> torch.Tensor:
    """`token_type_ids` of a shape that fits the conversation or its new part, as a tensor."""
    if not isinstance(types, torch.Tensor) or types.is_floating_point() or types.is_complex():
        raise ValueError("`token_type_ids` must be a tensor of integers: 1 inside prefix blocks, 0 elsewhere.")
    fitting = {given, given - past} if whole else {given, past + given}
    if types.ndim != 2 or types.shape[0] != batch or types.shape[1] not in fitting:
        wanted = " or ".join(str((batch, length)) for length in sorted(fitting))
        raise ValueError(f"`token_type_ids` has shape {tuple(types.shape)} for tokens of shape {wanted}.")
    return types


def _refuse_other_types(types: torch.Tensor, cache: Any, past: int, total: int) -> None:
    """Refuses types [batch, total] that contradict those with which the cached tokens were read."""
    history = History.of(cache)
    if history is None or past == 0 or types.shape[1] != total:
        return
    known = history.facts(0, past)
    stated = types[:, :past].to(known.types.device)
    inside = (stated == 1) | (stated == 2)
    if bool(((inside != (known.types > 0)) & known.real).any()):
        raise ValueError(
            f"`token_type_ids` contradict the types with which the {past} cached tokens were read: a prefix block "
            "that is wholly or partly in the cache cannot be changed. Pass a cache that ends before it, or none."
        )


def _checked_positions(position_ids: torch.Tensor, given: int, total: int, mask: torch.Tensor | None) -> torch.Tensor:
    """`position_ids` [rows, total]; where only those of the new tokens were given, zeros stand for the cached ones."""
    if position_ids.ndim != 2 or position_ids.shape[1] not in (given, total):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)} for {given} tokens: give one position per token."
        )
    new = position_ids[:, -given:]
    real = None if mask is None else mask[:, -given:].to(new.device) != 0
    if bool((find_sequences(new, real) > 0).any()):
        raise ValueError(
            "`position_ids` restart within a row, which packs several sequences into it, and `generate` continues one "
            "sequence per row: give each its own row, padded on the left."
        )
    return F.pad(position_ids, (total - position_ids.shape[1], 0))


def _takes_layout(model: Any) -> bool:
    # Not isinstance: an assistant from another folder has its own copy of this module.
    return "prompt_layout" in inspect.signature(model.prepare_inputs_for_generation).parameters


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


__all__ = ["HrmTextGenerationMixin"]
