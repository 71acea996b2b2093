"""PrefixLM through flash attention, exactly: variable-length calls, one entry for each run of tokens.

Flash attention knows no masks, only full and lower-right causal attention of a run of queries over a run of keys. A
prefix block is one entry of a full call (its queries over everything from the start of its sequence to the end of the
block), a causal run one entry of a causal call (over everything from the start of its sequence to its own end).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass
class FlashCall:
    """One variable-length call.

    Attributes:
        causal: lower-right causal, or full.
        query_index: int64 [total queries], into the flattened [batch * queries].
        key_index: int64 [total keys], into the flattened [batch * keys].
        query_offsets, key_offsets: int32 [entries + 1], where each entry starts.
        max_queries, max_keys: the longest entry.
    """

    causal: bool
    query_index: torch.Tensor
    key_index: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    max_queries: int
    max_keys: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FlashCall:
        names = ("query_index", "key_index", "query_offsets", "key_offsets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})


@dataclass
class FlashPlan:
    """The calls of one forward pass, and the kernel `(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, ...)`."""

    calls: list[FlashCall]
    kernel: Callable[..., Any]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FlashPlan:
        return replace(self, calls=[call.to(device, non_blocking) for call in self.calls])


def plan_flash(layout: Any, batch: int, queries: int, kernel: Callable[..., Any], device: torch.device) -> FlashPlan:
    """Cuts every row into runs (blocks and causal stretches of one sequence, without padding).

    Args:
        layout: a `TokenLayout` whose values can be read.
        batch: number of rows.
        queries: number of new tokens.
        kernel: the variable-length flash attention.
        device: where the index tensors go.
    """
    past, keys = layout.past, layout.past + queries

    def rows(values: torch.Tensor | None, fill: int) -> list[list[int]]:
        if values is None:
            return [[fill] * queries] * batch
        return values.expand(batch, -1).long().tolist()

    real, sequence, block = rows(layout.real, 1), rows(layout.sequence, 0), rows(layout.block, -1)
    visible = None if layout.past_visible is None else layout.past_visible[:, :past].expand(batch, -1).tolist()
    entries: dict[bool, list[tuple[list[int], list[int]]]] = {False: [], True: []}
    for row in range(batch):
        cached = range(past) if visible is None else [i for i in range(past) if visible[row][i]]
        seen = [row * keys + i for i in cached]
        run: list[int] = []
        of: tuple[int, int] | None = None
        for i in range(queries):
            if not real[row][i]:
                continue
            this = (sequence[row][i], block[row][i])
            if this != of:
                if run:
                    entries[of[1] < 0].append((run, list(seen)))
                if this[0] != (of[0] if of is not None else 0):
                    seen = []
                run, of = [], this
            run.append(row * queries + i)
            seen.append(row * keys + past + i)
        if run:
            entries[of[1] < 0].append((run, seen))
    calls = [_call(causal, entries[causal], device) for causal in (False, True) if entries[causal]]
    return FlashPlan(calls, kernel)


def _call(causal: bool, entries: list[tuple[list[int], list[int]]], device: torch.device) -> FlashCall:
    def flat(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        lengths = [len(one) for one in lists]
        index = torch.tensor([i for one in lists for i in one], dtype=torch.int64, device=device)
        offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        return index, offsets, max(lengths)

    query_index, query_offsets, max_queries = flat([q for q, _ in entries])
    key_index, key_offsets, max_keys = flat([k for _, k in entries])
    return FlashCall(causal, query_index, key_index, query_offsets, key_offsets, max_queries, max_keys)


def flash_attend(
    plan: FlashPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    """Attention through the calls of the plan; padded queries give zeros.

    Args:
        plan: of `plan_flash`.
        query: [batch, heads, queries, head_dim].
        key, value: [batch, heads, keys, head_dim].
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        [batch, queries, heads, head_dim].
    """
    batch, heads, queries, head_dim = query.shape
    flat_query = query.transpose(1, 2).reshape(-1, heads, head_dim)
    flat_key = key.transpose(1, 2).reshape(-1, heads, head_dim)
    flat_value = value.transpose(1, 2).reshape(-1, heads, head_dim)
    output = torch.zeros_like(flat_query)
    for call in plan.calls:
        part = plan.kernel(
            flat_query[call.query_index],
            flat_key[call.key_index],
            flat_value[call.key_index],
            cu_seqlens_q=call.query_offsets,
            cu_seqlens_k=call.key_offsets,
            max_seqlen_q=call.max_queries,
            max_seqlen_k=call.max_keys,
            softmax_scale=scaling,
            causal=call.causal,
            **({"dropout_p": dropout} if dropout else {}),
        )
        part = part[0] if isinstance(part, tuple) else part
        output = output.index_copy(0, call.query_index, part)
    return output.view(batch, queries, heads, head_dim)
