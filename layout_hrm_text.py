"""What the new tokens of a forward pass are: blocks, sequences, padding, and what came before them in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .blocks_hrm_text import find_blocks, find_sequences, infer_token_types
from .versions_hrm_text import cached_length


logger = logging.get_logger(__name__)


@dataclass
class TokenLayout:
    """What the new tokens of one forward pass are, all tensors of shape [batch or 1, new tokens].

    Attributes:
        past: number of cached positions before the first new token; a 0-d tensor where reading it would stall.
        real: False at padding, or None where every token is real.
        sequence: index of the token's sequence, 0 for the one that the cache holds; None where there is no border.
        block: index of the token's prefix block, -1 for causal tokens; None where every token is causal.
        past_visible: [batch, past or key length], which cached positions are real and of sequence 0; None where all.
    """

    past: int | torch.Tensor
    real: torch.Tensor | None = None
    sequence: torch.Tensor | None = None
    block: torch.Tensor | None = None
    past_visible: torch.Tensor | None = None


def values_are_readable() -> bool:
    """Whether tensor values may decide control flow: not while compiling, exporting or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


# ---- what a live cache remembers -----------------------------------------------------------------------------------


@dataclass
class CacheRecord:
    """What the next call on a cache must know of the last one; kept on the cache, and void when it no longer fits.

    Attributes:
        length, rows: size of the cache that the record speaks of.
        ends_in_block: bool [rows], whether the last real token was of a prefix block.
        ends_in_envelope: bool [rows], whether an inferred envelope was opened and not yet closed.
        last_position: int64 [rows], position of the last real token.
        sequence_start: int64 [rows], where the last sequence of a packed row begins in the cache.
    """

    length: int
    rows: int
    ends_in_block: torch.Tensor
    ends_in_envelope: torch.Tensor
    last_position: torch.Tensor
    sequence_start: torch.Tensor

    @classmethod
    def of(cls, cache: Any, length: int, rows: int) -> CacheRecord | None:
        """The record of the cache, or None where there is none or the cache was cropped, reset or re-used since."""
        record = getattr(cache, "_hrm_text_record", None)
        return record if record is not None and (record.length, record.rows) == (length, rows) else None

    @staticmethod
    def settle(cache: Any, length: int, rows: int) -> None:
        """Replaces the record after a call that is known to leave nothing open."""
        cache._hrm_text_record = None
        cache._hrm_text_settled = (length, rows)

    @classmethod
    def is_current(cls, cache: Any, length: int, rows: int) -> bool:
        """Whether the last call left a cache of this size, so that what it held has not been cropped or replaced."""
        settled = getattr(cache, "_hrm_text_settled", None) == (length, rows)
        return settled or cls.of(cache, length, rows) is not None


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index.clamp(min=0)[:, None])[:, 0]


# ---- from the arguments of a call to a layout -----------------------------------------------------------------------


def read_layout(
    config: Any,
    batch: int,
    queries: int,
    device: torch.device,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    cache: Any = None,
    cache_position: torch.Tensor | None = None,
    trusted: bool = False,
) -> tuple[TokenLayout, torch.Tensor]:
    """Reads the layout of a call's new tokens, checks it, and notes on the cache what the next call must know.

    Args:
        config: the model's config.
        batch, queries: shape of the new tokens.
        device: where they are.
        input_ids: [batch, queries], None where embeddings were given.
        attention_mask: [batch, cached + queries], 0 at padding.
        position_ids: [batch or 1, queries]; None derives them from the cache's length and the padding.
        token_type_ids: [batch, queries], 1 for tokens of a prefix block; None infers them where the config says how.
        cache: the live cache, or None.
        cache_position: [queries], indices of the new tokens in the cache, where the caller has them.
        trusted: the caller (`generate`) has checked the layout of the whole prompt: no value is read that need not
            be, nothing is inferred, and the row is one sequence.

    Returns:
        The layout, and position_ids [batch or 1, queries].

    Raises:
        ValueError: shapes or types that do not fit, or a block that would be split over two calls.
    """
    readable = values_are_readable()
    past = cached_length(cache)
    if cache_position is not None and isinstance(past, torch.Tensor):
        past = cache_position[0]
    if isinstance(past, torch.Tensor) and readable and (queries > 1 or past.device.type == "cpu"):
        past = int(past)
    exact = readable and isinstance(past, int)
    record = CacheRecord.of(cache, past, batch) if exact and past and not trusted else None

    real, past_visible, mask = _read_padding(attention_mask, past, batch, queries, readable, trusted)
    given_positions = position_ids is not None
    if given_positions:
        position_ids = _check_positions(position_ids, batch, queries)
    else:
        position_ids = _derive_positions(mask, past, queries, device)
    if record is not None and not given_positions:
        position_ids = _continue_positions(position_ids, record, real)
    _warn_beyond_context(config, position_ids, past, given_positions or mask is not None, queries, readable)

    sequence = None
    if given_positions and not trusted:
        sequence = _read_sequences(position_ids, real, record, batch, queries, readable)
    if record is not None and bool((record.sequence_start > 0).any()):
        inside = torch.arange(past, device=device) >= record.sequence_start[:, None]
        past_visible = inside if past_visible is None else past_visible & inside

    types, open_types = _read_types(config, input_ids, token_type_ids, batch, queries, real, sequence, record, trusted)
    if record is not None and types is not None:
        _refuse_split_block(types, real, sequence, record)
    block = None
    if types is not None and not (readable and queries == 1) and (not readable or bool(types.any())):
        block = find_blocks(types, real, sequence)

    layout = TokenLayout(past, real, sequence, block, past_visible)
    if cache is not None and exact:
        if trusted and queries == 1:
            CacheRecord.settle(cache, past + queries, batch)
        else:
            cache._hrm_text_record = _next_record(layout, record, batch, queries, position_ids, types, open_types)
    return layout, position_ids


def _read_padding(
    attention_mask: torch.Tensor | None,
    past: int | torch.Tensor,
    batch: int,
    queries: int,
    readable: bool,
    trusted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Splits a mask into `real` and `past_visible` (see TokenLayout), and returns it; None where nothing pads."""
    if attention_mask is None:
        return None, None, None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise ValueError(
            f"`attention_mask` has the shape {tuple(attention_mask.shape)}: give [{batch}, cached + new tokens] with "
            "0 at padding, or a whole 4-D mask [batch, 1, new tokens, cached + new tokens] without `token_type_ids`."
        )
    mask = attention_mask != 0
    if isinstance(past, torch.Tensor):
        index = (past + torch.arange(queries, device=mask.device)).clamp(max=mask.shape[1] - 1)
        return mask.index_select(1, index), mask, mask
    if mask.shape[1] < past + queries:
        raise ValueError(
            f"`attention_mask` covers {mask.shape[1]} positions and there are {past} cached and {queries} new tokens: "
            "give one entry for each of them, the cached ones too."
        )
    mask = mask[:, : past + queries]
    if readable and bool(mask.all()):
        return None, None, None
    real, past_visible = mask[:, past:], mask[:, :past] if past else None
    if readable and not trusted:
        real = None if bool(real.all()) else real
    return real, past_visible, mask


def _check_positions(position_ids: torch.Tensor, batch: int, queries: int) -> torch.Tensor:
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != queries:
        raise ValueError(
            f"`position_ids` has the shape {tuple(position_ids.shape)} and there are {queries} new tokens in {batch} "
            "rows: give one position for each new token."
        )
    return position_ids


def _derive_positions(
    mask: torch.Tensor | None, past: int | torch.Tensor, queries: int, device: torch.device
) -> torch.Tensor:
    """Counts real tokens, so that padding on either side shifts nothing."""
    index = torch.arange(queries, device=device) + past
    if mask is None:
        return index[None]
    counted = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return counted.index_select(1, index.clamp(max=mask.shape[1] - 1))


def _continue_positions(position_ids: torch.Tensor, record: CacheRecord, real: torch.Tensor | None) -> torch.Tensor:
    """Derived positions that go on from the last cached one, which differs from the cache's length in packed rows."""
    if real is None:
        steps = torch.arange(position_ids.shape[1], device=position_ids.device)[None]
    else:
        steps = (real.cumsum(dim=1) - 1).clamp(min=0)
    return record.last_position[:, None] + 1 + steps


def _warn_beyond_context(
    config: Any, position_ids: torch.Tensor, past: int | torch.Tensor, given: bool, queries: int, readable: bool
) -> None:
    if not readable or isinstance(past, torch.Tensor) or (given and queries == 1):
        return
    last = int(position_ids.max()) if given else past + queries - 1
    if last >= config.max_position_embeddings:
        logger.warning_once(
            f"position {last} lies beyond `max_position_embeddings` ({config.max_position_embeddings}): the model was "
            "not trained there and its answers will be worse. Shorten the input."
        )


def _read_sequences(
    position_ids: torch.Tensor,
    real: torch.Tensor | None,
    record: CacheRecord | None,
    batch: int,
    queries: int,
    readable: bool,
) -> torch.Tensor | None:
    sequence = None
    if queries > 1:
        sequence = find_sequences(position_ids, real)
    if record is not None:
        rows = position_ids.expand(batch, -1)
        first = rows[:, 0] if real is None else _at(rows, real.long().argmax(dim=1))
        restarts = first <= record.last_position
        if bool(restarts.any()):
            sequence = 0 if sequence is None else sequence
            return (sequence + restarts.long()[:, None]).expand(batch, queries)
    if sequence is None or (readable and not bool((sequence > 0).any())):
        return None
    return sequence


def _read_types(
    config: Any,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    batch: int,
    queries: int,
    real: torch.Tensor | None,
    sequence: torch.Tensor | None,
    record: CacheRecord | None,
    trusted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """bool [batch, queries]: which tokens are of a block, and which of an envelope that is still open; or None."""
    if token_type_ids is not None:
        if tuple(token_type_ids.shape) != (batch, queries):
            raise ValueError(
                f"`token_type_ids` has the shape {tuple(token_type_ids.shape)} and the new tokens "
                f"[{batch}, {queries}]: give one type for each new token, and none for cached ones."
            )
        if token_type_ids.is_floating_point() or token_type_ids.is_complex():
            raise ValueError(
                f"`token_type_ids` is of {token_type_ids.dtype}: give integers, 1 for tokens of a prefix block."
            )
        if not config.prefix_lm:
            warn_types_are_ignored()
            return None, None
        return token_type_ids == 1, None
    if trusted or not config.prefix_lm or config.prefix_end_token_id is None or input_ids is None:
        return None, None
    bos, end = config.bos_token_id, config.prefix_end_token_id
    closed, still_open = infer_token_types(input_ids, bos, end, real, sequence)
    refuse_split_envelope(input_ids, end, real, sequence, record)
    return closed, still_open


def warn_types_are_ignored() -> None:
    """Says once that a model without PrefixLM has no use for types."""
    logger.warning_once(
        "`token_type_ids` were given and are ignored, because `config.prefix_lm` is False: the model reads everything "
        "causally."
    )


def refuse_split_envelope(
    input_ids: torch.Tensor,
    prefix_end_token_id: int,
    real: torch.Tensor | None,
    sequence: torch.Tensor | None,
    record: CacheRecord | None,
) -> None:
    """Refuses new tokens that close an envelope of the cache, whose first part was read causally.

    Args:
        input_ids: the new tokens, [batch, tokens].
        prefix_end_token_id: closes an envelope.
        real: [batch, tokens], False at padding; None where every token is real.
        sequence: as of `find_sequences`, or None.
        record: of the cache, or None.
    """
    if record is None or not bool(record.ends_in_envelope.any()):
        return
    ends = input_ids == prefix_end_token_id
    if real is not None:
        ends = ends & (real != 0)
    if sequence is not None:
        ends = ends & (sequence == 0)
    if bool((ends.any(dim=1) & record.ends_in_envelope).any()):
        raise ValueError(
            "this call closes a prompt envelope that an earlier call on the same cache opened, and its first part was "
            "read causally: pass the whole envelope in one call, or `token_type_ids` of zeros to read it causally "
            "throughout."
        )


def _refuse_split_block(
    types: torch.Tensor, real: torch.Tensor | None, sequence: torch.Tensor | None, record: CacheRecord
) -> None:
    first = torch.zeros(types.shape[0], dtype=torch.int64, device=types.device)
    continues = record.ends_in_block
    if real is not None:
        first = real.long().argmax(dim=1)
        continues = continues & real.any(dim=1)
    if sequence is not None:
        continues = continues & (_at(sequence.expand_as(types), first) == 0)
    if bool((continues & _at(types, first)).any()):
        raise ValueError(
            "this call would extend a prefix block that is already in the cache, whose tokens could not see the new "
            "ones: pass the whole block in one call, or crop the cache to the block's start first."
        )


def _next_record(
    layout: TokenLayout,
    record: CacheRecord | None,
    batch: int,
    queries: int,
    position_ids: torch.Tensor,
    types: torch.Tensor | None,
    open_types: torch.Tensor | None,
) -> CacheRecord:
    device = position_ids.device
    index = torch.arange(queries, device=device)
    real = layout.real
    last = index[-1:].expand(batch) if real is None else torch.where(real, index, -1).amax(dim=1)
    some = last >= 0

    def at_last(values: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor:
        now = torch.zeros(batch, dtype=torch.bool, device=device)
        if values is not None:
            now = _at(values.expand(batch, queries), last)
        if before is None:
            return now & some if now.dtype == torch.bool else torch.where(some, now, -1)
        return torch.where(some, now, before)

    still_open = at_last(open_types, None if record is None else record.ends_in_envelope)
    if record is not None and open_types is not None:
        # Without a new border or a closing token, an envelope that was open before still is.
        unbroken = layout.sequence is None or (layout.sequence == 0).all(dim=1)
        still_open = still_open | (record.ends_in_envelope & unbroken)
    start = torch.zeros(batch, dtype=torch.int64, device=device) if record is None else record.sequence_start
    if layout.sequence is not None:
        sequence = layout.sequence.expand(batch, -1)
        final = _at(sequence, last)
        mine = (sequence == final[:, None]) & (sequence > 0)
        if real is not None:
            mine = mine & real
        start = torch.where(mine.any(dim=1), layout.past + mine.long().argmax(dim=1), start)
    return CacheRecord(
        length=layout.past + queries,
        rows=batch,
        ends_in_block=at_last(types, None if record is None else record.ends_in_block),
        ends_in_envelope=still_open,
        last_position=at_last(position_ids, None if record is None else record.last_position),
        sequence_start=start,
    )


__all__ = [
    "CacheRecord",
    "TokenLayout",
    "read_layout",
    "refuse_split_envelope",
    "values_are_readable",
    "warn_types_are_ignored",
]
