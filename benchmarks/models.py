"""The same random weights in our class and in transformers' own."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
LIBRARY, OURS, OPTIMIZED, COMPILED = "library", "ours", "optimized", "optimized + compiled layer"
INT8, INT4 = "8 bits", "4 bits"
INT8_COMPILED, INT4_COMPILED = f"{INT8} + compiled layer", f"{INT4} + compiled layer"
VARIANTS = (LIBRARY, OURS, OPTIMIZED, COMPILED, INT8, INT8_COMPILED, INT4, INT4_COMPILED)
# What `optimize_for_inference` is given: `weights` and `compile_layers`.
QUANTIZED = {INT8: "int8", INT8_COMPILED: "int8", INT4: "int4", INT4_COMPILED: "int4"}
WITH_COMPILED_LAYER = (COMPILED, INT8_COMPILED, INT4_COMPILED)

# Fields that differ from the defaults of the config, which are the 1B's.
SIZES: dict[str, dict[str, Any]] = {
    "1b": {},
    # Of `training/nano.py`, but for the context, which is long enough for every figure.
    "nano": {
        "vocab_size": 665,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_layers_per_stack": 2,
        "num_attention_heads": 4,
        "initializer_range": 128**-0.5,
        "max_position_embeddings": 4096,
    },
}
_BLOCK = 1 << 24


def our_class(reference: str) -> Any:
    """`module.Class` of the repository, as a user's `trust_remote_code=True` loads it."""
    return get_class_from_dynamic_module(reference, str(ROOT))


def config_of(size: str, layers: int | None = None, **overrides: Any) -> Any:
    """Our config of a size named in `SIZES`, with another number of layers in a stack where one is given."""
    depth = {} if layers is None else {"num_layers_per_stack": layers}
    return our_class("configuration_hrm_text.HrmTextConfig")(**{**SIZES[size], **depth, **overrides})


def library_is_there() -> bool:
    """Whether the installed transformers has the class (5.9 and later)."""
    try:
        import transformers.models.hrm_text  # noqa: F401
    except ImportError:
        return False
    return True


def build_ours(config: Any, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """Our causal LM with normal weights of standard deviation `initializer_range`, in eval mode."""
    model = _empty(our_class("modeling_hrm_text.HrmTextForCausalLM"), config, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    # One block of random numbers, read from a random place each time: drawing 1.2 billion would take longer than the
    # quick run, and layers that are alike would blow up the rounding of bfloat16.
    block = torch.randn(2 * _BLOCK, generator=generator).to(dtype)
    for name, parameter in model.named_parameters():
        std = 1.0 if name.endswith("z_L_init") else config.initializer_range
        if name.endswith("down_proj.weight"):
            std *= (config.hidden_size / config.intermediate_size) ** 0.5
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), _BLOCK):
            part = flat[start : start + _BLOCK]
            place = int(torch.randint(_BLOCK, (), generator=generator))
            part.copy_(block[place : place + part.numel()]).mul_(std)
    return model


def build_library(ours: Any) -> Any:
    """transformers' own class on the weights of our model: its parameters are views of ours, so they cost nothing."""
    from transformers.models.hrm_text import HrmTextConfig, HrmTextForCausalLM

    fields = ours.config.to_dict()
    fields.pop("auto_map", None)
    parameter = ours.lm_head.weight
    model = _empty(HrmTextForCausalLM, HrmTextConfig.from_dict(fields), parameter.dtype, "meta")
    model.model.embed_tokens.weight = ours.model.embed_tokens.weight
    model.model.z_L_init = ours.model.z_L_init
    model.lm_head.weight = ours.lm_head.weight
    for stack in ("L_module", "H_module"):
        for theirs, layer in zip(getattr(model.model, stack).layers, getattr(ours.model, stack).layers):
            parts = layer.attn.gqkv_proj.weight.data.chunk(4)
            for name, part in zip(("gate_proj", "q_proj", "k_proj", "v_proj"), parts):
                getattr(theirs.self_attn, name).weight = torch.nn.Parameter(part)
            theirs.self_attn.o_proj.weight = layer.attn.o_proj.weight
            for name, part in zip(("gate_proj", "up_proj"), layer.mlp.gate_up_proj.weight.data.chunk(2)):
                getattr(theirs.mlp, name).weight = torch.nn.Parameter(part)
            theirs.mlp.down_proj.weight = layer.mlp.down_proj.weight
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(parameter.device)
    return model


def build_variant(name: str, ours: Any, in_place: bool = False) -> Any:
    """The variant of that name, one of `VARIANTS`, on the weights of our model as loaded.

    Args:
        name, ours: of what.
        in_place: change `ours` itself where the variant is another form of it, in place of a copy.
    """
    if name == LIBRARY:
        return build_library(ours)
    if name == OURS:
        return ours
    options: dict[str, Any] = {"compile_layers": name in WITH_COMPILED_LAYER}
    if name in QUANTIZED:
        options |= {"weights": QUANTIZED[name], "keep_weights": False}
    return ours.optimize_for_inference(**options) if in_place else build_optimized(ours, **options)


def build_optimized(ours: Any, **options: Any) -> Any:
    """A copy of our model after `optimize_for_inference` with these options; on CUDA it shares the weights."""
    if ours.device.type == "cuda":
        twin = _empty(type(ours), ours.config, ours.dtype, "meta")
        twin.load_state_dict(ours.state_dict(), assign=True)
        twin.model.rotary_emb = copy.deepcopy(ours.model.rotary_emb)
    else:
        twin = copy.deepcopy(ours)
    return twin.optimize_for_inference(**options)


def _empty(cls: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    if device != "meta":
        model.to_empty(device=device)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval()


def filled_cache(variant: str, model: Any, batch: int, length: int) -> Any:
    """A cache of the variant's default class with `length` random positions a row, without running a prefill."""
    from transformers import DynamicCache

    config = model.config
    shape = (batch, config.num_attention_heads, length, config.head_dim)
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(shape[2:], generator=generator).to(model.device, model.dtype).expand(shape)
    if variant == LIBRARY:
        cache = DynamicCache(config=config)
    else:
        # The model's own class: the same one loaded by itself is a copy, and another class to the model.
        cache = sys.modules[type(model).__module__].HrmTextCache(config=config)
    for slot in range(config.num_hidden_layers):
        # A copy for each slot, as after a prefill: `update` of a dynamic cache keeps what it is given.
        cache.update(block.clone(), block.clone(), slot)
    return cache
