"""From what a checkpoint says of itself to one `config.json`, in the published dialect."""

import math
from reprlib import repr as short
from typing import Any

from .errors import ConversionError
from .layout import Dimensions


# Ids of the special tokens in every published tokenizer of the family.
PUBLISHED_IDS = {"<|endoftext|>": 5, "<|im_start|>": 6, "<|im_end|>": 7, "<|box_end|>": 11}
PAD_TOKEN = "<|endoftext|>"

# What a published config may say; the rest is written anew or left out.
_KEPT_FIELDS = {
    "H_cycles",
    "L_bp_cycles",
    "L_bp_steps",
    "L_cycles",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "bp_steps",
    "embedding_scale",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "label2id",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_layers_per_stack",
    "pad_token_id",
    "prefix_end_token_id",
    "prefix_lm",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
}
_ARCHITECTURE_DEFAULTS = {
    "half_layers": False,
    "attn_type": "prefixlm",
    "bp_max_steps": 5,
    "norm_type": "pre",
    "pos_emb_type": "rope",
    "H_override": {},
}


def gradient_steps(bp_steps: int, H_cycles: int, L_cycles: int) -> dict[str, Any]:
    """The config fields for training that backpropagated through the last `bp_steps` module calls.

    `L_bp_cycles` counts the L calls with gradient in each H cycle and takes for granted that every H call carries
    gradient. Where that was not so, `bp_steps` is written as well.
    """
    bp_steps = min(bp_steps, H_cycles * (L_cycles + 1))
    H_bp = min(H_cycles, bp_steps - 1)
    L_bp = bp_steps - H_bp
    first = H_cycles * L_cycles - L_bp
    fields: dict[str, Any] = {
        "L_bp_cycles": [min(L_cycles, max(0, (cycle + 1) * L_cycles - first)) for cycle in range(H_cycles)]
    }
    if H_bp < H_cycles:
        fields["bp_steps"] = bp_steps
    return fields


def from_training(
    run: dict[str, Any], metadata: dict[str, Any], token_ids: dict[str, int], dimensions: Dimensions, origin: str
) -> tuple[dict[str, Any], list[str]]:
    """Config of a training checkpoint.

    Args:
        run: `all_config.yaml`.
        metadata: `train_metadata.yaml`.
        token_ids: id of each special token that the tokenizer file knows; empty without one.
        dimensions: what the tensors tell.
        origin: the folder, for messages.

    Returns:
        The config and a list of warnings.

    Raises:
        ConversionError: a field is missing, contradicts the tensors, or describes another architecture.
    """
    where = f"{origin}/all_config.yaml"
    arch = run.get("arch")
    if not isinstance(arch, dict):
        raise ConversionError(f"{where} has no arch section: is it an HRM-Text checkpoint?")
    arch = {**_ARCHITECTURE_DEFAULTS, **arch}
    if "hrm" not in str(arch.get("name", "hrm")).lower():
        raise ConversionError(f"{where}: arch.name is {short(arch['name'])}, which is no HRM-Text")
    for field, wanted in (("norm_type", "pre"), ("pos_emb_type", "rope")):
        if arch[field] != wanted:
            raise ConversionError(f"{where}: arch.{field} is {short(arch[field])}; HRM-Text has {wanted!r} only")
    if arch["H_override"]:
        raise ConversionError(f"{where}: arch.H_override gives the stacks different settings, which HRM-Text has not")

    hidden, heads = _integer(arch, "hidden_size", where), _integer(arch, "num_heads", where)
    H_cycles, L_cycles = _integer(arch, "H_cycles", where), _integer(arch, "L_cycles", where)
    bp_steps = _integer(arch, "bp_max_steps", where, minimum=2)
    vocabulary = _integer(metadata, "vocab_size", f"{origin}/train_metadata.yaml")
    context = _integer(metadata, "max_seq_len", f"{origin}/train_metadata.yaml")
    if heads and hidden % heads:
        raise ConversionError(f"{where}: arch.num_heads {heads} does not divide arch.hidden_size {hidden}")
    _agree(where, "arch.hidden_size", hidden, dimensions.hidden)
    _agree(where, "arch.num_heads * head size", heads * (hidden // heads), dimensions.attention)
    _agree(f"{origin}/train_metadata.yaml", "vocab_size", vocabulary, dimensions.vocabulary)

    warnings = []
    layers = _integer(arch, "n_layers", where) // (2 if arch["half_layers"] else 1)
    if layers != dimensions.layers:
        warnings.append(
            f"{where} counts {layers} layers a stack, the tensors {dimensions.layers}: the tensors are right"
        )
    if "expansion" in arch:
        intermediate = -(-round(_number(arch, "expansion", where) * hidden * 2 / 3) // 256) * 256
        _agree(where, "the intermediate size from arch.expansion", intermediate, dimensions.intermediate)

    initializer_range = _initializer_range(arch, where)
    tokens = metadata.get("tokenizer_info") or {}
    config = {
        "initializer_range": initializer_range,
        "embedding_scale": 1.0 / initializer_range,
        "H_cycles": H_cycles,
        "L_cycles": L_cycles,
        **gradient_steps(bp_steps, H_cycles, L_cycles),
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "rms_norm_eps": _number(arch, "norm_eps", where),
        "rope_parameters": {"rope_theta": _number(arch, "rope_theta", where), "rope_type": "default"},
        "prefix_lm": arch["attn_type"] == "prefixlm",
        "bos_token_id": _token_id(tokens.get("boq"), token_ids, origin),
        "eos_token_id": _token_id(tokens.get("eoa"), token_ids, origin),
        "pad_token_id": _token_id(PAD_TOKEN, token_ids, origin),
        "prefix_end_token_id": _token_id(tokens.get("eoq"), token_ids, origin),
    }
    return complete(config, dimensions, origin), warnings


def from_published(
    stored: dict[str, Any], dimensions: Dimensions, token_ids: dict[str, int], origin: str
) -> tuple[dict[str, Any], list[str]]:
    """Config of a Hugging Face folder in either dialect. Arguments, return value and errors as `from_training`."""
    where = f"{origin}/config.json"
    if stored.get("model_type") != "hrm_text":
        raise ConversionError(f"{where}: model_type is {short(stored.get('model_type'))}, not 'hrm_text'")
    # An unknown field may name code (custom_pipelines) or a treatment of the weights that was not read.
    if stored.get("quantization_config"):
        raise ConversionError(f"{where}: the weights are quantized; convert the checkpoint before it was")
    config = {key: value for key, value in stored.items() if key in _KEPT_FIELDS}

    heads = _integer(config, "num_attention_heads", where)
    _agree(where, "num_attention_heads", heads, config.pop("num_key_value_heads", heads), "num_key_value_heads")
    if config.get("tie_word_embeddings"):
        raise ConversionError(f"{where}: tie_word_embeddings is true, and HRM-Text's embeddings are not tied")
    for key in ("attention_bias", "mlp_bias"):
        if config.pop(key, False):
            raise ConversionError(f"{where}: {key} is true, and HRM-Text has no biases")
    if config.pop("hidden_act", "silu") != "silu":
        raise ConversionError(f"{where}: hidden_act is {short(stored['hidden_act'])}, and HRM-Text has 'silu' only")
    for field, found in (
        ("hidden_size", dimensions.hidden),
        ("intermediate_size", dimensions.intermediate),
        ("vocab_size", dimensions.vocabulary),
    ):
        _agree(where, field, config.get(field, found), found)
    head_dim = config.get("head_dim") or dimensions.hidden // heads
    _agree(where, "num_attention_heads * head_dim", heads * head_dim, dimensions.attention)

    H_cycles, L_cycles = _integer(config, "H_cycles", where), _integer(config, "L_cycles", where)
    warnings = []
    counted = config.get("num_layers_per_stack")
    name = "num_layers_per_stack" if counted else "num_hidden_layers"
    counted = counted or config.get("num_hidden_layers")
    if counted != dimensions.layers:
        both = ", which counts both stacks" if counted == 2 * dimensions.layers else ""
        warnings.append(
            f"{where}: {name} is {counted}{both}; the tensors have {dimensions.layers} layers a stack and are right"
        )

    if "L_bp_cycles" not in config and "L_bp_steps" in config:
        config["L_bp_cycles"] = config["L_bp_steps"]
    config.pop("L_bp_steps", None)
    rope = config.pop("rope_parameters", None) or config.pop("rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"{where}: rope_parameters is no table; write it like {{'rope_theta': 10000.0}}")
    theta = config.pop("rope_theta", None)
    rope = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta, **rope}
    config["rope_parameters"] = {**rope, "rope_theta": _number(rope, "rope_theta", where)}
    config.pop("rope_scaling", None)
    if config.get("initializer_range") is None:
        config["initializer_range"] = 1.0 / math.sqrt(dimensions.hidden)
    if config.get("embedding_scale") is None:
        config["embedding_scale"] = 1.0 / _number(config, "initializer_range", where)
    config["rms_norm_eps"] = _number({"rms_norm_eps": 1e-6, **config}, "rms_norm_eps", where)
    config["max_position_embeddings"] = _integer(config, "max_position_embeddings", where)
    config.setdefault("prefix_lm", True)
    known = token_ids or PUBLISHED_IDS
    for field, token in (
        ("bos_token_id", "<|im_start|>"),
        ("eos_token_id", "<|box_end|>"),
        ("pad_token_id", PAD_TOKEN),
        ("prefix_end_token_id", "<|im_end|>"),
    ):
        if field == "prefix_end_token_id" and field in config:  # null switches it off
            continue
        if config.get(field) is None:
            index = known.get(token)
            config[field] = index if index is not None and index < dimensions.vocabulary else None
    if config["bos_token_id"] is None:
        config["prefix_end_token_id"] = None
    if config["prefix_end_token_id"] is None:
        warnings.append(
            f"{where}: prefix_end_token_id is not known, so prompts are read causally unless token_type_ids are given"
        )
    config["H_cycles"], config["L_cycles"] = H_cycles, L_cycles
    return complete(config, dimensions, origin), warnings


def complete(config: dict[str, Any], dimensions: Dimensions, origin: str) -> dict[str, Any]:
    """`config` with what the tensors tell, and with every token id checked against the vocabulary."""
    config = {
        **config,
        "model_type": "hrm_text",
        "architectures": ["HrmTextForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": dimensions.vocabulary,
        "hidden_size": dimensions.hidden,
        "intermediate_size": dimensions.intermediate,
        "head_dim": dimensions.attention // config["num_attention_heads"],
        "num_layers_per_stack": dimensions.layers,
        # One cache slot per attention call, as transformers' caches count.
        "num_hidden_layers": dimensions.layers * config["H_cycles"] * (config["L_cycles"] + 1),
        "tie_word_embeddings": False,
    }
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "prefix_end_token_id"):
        ids = config.get(field)
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if type(token) is not int or not 0 <= token < dimensions.vocabulary:
                raise ConversionError(
                    f"{origin}: {field} {short(token)} is outside the vocabulary of {dimensions.vocabulary}; "
                    "pass --tokenizer with the tokenizer that the model was trained with"
                )
    return dict(sorted(config.items()))


def _initializer_range(arch: dict[str, Any], where: str) -> float:
    """Standard deviation of the input projections, whose inverse scales the embedding."""
    hidden = 1.0 / math.sqrt(arch["hidden_size"])
    kind = arch.get("init_type", "lecun_normal")
    if kind == "lecun_normal":
        return hidden
    if kind not in {"fixed_normal", "megatron"}:
        raise ConversionError(
            f"{where}: arch.init_type {short(kind)} is unknown, and the embedding's scale follows it"
        )
    if arch.get("init_std") is not None:
        return _number(arch, "init_std", where)
    return hidden if kind == "megatron" else 0.02


def _token_id(token: Any, token_ids: dict[str, int], origin: str) -> int:
    known = token_ids or PUBLISHED_IDS
    if token not in known:
        raise ConversionError(
            f"{origin}: the id of the special token {short(token)} is not known; pass --tokenizer with the tokenizer "
            "that the model was trained with"
        )
    return known[token]


def _integer(fields: dict[str, Any], name: str, where: str, minimum: int = 1) -> int:
    value = fields.get(name)
    if type(value) is not int or value < minimum:
        raise ConversionError(f"{where}: {name} is {short(value)}; it must be an integer of at least {minimum}")
    return value


def _number(fields: dict[str, Any], name: str, where: str) -> float:
    value = fields.get(name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConversionError(f"{where}: {name} is {short(value)}; it must be a positive number")
    return float(value)


def _agree(where: str, name: str, said: Any, found: Any, of: str = "the tensors") -> None:
    if said != found:
        raise ConversionError(
            f"{where}: {name} is {short(said)}, and {of} say {short(found)}; repair the config or the weights"
        )
