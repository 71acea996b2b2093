"""What tokens are: sequences, prefix blocks, envelopes, and where a prompt may be cut; rules over whole rows.

Definitions. A *sequence* ends where the position of a real token is not above that of the real token before it. A
*prefix block* is a maximal run of real tokens with type 1 or 2 within one sequence; type 2 opens a new block
even directly behind another one. Inside a block attention is bidirectional, everything else is causal. An *envelope*
is a span of ids that opens and closes a prompt; where no types are given, each closed envelope is a block.

One rule, one place: all of it is a function of the facts of a whole row, cached tokens first. What a call must know of
the past is derived, never remembered: past and new tokens are two slices of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass
class TokenLayout:
    """What the tokens of a row are, for one forward pass. Keys are the cached tokens and then the new ones.

    Attributes:
        past: number of cached positions before the first new token; a 0-d tensor where it lies on the device.
        count: number of new tokens.
        position_ids: int64 [batch or 1, count].
        real: bool [batch, keys], False at padding; None where every token is real.
        sequence: [batch, keys], index of the token's sequence; None where the row is one.
        block: [batch, keys], number of the token's prefix block, -1 for causal tokens; None where none is new.
        lead: where known, how many leading new tokens are one block in every row, with causal tokens behind them.
        sees_all: whether every real new token is known to see every real key.
    """

    past: int | torch.Tensor
    count: int
    position_ids: torch.Tensor
    real: torch.Tensor | None = None
    sequence: torch.Tensor | None = None
    block: torch.Tensor | None = None
    lead: int | None = None
    sees_all: bool = False


@dataclass
class StepLayout:
    """Tells a forward pass that `generate` made its tokens: real, causal, of the cached sequence.

    Attributes:
        padded: whether the prompt holds padding.
    """

    padded: bool


@dataclass
class PromptLayout:
    """The types of a prompt, as `generate` hands them from call to call.

    Attributes:
        types: int64 [batch, prompt], 0, 1 or 2; cached tokens first.
        stated: whether they were given rather than inferred.
        padded: whether the prompt holds padding.
    """

    types: torch.Tensor
    stated: bool
    padded: bool

    def widened(self, count: int) -> PromptLayout:
        """The types of `count` tokens of which these are the last: virtual tokens of an adapter open the prompt."""
        more = count - self.types.shape[1]
        if more <= 0:
            return self
        first = (self.types > 0).long().argmax(dim=1, keepdim=True)
        opened = self.types.scatter(1, first, self.types.gather(1, first).clamp(max=1))
        virtual = (self.types > 0).any(dim=1, keepdim=True).long().expand(-1, more)
        return PromptLayout(torch.cat([virtual, opened], dim=1), self.stated, self.padded)

    def part(self, start: int, count: int, rows: int) -> PromptLayout:
        """The types of `count` tokens from `start` on, of `rows` rows: beams repeat each row of the prompt."""
        types = F.pad(self.types, (0, max(0, start + count - self.types.shape[1])))[:, start : start + count]
        types = types.repeat_interleave(rows // types.shape[0], dim=0)
        # Always of one stride, on which compiled graphs depend.
        return PromptLayout(types.clone(memory_format=torch.contiguous_format), self.stated, self.padded)


def values_are_readable() -> bool:
    """Whether tensor values may decide control flow: not while compiling, exporting or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


# ---- rules over whole rows ------------------------------------------------------------------------------------------


def last_true(condition: torch.Tensor) -> torch.Tensor:
    """Index of the last True at or before each token, -1 where there is none; bool [batch, n] -> int64 [batch, n]."""
    # A running maximum, written so that every exporter knows it.
    index = torch.arange(condition.shape[1], device=condition.device).expand_as(condition)
    rank = condition.long().cumsum(dim=1)
    table = torch.full_like(F.pad(rank, (1, 0)), -1)
    table = table.scatter(1, torch.where(condition, rank, 0), torch.where(condition, index, -1))
    return table.gather(1, rank)


def next_true(condition: torch.Tensor) -> torch.Tensor:
    """Index of the first True at or after each token, n where there is none; bool [batch, n] -> int64 [batch, n]."""
    return condition.shape[1] - 1 - last_true(condition.flip(1)).flip(1)


def _before(index: torch.Tensor) -> torch.Tensor:
    """What a running index said at the token before; -1 at the first."""
    return F.pad(index[:, :-1], (1, 0), value=-1)


def at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The values [batch or 1, n] at an index [batch, m] of each row; an index outside reads the nearest value."""
    return values.expand(index.shape[0], -1).gather(1, index.clamp(min=0, max=values.shape[1] - 1))


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
        previous = _before(last_true(real))
        position_ids = position_ids.expand_as(real)
        border = real & (previous >= 0) & (position_ids <= at(position_ids, previous))
    return border.long().cumsum(dim=1)


def refuse_lost_borders(arguments: dict[str, Any], position_ids: torch.Tensor | None) -> None:
    """Refuses a packed row whose positions were dropped, given the arguments that forward names not.

    Raises:
        ValueError: offsets name several sequences, and no `position_ids` tell where they lie.
    """
    offsets = arguments.get("cu_seq_lens_q")
    if position_ids is None and offsets is not None and offsets.shape[-1] > 2:
        raise ValueError(
            f"`cu_seq_lens_q` names {offsets.shape[-1] - 1} packed sequences, and `position_ids`, which tell them "
            "apart, were not given. An adapter with virtual tokens drops them: train it on rows of one sequence (in "
            "TRL, without `packing` and `padding_free`)."
        )


def find_blocks(types: torch.Tensor, real: torch.Tensor | None, sequence: torch.Tensor | None) -> torch.Tensor:
    """Numbers the prefix blocks of each row.

    Args:
        types: int [batch, tokens]: 1 in a block, 2 where a block opens, anything else for causal tokens.
        real: [batch, tokens], False at padding; None where every token is real.
        sequence: as of `find_sequences`, or None.

    Returns:
        [batch, tokens], -1 for causal tokens and padding, otherwise the number of the block.
    """
    inside = (types == 1) | (types == 2)
    if real is not None:
        inside = inside & real
    previous = _before(last_true(torch.ones_like(inside) if real is None else real))
    inherits = (types == 1) & (previous >= 0) & (at(inside.long(), previous) == 1)
    if sequence is not None:
        sequence = sequence.expand_as(inside)
        inherits = inherits & (at(sequence, previous) == sequence)
    return torch.where(inside, (inside & ~inherits).long().cumsum(dim=1) - 1, -1)


def _run_starts(
    ids: torch.Tensor, run: Sequence[int], following: torch.Tensor, sequence: torch.Tensor
) -> torch.Tensor:
    """bool [batch, tokens]: where a run of ids begins that no border breaks; padding in between does not count.

    Args:
        following: index of the next real token, n where there is none.
    """
    found, index = ids == run[0], following
    for token in run[1:]:
        found = found & (index < ids.shape[1]) & (at(ids, index) == token) & (at(sequence, index) == sequence)
        index = torch.where(index < ids.shape[1], at(following, index), ids.shape[1])
    return found


def infer_token_types(
    ids: torch.Tensor,
    prefix_start: Sequence[int],
    prefix_end: Sequence[int],
    real: torch.Tensor | None = None,
    sequence: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the envelopes of each row: spans from an opening run of ids to the end of the next closing run.

    An opening run inside an envelope that is still open is part of its text. Reads no values, so that it can be
    compiled and captured.

    Args:
        ids: [batch, tokens]; -1 is no id.
        prefix_start, prefix_end: the ids that open and close a span, each in order. The config ensures that they
            cannot overlap.
        real: [batch, tokens], False at padding; None where every token is real.
        sequence: as of `find_sequences`; a span never crosses a border.

    Returns:
        Types int64 [batch, tokens]: 1 in a closed envelope, 2 on its first token where it stands directly behind
        another one, 0 elsewhere; and bool [batch, tokens], the tokens of an envelope that is still open.
    """
    length = ids.shape[1]
    if real is not None:
        ids = torch.where(real, ids, -1)
    present = torch.ones_like(ids, dtype=torch.bool) if real is None else real.expand_as(ids)
    previous = _before(last_true(present))
    following = length - 1 - _before(last_true(present.flip(1))).flip(1)
    whole = torch.zeros_like(ids) if sequence is None else sequence.expand_as(ids)
    opens = _run_starts(ids, prefix_start, following, whole)
    ends = _run_starts(ids.flip(1), prefix_end[::-1], length - 1 - previous.flip(1), whole.flip(1)).flip(1)

    fresh = F.pad(ends[:, :-1], (1, 0), value=True)
    if sequence is not None:
        sequence = sequence.expand_as(ids)
        fresh = fresh | F.pad(sequence[:, 1:] != sequence[:, :-1], (1, 0), value=False)
    opened = opens.long().cumsum(dim=1)
    before = at(opened - opens.long(), last_true(fresh))
    inside = (opened > before) & present
    end = next_true(ends)
    closed = inside & (end < length)
    meets = (previous >= 0) & at(ends.long(), previous).bool()
    if sequence is not None:
        closed = closed & (at(sequence, end) == sequence)
        meets = meets & (at(sequence, previous) == sequence)
    behind = closed & opens & (opened == before + 1) & meets & at(closed.long(), previous).bool()
    return closed.long() + behind.long(), inside & ~closed


def infer_token_type_ids(
    input_ids: torch.Tensor,
    prefix_start: int | Sequence[int],
    prefix_end: int | Sequence[int],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `token_type_ids` that the model infers from prompts, int64 [batch, tokens]: see `infer_token_types`.

    Args:
        input_ids: [batch, tokens].
        prefix_start, prefix_end: the id, or the ids in order, that open and close an envelope.
        attention_mask: [batch, tokens], 0 at padding.
    """
    runs = [[ids] if isinstance(ids, int) else list(ids) for ids in (prefix_start, prefix_end)]
    return infer_token_types(input_ids, *runs, None if attention_mask is None else attention_mask != 0)[0]


def recognise_embeddings(
    embeddings: torch.Tensor, vectors: dict[int, torch.Tensor], vocabulary: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which embeddings are those of certain tokens, and which of the leading ones are of no token.

    Args:
        embeddings: [batch, tokens, hidden].
        vectors: id -> [hidden].
        vocabulary: [vocab, hidden].

    Returns:
        ids int64 [batch, tokens], -1 where none of these; and bool [batch, tokens], True before the first of them
        where the vector is not in the vocabulary, as an adapter's virtual tokens are.
    """
    ids = torch.full(embeddings.shape[:2], -1, dtype=torch.int64, device=embeddings.device)
    for token, vector in vectors.items():
        ids = torch.where((embeddings == vector).all(dim=-1), token, ids)
    leading = (ids < 0).long().cumprod(dim=1).bool()
    # A few elements tell vectors apart, and keep the comparison with a whole vocabulary small.
    few = slice(0, min(8, embeddings.shape[-1]))
    width = int(leading.sum(dim=1).amax()) if bool((ids >= 0).any()) else 0
    known = (embeddings[:, :width, None, few] == vocabulary[None, None, :, few]).all(dim=-1).any(dim=-1)
    return ids, leading & ~F.pad(known, (0, ids.shape[1] - width), value=True)


# ---- where a prompt may be cut --------------------------------------------------------------------------------------


def choose_cuts(
    types: torch.Tensor | None, mask: torch.Tensor | None, start: int, total: int, chunk_size: int
) -> list[int]:
    """Where a prompt may be cut into chunks: nowhere inside a prefix block of any row.

    Args:
        types: [batch, total], 1 and 2 inside prefix blocks; None where there is none.
        mask: [batch, total], 0 at padding, or None. Padding does not end a block.
        start: first position that is to be computed.
        total: end of the prompt.
        chunk_size: target number of tokens between two cuts, at least 1.

    Returns:
        Positions in rising order, each the first of a new chunk, all in start + 1 ... total - 1.

    Raises:
        ValueError: `chunk_size` below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"`prefill_chunk_size` is {chunk_size}: it must be at least 1.")
    if types is None:
        return list(range(start + chunk_size, total, chunk_size))
    real = torch.ones_like(types, dtype=torch.bool) if mask is None else mask[:, :total].to(types.device) != 0
    block = find_blocks(types, real, None)
    # The blocks of the nearest real tokens on either side of a cut.
    before, after = last_true(real)[:, :-1], next_true(real)[:, 1:]
    left = torch.where(before >= 0, at(block, before), -1)
    right = torch.where(after < total, at(block, after), -1)
    splits = ((left >= 0) & (left == right)).any(dim=0)
    allowed = [i + 1 for i, split in enumerate(splits.tolist()) if not split and i + 1 > start]
    cuts, begin = [], start
    while total - begin > chunk_size:
        fitting = [cut for cut in allowed if begin < cut <= begin + chunk_size]
        later = [cut for cut in allowed if cut > begin + chunk_size]
        if not fitting and not later:
            break
        begin = fitting[-1] if fitting else later[0]
        cuts.append(begin)
    return cuts


__all__ = [
    "PromptLayout",
    "StepLayout",
    "TokenLayout",
    "at",
    "choose_cuts",
    "find_blocks",
    "find_sequences",
    "infer_token_type_ids",
    "infer_token_types",
    "last_true",
    "next_true",
    "recognise_embeddings",
    "refuse_lost_borders",
    "values_are_readable",
]
