"""Which tokens attend to which: turns a layout into what each attention backend needs, and computes the attention.

`plan_attention` runs once per forward pass and `attend` once per attention call; no other place builds a mask.

Flash attention takes no mask, only full and lower-right causal attention of a run of queries over a run of keys. So a
prefix block is one entry of a full variable-length call (its queries over everything from the start of its sequence to
the end of the block), and a causal run one entry of a causal call (over everything up to its own end).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .kernels_hrm_text import attention_of_one_query, fused_gate, serves, single_query_attention
from .layout_hrm_text import TokenLayout, values_are_readable
from .versions_hrm_text import flash_kernel, is_flash


logger = logging.get_logger(__name__)


FLASH = "flash"


@dataclass
class AttentionPlan:
    """What every attention call of one forward pass does.

    Attributes:
        backend: "eager", "sdpa", "flex_attention" or "flash".
        mask: bool [batch or 1, 1, queries or 1, keys], True where the query sees the key; None where `is_causal` is
            enough. A caller's own 4-D mask may hold floats, which are added to the scores.
        is_causal: with no mask, whether query i sees keys 0..i (True) or everything (False).
        block_queries: where set, that many leading queries see the cache and one another, and only the remaining ones
            use `mask`. This is prefix + response without a dense mask.
        key_length: where set, only that many leading positions of a static cache are read.
        block_mask: the mask of flex attention.
        flash: the variable-length calls of flash attention.
        products: whether single queries go through batched matrix products; None measures on the CPU.
        rotary: the rotary tables of the new tokens, float32. They lie here, out of reach of what casts arguments.
        cache_kwargs: what the static slots of earlier releases of transformers ask for.
        weights: where set, collects the weights [batch, heads, queries, keys] of each call, in slot order.
    """

    backend: str
    mask: torch.Tensor | None = None
    is_causal: bool = False
    block_queries: int | None = None
    key_length: int | None = None
    block_mask: Any = None
    flash: FlashPlan | None = None
    products: bool | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    cache_kwargs: dict[str, Any] | None = None
    weights: list[torch.Tensor] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionPlan:
        """Copies the plan to another device, as the hooks of a model spread over devices ask."""
        moved = dict(vars(self))
        for name in ("mask", "flash"):
            if moved[name] is not None:
                moved[name] = moved[name].to(device, non_blocking=non_blocking)
        if self.rotary is not None:
            moved["rotary"] = tuple(table.to(device, non_blocking=non_blocking) for table in self.rotary)
        if self.cache_kwargs is not None:
            moved["cache_kwargs"] = {name: value.to(device) for name, value in self.cache_kwargs.items()}
        if self.block_mask is not None:
            moved["block_mask"] = self.block_mask.to(device)
        return AttentionPlan(**moved)

    def whole_mask(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """The plan of a pass without a cache as one mask [batch, 1, tokens, tokens], which any layer takes.

        Raises:
            ValueError: the plan is one of flex or flash attention, which have no such mask.
        """
        if self.block_mask is not None or self.flash is not None:
            raise ValueError(
                f"layers that are called one by one take a dense mask, and {self.backend!r} attention has none: call "
                "`model.set_attn_implementation('sdpa')` first."
            )
        mask = self.mask
        if mask is None or self.block_queries:
            whole = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
            whole = whole.tril() if self.is_causal else whole
            mask = whole if mask is None else _behind_block(whole, mask, self.block_queries)
        return mask.expand(batch, -1, tokens, -1)


def _behind_block(whole: torch.Tensor, mask: torch.Tensor, lead: int) -> torch.Tensor:
    """All True, [1, 1, tokens, tokens], with the mask of the queries behind a leading block put in its place."""
    block = whole[:, :, :lead].clone()
    block[..., lead:] = False
    return torch.cat((block.expand(mask.shape[0], -1, -1, -1), mask), dim=2)


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
        moved = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return FlashCall(**moved)


@dataclass
class FlashPlan:
    """The calls of one forward pass, and the kernel `(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, ...)`."""

    calls: list[FlashCall]
    kernel: Callable[..., Any]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FlashPlan:
        return FlashPlan([call.to(device, non_blocking) for call in self.calls], self.kernel)


# ---- from a layout to a plan ----------------------------------------------------------------------------------------


def choose_backend(config: Any, needs_weights: bool = False) -> str:
    """The backend that the config's attention implementation asks for.

    Raises:
        ValueError: the implementation is not supported.
    """
    name = config._attn_implementation or "sdpa"
    if needs_weights and name != "eager":
        logger.warning_once("`output_attentions=True` needs the attention weights: this call uses eager attention.")
        return "eager"
    if is_flash(name):
        return FLASH
    if name not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"HRM-Text does not support the attention implementation {name!r}: call `model.set_attn_implementation` "
            "with 'sdpa', 'eager', 'flex_attention' or a flash attention."
        )
    return name


def plan_whole_mask(mask: torch.Tensor, backend: str, key_length: int | None = None) -> AttentionPlan:
    """A plan that follows a caller's own mask [batch or 1, 1 or heads, queries, keys].

    Args:
        mask: bool (True sees) or floats that are added to the scores.
        backend: of `choose_backend`.
        key_length: as of the plan.

    Raises:
        ValueError: a mask of integers, or a backend that takes none.
    """
    if backend not in ("eager", "sdpa"):
        raise ValueError(f"a 4-D `attention_mask` cannot be given to {backend!r} attention: use 'sdpa' or 'eager'.")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"a 4-D `attention_mask` of {mask.dtype} is ambiguous, since a 1 could mark a visible key or be added to "
            "the scores: give `mask.bool()`, True where a query sees a key, or an additive mask of floats."
        )
    # Rows that see nothing are padding; they may see anything, since nothing sees them.
    if mask.dtype is torch.bool:
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        mask = mask.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    return AttentionPlan(backend, mask=mask, key_length=key_length)


def plan_attention(
    layout: TokenLayout, config: Any, rows: int, capacity: int | None, backend: str, static_shapes: bool = False
) -> AttentionPlan:
    """Turns a layout into what the backend needs, with as little mask as the layout allows.

    Args:
        layout: what the tokens are.
        config: the model's config.
        rows: the batch.
        capacity: number of positions of a static cache, None for a growing one or none at all.
        backend: of `choose_backend`.
        static_shapes: read all of a static cache behind a mask, so that the plan is of one shape at every step.

    Raises:
        ValueError: more tokens than a static cache holds, or flash attention while compiling.
    """
    past, count, device = layout.past, layout.count, layout.position_ids.device
    past_is_known = isinstance(past, int)
    if capacity is not None and past_is_known and past + count > capacity:
        raise ValueError(
            f"the static cache has {capacity} positions and this call needs {past} + {count}: create it with a larger "
            "`max_cache_len`, or use a growing cache."
        )
    # The weights that eager attention gives back span a static cache, as they do in the library's classes.
    static_window = capacity is not None and (static_shapes or not past_is_known or backend == "eager")
    keys = capacity if static_window else past + count
    key_length = keys if capacity is not None and not static_window else None

    if backend == FLASH and count == 1 and not static_window:
        # The cache of one query is read once either way, and a mask of keys costs less than a copy without padding.
        backend = "sdpa"
    if backend == FLASH:
        if static_window or not values_are_readable():
            raise ValueError(
                "flash attention needs the lengths of the sequences, which are unknown while compiling, exporting or "
                "capturing: call `model.set_attn_implementation('sdpa')` first."
            )
        flash = plan_flash(layout, rows, flash_kernel(config._attn_implementation))
        return AttentionPlan(backend, flash=flash, key_length=key_length)
    if backend == "flex_attention":
        # A single query has no blocks to skip, and every length of the cache would be compiled anew; and flex has no
        # backward pass on CPUs.
        if count > 1 and not (device.type == "cpu" and torch.is_grad_enabled()):
            return AttentionPlan(backend, block_mask=_flex_mask(layout, rows, keys), key_length=key_length)
        backend = "sdpa"
    if not static_window and layout.sequence is None:
        if layout.real is None:
            simple = _plan_without_padding(backend, layout, keys, key_length)
            if simple is not None:
                return simple
        elif layout.sees_all:
            return AttentionPlan(backend, mask=_key_mask(layout.real[:, :keys]), key_length=key_length)
    return AttentionPlan(backend, mask=visibility(layout, rows, keys), key_length=key_length)


def _plan_without_padding(
    backend: str, layout: TokenLayout, keys: int, key_length: int | None
) -> AttentionPlan | None:
    """The plans that need no dense mask, or None where the layout is not one of them."""
    count, device = layout.count, layout.position_ids.device
    if layout.sees_all or count == 1:
        return AttentionPlan(backend, key_length=key_length)
    if layout.block is None:
        if isinstance(layout.past, int) and layout.past == 0 and backend == "sdpa":
            return AttentionPlan(backend, is_causal=True, key_length=key_length)
        return AttentionPlan(backend, mask=_lower_right(count, keys, device), key_length=key_length)
    if not layout.lead or layout.lead < 0 or backend == "eager":
        return None
    rest = _lower_right(count - layout.lead, keys, device)
    return AttentionPlan(backend, mask=rest, block_queries=layout.lead, key_length=key_length)


def _lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, queries, keys]: the last query sees every key, the one before it all but the last, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def _key_mask(real: torch.Tensor) -> torch.Tensor:
    """bool [batch, 1, 1, keys]. A row with no real key at all sees everything, so that its softmax stays finite."""
    return (real | ~real.any(dim=1, keepdim=True))[:, None, None]


def visibility(layout: TokenLayout, rows: int, keys: int) -> torch.Tensor:
    """The dense mask, bool [batch or 1, 1, queries, keys], True where the query sees the key.

    Reads no values. A padded query sees the real keys before it, or itself where there is none: so its softmax stays
    finite, and what comes out at padding depends neither on the rest of the batch nor on what is yet to come, which
    matters to those who generate from a prompt that is padded on the right.
    """
    device = layout.position_ids.device
    rule = visibility_rule(layout, rows, keys)
    row = torch.arange(rows, device=device)[:, None, None]
    if layout.real is None and layout.sequence is None and layout.block is None:
        row = row[:1]
    query = torch.arange(layout.count, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    return rule(row, query, key).expand(row.shape[0], layout.count, keys)[:, None]


def visibility_rule(layout: TokenLayout, rows: int, keys: int) -> Callable[..., torch.Tensor]:
    """The rule itself: a function of row, query and key indices (tensors that broadcast) to bool.

    Written so that flex attention can trace it for single indices and `visibility` can evaluate it for all at once.
    """
    past = layout.past

    def over_keys(values: torch.Tensor | None, fill: int) -> torch.Tensor | None:
        # A static cache has keys behind the last token.
        if values is None:
            return None
        return F.pad(values[:, :keys].expand(rows, -1), (0, max(0, keys - values.shape[1])), value=fill)

    real, block = over_keys(layout.real, False), over_keys(layout.block, -1)
    sequence = over_keys(layout.sequence, 0)
    nothing_yet = None if real is None else real.long().cumsum(dim=1) == 0

    def sees(row, query, key):
        at = query + past
        visible = key <= at
        if block is not None:
            visible = visible | ((block[row, at] >= 0) & (block[row, at] == block[row, key]))
        if sequence is not None:
            visible = visible & (sequence[row, at] == sequence[row, key])
        if real is not None:
            filler = (real[row, key] & (key <= at)) | (nothing_yet[row, at] & (key == at))
            visible = (visible & real[row, key] & real[row, at]) | (filler & ~real[row, at])
        return visible

    return sees


def _flex_mask(layout: TokenLayout, rows: int, keys: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rule = visibility_rule(layout, rows, keys)

    def sees(row, head, query, key):
        return rule(row, query, key)

    return create_block_mask(sees, rows, None, layout.count, keys, device=layout.position_ids.device)


def plan_flash(layout: TokenLayout, rows: int, kernel: Callable[..., Any]) -> FlashPlan:
    """Cuts every row into runs (blocks and causal stretches of one sequence, without padding).

    Args:
        layout: one whose values can be read.
        rows: the batch.
        kernel: the variable-length flash attention.
    """
    past, count = layout.past, layout.count
    keys = past + count

    given = [values for values in (layout.real, layout.sequence, layout.block) if values is not None]
    # One read from the device for all of them.
    read = iter(torch.stack([values[:, :keys].expand(rows, -1).long() for values in given]).tolist() if given else ())

    def lists(values: torch.Tensor | None, fill: int) -> list[list[int]]:
        return [[fill] * keys] * rows if values is None else next(read)

    real, sequence, block = lists(layout.real, 1), lists(layout.sequence, 0), lists(layout.block, -1)
    entries: dict[bool, list[tuple[list[int], list[int]]]] = {False: [], True: []}
    for row in range(rows):
        present = [i for i in range(keys) if real[row][i]]
        new = [i for i in present if i >= past]
        runs: list[list[int]] = []
        for i in new:
            if runs and (sequence[row][i], block[row][i]) == (sequence[row][runs[-1][-1]], block[row][runs[-1][-1]]):
                runs[-1].append(i)
            else:
                runs.append([i])
        for run in runs:
            seen = [i for i in present if i <= run[-1] and sequence[row][i] == sequence[row][run[0]]]
            queries = [row * count + i - past for i in run]
            entries[block[row][run[0]] < 0].append((queries, [row * keys + i for i in seen]))
    device = layout.position_ids.device
    calls = [_flash_call(causal, entries[causal], device) for causal in (False, True) if entries[causal]]
    return FlashPlan(calls, kernel)


def _flash_call(causal: bool, entries: list[tuple[list[int], list[int]]], device: torch.device) -> FlashCall:
    def flat(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        lengths = [len(one) for one in lists]
        index = torch.tensor([i for one in lists for i in one], dtype=torch.int64, device=device)
        offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        return index, offsets, max(lengths)

    query_index, query_offsets, max_queries = flat([queries for queries, _ in entries])
    key_index, key_offsets, max_keys = flat([keys for _, keys in entries])
    return FlashCall(causal, query_index, key_index, query_offsets, key_offsets, max_queries, max_keys)


# ---- attention itself --------------------------------------------------------------------------------------------


def attend(
    plan: AttentionPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    module: torch.nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated attention of the new tokens over the cache and themselves.

    Args:
        plan: of `plan_attention`.
        query: [batch, heads, queries, head_dim].
        key, value: [batch, heads, keys, head_dim].
        gate: [batch, queries, heads, head_dim]; its sigmoid is a factor on the output.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        module: the calling layer, which transformers' flex attention asks for.

    Returns:
        [batch, queries, heads, head_dim], and the weights [batch, heads, queries, keys] from the eager backend.
    """
    if plan.key_length is not None:
        key, value = key[:, :, : plan.key_length], value[:, :, : plan.key_length]
    if plan.backend == "eager":
        output, weights = _eager(plan, query, key, value, scaling, dropout)
        return gated(output, gate), weights
    if plan.backend == FLASH:
        return gated(_flash(plan.flash, query, key, value, scaling, dropout), gate), None
    if plan.backend == "flex_attention":
        return gated(_flex(plan, query, key, value, scaling, dropout, module).transpose(1, 2), gate), None
    parts = [part.transpose(1, 2) for part in _sdpa(plan, query, key, value, scaling, dropout)]
    if len(parts) == 1:
        return gated(parts[0], gate), None
    # Gated before they are joined: backward keeps each part for the attention that made it, and would keep what is
    # joined besides, for the gate.
    gates = gate.split([part.shape[1] for part in parts], dim=1)
    return torch.cat([gated(*pair) for pair in zip(parts, gates)], dim=1), None


def gated(output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """output * sigmoid(gate), of one shape."""
    return fused_gate(output, gate) if serves(output) and serves(gate) else output * gate.sigmoid()


def _sdpa(
    plan: AttentionPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> tuple[torch.Tensor, ...]:
    """[batch, heads, queries, head_dim], in one part or in two: the queries of the block and the rest."""
    if plan.block_queries is None:
        mask = plan.mask
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.to(query.dtype)
        if plan.products is None:
            attention = attention_of_one_query(query, key)
        else:
            attention = single_query_attention if plan.products and query.shape[2] == 1 else None
        if attention is not None:
            return (attention(query, key, value, mask, scaling),)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=plan.is_causal, scale=scaling
        )
        return (output,)
    lead = plan.block_queries
    seen = key.shape[2] - query.shape[2] + lead
    # Split and not sliced: its backward joins the two gradients, where that of slices fills a whole one for each.
    of_block, of_rest = query.split((lead, query.shape[2] - lead), dim=2)
    block = F.scaled_dot_product_attention(
        of_block, key[:, :, :seen], value[:, :, :seen], dropout_p=dropout, scale=scaling
    )
    rest = F.scaled_dot_product_attention(of_rest, key, value, attn_mask=plan.mask, dropout_p=dropout, scale=scaling)
    return block, rest


def _flex(
    plan: AttentionPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    dropout: float,
    module: torch.nn.Module | None,
) -> torch.Tensor:
    if dropout > 0:
        raise ValueError(
            "flex attention has no dropout: use 'sdpa' or 'eager', or set `config.attention_dropout=0.0`."
        )
    if query.device.type == "cpu":
        # Uncompiled: inductor's CPU kernel fails on the second length, and compiles for seconds.
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=plan.block_mask, scale=scaling)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    return flex(module, query, key, value, plan.block_mask, scaling=scaling)[0].transpose(1, 2)


def _eager(
    plan: AttentionPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    if plan.mask is not None and plan.mask.dtype is torch.bool:
        scores = scores.masked_fill(~plan.mask, torch.finfo(scores.dtype).min)
    elif plan.mask is not None:
        scores = scores + plan.mask.to(scores.dtype)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    return (weights @ value).transpose(1, 2), weights


def _flash(
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


__all__ = [
    "AttentionPlan",
    "attend",
    "choose_backend",
    "plan_attention",
    "plan_whole_mask",
    "visibility",
]
