"""HrmTextConfig: both dialects in, one out, and clear refusals."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from .tiny import load_class, tiny_config, tiny_model


Config = load_class("configuration_hrm_text.HrmTextConfig")

PUBLISHED = {
    "model_type": "hrm_text",
    "vocab_size": 65536,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 128,
    "num_layers_per_stack": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "H_cycles": 2,
    "L_cycles": 3,
    "L_bp_cycles": [0, 3],
    "embedding_scale": 39.191835884530846,
    "prefix_lm": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "bos_token_id": 6,
    "eos_token_id": 11,
    "pad_token_id": 5,
    "max_position_embeddings": 4096,
}


def test_defaults_are_the_1b():
    default, published = Config(), Config(**PUBLISHED)
    for field in PUBLISHED:
        assert getattr(default, field) == pytest.approx(getattr(published, field)), field
    assert default.embedding_scale == pytest.approx(math.sqrt(1536))
    assert default.prefix_end_token_id is None


def test_older_dialect():
    config = Config(
        num_hidden_layers=16, L_bp_steps=[0, 3], rope_theta=5000.0, num_key_value_heads=12, H_cycles=2, L_cycles=3
    )
    assert (config.num_layers_per_stack, config.num_hidden_layers) == (16, 128)
    assert config.L_bp_cycles == [0, 3]
    assert config.rope_parameters == {"rope_theta": 5000.0, "rope_type": "default"}
    written = config.to_dict()
    assert written["num_layers_per_stack"] == 16 and written["num_hidden_layers"] == 128
    assert "L_bp_steps" not in written and "rope_theta" not in written and "num_key_value_heads" not in written


def test_writes_and_reads_itself(tmp_path):
    config = tiny_config(prefix_end_token_id=7, H_cycles=3, L_cycles=2, L_bp_cycles=[1, 2])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not [field for field in written if field.startswith("_")]
    again = Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.L_bp_cycles == [1, 1, 2] and again.prefix_end_token_id == 7
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_slots_follow_the_cycles():
    config = tiny_config()
    assert config.num_hidden_layers == 16
    config.L_cycles = 1
    assert config.num_hidden_layers == 8 and config.to_dict()["num_hidden_layers"] == 8
    assert config.L_bp_cycles == [1, 1]
    config.H_cycles = 4
    assert config.num_hidden_layers == 16 and config.gradient_calls() == (4, [0, 0, 0, 1])


@pytest.mark.parametrize("overrides", [{"H_cycles": 3}, {"L_cycles": 1}, {"L_cycles": 5, "H_cycles": 1}], ids=str)
def test_depth_overridden_at_load(overrides, tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path)
    cls = load_class("modeling_hrm_text.HrmTextForCausalLM")
    model = cls.from_pretrained(tmp_path, **overrides).eval()
    slots = 2 * model.config.H_cycles * (model.config.L_cycles + 1)
    outputs = model(torch.randint(12, 96, (1, 5)), output_hidden_states=True)
    assert len(outputs.past_key_values.layers) == slots == model.config.num_hidden_layers
    assert len(outputs.hidden_states) == slots + 1
    assert model.gradient_steps <= model.config.H_cycles * (model.config.L_cycles + 1)


def test_depth_warning_comes_once(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    module = __import__(load_class("modeling_hrm_text.HrmTextModel").__module__, fromlist=["logger"])
    said: list[str] = []
    original, module.logger.warning_once = module.logger.warning_once, said.append
    try:
        load_class("modeling_hrm_text.HrmTextForCausalLM").from_pretrained(tmp_path, H_cycles=3)
        load_class("modeling_hrm_text.HrmTextForCausalLM").from_pretrained(tmp_path)
    finally:
        module.logger.warning_once = original
    assert len(said) == 1 and "another depth" in said[0]


def test_bp_steps_where_the_list_cannot_say_it():
    config = tiny_config(H_cycles=3, L_cycles=2, bp_steps=2)
    assert config.gradient_calls() == (1, [0, 0, 1])
    assert Config(**config.to_dict()).gradient_calls() == (1, [0, 0, 1])
    assert "bp_steps" not in tiny_config().to_dict()


@pytest.mark.parametrize(
    ("cycles", "steps", "calls"),
    [
        ((2, 3), 2, (1, [0, 1])),
        ((2, 3), 3, (2, [0, 1])),
        ((2, 3), 5, (2, [0, 3])),
        ((2, 3), 8, (2, [3, 3])),
        ((2, 3), 99, (2, [3, 3])),
        ((1, 1), 5, (1, [1])),
        ((3, 2), 6, (3, [0, 1, 2])),
    ],
)
def test_gradient_calls(cycles, steps, calls):
    assert tiny_config(H_cycles=cycles[0], L_cycles=cycles[1]).gradient_calls(steps) == calls


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"hidden_size": 30}, ["hidden_size", "num_attention_heads", "head_dim"]),
        ({"hidden_size": 12, "num_attention_heads": 4}, ["head_dim"]),
        ({"H_cycles": 0}, ["H_cycles"]),
        ({"L_cycles": 0}, ["L_cycles"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"L_bp_cycles": [1, 1, 1]}, ["L_bp_cycles", "H_cycles"]),
        ({"L_bp_cycles": [0, 4]}, ["L_bp_cycles", "L_cycles"]),
        ({"L_bp_cycles": [-1, 3]}, ["L_bp_cycles"]),
        ({"bp_steps": 1}, ["bp_steps"]),
        ({"bp_steps": 9}, ["bp_steps"]),
        ({"num_hidden_layers": 12}, ["num_hidden_layers", "num_layers_per_stack"]),
        ({"embedding_scale": 0.0}, ["embedding_scale"]),
        ({"embedding_scale": -1.0}, ["embedding_scale"]),
        ({"initializer_range": 0.0}, ["initializer_range"]),
        ({"rms_norm_eps": -1e-6}, ["rms_norm_eps"]),
        ({"rope_theta": 0.0}, ["rope_theta"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads", "num_attention_heads"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"pad_token_id": 96}, ["pad_token_id", "vocab_size"]),
        ({"eos_token_id": [11, 96]}, ["eos_token_id"]),
        ({"prefix_end_token_id": -1}, ["prefix_end_token_id"]),
        ({"prefix_end_token_id": 7, "bos_token_id": None}, ["prefix_end_token_id", "bos_token_id"]),
    ],
    ids=str,
)
def test_refusals(fields, names):
    with pytest.raises(ValueError) as error:
        tiny_config(**fields)
    assert all(f"`{name}`" in str(error.value) for name in names), str(error.value)


def test_checked_when_a_model_is_built_and_not_on_assignment():
    config = tiny_config()
    config.L_cycles = 0
    with pytest.raises(ValueError, match="L_cycles"):
        load_class("modeling_hrm_text.HrmTextModel")(config)


def test_contradiction_at_load_in_any_order(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    cls = load_class("modeling_hrm_text.HrmTextForCausalLM")
    for overrides in ({"H_cycles": 3, "num_hidden_layers": 24}, {"num_hidden_layers": 24, "H_cycles": 3}):
        assert cls.from_pretrained(tmp_path, **overrides).config.num_hidden_layers == 24
    with pytest.raises(ValueError, match="num_hidden_layers"):
        cls.from_pretrained(tmp_path, num_hidden_layers=23)


def test_prefix_lm_off_ignores_types():
    model = tiny_model(prefix_lm=False, prefix_end_token_id=7)
    ids = torch.tensor([[6, 20, 21, 22, 7, 30, 31]])
    types = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    causal = tiny_model()(ids).logits
    torch.testing.assert_close(model(ids, token_type_ids=types).logits, causal)
    torch.testing.assert_close(model(ids).logits, causal)
