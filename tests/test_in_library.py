"""Side by side with transformers' own class, where the installed version has one: same files, same logits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .tiny import load_class, tiny_config, tiny_model


library = pytest.importorskip("transformers.models.hrm_text", reason="this transformers has no HRM-Text of its own")

SHAPES = [
    {"H_cycles": 1, "L_cycles": 1},
    {"H_cycles": 2, "L_cycles": 3},
    {"H_cycles": 3, "L_cycles": 2, "head_dim": 16},
    {"H_cycles": 2, "L_cycles": 4, "num_attention_heads": 2, "num_layers_per_stack": 3},
    {"H_cycles": 1, "L_cycles": 3, "hidden_size": 48, "head_dim": 8, "rope_theta": 500.0},
]


def theirs_from(folder) -> torch.nn.Module:
    return library.HrmTextForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_same_logits_from_our_folder(shape, tmp_path):
    ours = tiny_model(seed=1, **shape)
    ours.save_pretrained(tmp_path)
    theirs = theirs_from(tmp_path)
    ids = torch.randint(12, 96, (2, 17))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
    block = torch.ones_like(ids)
    block[:, 9:] = 0
    ours_block = ours(ids, token_type_ids=block).logits
    torch.testing.assert_close(ours_block, theirs(ids, token_type_ids=block).logits, atol=1e-5, rtol=0)
    assert (ours_block - ours(ids).logits).abs().max() > 0.05


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@torch.no_grad()
def test_their_folder_loads_here(shape, tmp_path):
    torch.manual_seed(3)
    fields = tiny_config(**shape).to_dict()
    theirs = library.HrmTextForCausalLM(library.HrmTextConfig(**fields)).eval()
    theirs.model.z_L_init.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = load_class("modeling_hrm_text.HrmTextForCausalLM").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(12, 96, (2, 13))
    torch.testing.assert_close(ours.eval()(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)

    ours.save_pretrained(tmp_path / "ours")
    theirs_from(tmp_path / "ours").save_pretrained(tmp_path / "back")
    first = load_file(tmp_path / "theirs" / "model.safetensors")
    for folder in ("ours", "back"):
        again = load_file(tmp_path / folder / "model.safetensors")
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@torch.no_grad()
def test_bfloat16_is_at_least_as_close_to_float32(tmp_path):
    ids = torch.randint(12, 96, (4, 64))
    errors = {"ours": [], "theirs": []}
    for seed in range(6):
        model = tiny_model(seed=seed, hidden_size=64, num_layers_per_stack=4, initializer_range=0.125)
        model.save_pretrained(tmp_path / str(seed))
        exact = model(ids).logits
        bf16 = {"ours": model.to(torch.bfloat16), "theirs": theirs_from(tmp_path / str(seed)).to(torch.bfloat16)}
        for name, rounded in bf16.items():
            errors[name].append((rounded(ids).logits.float() - exact).square().mean().sqrt().item())
    ours, theirs = (sum(errors[name]) / len(errors[name]) for name in ("ours", "theirs"))
    assert ours <= theirs * 1.02, errors


def test_their_class_is_untouched(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(auto) is library.HrmTextForCausalLM
