"""Builds one `config.json`, in the published dialect, from what a checkpoint says about itself."""

import math
from typing import Any

from .errors import ConversionError
from .layout import Dimensions
from .reading import shown as short
from .tokenizer import CONDITIONS, PADDING, Envelope, Tokenizer


# Ids of the special tokens in every published tokenizer of the family.
PUBLISHED_IDS = {"<|endoftext|>": 5, "<|im_start|>": 6, "<|im_end|>": 7, "<|box_end|>": 11}
# More cycles than any model of the family has, and a context that nobody can fill.
_MOST_CYCLES = 64
_MOST_POSITIONS = 2**31

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
    "prefix_start_token_ids",
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

    `L_bp_cycles` counts the L calls with gradient in each H cycle and assumes that every H call carries
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
    run: dict[str, Any],
    metadata: dict[str, Any],
    envelope: Envelope,
    tokenizer: Tokenizer | None,
    dimensions: Dimensions,
    origin: str,
) -> tuple[dict[str, Any], list[str]]:
    """Config of a training checkpoint.

    Args:
        run: `all_config.yaml`.
        metadata: `train_metadata.yaml`.
        envelope: what the metadata calls the tokens of a prompt.
        tokenizer: the checkpoint's; None where there is none, and the published ids hold.
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
    name = arch.get("name", "hrm")
    if not isinstance(name, str) or "hrm" not in name.lower():
        raise ConversionError(f"{where}: arch.name is {short(name)}, which is not HRM-Text")
    for field, wanted in (("norm_type", "pre"), ("pos_emb_type", "rope")):
        if arch[field] != wanted:
            raise ConversionError(f"{where}: arch.{field} is {short(arch[field])}; HRM-Text has {wanted!r} only")
    if type(arch["half_layers"]) is not bool:
        raise ConversionError(f"{where}: arch.half_layers is {short(arch['half_layers'])}; it must be true or false")
    if arch["H_override"]:
        raise ConversionError(
            f"{where}: arch.H_override gives the stacks different settings, which HRM-Text does not have"
        )

    hidden, heads = _integer(arch, "hidden_size", where), _integer(arch, "num_heads", where)
    H_cycles, L_cycles = _cycles(arch, where)
    bp_steps = _integer(arch, "bp_max_steps", where, minimum=2)
    vocabulary = _integer(metadata, "vocab_size", f"{origin}/train_metadata.yaml")
    context = _integer(metadata, "max_seq_len", f"{origin}/train_metadata.yaml", maximum=_MOST_POSITIONS)
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
    pad = _pad_token_id(tokenizer, origin)
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
        "bos_token_id": _token_id(envelope.start, tokenizer, origin),
        "eos_token_id": _token_id(envelope.answer_end, tokenizer, origin),
        "pad_token_id": pad,
        "prefix_end_token_id": _token_id(envelope.end, tokenizer, origin),
    }
    return complete(config, dimensions, origin), warnings


def from_published(
    stored: dict[str, Any], dimensions: Dimensions, tokenizer: Tokenizer | None, origin: str
) -> tuple[dict[str, Any], list[str]]:
    """Config of a Hugging Face folder in either dialect. Arguments, return value and errors as `from_training`."""
    where = f"{origin}/config.json"
    if stored.get("model_type") != "hrm_text":
        raise ConversionError(f"{where}: model_type is {short(stored.get('model_type'))}, not 'hrm_text'")
    refuse_quantized(stored, origin)
    # An unknown field may name code (custom_pipelines) or a treatment of the weights that was not read.
    config = {key: value for key, value in stored.items() if key in _KEPT_FIELDS}

    heads = _integer(config, "num_attention_heads", where)
    _agree(where, "num_attention_heads", heads, config.pop("num_key_value_heads", heads), "num_key_value_heads")
    if config.get("tie_word_embeddings"):
        raise ConversionError(f"{where}: tie_word_embeddings is true, and HRM-Text's embeddings are not tied")
    for key in ("attention_bias", "mlp_bias"):
        if config.pop(key, False):
            raise ConversionError(f"{where}: {key} is true, and HRM-Text has no biases")
    if config.pop("hidden_act", "silu") != "silu":
        raise ConversionError(
            f"{where}: hidden_act is {short(stored['hidden_act'])}, and HRM-Text's MLP is SwiGLU, which has 'silu': "
            "this is not an HRM-Text checkpoint"
        )
    for field, found in (
        ("hidden_size", dimensions.hidden),
        ("intermediate_size", dimensions.intermediate),
        ("vocab_size", dimensions.vocabulary),
    ):
        _agree(where, field, config.get(field, found), found)
    given = config.get("head_dim") is not None
    head_dim = _integer(config, "head_dim", where) if given else dimensions.hidden // heads
    _agree(where, "num_attention_heads * head_dim", heads * head_dim, dimensions.attention)

    H_cycles, L_cycles = _cycles(config, where)
    warnings = []
    counted = config.get("num_layers_per_stack")
    name = "num_layers_per_stack" if counted else "num_hidden_layers"
    counted = counted or config.get("num_hidden_layers")
    if counted != dimensions.layers:
        both = ", which counts both stacks" if counted == 2 * dimensions.layers else ""
        warnings.append(
            f"{where}: {name} is {short(counted)}{both}; the tensors have {dimensions.layers} layers a stack and are "
            "right"
        )

    if "L_bp_cycles" not in config and "L_bp_steps" in config:
        config["L_bp_cycles"] = config["L_bp_steps"]
    config.pop("L_bp_steps", None)
    rope = config.pop("rope_parameters", None) or config.pop("rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"{where}: rope_parameters is not a table; write it like {{'rope_theta': 10000.0}}")
    theta = config.pop("rope_theta", None)
    rope = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta, **rope}
    config["rope_parameters"] = {**rope, "rope_theta": _number(rope, "rope_theta", where)}
    config.pop("rope_scaling", None)
    if config.get("initializer_range") is None:
        config["initializer_range"] = 1.0 / math.sqrt(dimensions.hidden)
    if config.get("embedding_scale") is None:
        config["embedding_scale"] = 1.0 / _number(config, "initializer_range", where)
    config["rms_norm_eps"] = _number({"rms_norm_eps": 1e-6, **config}, "rms_norm_eps", where)
    config["max_position_embeddings"] = _integer(config, "max_position_embeddings", where, maximum=_MOST_POSITIONS)
    config.setdefault("prefix_lm", True)
    known = PUBLISHED_IDS if tokenizer is None else tokenizer.ids
    envelope = published_envelope(tokenizer)
    for field, token in (
        ("bos_token_id", envelope.start),
        ("eos_token_id", envelope.answer_end),
        ("pad_token_id", PADDING),
        ("prefix_end_token_id", envelope.end),
    ):
        if field == "prefix_end_token_id" and field in config:  # null switches it off
            continue
        if config.get(field) is None:
            index = known.get(token)
            if index is None and tokenizer is not None and field != "prefix_end_token_id":
                index = tokenizer.special_id(field.removesuffix("_id"))
            config[field] = index if index is not None and index < dimensions.vocabulary else None
    if config["bos_token_id"] is None and config.get("prefix_start_token_ids") is None:
        config["prefix_end_token_id"] = None
    if config["prefix_end_token_id"] is None and tokenizer is None:
        warnings.append(
            f"{where}: prefix_end_token_id is not known, so prompts are read causally unless token_type_ids are given"
        )
    config["H_cycles"], config["L_cycles"] = H_cycles, L_cycles
    _check_types(config, where)
    return complete(config, dimensions, where), warnings


def published_envelope(tokenizer: Tokenizer | None) -> Envelope:
    """The tokens of a prompt in a model's folder, which an earlier conversion may have named in the settings."""
    usual, settings = Envelope(), {} if tokenizer is None else tokenizer.settings
    bos, eos = (settings.get(name) for name in ("bos_token", "eos_token"))
    if "prompt_end" not in settings:  # special tokens of chats have many meanings, and the usual names one
        bos, eos = usual.start, usual.answer_end
    return Envelope(
        bos if isinstance(bos, str) else usual.start,
        settings.get("prompt_end") or usual.end,
        eos if isinstance(eos, str) else usual.answer_end,
        tuple(settings.get("condition_tokens", CONDITIONS).items()),
    )


def training_envelope(info: dict[str, Any], tokenizer: Tokenizer | None, origin: str) -> Envelope:
    """The tokens of a prompt as the metadata of a training run names them.

    Raises:
        ConversionError: a name is not a string, or the tokenizer does not have the token of a condition.
    """
    where = f"{origin}/train_metadata.yaml"
    mapping = info.get("condition_mapping", CONDITIONS)
    if not isinstance(mapping, dict) or not all(isinstance(text, str) for text in [*mapping, *mapping.values()]):
        raise ConversionError(f"{where}: condition_mapping is {short(mapping)}; it must be a table of tokens")
    names = {}
    for field in ("boq", "eoq", "eoa"):
        names[field] = info.get(field)
        if not isinstance(names[field], str):
            raise ConversionError(f"{where}: {field} is {short(names[field])}; it must be a token")
    if tokenizer is not None:
        for token in mapping.values():
            _token_id(token, tokenizer, origin)
    # In the order in which people list them, where the tags are the usual ones.
    ordered = {tag: mapping[tag] for tag in (*CONDITIONS, *mapping) if tag in mapping}
    return Envelope(names["boq"], names["eoq"], names["eoa"], tuple(ordered.items()))


def refuse_quantized(stored: dict[str, Any], origin: str) -> None:
    """Raises a ConversionError for the config of weights that are quantized already."""
    if stored.get("quantization_config"):
        raise ConversionError(f"{origin}/config.json: the weights are quantized; convert the checkpoint before it was")


def check_generation(stored: dict[str, Any], origin: str) -> dict[str, Any]:
    """`generation_config.json`, whose fields are plain values and whose lengths are counts."""
    where = f"{origin}/generation_config.json"
    for field in ("max_new_tokens", "max_length", "min_length", "min_new_tokens", "num_beams", "top_k"):
        if stored.get(field) is not None:
            _integer(stored, field, where, minimum=0)
    for field in ("temperature", "top_p", "repetition_penalty"):
        if stored.get(field) is not None and type(stored[field]) not in (int, float):
            raise ConversionError(f"{where}: {field} is {short(stored[field])}; it must be a number")
    for field in ("do_sample", "use_cache"):
        if not isinstance(stored.get(field), bool | None):
            raise ConversionError(f"{where}: {field} is {short(stored[field])}; it must be true or false")
    return stored


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
    if config.get("prefix_start_token_ids") is None:
        config.pop("prefix_start_token_ids", None)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "prefix_end_token_id", "prefix_start_token_ids"):
        ids = config.get(field)
        if ids == [] or (isinstance(ids, list) and field in ("bos_token_id", "pad_token_id")):
            raise ConversionError(f"{origin}: {field} is {short(ids)}; it must be one id")
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
    if kind not in ("fixed_normal", "megatron"):
        raise ConversionError(
            f"{where}: arch.init_type {short(kind)} is unknown, and the embedding's scale follows it"
        )
    if arch.get("init_std") is not None:
        return _number(arch, "init_std", where)
    return hidden if kind == "megatron" else 0.02


def _cycles(fields: dict[str, Any], where: str) -> tuple[int, int]:
    """H_cycles and L_cycles, bounded: with absurd ones the check of the result would run for hours."""
    H_cycles, L_cycles = (_integer(fields, name, where, maximum=_MOST_CYCLES) for name in ("H_cycles", "L_cycles"))
    return H_cycles, L_cycles


def _check_types(config: dict[str, Any], where: str) -> None:
    """Refuses fields of a published config whose type the model's config does not accept."""

    def require(right: bool, field: str, wanted: str) -> None:
        if not right:
            raise ConversionError(f"{where}: {field} is {short(config[field])}; it must be {wanted}")

    for field in ("use_cache", "prefix_lm"):
        require(isinstance(config.get(field), bool | None), field, "true or false")
    if (dropout := config.get("attention_dropout")) is not None:
        require(type(dropout) in (int, float) and 0 <= dropout <= 1, "attention_dropout", "a number from 0 to 1")
    for field in ("initializer_range", "embedding_scale"):
        _number(config, field, where)
    if config.get("bp_steps") is not None:
        _integer(config, "bp_steps", where, minimum=2, maximum=config["H_cycles"] * (config["L_cycles"] + 1))
    steps = config.get("L_bp_cycles")
    if steps is not None:
        steps = [steps] if type(steps) is int else steps
        right = isinstance(steps, list) and len(steps) <= config["H_cycles"]
        require(right and all(type(n) is int and 0 <= n <= config["L_cycles"] for n in steps), "L_bp_cycles", "counts")
    for field, kind in (("id2label", str), ("label2id", int)):
        table = config.get(field)
        right = table is None or (isinstance(table, dict) and all(type(value) is kind for value in table.values()))
        require(right and (field == "label2id" or all(key.isdecimal() for key in table or {})), field, "a table")
    rope = config["rope_parameters"]
    require(isinstance(rope.get("rope_type"), str), "rope_parameters", "a table with a rope_type")


def _pad_token_id(tokenizer: Tokenizer | None, origin: str) -> int:
    """The padding token: the published one, or in another tokenizer what it names itself."""
    own = None if tokenizer is None or PADDING in tokenizer.ids else tokenizer.special_id("pad_token")
    return _token_id(PADDING, tokenizer, origin) if own is None else own


def _token_id(token: Any, tokenizer: Tokenizer | None, origin: str) -> int:
    known = PUBLISHED_IDS if tokenizer is None else tokenizer.ids
    if token not in known:
        raise ConversionError(
            f"{origin}: the id of the special token {short(token)} is not known; pass --tokenizer with the tokenizer "
            "that the model was trained with"
        )
    return known[token]


def _integer(fields: dict[str, Any], name: str, where: str, minimum: int = 1, maximum: int = 2**62) -> int:
    value = fields.get(name)
    if type(value) is not int or not minimum <= value <= maximum:
        most = f" and at most {maximum}" if maximum < 2**62 else ""
        raise ConversionError(f"{where}: {name} is {short(value)}; it must be an integer of at least {minimum}{most}")
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
