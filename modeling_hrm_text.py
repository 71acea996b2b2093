"""HRM-Text: two Transformer stacks, a slow one (H) and a fast one (L), iterated over the same positions.

    z_H = embedding_scale * embed(input_ids)
    z_L = z_L_init
    repeat H_cycles times:
        repeat L_cycles times:
            z_L = L_module(z_L + z_H)
        z_H = H_module(z_H + z_L)
    logits = lm_head(z_H)

What is unusual:
- RMSNorm has no weight, and each stack ends in one more norm, which bounds the state inside the loop;
- the attention output is gated by a sigmoid, element by element, before `o_proj`; gate, q, k and v are one matrix;
- prefix blocks (prompts) are read in both directions, everything else causally, see `attention_hrm_text.py`;
- every attention call has a cache slot of its own: L calls (h, l) and H calls (h) of every layer;
- training backpropagates through the last few module calls only, see `set_gradient_steps`.

Source of the architecture: the HRM-Text paper and its training code. The formulas are here in plain torch; where
`kernels_hrm_text.py` has a faster form with the same rounding, that is tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .attention_hrm_text import AttentionPlan, attend, choose_backend, plan_attention, plan_whole_mask
from .cache_hrm_text import History, HrmTextCache, OneSlot, kept_whole
from .compiled_hrm_text import head_of
from .configuration_hrm_text import HrmTextConfig
from .decoding_hrm_text import one_token_through
from .folder_hrm_text import AdoptedLinear  # noqa: F401  (transformers before 5.10 copies what this module names)
from .generation_hrm_text import HrmTextGenerationMixin
from .inference_hrm_text import InferenceMixin, compiled_layer, compiles_layers
from .kernels_hrm_text import fused_norm, fused_split_and_rotate, fused_swiglu, is_eager, linear, saves_memory, serves
from .layout_hrm_text import (
    PromptLayout,
    StepLayout,
    TokenLayout,
    recognise_embeddings,
    refuse_lost_borders,
    values_are_readable,
)
from .loading_hrm_text import LoadingMixin
from .packed_hrm_text import PackedLinear  # noqa: F401  (for the same reason)
from .quantized_hrm_text import QuantizedMatrix  # noqa: F401  (for the same reason)
from .reading_hrm_text import Call, read_layout, read_step
from .versions_hrm_text import (
    CACHE_NAME,
    CausalLMOutput,
    ModelOutput,
    cached_length,
    is_traced,
    one_cache,
    refuse_paged_call,
    static_capacity,
    tied_weights_keys,
)


logger = logging.get_logger(__name__)


# ---- one layer ------------------------------------------------------------------------------------------------------


def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without a weight over the last dimension: x / sqrt(mean(x^2) + eps)."""
    return fused_norm(x, eps) if serves(x) else F.rms_norm(x, x.shape[-1:], eps=eps)


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of `rotate`, each [batch or 1, tokens, 1, 1, head_dim], of cos and sin without the two 1s."""
    first, second = sin.chunk(2, dim=-1)
    return cos[:, :, None, None], torch.cat((-first, second), dim=-1)[:, :, None, None]


def embeddings_of(tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [batch or 1, tokens, head_dim], of what `rotary_tables` made of them."""
    cos, signed = (table[:, :, 0, 0] for table in tables)
    first, second = signed.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in float32, cast back: x * cos + (-x2, x1) * sin; [batch, tokens, kinds, heads, head_dim]."""
    wide = x.float()
    return torch.addcmul(wide * tables[0], wide.roll(x.shape[-1] // 2, dims=-1), tables[1]).to(x.dtype)


def split_and_rotate(
    gqkv: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate [batch, tokens, heads, head_dim]; rotated q, rotated k, and v [batch, heads, tokens, head_dim]."""
    if serves(gqkv) or saves_memory(gqkv):
        return fused_split_and_rotate(gqkv, tables)
    gate, query_key, value = gqkv.split((1, 2, 1), dim=2)
    query, key = rotate(query_key, tables).permute(2, 0, 3, 1, 4)
    return gate.squeeze(2), query, key, value.squeeze(2).transpose(1, 2)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [..., width], of [..., 2 * width] that holds gate and then up."""
    if serves(gate_up) or saves_memory(gate_up):
        return fused_swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class HrmTextRotaryEmbedding(nn.Module):
    """Rotary table of the new positions, float32 whatever the model's dtype."""

    inv_freq: torch.Tensor

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.rope_init_fn = (
            self.compute_default_rope_parameters
            if self.rope_type == "default"
            else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        self._set_frequencies()

    def _set_frequencies(self, device: torch.device | None = None) -> None:
        self.max_seq_len_cached = self.original_max_seq_len = self.config.max_position_embeddings
        inv_freq, self.attention_scaling = self.rope_init_fn(self.config, None)
        inv_freq = inv_freq.float() if device is None else inv_freq.to(device, torch.float32)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Moves the frequencies but never casts them: they are computed anew, so that no rounding stays behind."""
        super()._apply(fn, recurse)
        self._set_frequencies(self.inv_freq.device)
        return self

    @staticmethod
    def compute_default_rope_parameters(
        config: HrmTextConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies float32 [head_dim / 2], and the factor 1 on cos and sin."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [batch or 1, tokens, head_dim], for position_ids [batch or 1, tokens]."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class HrmTextAttention(nn.Module):
    """Gated multi-head attention over a cache slot."""

    def __init__(self, config: HrmTextConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.num_key_value_groups = 1
        width = config.num_attention_heads * config.head_dim
        self.gqkv_proj = nn.Linear(config.hidden_size, 4 * width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, plan: AttentionPlan, cache: Any = None, cycle_offset: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[batch, tokens, hidden] -> the same shape, and the weights [batch, heads, tokens, keys] if eager."""
        batch, tokens, _ = hidden_states.shape
        # [batch, tokens, 4, heads, head_dim]; heads are counted from the matrix, which may hold a part of them only.
        gqkv = linear(self.gqkv_proj, hidden_states).view(batch, tokens, 4, -1, self.head_dim)
        gate, query, key, value = split_and_rotate(gqkv, plan.rotary)
        if cache is not None:
            # A compiled layer must not depend on its number.
            slot = 0 if isinstance(cache, OneSlot) else self.layer_idx + cycle_offset
            key, value = cache.update(key, value, slot, plan.cache_kwargs)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(plan, query, key, value, gate, self.scaling, dropout, self)
        if plan.weights is not None:
            plan.weights.append(weights)
        return linear(self.o_proj, output.reshape(batch, tokens, -1)), weights


class HrmTextMLP(nn.Module):
    """SwiGLU; rows of `gate_up_proj` are gate, then up."""

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.init_factor = (config.hidden_size / config.intermediate_size) ** 0.5

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(self.down_proj, swiglu(linear(self.gate_up_proj, hidden_states)))


class HrmTextDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x += attn(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: HrmTextConfig, layer_idx: int = 0):
        super().__init__()
        self.config, self.eps = config, config.rms_norm_eps
        self.attn = HrmTextAttention(config, layer_idx)
        self.mlp = HrmTextMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionPlan | torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cycle_offset: int = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: [batch, tokens, hidden].
            attention_mask: the plan of the forward pass. A layer called by itself takes what the library's takes: a
                mask [batch or 1, 1, tokens, keys], or None for causal attention.
            past_key_values: a live cache; `cache` is another name for it.
            position_embeddings: with a mask in place of a plan, cos and sin, each [batch or 1, tokens, head_dim].
            cycle_offset: the layer's cache slot is its number plus this.

        Returns:
            [batch, tokens, hidden].
        """
        plan = attention_mask
        if not isinstance(plan, AttentionPlan):
            plan = _plan_alone(self.config, attention_mask, position_embeddings)
        cache = past_key_values if cache is None else cache
        hidden_states = hidden_states + self.attn(norm(hidden_states, self.eps), plan, cache, cycle_offset)[0]
        return hidden_states + self.mlp(norm(hidden_states, self.eps))


def _plan_alone(
    config: HrmTextConfig, mask: torch.Tensor | None, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
) -> AttentionPlan:
    """The plan of a layer or stack that is called by itself, with the library's arguments."""
    if position_embeddings is None:
        raise ValueError(
            "`position_embeddings` are missing: give cos and sin of the tokens' positions, as `rotary_emb` makes them."
        )
    backend = "eager" if config._attn_implementation == "eager" else "sdpa"
    if mask is not None:
        plan = plan_whole_mask(mask, backend)
    elif backend == "sdpa":
        plan = AttentionPlan(backend, is_causal=True)
    else:
        tokens = position_embeddings[0].shape[1]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=position_embeddings[0].device).tril()
        plan = AttentionPlan(backend, mask=mask)
    plan.rotary = rotary_tables(*(table.float() for table in position_embeddings))
    return plan


# ---- the two stacks -------------------------------------------------------------------------------------------------


class HrmTextStack(nn.Module):
    """`num_layers_per_stack` blocks and the norm at their exit."""

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.config, self.eps = config, config.rms_norm_eps
        self.layers = nn.ModuleList(HrmTextDecoderLayer(config, i) for i in range(config.num_layers_per_stack))
        self.gradient_checkpointing = self.compiles_decoding = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionPlan | torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cycle_offset: int = 0,
        cache: Any = None,
        note: Callable[[torch.Tensor], None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One module call, on cache slots cycle_offset ... + layers - 1; [batch, tokens, hidden] -> the same shape.

        Args:
            note: told the output of each layer. The others are those of `HrmTextDecoderLayer.forward`.
        """
        if is_traced():
            return self._call_each(hidden_states, attention_mask, position_embeddings)
        plan = attention_mask
        if not isinstance(plan, AttentionPlan):
            plan = _plan_alone(self.config, attention_mask, position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is None and plan.weights is None and any(map(_is_replaced, self.layers)):
            mask = plan.whole_mask(*hidden_states.shape[:2], hidden_states.device)
            return self._call_each(hidden_states, mask, embeddings_of(plan.rotary), note)
        if note is None and not compiles_layers() and all(map(_has_formulas_of_this_room, self.layers)):
            output = one_token_through(self, hidden_states, plan, cache, cycle_offset, attend)
            if output is not None:
                return norm(output, self.eps)
        for i, layer in enumerate(self.layers):
            compiled = compiled_layer(layer, cache) if hidden_states.shape[1] == 1 and plan.weights is None else None
            if compiled is not None:
                hidden_states = compiled(layer, hidden_states, plan, cache=OneSlot(cache.layers[cycle_offset + i]))
            else:
                hidden_states = layer(hidden_states, attention_mask=plan, cycle_offset=cycle_offset, cache=cache)
            if note is not None:
                note(hidden_states)
        return norm(hidden_states, self.eps)

    def _call_each(
        self, hidden_states: torch.Tensor, mask: torch.Tensor, tables: Any, note: Callable[..., None] | None = None
    ) -> torch.Tensor:
        """A module call with the arguments of the library's layers, of which tools keep copies."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=tables)
            if note is not None:
                note(hidden_states)
        return norm(hidden_states, self.eps)


def _has_formulas_of_this_room(layer: nn.Module) -> bool:
    return (type(layer), type(layer.attn), type(layer.mlp)) == (HrmTextDecoderLayer, HrmTextAttention, HrmTextMLP)


def _is_replaced(layer: nn.Module) -> bool:
    """Whether a tool, such as AutoRound, listens to a layer in place of its `forward`; accelerate does so too."""
    return "forward" in vars(layer) and not hasattr(layer, "_hf_hook")


# ---- what all models share ------------------------------------------------------------------------------------------

# Standard deviation of a unit normal cut at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


class HrmTextPreTrainedModel(InferenceMixin, LoadingMixin, PreTrainedModel):
    """What all HRM-Text models share: initialisation, loading, and the number of gradient steps."""

    config_class = HrmTextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HrmTextDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HrmTextDecoderLayer, "attentions": HrmTextAttention}
    # How many trailing module calls carry gradient; None asks the config.
    _gradient_steps: int | None = None

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The library looks for its own dispatch in the source; ours reads the config's at every forward pass.
        return True

    def __init__(self, config: HrmTextConfig, *args: Any, **kwargs: Any):
        config.validate_hrm_text()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normals as in training; `down_proj` and `z_L_init` have standard deviations of their own."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if hasattr(module, "weight"):  # else it is quantized and packed
                _truncated_normal(module.weight, std * getattr(module, "init_factor", 1.0))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, HrmTextModel):
            _truncated_normal(module.z_L_init, 1.0)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, partial(_with_gradient, gradient_checkpointing_func), **kwargs)

    def set_gradient_steps(self, bp_steps: int | None) -> None:
        """Sets how many trailing module calls training backpropagates through, H calls first.

        This changes gradients only, not outputs; a trainer may call it at every step.

        Args:
            bp_steps: from 2 (the last H and the last L call) to H_cycles * (L_cycles + 1); None goes back to what the
                config says.

        Raises:
            ValueError: a number outside that range.
        """
        most = self.config.H_cycles * (self.config.L_cycles + 1)
        if bp_steps is not None and not 2 <= bp_steps <= most:
            raise ValueError(f"`bp_steps` is {bp_steps!r}: give a whole number from 2 to {most}, or None.")
        for module in self.modules():
            if isinstance(module, HrmTextModel):
                module._gradient_steps = bp_steps

    @property
    def gradient_steps(self) -> int:
        """Number of module calls that carry gradient, by the config's cycles as they are now."""
        model = next(module for module in self.modules() if isinstance(module, HrmTextModel))
        H_bp, L_bp = model.config.gradient_calls(model._gradient_steps)
        return H_bp + sum(L_bp)


def _with_gradient(checkpointing: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
    """Checkpoints a layer call that carries gradient; others have nothing to keep, and torch would warn of them."""
    return checkpointing(layer, *args) if torch.is_grad_enabled() else layer(*args)


def _truncated_normal(tensor: torch.Tensor, std: float) -> None:
    """Normal cut at two standard deviations, widened so that `std` is what comes out."""
    wide = std / _TRUNCATED_STD
    nn.init.trunc_normal_(tensor, std=wide, a=-2 * wide, b=2 * wide)


# ---- the network ----------------------------------------------------------------------------------------------------


class HrmTextModel(HrmTextPreTrainedModel):
    """The network without its output head."""

    # Those of a training step whose `forward` of the causal LM a trainer has replaced, for the warning about them.
    _labels: torch.Tensor | None = None

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = HrmTextRotaryEmbedding(config)
        self.L_module = HrmTextStack(config)
        self.H_module = HrmTextStack(config)
        self.z_L_init = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        if config.cycles_changed:
            logger.warning_once(
                f"the config was created with H_cycles, L_cycles = {tuple(config._made_for_cycles)} and the model "
                f"runs {(config.H_cycles, config.L_cycles)}: its checkpoint was trained at another depth."
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """
        Args:
            input_ids: [batch, tokens], or `inputs_embeds` instead.
            attention_mask: [batch, cached + tokens], 0 at padding; or a whole 4-D mask [batch, 1, tokens, keys] (bool,
                or added to the scores), which decides alone.
            position_ids: [batch or 1, tokens]; where they restart, a new packed sequence begins.
            past_key_values: a live cache; `cache` is another name for it.
            token_type_ids: [batch, tokens], 1 for tokens of a prefix block, 2 for one that opens a block directly
                behind another. None infers the blocks where `config.prefix_end_token_id` is set; all zeros is causal.
            inputs_embeds: [batch, tokens, hidden], before scaling.
            use_cache: whether to return a cache; None takes the config's.
            output_attentions: return the attention weights of every call (through the eager backend).
            output_hidden_states: return the input of the first layer call and the output of every one, in slot order,
                the last one after its stack's norm; or the indices of those to keep, with None for the others.

        Raises:
            ValueError: arguments that do not fit, or a prefix block that would be split over two calls.
        """
        refuse_paged_call(kwargs)
        refuse_lost_borders(kwargs, position_ids)
        cache = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`, and not both.")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self._decide_use_cache(use_cache, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = HrmTextCache(config=self.config)

        call = Call(
            tuple(inputs_embeds.shape[:2]),
            inputs_embeds.device,
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            cache,
            # Not in the signature: only transformers 4 and 5.0 pass it, and later versions would, if it were named.
            kwargs.get("cache_position"),
            kwargs.get("labels", self._labels),
        )
        if input_ids is None and token_type_ids is None and kwargs.get("layout") is None:
            call.embedded = self.recognise(inputs_embeds)
        layout, plan = self._prepare(call, kwargs.get("layout"), bool(output_attentions))
        plan.rotary = rotary_tables(*self.rotary_emb(inputs_embeds, layout.position_ids))
        hidden_states = _HiddenStates(output_hidden_states, self.config.num_hidden_layers)
        with kept_whole(cache):
            z_H = self._recur(inputs_embeds * self.config.embedding_scale, plan, cache, hidden_states.note)
        history = History.of(cache)
        if history is not None and values_are_readable() and isinstance(layout.past, int):
            history.note_marks(cache, layout.past, layout.past + layout.count)
        return ModelOutput(
            **{CACHE_NAME: cache if use_cache else None},
            last_hidden_state=z_H,
            hidden_states=hidden_states.with_last(z_H),
            attentions=None if plan.weights is None else tuple(plan.weights),
        )

    def _begin(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first z_H, mask [batch, 1, tokens, tokens], cos and sin, for layers that are called one by one."""
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape = embeds.shape[:2]
        call = Call(tuple(shape), embeds.device, input_ids, attention_mask, position_ids, token_type_ids, None, None)
        layout, plan = self._prepare(call, None, False)
        cos, sin = self.rotary_emb(embeds, layout.position_ids)
        return embeds * self.config.embedding_scale, plan.whole_mask(*shape, embeds.device), cos, sin

    def _prepare(self, call: Call, handed: Any, wants_weights: bool) -> tuple[TokenLayout, AttentionPlan]:
        """What the tokens are, and which of them attend to which.

        Args:
            handed: what `generate` knows of the tokens: the types of a prompt, or that it generated them.
        """
        backend = choose_backend(self.config, wants_weights)
        self._refuse_cache_of_another_depth(call.cache)
        capacity = static_capacity(call.cache)
        whole_mask = call.attention_mask
        if whole_mask is not None and whole_mask.dim() == 4:
            if call.token_type_ids is not None:
                raise ValueError(
                    "a 4-D `attention_mask` and `token_type_ids` were given, and each defines which tokens a token "
                    "sees: give a 2-D `attention_mask` with `token_type_ids`, or the 4-D mask alone."
                )
            call.attention_mask = None
            call.token_type_ids = torch.zeros(call.shape, dtype=torch.long, device=call.device)
            layout = read_layout(self.config, call)
            plan = plan_whole_mask(whole_mask, backend, whole_mask.shape[-1] if isinstance(layout.past, int) else None)
        else:
            if isinstance(handed, StepLayout):
                past = cached_length(call.cache)
                if isinstance(past, torch.Tensor) and past.device.type == "cpu" and values_are_readable():
                    past = int(past)
                layout = read_step(call, handed, past)
            else:
                if handed is not None and not isinstance(handed, PromptLayout):
                    raise ValueError("`layout` is not an argument of this model: give `token_type_ids`.")
                call.prompt = None if handed is None else handed.widened(call.shape[1])
                layout = read_layout(self.config, call)
            static_shapes = compiles_layers() and layout.count == 1
            plan = plan_attention(layout, self.config, call.shape[0], capacity, backend, static_shapes)
        if capacity is not None:
            # A caller's own indices are needed only where a graph is traced for any position.
            index = None if values_are_readable() else call.cache_position
            if index is None or index.shape[0] != layout.count:
                index = torch.arange(layout.count, device=call.device) + call.cache.get_seq_length()
            plan.cache_kwargs = {"cache_position": index}
        plan.weights = [] if wants_weights else None
        return layout, plan

    @torch.no_grad()
    def recognise(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What can be told of embeddings by comparing them with the model's own; None where nothing may be read."""
        ids = sorted({*self.config.prefix_start, *self.config.prefix_end})
        weight = getattr(self.embed_tokens, "weight", None)
        if not ids or not self.config.prefix_lm or weight is None or weight.is_meta:
            return None
        if not values_are_readable() or not is_eager():
            return None
        index = torch.tensor(ids, device=weight.device)
        vectors = dict(zip(ids, self.embed_tokens(index).to(inputs_embeds)))
        return recognise_embeddings(inputs_embeds, vectors, weight.to(inputs_embeds.device))

    def _refuse_cache_of_another_depth(self, cache: Any) -> None:
        slots = len(getattr(cache, "layers", None) or ())
        history = History.of(cache)
        counts = values_are_readable() and history is not None and history.length
        if counts and slots not in (0, self.config.num_hidden_layers):
            raise ValueError(
                f"the cache has {slots} slots and the model makes {self.config.num_hidden_layers} attention calls: "
                "`H_cycles` or `L_cycles` were changed since the cache was filled. Start with a new cache."
            )

    def _recur(
        self,
        z_H: torch.Tensor,
        plan: AttentionPlan | torch.Tensor,
        cache: Any,
        note: Callable[[torch.Tensor], None] | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        """The loop; z_H [batch, tokens, hidden] -> the same shape."""
        H_cycles, L_cycles, layers = self.config.H_cycles, self.config.L_cycles, self.config.num_layers_per_stack
        H_bp, L_bp = self.config.gradient_calls(self._gradient_steps)
        grad = torch.is_grad_enabled()
        z_L = self.z_L_init.detach().to(z_H.device, z_H.dtype).expand_as(z_H)
        slot = 0
        for h in range(H_cycles):
            for step in range(L_cycles):
                with torch.set_grad_enabled(grad and step >= L_cycles - L_bp[h]):
                    inputs = _carry_gradient(z_L.to(z_H.device) + z_H, self.L_module)
                    if note is not None and slot == 0:
                        note(inputs)
                    z_L = self.L_module(inputs, plan, cycle_offset=slot, cache=cache, note=note, **arguments)
                slot += layers
            with torch.set_grad_enabled(grad and h >= H_cycles - H_bp):
                inputs = _carry_gradient(z_H + z_L.to(z_H.device), self.H_module)
                z_H = self.H_module(inputs, plan, cycle_offset=slot, cache=cache, note=note, **arguments)
            slot += layers
        return z_H

    def _decide_use_cache(self, use_cache: bool | None, cache: Any) -> bool:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.L_module.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "`past_key_values` were given in training with gradient checkpointing, whose recomputation would "
                    "write to the cache again: leave them out, or call `model.gradient_checkpointing_disable()`."
                )
            if use_cache:
                logger.warning_once(
                    "`use_cache=True` has no effect with gradient checkpointing: no cache is returned."
                )
            return False
        return bool(use_cache)


def _carry_gradient(inputs: torch.Tensor, stack: HrmTextStack) -> torch.Tensor:
    """Makes the input of a checkpointed call that carries gradient require it, even where what came before did not.

    Without this, reentrant checkpointing would see no input that requires gradient and silently train nothing.
    """
    if stack.gradient_checkpointing and stack.training and torch.is_grad_enabled() and not inputs.requires_grad:
        return inputs.requires_grad_()
    return inputs


class _HiddenStates:
    """What `output_hidden_states` returns: the first input and the output of each of the layer calls."""

    def __init__(self, wanted: bool | int | list[int] | None, calls: int):
        self.note = self._note if wanted or (wanted == 0 and wanted is not False) else None
        self.states: list[torch.Tensor | None] = []
        count = calls + 1
        indices = range(count) if wanted is True or not wanted else [wanted] if isinstance(wanted, int) else wanted
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"`output_hidden_states` is {wanted!r}: give True or indices below {count}.")
        self.wanted = {i % count for i in indices}

    def _note(self, hidden_states: torch.Tensor) -> None:
        self.states.append(hidden_states if len(self.states) in self.wanted else None)

    def with_last(self, z_H: torch.Tensor) -> tuple[torch.Tensor | None, ...] | None:
        """All of them; the last one is read after the norm of its stack."""
        if self.note is None:
            return None
        return (*self.states[:-1], None if self.states[-1] is None else z_H)


class HrmTextForCausalLM(HrmTextGenerationMixin, HrmTextPreTrainedModel):
    """HRM-Text with its output head."""

    _tied_weights_keys = tied_weights_keys("lm_head.weight", "model.embed_tokens.weight")
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        self.model = HrmTextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; a `forward` that a trainer put in place of ours keeps the labels from the network."""
        if torch.compiler.is_compiling() or "forward" not in vars(self):
            return super().__call__(*args, **kwargs)
        self.model._labels = kwargs.get("labels")
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.model._labels = None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """
        Args:
            labels: [batch, tokens], -100 at tokens without a loss; label i is compared with the logits of token i - 1,
                in float32. `num_items_in_batch` divides the sum in place of the number of labels.
            logits_to_keep: how many trailing positions to compute logits for, 0 for all; or a tensor of indices.

        The other arguments are those of `HrmTextModel.forward`.
        """
        if is_traced():
            return self._trace(input_ids, attention_mask, position_ids, token_type_ids, inputs_embeds)
        refuse_paged_call(kwargs)
        refuse_lost_borders(kwargs, position_ids)
        cache = one_cache(past_key_values, cache)
        layout = kwargs.pop("layout", None)
        if self._decoder is not None and isinstance(layout, StepLayout) and labels is None:
            logits = self._captured_step(input_ids, attention_mask, position_ids, cache)
            if logits is not None:
                return CausalLMOutput(**{CACHE_NAME: cache}, logits=logits)
        with kept_whole(cache):
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                cache=cache,
                layout=layout,
                labels=labels,
                cache_position=kwargs.pop("cache_position", None),
                return_dict=True,
            )
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head_of(self.lm_head, outputs.last_hidden_state[:, kept], self.compiles_decoding)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, **kwargs)
        return CausalLMOutput(
            **{CACHE_NAME: outputs.cache},
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _trace(self, *arguments: Any) -> CausalLMOutput:
        """The pass as a tracer of torch.fx sees it: what is decided from values is one call, and then come layers."""

        def begin(*values: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            return self.model._begin(*values)

        tracer = next(value.tracer for value in arguments if isinstance(value, torch.fx.Proxy))
        begun = tracer.create_proxy("call_function", begin, arguments, {})
        z_H = self.model._recur(begun[0], begun[1], None, position_embeddings=(begun[2], begun[3]))
        return CausalLMOutput(logits=self.lm_head(z_H))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Mean cross-entropy of the next token; a loss function set in place of the library's stays in force."""
        plain = self.loss_function is ForCausalLMLoss and kwargs.get("shift_labels") is None
        if plain and labels.shape == logits.shape[:2] and values_are_readable():
            # Prompts carry no labels: their logits need no float32 copy, no softmax and no gradient.
            following = labels[:, 1:].to(logits.device)
            # One read from the device, of how many they are.
            rows, columns = (following != kwargs.get("ignore_index", -100)).nonzero(as_tuple=True)
            if len(rows) < following.numel():
                logits, kwargs["shift_labels"] = logits[rows, columns], following[rows, columns]
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    def _static_step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, visible: torch.Tensor, slots: Any, products: bool
    ) -> torch.Tensor:
        """The logits [rows, 1, vocab] of one step that reads no value; see `inference_hrm_text.py`."""
        network = self.model
        embeds = network.embed_tokens(input_ids)
        rotary = rotary_tables(*network.rotary_emb(embeds, position_ids))
        plan = AttentionPlan("sdpa", mask=visible, products=products, rotary=rotary)
        return self.lm_head(network._recur(embeds * self.config.embedding_scale, plan, slots))


# ---- classification: with the whole text as one prefix block, HRM-Text is a bidirectional encoder -------------------


class _ReadsWholeText:
    """For a generic head over `HrmTextModel`: its input is one prefix block, unless `token_type_ids` say otherwise."""

    def __init__(self, config: HrmTextConfig):
        # Past the generic head's own, which builds the base model through AutoModel: that does not know remote code.
        HrmTextPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HrmTextModel(config)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            token_type_ids: [batch, tokens]; None makes the text one block, so that every token sees every other. All
                zeros is plain causal. With `config.prefix_lm=False` everything is causal.
            labels: [batch] or [batch, num_labels] for a sequence, by `config.problem_type`; [batch, tokens], with -100
                where there is none, for tokens.
            use_cache: an encoder reads its text once, so no cache is kept by default.

        The other arguments are those of `HrmTextModel.forward`. Padded rows of a batch need `config.pad_token_id`, by
        which the sequence head finds the last token of each.
        """
        decides_itself = attention_mask is not None and attention_mask.dim() == 4
        if token_type_ids is None and self.config.prefix_lm and not decides_itself:
            text = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
            token_type_ids = torch.ones_like(text, dtype=torch.long)
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
            **kwargs,
        )


class HrmTextForSequenceClassification(_ReadsWholeText, GenericForSequenceClassification, HrmTextPreTrainedModel):
    """One label for a text, read off its last token: logits [batch, num_labels]. The head `score` starts new."""

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class HrmTextForTokenClassification(_ReadsWholeText, GenericForTokenClassification, HrmTextPreTrainedModel):
    """One label for each token: logits [batch, tokens, num_labels]; dropout `config.classifier_dropout`, else 0.1."""

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


__all__ = [
    "HrmTextForCausalLM",
    "HrmTextForSequenceClassification",
    "HrmTextForTokenClassification",
    "HrmTextModel",
    "HrmTextPreTrainedModel",
]
