"""Everything that differs between the supported versions of transformers, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging


OLDEST, NEWEST = "4.57.6", "5.24.0"
OLDEST_TORCH, NEWEST_TORCH = "2.8", "2.15"


def _release(version: str) -> tuple[int, ...]:
    """(5, 24, 0) for "5.24.0.dev0"."""
    return tuple(int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def check_version(installed: str) -> None:
    """Refuses a transformers that is too old, and warns once of one that is newer than any this was tested with.

    Raises:
        ImportError: older than the oldest supported release.
    """
    tested = f"this code was tested with transformers {OLDEST} to {NEWEST}"
    if _release(installed) < _release(OLDEST):
        raise ImportError(
            f"HRM-Text needs transformers {OLDEST} or newer and {installed} is installed ({tested}): "
            f"`pip install --upgrade 'transformers>={OLDEST}'`."
        )
    if _release(installed)[:2] > _release(NEWEST)[:2]:
        # One name for every copy of this file that remote code loads, so that the warning comes once.
        transformers_logging.get_logger("transformers_modules.hrm_text").warning_once(
            f"transformers {installed} is installed, and {tested}. Should something fail, install {NEWEST}."
        )


def check_torch(installed: str) -> None:
    """Refuses a torch that is too old: one compiled layer cannot serve all slots of a static cache before 2.8.

    Raises:
        ImportError: older than the oldest supported release.
    """
    if _release(installed) < _release(OLDEST_TORCH):
        raise ImportError(
            f"HRM-Text needs torch {OLDEST_TORCH} or newer and {installed} is installed: "
            f"`pip install --upgrade 'torch>={OLDEST_TORCH}'`."
        )


check_version(transformers.__version__)
check_torch(torch.__version__)

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4 spells it with a small t, and its rotary functions read `rope_scaling`
    from transformers import PretrainedConfig

    class PreTrainedConfig(PretrainedConfig):
        """The base of transformers 4, with the view of `rope_parameters` that its rotary functions read."""

        @property
        def rope_scaling(self) -> dict[str, Any] | None:
            rope = getattr(self, "rope_parameters", None)
            return None if rope is None or rope["rope_type"] == "default" else rope

        @rope_scaling.setter
        def rope_scaling(self, value: dict[str, Any] | None) -> None:
            self.rope_parameters = {"rope_theta": self.rope_theta, "rope_type": "default", **(value or {})}


# Releases from 5.24 on call the cache of a call and of its output `cache`, earlier ones `past_key_values`.
CACHE_NAME = "cache" if _release(transformers.__version__) >= (5, 24) else "past_key_values"
# In 5.9 and older, what is given to `crop` is the length to keep, so that 0 empties a cache; in 5.16 and newer it is
# what goes, and 0 is nothing. A number below zero is what goes in all of them, and ours takes one above zero as the
# length to keep.
CROP_KEEPS = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache of a call that may give it under either name, on every version.

    Raises:
        ValueError: two different caches, a cache of continuous batching, or something that is no cache.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "`past_key_values` and `cache` are two names of one argument, and two different caches were given: give "
            "one of them."
        )
    cache = past_key_values if cache is None else cache
    if cache is not None:
        if is_paged_cache(cache):
            raise ValueError(NO_CONTINUOUS_BATCHING)
        if hasattr(cache, "self_attention_cache"):
            raise ValueError(
                f"the cache is a {type(cache).__name__}, and HRM-Text has no encoder: give its `self_attention_cache`."
            )
        if not hasattr(cache, "get_seq_length") or not hasattr(cache, "update"):
            raise ValueError(
                f"the cache is a {type(cache).__name__}: give a cache of transformers (`DynamicCache`, `StaticCache`, "
                "...) or the one that an earlier call returned."
            )
    return cache


NO_CONTINUOUS_BATCHING = (
    "HRM-Text has no continuous batching: its scheduler cuts prompts anywhere and its paged attention is causal, so "
    "prefix blocks would be read wrongly. Call `model.generate(...)` on a batch padded on the left instead (a server: "
    "start it without continuous batching)."
)


def refuse_paged_call(arguments: dict[str, Any]) -> None:
    """Refuses a forward call by the continuous batching of transformers, given the arguments that forward names not.

    Raises:
        ValueError: they say where a paged cache is read and written.
    """
    if arguments.get("read_index") is not None or arguments.get("write_index") is not None:
        raise ValueError(NO_CONTINUOUS_BATCHING)


def is_paged_cache(cache: Any) -> bool:
    """Whether the object is the paged cache of continuous batching; a lookalike under the same name is not."""
    paged = sys.modules.get("transformers.generation.continuous_batching.cache")
    return paged is not None and isinstance(cache, paged.PagedAttentionCache)


if CACHE_NAME == "cache":
    ModelOutput, CausalLMOutput = BaseModelOutputWithPast, CausalLMOutputWithPast
else:

    class ModelOutput(BaseModelOutputWithPast):
        """The library's output, whose cache can be read under the newer name too, as 5.24 reads the older one."""

        @property
        def cache(self) -> Any:
            return self.past_key_values

    class CausalLMOutput(CausalLMOutputWithPast):
        """The library's output, whose cache can be read under the newer name too, as 5.24 reads the older one."""

        @property
        def cache(self) -> Any:
            return self.past_key_values


def is_version_5() -> bool:
    """Whether the installed transformers is of the 5 series."""
    return int(transformers.__version__.split(".")[0]) >= 5


def tied_weights_keys(target: str, source: str) -> dict[str, str] | list[str]:
    """The value of `_tied_weights_keys`: a mapping in transformers 5, a list of targets before."""
    return {target: source} if is_version_5() else [target]


def is_traced() -> bool:
    """Whether torch.fx records the model as llm-compressor does: compiling, but not by dynamo nor for an export."""
    compiler = torch.compiler
    return compiler.is_compiling() and not compiler.is_dynamo_compiling() and not compiler.is_exporting()


def static_capacity(cache: Any) -> int | None:
    """Number of positions that a static cache holds, None for a cache that grows."""
    layers = getattr(cache, "layers", None)
    capacity = getattr(layers[0], "max_cache_len", None) if layers else None
    return int(capacity) if capacity is not None else None


def cached_length(cache: Any) -> int | torch.Tensor:
    """Number of positions in a cache or a slot; a 0-d tensor for a static one that has been written to."""
    length = 0 if cache is None else cache.get_seq_length()
    # Around 5.9 a static cache counts in a tensor [1].
    return length.reshape(()) if isinstance(length, torch.Tensor) else length


def is_flash(implementation: str) -> bool:
    """Whether the name is that of a flash attention, also one from the kernels hub; paged ones are not served."""
    name = implementation.rsplit("@", 1)[0].split(":")[0].lower()
    if name.startswith("paged|"):
        return False
    return name.startswith("flash_attention_") or ("/" in name and "flash" in name)


def flash_kernel(implementation: str) -> Callable[..., Any]:
    """The variable-length function of a flash attention, loaded as transformers loads it."""
    from transformers import modeling_flash_attention_utils

    modeling_flash_attention_utils.lazy_import_flash_attention(implementation)
    kernel = modeling_flash_attention_utils._flash_varlen_fn
    if kernel is None:
        raise ValueError(f"{implementation!r} has no variable-length call: use 'flash_attention_2' or 'sdpa'.")
    return kernel


@contextlib.contextmanager
def as_expected_tokenizer_class() -> Iterator[None]:
    """Keeps transformers 4 from warning that `tokenizer_config.json` names the plain fast class, as ours does."""
    logger = logging.getLogger("transformers.tokenization_utils_base")

    def differs(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("The tokenizer class you load from this checkpoint is not the same type")

    logger.addFilter(differs)
    try:
        yield
    finally:
        logger.removeFilter(differs)


# gate, q, k and v lie in one matrix; the library's packed styles before 5.16 cut two parts only.
_FOUR_PARTS = "hrm_text_packed_colwise"
_TENSOR_PARALLEL_SINCE = "5.16"


def tensor_parallel_plan() -> dict[str, str] | None:
    """How the layers are split over devices, by heads and by columns; None where transformers cannot do it."""
    try:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel

        ALL_PARALLEL_STYLES.register(_FOUR_PARTS, PackedColwiseParallel(split_factor=4))
    except (ImportError, TypeError):
        return None
    styles = {
        "attn.gqkv_proj": _FOUR_PARTS,
        "attn.o_proj": "rowwise",
        "mlp.gate_up_proj": "packed_colwise",
        "mlp.down_proj": "rowwise",
    }
    layers = [f"{stack}_module.layers.*" for stack in ("L", "H")]
    return {f"{layer}.{name}": style for layer in layers for name, style in styles.items()}


def refuse_tensor_parallelism(arguments: dict[str, Any]) -> None:
    """Raises a ValueError for arguments of `from_pretrained` that ask for a split which transformers cannot do."""
    asked = next((name for name in ("tp_plan", "tp_size") if arguments.get(name) is not None), None)
    if asked is not None and tensor_parallel_plan() is None:
        raise ValueError(
            f"`{asked}` was given, but transformers {transformers.__version__} cannot split the four-part projection "
            f"of this model over devices: use transformers {_TENSOR_PARALLEL_SINCE} or newer, or `device_map='auto'`."
        )


class FusedLoadingMixin:
    """Loads the fused projections as they are.

    From 5.9 on, the library knows under our model type how to split them for its own class. Releases before 5.13 do it
    to remote code too, after which no tensor would fit.
    """

    @classmethod
    def _load_pretrained_model(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            mapping = getattr(argument, "weight_mapping", None)
            if mapping:
                mapping[:] = [transform for transform in mapping if not _splits_projections(transform)]
        return super()._load_pretrained_model(model, *args, **kwargs)


def _splits_projections(transform: Any) -> bool:
    """Whether a weight conversion leads to the names of the library's own class, which ours has not."""
    foreign = ("self_attn", "mlp.gate_proj", "mlp.up_proj")
    return any(name in str(target) for target in transform.target_patterns for name in foreign)


class VersionedGenerationMixin(GenerationMixin):
    """GenerationMixin with the same hooks in every version.

    Chunked prefill reaches `prefill_leading_chunks` from `_prefill_chunking` (transformers 4) and `_prefill` (5). A
    live cache may be continued with the new tokens alone, and given `position_ids` grow with the text (only 5 does
    either).
    """

    def _prepare_generation_config(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        prepared = super()._prepare_generation_config(generation_config, *args, **kwargs)
        if generation_config is not None and generation_config is _pipeline_defaults():
            # The pipeline's settings are for models that have none of their own. Before 5.22 they win over ours (in 4
            # over those that equal the library's defaults), and the pipeline samples where we decode greedily.
            for name in ("do_sample", "temperature", "max_new_tokens"):
                value = getattr(self.generation_config, name)
                if name not in kwargs and (value is not None or name == "temperature"):
                    setattr(prepared[0], name, value)
        return prepared

    @staticmethod
    def known_length(model_kwargs: dict[str, Any]) -> int:
        """Length of the conversation as far as the arguments of `generate` tell, cached tokens included."""
        known = [model_kwargs.get(name) for name in ("attention_mask", "position_ids")]
        prompt = model_kwargs.get("prompt_layout")
        known.append(None if prompt is None else prompt.types)
        return max((value.shape[1] for value in known if value is not None), default=0)

    def prefill_leading_chunks(self, tokens: torch.Tensor, model_kwargs: dict[str, Any], chunk_size: int) -> int:
        """Runs all chunks of the prompt but the last into the cache; returns how many tokens the last one has."""
        raise NotImplementedError

    def prepare_step(
        self,
        input_ids: torch.Tensor,
        cache: Any,
        prompt_length: int,
        inputs_embeds: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Completes what the library's `prepare_inputs_for_generation` relies on: returns the new `kwargs`."""
        kwargs = dict(kwargs)
        position_ids = kwargs.get("position_ids")
        if position_ids is not None:
            kwargs["position_ids"] = _extended_positions(position_ids, input_ids.shape[1] - position_ids.shape[1])
        if (
            cache is not None
            and inputs_embeds is None
            and kwargs.get("is_first_iteration")
            and "next_sequence_length" in kwargs
            and kwargs["next_sequence_length"] is None
            and prompt_length <= input_ids.shape[1]
        ):
            # Assisted decoding gives no length on its first call, and would feed what the cache holds a second time.
            past = int(cached_length(cache))
            kwargs["next_sequence_length"] = input_ids.shape[1] - past if past else None
        return kwargs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        before = model_kwargs.get("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        after = model_kwargs.get("position_ids")
        if after is not None and before is not None and after.shape[1] == before.shape[1]:
            model_kwargs["position_ids"] = _extended_positions(after, int(num_new_tokens))
        return model_kwargs

    def _get_initial_cache_position(
        self, seq_length: int, device: Any, model_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        past = int(cached_length(cache))
        if (
            past
            and mask is not None
            and mask.shape[1] == past + seq_length
            and model_kwargs.get("cache_position") is None
        ):
            model_kwargs["cache_position"] = torch.arange(past, past + seq_length, device=device)
            return model_kwargs
        return super()._get_initial_cache_position(seq_length, device, model_kwargs)

    def _prefill_chunking(
        self, input_ids: torch.Tensor, generation_config: Any, **model_kwargs: Any
    ) -> dict[str, Any]:
        if model_kwargs.get(CACHE_NAME) is None:
            return super()._prefill_chunking(input_ids, generation_config, **model_kwargs)
        cache_position = model_kwargs["cache_position"]
        tokens = input_ids if model_kwargs.get("inputs_embeds") is None else model_kwargs["inputs_embeds"]
        tokens = tokens[:, -cache_position.shape[0] :]
        left = self.prefill_leading_chunks(tokens, model_kwargs, generation_config.prefill_chunk_size)
        # The decoding loop computes what is left, with all of the last block in one call.
        model_kwargs["cache_position"] = cache_position[-left:]
        return model_kwargs

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache, chunk_size = model_kwargs.get(CACHE_NAME), generation_config.prefill_chunk_size
        if chunk_size is None or cache is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        embeds, past = model_kwargs.get("inputs_embeds"), int(cached_length(cache))
        whole = embeds is not None or self.known_length(model_kwargs) <= input_ids.shape[1]
        tokens = input_ids if embeds is None else embeds
        left = self.prefill_leading_chunks(tokens[:, past:] if whole else tokens, model_kwargs, chunk_size)
        unchunked = copy.copy(generation_config)
        unchunked.prefill_chunk_size = None
        rest = input_ids if whole else input_ids[:, -left:]
        return super()._prefill(rest, unchunked, model_kwargs, *args, **kwargs)


def _pipeline_defaults() -> Any:
    """The settings that the text-generation pipeline brings along, None where nobody has imported it."""
    module = sys.modules.get("transformers.pipelines.text_generation")
    return module and getattr(module.TextGenerationPipeline, "_default_generation_config", None)


def _extended_positions(position_ids: torch.Tensor, count: int) -> torch.Tensor:
    """Appends `count` positions to [rows, tokens], counting on from the last one of each row."""
    if count <= 0:
        return position_ids
    steps = torch.arange(1, count + 1, device=position_ids.device, dtype=position_ids.dtype)
    return torch.cat([position_ids, position_ids[:, -1:] + steps], dim=1)


__all__ = [
    "CACHE_NAME",
    "NO_CONTINUOUS_BATCHING",
    "CausalLMOutput",
    "FusedLoadingMixin",
    "ModelOutput",
    "PreTrainedConfig",
    "as_expected_tokenizer_class",
    "cached_length",
    "check_torch",
    "check_version",
    "flash_kernel",
    "is_flash",
    "is_paged_cache",
    "is_traced",
    "is_version_5",
    "one_cache",
    "refuse_paged_call",
    "refuse_tensor_parallelism",
    "static_capacity",
    "tensor_parallel_plan",
    "tied_weights_keys",
]
