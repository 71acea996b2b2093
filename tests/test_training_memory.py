"""What a training step keeps for backward: not more than transformers' own class on the same weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models import build_library

from .tiny import tiny_model


ROWS, TOKENS = 2, 64


def kept_for_backward(model) -> tuple[int, int]:
    """Bytes that one forward pass leaves to backward, weights aside: activations, and masks."""
    ids = torch.randint(12, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    types = (torch.arange(TOKENS) < TOKENS // 2).long().expand(ROWS, -1).contiguous()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(ids, token_type_ids=types, labels=ids.masked_fill(types == 1, -100), use_cache=False).loss
    loss.backward()
    model.zero_grad()
    sizes = {True: 0, False: 0}
    for tensor in saved.values():
        # Queries by keys, the same for all heads.
        is_mask = tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[3] == TOKENS
        sizes[is_mask] += tensor.untyped_storage().nbytes()
    return sizes[False], sizes[True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_no_more_than_in_the_library(dtype):
    pytest.importorskip("transformers.models.hrm_text", reason="this transformers has no HRM-Text of its own")
    ours = tiny_model().to(dtype).train()
    library = build_library(ours).train()
    activations, masks = kept_for_backward(ours)
    theirs, their_masks = kept_for_backward(library)
    assert 0 < activations <= theirs
    assert 0 < masks <= their_masks / 2
