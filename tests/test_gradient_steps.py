"""Which module calls carry gradient, and what checkpointing must not lose."""

from __future__ import annotations

import warnings

import pytest
import torch

from .tiny import tiny_model


def gradients(model, ids, types=None, **kwargs) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    model(ids, token_type_ids=types, labels=labels, use_cache=False, **kwargs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def case() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(12, 96, (2, 16))
    types = torch.zeros_like(ids)
    types[:, :8] = 1
    return ids, types


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bp_steps", [2, 3, 5, 8])
def test_checkpointing_gives_the_same_gradients(bp_steps, reentrant):
    model = tiny_model().train()
    model.set_gradient_steps(bp_steps)
    ids, types = case()
    plain = gradients(model, ids, types)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with warnings.catch_warnings():
        # Reentrant checkpointing warns of a call whose inputs need no gradient; there is none.
        warnings.simplefilter("error")
        checkpointed = gradients(model, ids, types)
    trained = 0
    for name, gradient in plain.items():
        if gradient is None:
            assert checkpointed[name] is None, name
        else:
            trained += 1
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    assert trained == len(plain) - (2 if bp_steps == 2 else 1)


def test_the_embedding_gets_no_gradient_at_two_steps():
    model = tiny_model().train()
    model.set_gradient_steps(2)
    assert model.gradient_steps == 2
    ids, types = case()
    named = gradients(model, ids, types)
    assert named["model.embed_tokens.weight"] is None
    assert named["model.L_module.layers.0.mlp.down_proj.weight"].abs().max() > 0
    model.set_gradient_steps(None)
    assert model.gradient_steps == 5
    assert gradients(model, ids, types)["model.embed_tokens.weight"].abs().max() > 0


def test_z_L_init_is_never_trained(tmp_path):
    model = tiny_model().train()
    assert not model.model.z_L_init.requires_grad
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert not loaded.model.z_L_init.requires_grad
    loaded.requires_grad_(True)
    ids, types = case()
    assert gradients(loaded, ids, types)["model.z_L_init"] is None


@torch.no_grad()
def test_values_do_not_depend_on_the_gradient_steps():
    model = tiny_model()
    ids, types = case()
    reference = model(ids, token_type_ids=types).logits
    tokens = model.generate(ids, token_type_ids=types, max_new_tokens=4, do_sample=False)
    for steps in (2, 3, 8):
        model.set_gradient_steps(steps)
        assert torch.equal(model(ids, token_type_ids=types).logits, reference)
        assert torch.equal(model.generate(ids, token_type_ids=types, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("bp_steps", [0, 1, 9])
def test_refused_numbers(bp_steps):
    with pytest.raises(ValueError, match="bp_steps"):
        tiny_model().set_gradient_steps(bp_steps)


def test_config_decides_and_is_reread():
    assert tiny_model(L_bp_cycles=[1, 2]).gradient_steps == 5
    assert tiny_model(L_bp_cycles=[0, 1]).gradient_steps == 3
    assert tiny_model(bp_steps=2).gradient_steps == 2
    assert tiny_model(H_cycles=1, L_cycles=1).gradient_steps == 2


def test_no_live_cache_under_checkpointing():
    model = tiny_model().train()
    ids, _ = case()
    cache = model(ids[:, :4]).past_key_values
    model.gradient_checkpointing_enable()
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids[:, 4:], past_key_values=cache)
