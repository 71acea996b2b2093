"""HRM-Text: two Transformer stacks, a slow one (H) and a fast one (L), iterated over the same positions.

    z_H = embedding_scale * embed(input_ids)
    z_L = z_L_init
    repeat H_cycles times:
        repeat L_cycles times:
            z_L = L_module(z_L + z_H)
        z_H = H_module(z_H + z_L)
    logits = lm_head(z_H)

What is unusual:
- RMSNorm has no weight, and each stack ends in one more norm, which bounds the state that goes round the loop;
- the attention output is gated by a sigmoid, element by element, before `o_proj`; gate, q, k and v are one matrix;
- prefix blocks (prompts) are read in both directions, everything else causally, see `attention_hrm_text.py`;
- every attention call has a cache slot of its own: L calls (h, l) and H calls (h) of every layer;
- training backpropagates through the last few module calls only, see `set_gradient_steps`.

Source of the architecture: the HRM-Text paper and its training code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .attention_hrm_text import AttentionPlan, attend, prepare_attention
from .blocks_hrm_text import find_blocks  # noqa: F401
from .cache_hrm_text import HrmTextCache, OneSlot
from .configuration_hrm_text import HrmTextConfig
from .decoding_hrm_text import StaticDecoder  # noqa: F401
from .flash_hrm_text import FlashPlan  # noqa: F401  (transformers before 5.10 copies what the entry module imports)
from .generation_hrm_text import HrmTextGenerationMixin, refuse_paged_call
from .inference_hrm_text import InferenceMixin, compiled_layer
from .layout_hrm_text import values_are_readable
from .loading_hrm_text import LoadingMixin
from .one_row_hrm_text import project
from .operations_hrm_text import norm, rotary_tables, split_and_rotate, swiglu
from .packed_hrm_text import PackedLinear  # noqa: F401
from .single_query_hrm_text import single_query_attention  # noqa: F401
from .timing_hrm_text import least_seconds  # noqa: F401
from .versions_hrm_text import CACHE_NAME, CausalLMOutput, ModelOutput, one_cache, static_capacity, tied_weights_keys


logger = logging.get_logger(__name__)

# Standard deviation of a unit normal cut at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


class HrmTextRotaryEmbedding(nn.Module):
    """Rotary table of the new positions, float32 whatever the model's dtype."""

    inv_freq: torch.Tensor

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.rope_init_fn = (
            self.compute_default_rope_parameters
            if self.rope_type == "default"
            else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = self.rope_init_fn(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

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
        """cos and sin, float32 [batch or 1, tokens, head_dim / 2], for position_ids [batch or 1, tokens]."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class HrmTextAttention(nn.Module):
    """Gated multi-head attention over a cache slot."""

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.num_key_value_groups = 1
        width = config.num_attention_heads * config.head_dim
        self.gqkv_proj = nn.Linear(config.hidden_size, 4 * width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Any = None,
        slot: int = 0,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        # [batch, tokens, 4, heads, head_dim]; heads are counted from the matrix, which may hold a part of them only.
        gqkv = project(self.gqkv_proj, hidden_states).view(batch, tokens, 4, -1, self.head_dim)
        gate, query, key, value = split_and_rotate(gqkv, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, slot, cache_kwargs)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(plan, query, key, value, gate, self.scaling, dropout, self)
        return project(self.o_proj, output.reshape(batch, tokens, -1)), weights


class HrmTextMLP(nn.Module):
    """SwiGLU; rows of `gate_up_proj` are gate, then up."""

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.init_factor = (config.hidden_size / config.intermediate_size) ** 0.5

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, swiglu(project(self.gate_up_proj, hidden_states)))


class HrmTextDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x += attn(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = HrmTextAttention(config)
        self.mlp = HrmTextMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Any = None,
        slot: int = 0,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [batch, tokens, hidden] -> the same shape, and the eager attention weights."""
        update, weights = self.attn(
            norm(hidden_states, self.eps), position_embeddings, plan, past_key_values, slot, cache_kwargs
        )
        hidden_states = hidden_states + update
        return hidden_states + self.mlp(norm(hidden_states, self.eps)), weights


class HrmTextStack(nn.Module):
    """`num_layers_per_stack` blocks and the norm at their exit."""

    def __init__(self, config: HrmTextConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.layers = nn.ModuleList(HrmTextDecoderLayer(config) for _ in range(config.num_layers_per_stack))
        self.gradient_checkpointing = False
        # Where set, the options of `torch.compile` for one layer, which then serves all decoding on static caches.
        self.compile_options: tuple[tuple[str, Any], ...] | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Any = None,
        slot: int = 0,
        cache_kwargs: dict[str, Any] | None = None,
        recorder: _Recorder | None = None,
    ) -> torch.Tensor:
        """One module call, on cache slots slot .. slot + layers - 1; [batch, tokens, hidden] -> the same shape."""
        compiled = self._compiled_layer(past_key_values) if hidden_states.shape[1] == 1 else None
        for i, layer in enumerate(self.layers):
            inputs = hidden_states
            arguments = (hidden_states, position_embeddings, plan, past_key_values, slot + i, cache_kwargs)
            if compiled is not None:
                one_slot = OneSlot(past_key_values.layers[slot + i])
                hidden_states, weights = compiled(layer, *arguments[:3], one_slot, 0, cache_kwargs)
            else:
                hidden_states, weights = layer(*arguments)
            if recorder is not None:
                recorder.note(inputs, weights)
        return norm(hidden_states, self.eps)

    def _compiled_layer(self, past_key_values: Any) -> Any:
        if self.compile_options is None or static_capacity(past_key_values) is None or torch.compiler.is_compiling():
            return None
        return compiled_layer(type(self.layers[0]).forward, self.compile_options)


class _Recorder:
    """Collects what `output_hidden_states` and `output_attentions` return, in slot order."""

    def __init__(self, hidden_states: bool | int | list[int], attentions: bool, calls: int):
        self.hidden_states: list[torch.Tensor | None] | None = [] if hidden_states else None
        self.attentions: list[torch.Tensor | None] | None = [] if attentions else None
        count = calls + 1  # the last hidden state comes after those of all calls
        indices = [] if not hidden_states else [hidden_states] if isinstance(hidden_states, int) else hidden_states
        if hidden_states is True:
            indices = range(count)
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"`output_hidden_states` is {hidden_states!r}: give True or indices below {count}.")
        self.wanted = {i % count for i in indices}

    def note(self, inputs: torch.Tensor, weights: torch.Tensor | None) -> None:
        if self.hidden_states is not None:
            self.note_hidden_state(inputs)
        if self.attentions is not None:
            self.attentions.append(weights)

    def note_hidden_state(self, hidden_state: torch.Tensor) -> None:
        self.hidden_states.append(hidden_state if len(self.hidden_states) in self.wanted else None)


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
        """Sets through how many trailing module calls training backpropagates, H calls first.

        Values do not change, only gradients; a trainer may call this at every step.

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
                module.gradient_calls = self.config.gradient_calls(bp_steps)

    @property
    def gradient_steps(self) -> int:
        """Number of module calls that carry gradient."""
        model = next(module for module in self.modules() if isinstance(module, HrmTextModel))
        H_bp, L_bp = model.gradient_calls
        return H_bp + sum(L_bp)


def _with_gradient(checkpointing: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
    """Checkpoints a layer call that carries gradient; others have nothing to keep, and torch would warn of them."""
    return checkpointing(layer, *args) if torch.is_grad_enabled() else layer(*args)


def _truncated_normal(tensor: torch.Tensor, std: float) -> None:
    """Normal cut at two standard deviations, widened so that `std` is what comes out."""
    wide = std / _TRUNCATED_STD
    nn.init.trunc_normal_(tensor, std=wide, a=-2 * wide, b=2 * wide)


class HrmTextModel(HrmTextPreTrainedModel):
    """The network without its output head."""

    def __init__(self, config: HrmTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = HrmTextRotaryEmbedding(config)
        self.L_module = HrmTextStack(config)
        self.H_module = HrmTextStack(config)
        self.z_L_init = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.gradient_calls = config.gradient_calls()
        if config.cycles_changed:
            logger.warning_once(
                f"the config was made for H_cycles, L_cycles = {tuple(config._made_for_cycles)} and the model runs "
                f"{(config.H_cycles, config.L_cycles)}: a checkpoint that came with it was trained for another depth."
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
        trusted_layout: bool = False,
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
            token_type_ids: [batch, tokens], 1 for tokens of a prefix block. None infers the blocks where
                `config.prefix_end_token_id` is set; all zeros is plain causal.
            inputs_embeds: [batch, tokens, hidden], before scaling.
            use_cache: whether to return a cache; None takes the config's.
            output_attentions: return the attention weights of every call (through the eager backend).
            output_hidden_states: return the input of every layer call, in slot order, and the last hidden state; or
                the indices of those to keep, with None in place of the others.
            trusted_layout: the caller has checked the layout of the whole prompt; no values are read for checks.

        Raises:
            ValueError: arguments that do not fit, or a prefix block that would be split over two calls.
        """
        refuse_paged_call(kwargs)
        past_key_values = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`, and not both.")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        use_cache = self._decide_use_cache(use_cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = HrmTextCache(config=self.config)

        batch, tokens, _ = inputs_embeds.shape
        # Not in the signature: only transformers 4 and 5.0 pass it, and later versions would, if it were named.
        cache_position = kwargs.get("cache_position")
        plan, position_ids = prepare_attention(
            self.config,
            (batch, tokens),
            inputs_embeds.device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            cache=past_key_values,
            cache_position=cache_position,
            trusted=trusted_layout,
            needs_weights=bool(output_attentions),
            static_shapes=self.L_module.compile_options is not None and tokens == 1,
        )
        cache_kwargs = None
        if static_capacity(past_key_values) is not None:
            if cache_position is None:
                cache_position = torch.arange(tokens, device=inputs_embeds.device) + past_key_values.get_seq_length()
            cache_kwargs = {"cache_position": cache_position}
        position_embeddings = rotary_tables(*self.rotary_emb(inputs_embeds, position_ids))
        recorder = (
            _Recorder(output_hidden_states, output_attentions, self.config.num_hidden_layers)
            if output_hidden_states or output_attentions
            else None
        )

        z_H = self._recur(
            inputs_embeds * self.config.embedding_scale,
            (position_embeddings, plan, past_key_values),
            cache_kwargs,
            recorder,
        )
        if recorder is not None and output_hidden_states:
            recorder.note_hidden_state(z_H)
        return ModelOutput(
            **{CACHE_NAME: past_key_values if use_cache else None},
            last_hidden_state=z_H,
            hidden_states=tuple(recorder.hidden_states) if output_hidden_states else None,
            attentions=tuple(recorder.attentions) if output_attentions else None,
        )

    def _recur(
        self,
        z_H: torch.Tensor,
        shared: tuple[Any, ...],
        cache_kwargs: dict[str, Any] | None,
        recorder: _Recorder | None,
    ) -> torch.Tensor:
        """The loop; z_H [batch, tokens, hidden] -> the same shape."""
        H_cycles, L_cycles, layers = self.config.H_cycles, self.config.L_cycles, self.config.num_layers_per_stack
        H_bp, L_bp = self.gradient_calls
        grad = torch.is_grad_enabled()
        z_L = self.z_L_init.detach().to(z_H.device, z_H.dtype).expand_as(z_H)
        slot = 0
        for h in range(H_cycles):
            for step in range(L_cycles):
                with torch.set_grad_enabled(grad and step >= L_cycles - L_bp[h]):
                    inputs = _carry_gradient(z_L.to(z_H.device) + z_H)
                    z_L = self.L_module(inputs, *shared, slot, cache_kwargs, recorder)
                slot += layers
            with torch.set_grad_enabled(grad and h >= H_cycles - H_bp):
                inputs = _carry_gradient(z_H + z_L.to(z_H.device))
                z_H = self.H_module(inputs, *shared, slot, cache_kwargs, recorder)
            slot += layers
        return z_H

    def _decide_use_cache(self, use_cache: bool | None, past_key_values: Any) -> bool:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.L_module.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if past_key_values is not None:
                raise ValueError(
                    "`past_key_values` were given while training with gradient checkpointing, whose second pass would "
                    "write the cache again: leave them out, or call `model.gradient_checkpointing_disable()`."
                )
            if use_cache:
                logger.warning_once("`use_cache=True` does not go with gradient checkpointing: no cache is returned.")
            return False
        return bool(use_cache)


def _carry_gradient(inputs: torch.Tensor) -> torch.Tensor:
    """Makes the input of a call that carries gradient require it, even where everything before it carried none.

    Without this, reentrant checkpointing would see no input that requires gradient and silently train nothing.
    """
    if torch.is_grad_enabled() and not inputs.requires_grad:
        return inputs.requires_grad_()
    return inputs


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
        trusted_layout: bool = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """
        Args:
            labels: [batch, tokens], -100 where nothing is asked; token i is compared with the logits of token i - 1,
                in float32. `num_items_in_batch` divides the sum in place of the number of labels.
            logits_to_keep: how many trailing positions to compute logits for, 0 for all; or a tensor of indices.

        The other arguments are those of `HrmTextModel.forward`.
        """
        refuse_paged_call(kwargs)
        past_key_values = one_cache(past_key_values, cache)
        if self._decoder is not None and labels is None and not (output_attentions or output_hidden_states):
            step = (input_ids, attention_mask, position_ids, past_key_values, trusted_layout)
            logits = self._decoder.step(self, *step)
            if logits is not None:
                return CausalLMOutput(**{CACHE_NAME: past_key_values}, logits=logits)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            trusted_layout=trusted_layout,
            return_dict=True,
            cache_position=kwargs.pop("cache_position", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = project(self.lm_head, outputs.last_hidden_state[:, kept])
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

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Mean cross-entropy of the next token; a loss function set in place of the library's stays in force."""
        plain = self.loss_function is ForCausalLMLoss and kwargs.get("shift_labels") is None
        if plain and labels.shape == logits.shape[:2] and values_are_readable():
            # Prompts carry no labels: their logits need no float32 copy, no softmax and no gradient.
            following = labels[:, 1:].to(logits.device)
            counted = following != kwargs.get("ignore_index", -100)
            if not counted.all():
                logits, kwargs["shift_labels"] = logits[:, :-1][counted], following[counted]
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)


def __getattr__(name: str) -> Any:
    """The classification heads, which lie in a room of their own.

    The import is late because they import this module, and stands here because transformers copies and saves with a
    model the files that its module names: without it, a fine-tuned folder would lack the heads of its `auto_map`.
    """
    if name in ("HrmTextForSequenceClassification", "HrmTextForTokenClassification"):
        from .heads_hrm_text import HrmTextForSequenceClassification, HrmTextForTokenClassification

        return {
            "HrmTextForSequenceClassification": HrmTextForSequenceClassification,
            "HrmTextForTokenClassification": HrmTextForTokenClassification,
        }[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["HrmTextForCausalLM", "HrmTextModel", "HrmTextPreTrainedModel"]
