"""Who may see whom: from a layout of the new tokens to what each attention backend needs.

`plan_attention` runs once a forward pass and `attend` once an attention call; no other place builds a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .flash_hrm_text import FlashPlan, flash_attend, plan_flash
from .layout_hrm_text import TokenLayout, read_layout, values_are_readable
from .operations_hrm_text import gated
from .single_query_hrm_text import single_query_attention, single_query_pays
from .versions_hrm_text import flash_kernel, is_flash, static_capacity


logger = logging.get_logger(__name__)


FLASH = "flash"


@dataclass
class AttentionPlan:
    """What every attention call of one forward pass does.

    Attributes:
        backend: "eager", "sdpa", "flex_attention" or "flash".
        mask: bool [batch or 1, 1, queries or 1, keys], True where the query sees the key; None where `is_causal` says
            it all. A caller's own 4-D mask may hold floats, which are added to the scores.
        is_causal: with no mask, whether query i sees keys 0..i (True) or everything (False).
        block_queries: where set, that many leading queries see the cache and one another, and only the remaining ones
            use `mask`. This is prefix + response without a dense mask.
        key_length: where set, only that many leading positions of a static cache are read.
        block_mask: the mask of flex attention.
        flash: the variable-length calls of flash attention.
        products: whether single queries go through batched matrix products; None measures on the CPU.
    """

    backend: str
    mask: torch.Tensor | None = None
    is_causal: bool = False
    block_queries: int | None = None
    key_length: int | None = None
    block_mask: Any = None
    flash: FlashPlan | None = None
    products: bool | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AttentionPlan:
        """Copies the plan to another device, as the hooks of a model spread over devices ask."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("mask", "flash")
            if (value := getattr(self, name)) is not None
        }
        if self.block_mask is not None:
            moved["block_mask"] = self.block_mask.to(device)
        return replace(self, **moved)


# ---- from the arguments of a call to a plan -------------------------------------------------------------------------


def prepare_attention(
    config: Any,
    shape: tuple[int, int],
    device: torch.device,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    cache: Any = None,
    cache_position: torch.Tensor | None = None,
    trusted: bool = False,
    needs_weights: bool = False,
    static_shapes: bool = False,
) -> tuple[AttentionPlan, torch.Tensor]:
    """From the arguments of a forward pass to its plan.

    Args:
        config: the model's config.
        shape: rows and new tokens.
        device: where the tokens are.
        attention_mask: 2-D, or a whole 4-D mask [batch, 1, queries, keys] (bool, or added to the scores), which
            decides alone.
        needs_weights: whether the attention weights are asked for, which only the eager backend gives.
        static_shapes: as of `plan_attention`. The other arguments are those of `read_layout`.

    Returns:
        The plan, and position_ids [batch or 1, new tokens].

    Raises:
        ValueError: arguments that do not fit, or an attention implementation that cannot be served.
    """
    backend = _choose_backend(config, needs_weights)
    whole_mask = None
    if attention_mask is not None and attention_mask.dim() == 4:
        if token_type_ids is not None:
            raise ValueError(
                "a 4-D `attention_mask` and `token_type_ids` were given, and both say who sees whom: give a 2-D "
                "`attention_mask` with `token_type_ids`, or the 4-D mask alone."
            )
        whole_mask, attention_mask, trusted = attention_mask, None, True
    layout, position_ids = read_layout(
        config,
        *shape,
        device,
        input_ids,
        attention_mask,
        position_ids,
        token_type_ids,
        cache,
        cache_position,
        trusted,
    )
    if whole_mask is not None:
        return _plan_whole_mask(whole_mask, backend, layout), position_ids
    kernel = flash_kernel(config._attn_implementation) if backend == FLASH else None
    plan = plan_attention(layout, backend, *shape, static_capacity(cache), device, kernel, static_shapes)
    return plan, position_ids


def _choose_backend(config: Any, needs_weights: bool) -> str:
    name = config._attn_implementation or "sdpa"
    if needs_weights and name != "eager":
        logger.warning_once("`output_attentions=True` needs the weights: this call runs the eager attention.")
        return "eager"
    if is_flash(name):
        return FLASH
    if name not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"the attention implementation {name!r} is not one that HRM-Text knows how to give prefix blocks to: "
            "use 'sdpa', 'eager', 'flex_attention' or a flash attention through `model.set_attn_implementation`."
        )
    return name


def _plan_whole_mask(mask: torch.Tensor, backend: str, layout: TokenLayout) -> AttentionPlan:
    """A plan that follows a caller's 4-D mask, bool (True sees) or floats that are added to the scores."""
    if backend not in ("eager", "sdpa"):
        raise ValueError(f"a 4-D `attention_mask` cannot be given to {backend!r} attention: use 'sdpa' or 'eager'.")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"a 4-D `attention_mask` of {mask.dtype} could mean a 1 that is seen or one that is added: give "
            "`mask.bool()`, True where a query sees a key, or floats that are added."
        )
    # Rows that see nothing are padding; they may see anything, since nothing sees them.
    if mask.dtype is torch.bool:
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    else:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        mask = mask.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    return AttentionPlan(backend, mask=mask, key_length=mask.shape[-1] if isinstance(layout.past, int) else None)


# ---- from a layout to a plan -------------------------------------------------------------------------------------


def plan_attention(
    layout: TokenLayout,
    backend: str,
    batch: int,
    queries: int,
    capacity: int | None,
    device: torch.device,
    flash_kernel: Any = None,
    static_shapes: bool = False,
) -> AttentionPlan:
    """Turns a layout into what the backend needs, with as little mask as the layout allows.

    Args:
        layout: what the new tokens are.
        backend: "eager", "sdpa", "flex_attention" or "flash".
        batch: number of rows.
        queries: number of new tokens.
        capacity: number of positions of a static cache, None for a growing one or none at all.
        device: where masks are built.
        flash_kernel: the variable-length flash attention, for backend "flash".
        static_shapes: read all of a static cache behind a mask, so that the plan is of one shape at every step.

    Raises:
        ValueError: more tokens than a static cache holds, or flash attention while compiling.
    """
    past_is_known = isinstance(layout.past, int)
    if capacity is not None and past_is_known and layout.past + queries > capacity:
        raise ValueError(
            f"the static cache holds {capacity} positions and {layout.past} + {queries} are needed: create it with a "
            "larger `max_cache_len`, or use a growing cache."
        )
    # The weights that eager attention gives back span a static cache, as they do in the library's classes.
    static_window = capacity is not None and (static_shapes or not past_is_known or backend == "eager")
    keys = capacity if static_window else layout.past + queries
    plan = AttentionPlan(backend, key_length=keys if capacity is not None and not static_window else None)

    if backend == FLASH:
        if static_window or not values_are_readable():
            raise ValueError(
                "flash attention needs the lengths of the sequences, which are unknown while compiling, exporting or "
                "capturing: call `model.set_attn_implementation('sdpa')` first."
            )
        return replace(plan, flash=plan_flash(layout, batch, queries, flash_kernel, device))
    if backend == "flex_attention":
        # A single query has no blocks to skip, and every length of the cache would be compiled anew; and flex has no
        # backward pass on processors.
        if queries > 1 and not (device.type == "cpu" and torch.is_grad_enabled()):
            return replace(plan, block_mask=_flex_mask(layout, batch, queries, keys, device))
        plan = replace(plan, backend="sdpa")

    nothing_hidden = layout.real is None and layout.past_visible is None and layout.sequence is None
    if nothing_hidden and not static_window:
        simple = _plan_without_padding(plan, layout, queries, keys, device)
        if simple is not None:
            return simple
    if layout.sequence is None and not static_window and _is_one_block(layout, queries):
        return replace(plan, mask=_key_mask(layout, batch, queries, device))
    return replace(plan, mask=visibility(layout, batch, queries, keys, device))


def _is_one_block(layout: TokenLayout, queries: int) -> bool:
    """Whether every real new token sees every real key: a decoding step, or prompts that are one block each."""
    if queries == 1:
        return True
    if layout.block is None or not values_are_readable():
        return False
    block = layout.block if layout.real is None else torch.where(layout.real, layout.block, 0)
    return bool((block == 0).all())


def _plan_without_padding(
    plan: AttentionPlan, layout: TokenLayout, queries: int, keys: int, device: torch.device
) -> AttentionPlan | None:
    """The plans that need no dense mask, or None where the layout is not one of them."""
    if queries == 1:
        return plan
    if layout.block is None:
        if layout.past == 0 and plan.backend == "sdpa":
            return replace(plan, is_causal=True)
        return replace(plan, mask=_lower_right(queries, keys, device))
    if not values_are_readable():
        return None
    in_block = layout.block >= 0
    first = in_block[0]
    lead = int(first.long().cumprod(0).sum())
    if lead == 0 or bool(first[lead:].any()) or bool((in_block != first).any()):
        return None
    if lead == queries:
        return plan
    if plan.backend == "eager":
        return None
    return replace(plan, block_queries=lead, mask=_lower_right(queries - lead, keys, device))


def _lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, queries, keys]: the last query sees every key, the one before it all but the last, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def _visible_keys(layout: TokenLayout, batch: int, queries: int, device: torch.device) -> torch.Tensor:
    """bool [batch, past + queries]: which keys are real and of a sequence that the call continues."""
    past = layout.past_visible
    if past is None:
        past = torch.ones(batch, layout.past, dtype=torch.bool, device=device)
    real = layout.real
    if real is None:
        real = torch.ones(batch, queries, dtype=torch.bool, device=device)
    return torch.cat([past.expand(batch, -1), real.expand(batch, -1)], dim=1)


def _key_mask(layout: TokenLayout, batch: int, queries: int, device: torch.device) -> torch.Tensor:
    """bool [batch, 1, 1, keys]. A row with no real key at all sees everything, so that its softmax stays finite."""
    visible = _visible_keys(layout, batch, queries, device)
    return (visible | ~visible.any(dim=1, keepdim=True))[:, None, None]


def _key_axis(values: torch.Tensor, layout: TokenLayout, keys: int, fill: int) -> torch.Tensor:
    """Places what is known of the new tokens [batch, queries] on the key axis [batch, keys]; `fill` elsewhere."""
    batch, queries = values.shape
    if isinstance(layout.past, int):
        return F.pad(values, (layout.past, keys - layout.past - queries), value=fill)
    index = layout.past + torch.arange(queries, device=values.device)
    return values.new_full((batch, keys), fill).index_copy(1, index, values)


def visibility(layout: TokenLayout, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """The dense mask, bool [batch or 1, 1, queries, keys], True where the query sees the key.

    Reads no values. A padded query sees the real keys before it, or itself where there is none: so its softmax stays
    finite, and what comes out at padding depends neither on the rest of the batch nor on what is yet to come, which
    matters to those who generate from a prompt that is padded on the right.
    """
    rule = visibility_rule(layout, batch, queries, keys, device)
    rows = torch.arange(batch, device=device)[:, None, None]
    if layout.real is None and layout.past_visible is None and layout.sequence is None and layout.block is None:
        rows = rows[:1]
    q = torch.arange(queries, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    return rule(rows, q, k).expand(rows.shape[0], queries, keys)[:, None]


def visibility_rule(layout: TokenLayout, batch: int, queries: int, keys: int, device: torch.device):
    """The rule itself: a function of row, query and key indices (tensors that broadcast) to bool.

    Written so that flex attention can trace it for single indices and `visibility` can evaluate it for all at once.
    """
    past = layout.past
    block = layout.block.expand(batch, -1) if layout.block is not None else None
    sequence = layout.sequence.expand(batch, -1) if layout.sequence is not None else None
    key_block = _key_axis(block, layout, keys, -1) if block is not None else None
    key_sequence = _key_axis(sequence, layout, keys, 0) if sequence is not None else None
    real = layout.real.expand(batch, -1) if layout.real is not None else None
    key_visible = None
    if real is not None or layout.past_visible is not None:
        new = real if real is not None else torch.ones(batch, queries, dtype=torch.bool, device=device)
        key_visible = _key_axis(new.long(), layout, keys, 1).bool()
        if layout.past_visible is not None:
            hidden = ~layout.past_visible[:, :keys].expand(batch, -1)
            key_visible = key_visible & ~F.pad(hidden, (0, keys - hidden.shape[1]))

    nothing_yet = key_visible.long().cumsum(dim=1) == 0 if real is not None else None

    def sees(row, query, key):
        at = query + past
        visible = key <= at
        if block is not None:
            visible = visible | ((block[row, query] >= 0) & (block[row, query] == key_block[row, key]))
        if sequence is not None:
            visible = visible & (sequence[row, query] == key_sequence[row, key])
        if key_visible is not None:
            visible = visible & key_visible[row, key]
        if real is not None:
            filler = (key_visible[row, key] & (key <= at)) | (nothing_yet[row, at] & (key == at))
            visible = (visible & real[row, query]) | (filler & ~real[row, query])
        return visible

    return sees


def _flex_mask(layout: TokenLayout, batch: int, queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rule = visibility_rule(layout, batch, queries, keys, device)

    def sees(row, head, query, key):
        return rule(row, query, key)

    return create_block_mask(sees, batch, None, queries, keys, device=device)


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
        return gated(flash_attend(plan.flash, query, key, value, scaling, dropout), gate), None
    if plan.backend == "flex_attention":
        return gated(_flex(plan, query, key, value, scaling, dropout, module).transpose(1, 2), gate), None
    parts = [part.transpose(1, 2) for part in _sdpa(plan, query, key, value, scaling, dropout)]
    if len(parts) == 1:
        return gated(parts[0], gate), None
    # Gated before they are joined: backward keeps each part for the attention that made it, and would keep what is
    # joined besides, for the gate.
    gates = gate.split([part.shape[1] for part in parts], dim=1)
    return torch.cat([gated(*pair) for pair in zip(parts, gates)], dim=1), None


def _sdpa(
    plan: AttentionPlan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> tuple[torch.Tensor, ...]:
    """[batch, heads, queries, head_dim], in one part or in two: the queries of the block and the rest."""
    if plan.block_queries is None:
        mask = plan.mask
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.to(query.dtype)
        products = single_query_pays(query, key) if plan.products is None else plan.products
        if products and query.shape[2] == 1:
            return (single_query_attention(query, key, value, mask, scaling),)
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
        # Uncompiled: inductor's kernel for processors fails on the second length, and compiles for seconds.
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


__all__ = ["AttentionPlan", "attend", "plan_attention", "prepare_attention", "visibility"]
