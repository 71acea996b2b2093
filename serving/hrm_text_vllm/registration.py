"""The entry point: registers the plug-in with vLLM, after a look at which vLLM this is."""

from __future__ import annotations

import importlib
import re


ARCHITECTURE = "HrmTextForCausalLM"
MODE = "hrm_text"
TESTED = "0.32"

# What the plug-in subclasses or calls and vLLM does not promise to keep: module, and the attributes needed of it.
USED: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.attention": ("PrefillPrefixLMAttention",),
    "vllm.model_executor.models.config": ("MODELS_CONFIG_MAP", "VerifyAndUpdateConfig"),
    "vllm.model_executor.models.hrm_text": ("HrmTextForCausalLM",),
    "vllm.renderers.hf": ("HfRenderer.render_messages", "HfRenderer.render_messages_async"),
    "vllm.renderers.registry": ("RENDERER_REGISTRY.register",),
    "vllm.tokenizers.hf": ("CachedHfTokenizer.from_pretrained",),
    "vllm.tokenizers.registry": ("TokenizerRegistry.register",),
    "vllm.utils.hashing": ("get_hash_fn_by_name",),
    "vllm.v1.attention.backend": ("CommonAttentionMetadata.replace", "subclass_attention_backend"),
    "vllm.v1.attention.selector": ("get_attn_backend",),
    "vllm.v1.core.kv_cache_utils": ("generate_block_hash_extra_keys", "hash_block_tokens"),
    "vllm.v1.core.sched.scheduler": ("Scheduler._reserve_prefill_lookahead", "Scheduler.add_request"),
    "vllm.v1.request": ("Request.update_block_hashes",),
}


def what_is_missing() -> list[str]:
    """What the plug-in needs and this vLLM lacks; nothing is missing from a vLLM that it knows."""
    missing = []
    for module_name, paths in USED.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            missing.append(f"{module_name} ({error})")
            continue
        for path in paths:
            value = module
            for name in path.split("."):
                value = getattr(value, name, None)
            if value is None:
                missing.append(f"{module_name}.{path}")
    return missing


def refusal(version: str) -> str | None:
    """Why this vLLM is refused, as a sentence that says what to do instead; None where it is known.

    Args:
        version: of vLLM, `0.32.0` for example.
    """
    found = re.match(r"\d+\.\d+", version)
    if found is None or found.group() != TESTED:
        return (
            f"hrm-text-vllm was tested with vLLM {TESTED} and this is {version}: install vLLM {TESTED}, or a newer "
            "hrm-text-vllm. Set VLLM_PLUGINS='' to run other models without the plug-in."
        )
    return None


def register() -> None:
    """Registers model, settings, tokenizer and renderer; vLLM calls it once in each of its processes.

    On a vLLM that the plug-in does not know, HRM-Text is refused when it is loaded; other models are not touched.

    Raises:
        RuntimeError: a vLLM in which not even the refusal can be registered.
    """
    import vllm

    reason = refusal(vllm.__version__)
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError as error:
        raise RuntimeError(reason or f"hrm-text-vllm does not know this vLLM: {error}") from error
    from .settings import RefusedSettings, Settings

    if reason is not None:
        MODELS_CONFIG_MAP[ARCHITECTURE] = RefusedSettings.because(reason)
        return
    from vllm.model_executor.models import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    MODELS_CONFIG_MAP[ARCHITECTURE] = Settings
    ModelRegistry.register_model(ARCHITECTURE, "hrm_text_vllm.model:ExactHrmTextForCausalLM")
    TokenizerRegistry.register(MODE, "hrm_text_vllm.chat", "ChatTokenizer")
    RENDERER_REGISTRY.register(MODE, "hrm_text_vllm.chat", "ChatRenderer")
