"""Sequences, prefix blocks and prompt envelopes, found in rows of tokens.

The words are these. A *prefix block* is a maximal run of real tokens with type 1 within one sequence; inside it
attention is bidirectional. Everything else is causal. A *sequence* ends where the position of a real token is not
above that of the real token before it in the row. Nothing sees padding, and nothing sees another sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _previous_real(real: torch.Tensor) -> torch.Tensor:
    """Index of the last real token before each token, -1 where there is none; [batch, tokens] -> the same shape."""
    index = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, index, -1).cummax(dim=1)[0]
    return F.pad(last[:, :-1], (1, 0), value=-1)


def find_sequences(position_ids: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Numbers the packed sequences of each row.

    Args:
        position_ids: [batch, tokens].
        real: [batch, tokens], False at padding; None where every token is real.

    Returns:
        [batch, tokens], 0 for the first sequence of a row, rising by one at each border. Padding belongs to the
        sequence before it.
    """
    if real is None:
        border = F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0), value=False)
    else:
        position_ids = position_ids.expand_as(real)
        previous = _previous_real(real)
        before = position_ids.gather(1, previous.clamp(min=0))
        border = real & (previous >= 0) & (position_ids <= before)
    return border.cumsum(dim=1)


def find_blocks(types: torch.Tensor, real: torch.Tensor | None, sequence: torch.Tensor | None) -> torch.Tensor:
    """Numbers the prefix blocks of each row.

    Args:
        types: bool [batch, tokens], True for tokens of a prefix block.
        real: [batch, tokens], False at padding; None where every token is real.
        sequence: as of `find_sequences`, or None.

    Returns:
        [batch, tokens], -1 for causal tokens and padding, otherwise the number of the block.
    """
    if real is None:
        inherits = F.pad(types[:, :-1], (1, 0), value=False)
        if sequence is not None:
            inherits = inherits & F.pad(sequence[:, 1:] == sequence[:, :-1], (1, 0), value=False)
    else:
        types = types & real
        previous = _previous_real(real)
        at = previous.clamp(min=0)
        inherits = (previous >= 0) & types.gather(1, at)
        if sequence is not None:
            sequence = sequence.expand_as(types)
            inherits = inherits & (sequence.gather(1, at) == sequence)
    number = (types & ~inherits).cumsum(dim=1) - 1
    return torch.where(types, number, -1)


def infer_token_types(
    input_ids: torch.Tensor,
    bos_token_id: int,
    prefix_end_token_id: int,
    real: torch.Tensor | None = None,
    sequence: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the prompt envelopes: each span from a bos token up to and including the next prefix end token.

    Reads no values, so that it can be compiled and captured.

    Args:
        input_ids: [batch, tokens].
        bos_token_id: opens a span.
        prefix_end_token_id: closes it.
        real: [batch, tokens], False at padding; None where every token is real.
        sequence: as of `find_sequences`; a span never crosses a border.

    Returns:
        Two bool tensors [batch, tokens]: the tokens of closed spans, and those of a span that is still open.
    """
    opens, ends = input_ids == bos_token_id, input_ids == prefix_end_token_id
    if real is not None:
        opens, ends = opens & real, ends & real
    length = input_ids.shape[1]
    index = torch.arange(length, device=input_ids.device)
    fresh = F.pad(ends[:, :-1], (1, 0), value=True)
    if sequence is not None:
        fresh = fresh | F.pad(sequence[:, 1:] != sequence[:, :-1], (1, 0), value=False)
    start = torch.where(fresh, index, 0).cummax(dim=1)[0]
    opened = opens.cumsum(dim=1)
    inside = opened > (opened - opens.long()).gather(1, start)
    next_end = torch.where(ends, index, length).flip(1).cummin(dim=1)[0].flip(1)
    closed = next_end < length
    if sequence is not None:
        sequence = sequence.expand_as(input_ids)
        closed = closed & (sequence.gather(1, next_end.clamp(max=length - 1)) == sequence)
    return inside & closed, inside & ~closed


def infer_token_type_ids(
    input_ids: torch.Tensor, bos_token_id: int, prefix_end_token_id: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The `token_type_ids` that the model infers from a prompt: 1 inside closed envelopes, 0 elsewhere.

    Args:
        input_ids: [batch, tokens].
        bos_token_id: opens an envelope.
        prefix_end_token_id: closes it.
        attention_mask: [batch, tokens], 0 at padding.

    Returns:
        int64 [batch, tokens].
    """
    real = None if attention_mask is None else attention_mask.bool()
    return infer_token_types(input_ids, bos_token_id, prefix_end_token_id, real)[0].long()


__all__ = ["find_blocks", "find_sequences", "infer_token_type_ids", "infer_token_types"]
