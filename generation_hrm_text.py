"""What `generate` has to know about prefix blocks.

`generate` of transformers treats `token_type_ids` as something that grows with the text: it copies the last type onto
every new token, hands the grown types to assistants, and cuts a long prompt wherever a chunk ends. A prefix block
stands none of that. So the layout of the prompt is taken out at the entrance, once, and travels through `generate`
under a name of its own, `prompt_token_types` [batch, prompt], which beams expand and assistants inherit. Every forward
call gets the slice that belongs to its tokens; generated tokens are never prefix.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .blocks_hrm_text import find_sequences, infer_token_type_ids
from .cache_hrm_text import HrmTextCache
from .layout_hrm_text import CacheRecord, refuse_split_envelope, warn_types_are_ignored
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
    """GenerationMixin for PrefixLM: the same tokens in every mode, and a refusal where that cannot be."""

    # ---- the entrance ------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates as transformers' `generate` does, with the prefix blocks of the prompt kept.

        Args:
            inputs: token ids [batch, prompt]; `input_ids=` or `inputs_embeds=` serve as well.
            token_type_ids: int [batch, prompt], 1 inside prefix blocks. None means that the blocks are inferred
                where `config.prefix_end_token_id` is set.
            past_key_values: a cache that holds the beginning of the conversation; `cache` is another name for it.
                `input_ids` are then the whole conversation (an `attention_mask` is as long, or absent), or only what
                follows (an `attention_mask` covers cache and input; without one, ids no longer than the cache are
                taken so). `token_type_ids` may cover the conversation or only what is new.
            args, kwargs: everything else that transformers' `generate` takes.

        Returns:
            What transformers' `generate` returns.

        Raises:
            ValueError: `token_type_ids` or `attention_mask` of another shape than the tokens, a cache that holds the
                whole input already or has too few positions, a mode that cannot be served (the message says what to
                use instead).
        """
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        self._take_out_layout(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _take_out_layout(self, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Replaces `token_type_ids` in `kwargs` by `prompt_token_types`, int64 [batch, cached + new prompt tokens]."""
        if kwargs.get("prompt_token_types") is not None:
            # A call from inside `generate`: the main model hands its layout to an assistant.
            kwargs.pop("token_type_ids", None)
            return
        types = kwargs.pop("token_type_ids", None)
        end = self.config.prefix_end_token_id if self.config.prefix_lm else None
        if types is not None and not self.config.prefix_lm:
            warn_types_are_ignored()
            types = None
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        tokens = input_ids if embeds is None else embeds
        if tokens is None:
            # The library starts from a lone bos token, which is no block.
            if end is not None:
                kwargs["prompt_token_types"] = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            return
        batch, given = tokens.shape[:2]
        cache = kwargs.get(CACHE_NAME)
        past = int(cached_length(cache))
        whole = _holds_whole_conversation(given, past, kwargs.get("attention_mask"))
        if embeds is not None and not whole:
            raise ValueError(
                f"`inputs_embeds` holds {given} tokens and the cache {past}: give the embeddings of the whole "
                "conversation, the cached tokens too, or `input_ids`."
            )
        total = given if whole else past + given
        if not whole and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones(batch, total, dtype=torch.long, device=tokens.device)
        mask = kwargs.get("attention_mask")
        mask = mask if mask is not None and mask.shape == (batch, total) else None
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _checked_positions(kwargs["position_ids"], given, total, mask)
        if types is None and end is None:
            return

        covers_all = whole
        if types is not None:
            types = _checked_types(types, batch, given, past, whole)
            covers_all = types.shape[1] == total
        elif input_ids is not None and input_ids.shape[1] == given:
            new_mask = mask[:, -given:] if mask is not None else None
            types = infer_token_type_ids(input_ids, self.config.bos_token_id, end, new_mask)
            if not whole:
                refuse_split_envelope(input_ids, end, new_mask, None, CacheRecord.of(cache, past, batch))
        else:
            types = torch.zeros(batch, given, dtype=torch.long, device=tokens.device)
        types = F.pad((types == 1).long(), (total - types.shape[1], 0))
        if mask is not None:
            types = types * (mask != 0).to(types.device)
        if past and covers_all and CacheRecord.is_current(cache, past, batch):
            _refuse_block_across(types, mask, past)
        kwargs["prompt_token_types"] = types
        if end is not None and past == 0:
            self._warn_without_block(types, mask)

    def _warn_without_block(self, types: torch.Tensor, mask: torch.Tensor | None) -> None:
        without = ~types.any(dim=1)
        if mask is not None:
            without = without & (mask != 0).any(dim=1).to(without.device)
        if bool(without.any()):
            logger.warning_once(
                "The prompt holds no prefix block, so HRM-Text reads it causally and answers much worse. It expects "
                f"the envelope <|im_start|> (id {self.config.bos_token_id}) + condition + text + <|im_end|> (id "
                f"{self.config.prefix_end_token_id}), which `tokenizer.encode_prompt` and "
                "`tokenizer.apply_chat_template` write, or `token_type_ids` with 1 on the tokens of the prompt."
            )

    # ---- from step to step -------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_token_types: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of one forward call, with explicit `token_type_ids` [batch, new tokens]."""
        cache = one_cache(past_key_values, cache)
        kwargs = self.prepare_step(input_ids, cache, prompt_token_types, inputs_embeds, kwargs)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE_NAME: cache}, **kwargs
        )
        if prompt_token_types is None:
            return model_inputs
        new = model_inputs.get("inputs_embeds")
        new = model_inputs["input_ids"] if new is None else new
        rows, count = new.shape[:2]
        start = self._first_new_position(count, cache, kwargs)
        end, prompt = start + count, prompt_token_types.shape[1]
        if start >= prompt:
            types = torch.zeros(rows, count, dtype=torch.long, device=new.device)
        else:
            types = F.pad(prompt_token_types, (0, max(0, end - prompt)))[:, start:end].expand(rows, -1)
            # Always of one stride, on which compiled graphs depend.
            types = types.to(new.device).clone(memory_format=torch.contiguous_format)
        model_inputs["token_type_ids"] = types
        # Generated tokens are one causal sequence: nothing about them has to be read from the device.
        model_inputs["trusted_layout"] = start >= prompt
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
        capacity = static_capacity(cache)
        if capacity is None or generation_config.max_length is None:
            return
        needed = generation_config.max_length - 1
        if generation_config.max_new_tokens is not None:
            known = [model_kwargs.get(name) for name in ("prompt_token_types", "attention_mask", "position_ids")]
            prompt = max((value.shape[1] for value in known if value is not None), default=0)
            needed = max(needed, prompt + generation_config.max_new_tokens - 1)
        if needed > capacity:
            raise ValueError(
                f"the static cache holds {capacity} positions and this call may need {needed}: create it with "
                f"`max_cache_len={needed}` or more, or lower `max_new_tokens`."
            )

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
        start, new = int(cached_length(cache)), tokens.shape[1]
        total = start + new
        types = model_kwargs.get("prompt_token_types")
        mask = model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if types is not None:
            types = F.pad(types, (0, max(0, total - types.shape[1])))[:, :total].expand(tokens.shape[0], -1)
        name = "input_ids" if tokens.ndim == 2 else "inputs_embeds"

        cuts = choose_cuts(types, mask, start, total, chunk_size)
        for begin, end in zip([start, *cuts], cuts):
            call = {name: tokens[:, begin - start : end - start], CACHE_NAME: cache, "use_cache": True}
            if types is not None:
                call["token_type_ids"] = types[:, begin:end]
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
                "`assistant_early_exit` cannot be served: HRM-Text has no layer after which its state could be read "
                "as logits. Use `prompt_lookup_num_tokens`, or a smaller HRM-Text as `assistant_model`."
            )
        model_kwargs = kwargs["model_kwargs"]
        lengths = [model_kwargs.get(name) for name in ("prompt_token_types", "attention_mask", "position_ids")]
        beyond = any(value is not None and value.shape[1] > input_ids.shape[1] for value in lengths)
        if model_kwargs.get("inputs_embeds") is not None or beyond:
            raise ValueError(
                "assisted decoding needs the ids of the whole conversation, since drafts are compared with them: "
                "pass `input_ids` in full (no `inputs_embeds`, and not only the tokens that follow the cache), or "
                "leave the assistant out."
            )
        assistant = kwargs.get("assistant_model")
        tokenizers = (kwargs.get("target_tokenizer"), kwargs.get("assistant_tokenizer"))
        if assistant is not None and not _takes_layout(assistant):
            model_kwargs = {key: value for key, value in model_kwargs.items() if key != "prompt_token_types"}
        elif assistant is not None and all(tokenizer is not None for tokenizer in tokenizers):
            # Another vocabulary: the prompt reaches the assistant as plain text, without its envelope.
            nothing = torch.zeros(1, 0, dtype=torch.long, device=input_ids.device)
            model_kwargs = {**model_kwargs, "prompt_token_types": nothing}
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


def refuse_paged_call(arguments: dict[str, Any]) -> None:
    """Refuses a forward call by the continuous batching of transformers, given the arguments that forward names not.

    Raises:
        ValueError: they say where a paged cache is read and written.
    """
    if arguments.get("read_index") is not None or arguments.get("write_index") is not None:
        raise ValueError(NO_CONTINUOUS_BATCHING)


def choose_cuts(
    types: torch.Tensor | None, mask: torch.Tensor | None, start: int, total: int, chunk_size: int
) -> list[int]:
    """Where a prompt may be cut into chunks: nowhere inside a prefix block of any row.

    Args:
        types: [batch, total], 1 inside prefix blocks; None where there is none.
        mask: [batch, total], 0 at padding, or None. Padding does not end a block.
        start: first position that is to be computed.
        total: end of the prompt.
        chunk_size: the wished number of tokens between two cuts, at least 1.

    Returns:
        Positions in rising order, each the first of a new chunk, all in start + 1 ... total - 1.

    Raises:
        ValueError: `chunk_size` below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"`prefill_chunk_size` is {chunk_size}: it must be at least 1.")
    if types is None:
        return list(range(start + chunk_size, total, chunk_size))
    inside = (types == 1).int()
    if mask is not None:
        # What the nearest real token on either side says; padding itself says nothing.
        real = mask[:, :total].to(types.device) != 0
        index = torch.arange(total, device=types.device)
        before = torch.where(real, index, -1).cummax(dim=1).values
        after = torch.where(real, index, total).flip(1).cummin(dim=1).values.flip(1)
        inside_before = inside.gather(1, before.clamp(min=0)) * (before >= 0)
        inside_after = inside.gather(1, after.clamp(max=total - 1)) * (after < total)
    else:
        inside_before = inside_after = inside
    splits = ((inside_before[:, :-1] == 1) & (inside_after[:, 1:] == 1)).any(dim=0)
    allowed = [i + 1 for i, split in enumerate(splits.tolist()) if not split and i + 1 > start]
    cuts, at = [], start
    while total - at > chunk_size:
        fitting = [cut for cut in allowed if at < cut <= at + chunk_size]
        later = [cut for cut in allowed if cut > at + chunk_size]
        if not fitting and not later:
            break
        at = fitting[-1] if fitting else later[0]
        cuts.append(at)
    return cuts


def _holds_whole_conversation(given: int, past: int, attention_mask: torch.Tensor | None) -> bool:
    """Whether ids of `given` tokens include the `past` ones of the cache, rather than only what follows them."""
    if attention_mask is None:
        return given > past
    if attention_mask.ndim != 2:
        raise ValueError(
            f"`attention_mask` has {attention_mask.ndim} dimensions: `generate` takes one of 2, [batch, tokens], with "
            "0 at padding."
        )
    covered = attention_mask.shape[1]
    if covered == given and given > past:
        return True
    if past and covered == past + given:
        return False
    if covered == given:
        raise ValueError(
            f"the cache holds {past} tokens already and `input_ids` only {given}: pass the whole conversation, or "
            f"only what follows the cache together with an `attention_mask` of {past + given} columns."
        )
    raise ValueError(
        f"`attention_mask` has {covered} columns for {given} tokens"
        + (
            f" on a cache of {past}: give it {given} (whole conversation) or {past + given} (only new tokens)."
            if past
            else ": it needs one column for each token."
        )
    )


def _checked_types(types: Any, batch: int, given: int, past: int, whole: bool) -> torch.Tensor:
    """`token_type_ids` of a shape that fits the conversation or its new part, as a tensor."""
    if not isinstance(types, torch.Tensor) or types.is_floating_point() or types.is_complex():
        raise ValueError("`token_type_ids` must be a tensor of integers: 1 inside prefix blocks, 0 elsewhere.")
    fitting = {given, given - past} if whole else {given, past + given}
    if types.ndim != 2 or types.shape[0] != batch or types.shape[1] not in fitting:
        wanted = " or ".join(str((batch, length)) for length in sorted(fitting))
        raise ValueError(f"`token_type_ids` has shape {tuple(types.shape)} for tokens of shape {wanted}.")
    return types


def _checked_positions(position_ids: torch.Tensor, given: int, total: int, mask: torch.Tensor | None) -> torch.Tensor:
    """`position_ids` [rows, total]; where only those of the new tokens were given, zeros stand for the cached ones."""
    if position_ids.ndim != 2 or position_ids.shape[1] not in (given, total):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)} for {given} tokens: give one for each."
        )
    new = position_ids[:, -given:]
    real = None if mask is None else mask[:, -given:].to(new.device) != 0
    if bool((find_sequences(new, real) > 0).any()):
        raise ValueError(
            "`position_ids` restart within a row, which packs several sequences into it; `generate` continues one "
            "sequence a row: give each its own row, padded on the left."
        )
    return F.pad(position_ids, (total - position_ids.shape[1], 0))


def _refuse_block_across(types: torch.Tensor, mask: torch.Tensor | None, past: int) -> None:
    """Refuses a layout [batch, total] with a block that begins among the `past` cached tokens and goes on."""
    cached, new = types[:, :past], types[:, past:]
    last = torch.full((types.shape[0], 1), past - 1, device=types.device)
    first = torch.zeros_like(last)
    if mask is not None:
        real = mask.to(types.device) != 0
        last = torch.where(real[:, :past], torch.arange(past, device=types.device), -1).amax(dim=1, keepdim=True)
        first = real[:, past:].long().argmax(dim=1, keepdim=True)
    across = (cached.gather(1, last.clamp(min=0)) == 1) & (last >= 0) & (new.gather(1, first) == 1)
    if bool(across.any()):
        raise ValueError(
            f"a prefix block begins among the {past} tokens that the cache holds and goes on after them, and those "
            "tokens could not see the rest of it: pass a cache that ends where a block ends, or none."
        )


def _takes_layout(model: Any) -> bool:
    # Not isinstance: an assistant from another folder has its own copy of this module.
    return "prompt_token_types" in inspect.signature(model.prepare_inputs_for_generation).parameters


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


__all__ = ["HrmTextGenerationMixin", "choose_cuts", "refuse_paged_call"]
