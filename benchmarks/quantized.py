"""What transformers' quantized caches save and cost on our slots."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from benchmarks.measure import interleaved
from benchmarks.models import OURS


# Backend, bits, axis of the groups, and the package that it needs.
KINDS = (("hqq", 8, 1, "hqq"), ("quanto", 4, 0, "optimum.quanto"), ("quanto", 2, 0, "optimum.quanto"))
_PROMPT = 256


def tensor_bytes(held: Any) -> int:
    """Bytes of all tensors in an object: containers, and quantized tensors that are made of others."""
    if isinstance(held, torch.Tensor):
        if hasattr(held, "__tensor_flatten__"):
            return sum(tensor_bytes(getattr(held, name)) for name in held.__tensor_flatten__()[0])
        return held.untyped_storage().nbytes()
    if isinstance(held, dict):
        return sum(tensor_bytes(value) for value in held.values())
    if isinstance(held, (list, tuple)):
        return sum(tensor_bytes(value) for value in held)
    return 0


def cache_bytes(cache: Any) -> int:
    """Bytes that the slots of a cache hold."""
    return sum(tensor_bytes(list(vars(layer).values())) for layer in cache.layers)


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@torch.inference_mode()
def measure_quantized(bench: Any) -> None:
    """Seconds a decoding step, bytes a token and the change of the logits, for each kind of cache.

    Args:
        bench: a `Bench` with its models; rows are appended to it.
    """
    from transformers import QuantizedCache

    model = bench.models[OURS]
    ids = torch.randint(12, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(4))
    ids = ids.to(bench.device)
    types, token = torch.ones_like(ids), ids[:, :1]
    caches: dict[str, Any] = {"in full": None}
    for backend, bits, axis, package in KINDS:
        if not _is_there(package):
            bench.say(f"{bench.size:5} cache     {backend} is not installed (extra `quantize`)")
            continue
        caches[f"{backend}, {bits} bits"] = QuantizedCache(
            backend=backend, config=model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=32
        )
    logits, sizes = {}, {}
    for name in caches:
        caches[name] = model(ids, token_type_ids=types, past_key_values=caches[name], use_cache=True).past_key_values
        sizes[name] = cache_bytes(caches[name]) / _PROMPT
        logits[name] = model(token, past_key_values=caches[name], use_cache=True).logits.float()
    runs = {
        name: lambda cache=cache: model(token, past_key_values=cache, use_cache=True) for name, cache in caches.items()
    }
    full = logits["in full"]
    for name, figure in interleaved(bench.device, runs, 3).items():
        error = float((logits[name] - full).norm() / full.norm())
        row = bench.row("cache", f"context {_PROMPT}", name, "s")
        bench.rows.append({**row, **figure.row(), "bytes_a_token": sizes[name], "relative_error": error})
        bench.say(
            f"{bench.size:5} cache     {name:16} {sizes[name] / 1e3:8.1f} kB a token, "
            f"{figure.median:.4f} s a step, logits changed by {error:.1%}"
        )
