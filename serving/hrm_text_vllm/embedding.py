"""Quantized embeddings on processors, where vLLM's kernel for them, written in Triton, does not run."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform


def gather(
    ids: torch.Tensor, weight_packed: torch.Tensor, weight_scale: torch.Tensor, hidden: int, num_bits: int
) -> torch.Tensor:
    """The embeddings [tokens, hidden] of token ids [tokens], in the dtype of the scales.

    Args:
        ids: int64 [tokens].
        weight_packed: int32 [vocab, words]; the first number of a word lies in its lowest bits, moved to be >= 0.
        weight_scale: [vocab, groups].
        hidden: numbers of a row.
        num_bits: of a number.
    """
    shifts = torch.arange(0, 32 // num_bits * num_bits, num_bits, dtype=torch.int32, device=ids.device)
    numbers = (weight_packed[ids][..., None] >> shifts) & (2**num_bits - 1)
    numbers = numbers.flatten(1)[:, :hidden].float() - 2 ** (num_bits - 1)
    scales = weight_scale[ids].float()
    groups = numbers.view(len(ids), scales.shape[1], -1) * scales[..., None]
    return groups.flatten(1).to(weight_scale.dtype)


def serve_on_processors() -> None:
    """Puts `gather` in the place of vLLM's kernel, on processors and in a vLLM that has such embeddings."""
    if not current_platform.is_cpu():
        return
    try:
        from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding
    except ImportError:
        return
    compressed_tensors_embedding._dequant_gather_triton = gather


__all__ = ["gather", "serve_on_processors"]
