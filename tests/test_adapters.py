"""LoRA adapters of transformers' own class on ours and back: converted exactly, refused where names do not match."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conversion.errors import ConversionError
from convert_weights import convert, main
from training.sft import adapted_in_L

from .tiny import tiny_config, tiny_model


peft = pytest.importorskip("peft")
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["gqkv_proj", "o_proj", "gate_up_proj", "down_proj"]
IDS = torch.arange(30, 54)[None]
TYPES = (torch.arange(24)[None] < 16).long()
FIELDS = {"prefix_end_token_id": 7}


def library_model():
    """Transformers' own class with the weights of `tiny_model`."""
    if not hasattr(transformers, "HrmTextForCausalLM"):
        pytest.skip("this transformers has no HRM-Text of its own")
    ours = tiny_model(**FIELDS)
    fields = {key: value for key, value in tiny_config(**FIELDS).to_dict().items() if key != "auto_map"}
    theirs = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**fields)).eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        if "gqkv_proj" in name:
            names = [name.replace("attn.gqkv", f"self_attn.{part}") for part in ("gate", "q", "k", "v")]
        elif "gate_up_proj" in name:
            names = [name.replace("gate_up", part) for part in ("gate", "up")]
        else:
            names = [name.replace(".attn.", ".self_attn.")]
        state.update(zip(names, tensor.chunk(len(names))))
    theirs.load_state_dict(state)
    return theirs


def adapt(model, targets, folder, seed=3, **fields):
    """An adapter with random matrices, saved; and the logits with it."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **{"r": 4, "lora_alpha": 12, **fields})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(folder)
    return logits(adapted)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, token_type_ids=TYPES).logits


PATTERNS = {"rank_pattern": {"v_proj": 2, "mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 1}, "lora_alpha": 3}


@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (SPLIT, {}),
        (["q_proj", "v_proj"], {}),
        (["gate_proj", "down_proj"], {"use_rslora": True}),
        (SPLIT, {**PATTERNS, "use_rslora": True}),
        (SPLIT, {"layers_to_transform": [1], "layers_pattern": "layers"}),
        (r".*H_module\.layers\.0\..*(q|up)_proj", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_an_adapter_of_the_librarys_class_does_the_same_on_ours(tmp_path, targets, fields):
    theirs = library_model()
    without = logits(theirs)
    wanted = adapt(theirs, targets, tmp_path / "split", **fields)
    assert (wanted - without).abs().max() > 0.05
    convert(tmp_path / "split", tmp_path / "fused")
    ours = peft.PeftModel.from_pretrained(tiny_model(**FIELDS), str(tmp_path / "fused"))
    torch.testing.assert_close(logits(ours), wanted, atol=2e-4, rtol=0)
    torch.testing.assert_close(logits(ours.merge_and_unload()), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("targets", "divided"), [(FUSED, False), (["gate_up_proj"], False), ("all-linear", False), (FUSED, True)]
)
def test_an_adapter_of_ours_does_the_same_on_the_librarys_class(tmp_path, targets, divided):
    model = tiny_model(**FIELDS)
    # As `training.sft --lora` makes them.
    fields = {"alpha_pattern": dict.fromkeys(adapted_in_L(model, targets), 4.5)} if divided else {}
    wanted = adapt(model, targets, tmp_path / "fused", **fields)
    convert(tmp_path / "fused", tmp_path / "split", layout="split")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(library_model(), str(tmp_path / "split"))
    torch.testing.assert_close(logits(theirs), wanted, atol=2e-4, rtol=0)
    # And back, where the ranks have added up.
    convert(tmp_path / "split", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny_model(**FIELDS), str(tmp_path / "again"))
    torch.testing.assert_close(logits(again), wanted, atol=2e-4, rtol=0)


def test_the_command_line(tmp_path, capsys):
    adapt(library_model(), SPLIT, tmp_path / "split")
    assert main([str(tmp_path / "split"), "--output", str(tmp_path / "out")]) == 0
    assert "16 projections, fused layout, rank up to 16" in capsys.readouterr().out
    for arguments, message in (
        (["--force"], ""),
        ([], "pass --force"),
        (["--force", "--format", "split"], "split layout already"),
        (["--force", "--dtype", "float16"], "--dtype does not apply"),
        (["--force", "--dry-run"], "--dry-run does not apply"),
    ):
        assert main([str(tmp_path / "split"), "--output", str(tmp_path / "out"), *arguments]) == int(bool(message))
        assert message in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(FUSED)
    assert settings["r"] / settings["lora_alpha"] == 4 / 12


def refused(call):
    with pytest.raises(ValueError, match=r"convert_weights\.py ADAPTER --output DIR") as caught:
        call()
    return str(caught.value)


def configured(targets=FUSED, **fields):
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **fields)


WRONG = [
    configured(SPLIT),
    configured(["q_proj"]),
    configured(["o_proj", "q_proj"]),
    configured(["self_attn.o_proj"]),
    configured(["o_proj", "c_attn"]),
    configured(["o_proj", "H_module.layers.7.attn.gqkv_proj"]),
    configured(r".*\.(o_proj|v_proj)"),
    configured(r".*\.(q|k|v|o)_proj"),
    configured(r".*\.[qkvo]_proj"),
    configured(r"(?i).*\.Q_PROJ|.*\.o_proj"),
    configured(r".*\.(dense|o_proj)$"),
    configured(r".*\.c_attn|.*\.o_proj"),
    configured(rank_pattern={"q_proj": 2}),
    configured(alpha_pattern={r"layers\.9\.attn\.o_proj": 2}),
    configured(exclude_modules=["mlp.up_proj"]),
    configured(exclude_modules=r".*\.[qk]_proj"),
    configured(modules_to_save=["wte"]),
    configured(target_parameters=["self_attn.q_proj.weight"]),
    configured(layers_to_transform=[0, 9]),
    peft.IA3Config(target_modules=["gqkv_proj", "k_proj"], feedforward_modules=[]),
]


@pytest.mark.parametrize("config", WRONG)
def test_names_that_match_in_part_are_refused_and_change_nothing(config):
    model = tiny_model(**FIELDS)
    model.model.H_module.requires_grad_(False)
    before, parameters = logits(model), {name: value.requires_grad for name, value in model.named_parameters()}
    for add in (peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        refused(lambda add=add: add(model, copy.deepcopy(config)))
        assert {name: value.requires_grad for name, value in model.named_parameters()} == parameters
        assert torch.equal(logits(model), before)
        assert not hasattr(model, "peft_config")


RIGHT = [
    configured(["attn.o_proj"]),
    configured("all-linear", exclude_modules=["lm_head", "score"]),
    configured(r".*_proj"),
    configured(r".*L_module.*\.(gqkv|o)_proj"),
    configured([*FUSED, "lm_head"], layers_to_transform=[1], rank_pattern={r"layers\.0\.attn\.o_proj": 2}),
    configured(modules_to_save=["lm_head", "score"], use_dora=True),
]


@pytest.mark.parametrize("config", RIGHT)
def test_right_names_are_taken(config):
    adapted = peft.get_peft_model(tiny_model(**FIELDS), copy.deepcopy(config))
    assert any("lora_B" in name for name, _ in adapted.named_parameters())


def test_a_second_adapter_of_wrong_names_is_refused(tmp_path):
    adapt(library_model(), ["q_proj", "o_proj"], tmp_path / "split")
    wanted = adapt(tiny_model(**FIELDS), FUSED, tmp_path / "fused")
    model = peft.PeftModel.from_pretrained(tiny_model(**FIELDS), str(tmp_path / "fused"))
    refused(lambda: model.load_adapter(str(tmp_path / "split"), "two"))
    refused(lambda: model.add_adapter("two", configured(["q_proj", "o_proj"])))
    model.add_adapter("two", configured(["o_proj"]))
    tensors = load_file(tmp_path / "split" / "adapter_model.safetensors")
    refused(lambda: peft.set_peft_model_state_dict(model, tensors, "two"))
    assert list(model.peft_config) == ["default", "two"]
    torch.testing.assert_close(logits(model), wanted)


def test_a_second_adapter_through_transformers(tmp_path):
    adapt(library_model(), ["q_proj", "o_proj"], tmp_path / "split")
    wanted = adapt(tiny_model(**FIELDS), FUSED, tmp_path / "fused")
    # Right names in the config, those of the other class in the tensors.
    shutil.copytree(tmp_path / "split", tmp_path / "mixed")
    shutil.copy(tmp_path / "fused/adapter_config.json", tmp_path / "mixed")
    model = tiny_model(**FIELDS)
    before = logits(model)
    for folder in ("split", "mixed"):
        refused(lambda folder=folder: model.load_adapter(str(tmp_path / folder)))
        assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")
    model.load_adapter(str(tmp_path / "fused"))
    torch.testing.assert_close(logits(model), wanted)
    for folder in ("split", "mixed"):
        refused(lambda folder=folder: model.load_adapter(str(tmp_path / folder), "two"))
        assert list(model.peft_config) == ["default"]
        torch.testing.assert_close(logits(model), wanted)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path):
    adapt(tiny_model(**FIELDS, num_layers_per_stack=3), FUSED, tmp_path / "deep")
    for load in (peft.PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder)):
        with pytest.raises(ValueError, match="another size"):
            load(tiny_model(**FIELDS), str(tmp_path / "deep"))


def test_a_config_that_peft_sets_afterwards_is_checked_too():
    """A release of peft that lists the modules elsewhere is caught when it is done."""
    adapted = peft.get_peft_model(tiny_model(**FIELDS), configured(["o_proj"], modules_to_save=["lm_head"]))
    model = adapted.base_model.model
    configs = {"default": configured(["o_proj", "q_proj"])}
    del model.peft_config
    refused(lambda: setattr(model, "peft_config", configs))
    fresh = tiny_model(**FIELDS)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    assert all(parameter.requires_grad != name.endswith("z_L_init") for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), logits(fresh))


def test_an_adapter_whose_pattern_matches_and_whose_tensors_do_not(tmp_path):
    adapt(library_model(), r".*layers.*_proj", tmp_path / "split")
    model = tiny_model(**FIELDS)
    message = refused(lambda: peft.PeftModel.from_pretrained(model, str(tmp_path / "split")))
    assert "fused" in message


def test_right_adapters_are_taken_as_ever(tmp_path):
    adapt(tiny_model(**FIELDS), FUSED, tmp_path / "one")
    adapt(tiny_model(**FIELDS), r".*L_module.*(gqkv|o)_proj", tmp_path / "two", seed=4)
    model = peft.PeftModel.from_pretrained(tiny_model(**FIELDS), str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    first = logits(model)
    model.set_adapter("two")
    assert (logits(model) - first).abs().max() > 0.01
    base = model.unload()
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), logits(tiny_model(**FIELDS)))
    copied = copy.deepcopy(peft.PeftModel.from_pretrained(base, str(tmp_path / "one")))
    torch.testing.assert_close(logits(copied), first)


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "IA3", "only LORA"),
        ("use_dora", True, "use_dora"),
        ("r", "x", "r is 'x'"),
        ("r", 8, "another"),
        ("lora_alpha", -1, "lora_alpha is -1"),
        ("rank_pattern", {".*(a+)+$": 2}, "rank_pattern"),
        ("bias", "all", "no biases"),
        ("init_lora_weights", "pissa", "merge the adapter"),
        ("target_parameters", ["x"], "target_parameters"),
    ],
)
def test_other_adapters_are_refused(tmp_path, field, value, message):
    adapt(tiny_model(**FIELDS), FUSED, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "adapter", tmp_path / "out", layout="split")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_damaged_adapters_are_refused(tmp_path):
    adapt(tiny_model(**FIELDS), FUSED, tmp_path / "adapter")
    name = "base_model.model.model.H_module.layers.0.attn.gqkv_proj.lora_A.weight"
    for change, message in (
        (lambda tensors: tensors.pop(name), "do not fit"),
        (lambda tensors: tensors.update({name: torch.ones(4)}), "shape"),
        (lambda tensors: tensors.update({name.replace("attn", "a"): tensors.pop(name)}), "not a LoRA matrix"),
    ):
        change_tensors(tmp_path / "adapter", change)
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "adapter", tmp_path / "out", layout="split")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ConversionError, match="pickled"):
        convert(tmp_path / "adapter", tmp_path / "out", layout="split")
