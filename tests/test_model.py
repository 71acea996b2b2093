"""The classes as a user of transformers meets them: names and shapes, loading, saving, outputs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import StaticCache

from .tiny import ROOT, load_class, tiny_config, tiny_model


CausalLM = load_class("modeling_hrm_text.HrmTextForCausalLM")
IDS = torch.randint(12, 96, (2, 11), generator=torch.Generator().manual_seed(5))


def published_names(layers: int, hidden: int, intermediate: int, width: int, vocab: int) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.z_L_init": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for stack in ("H_module", "L_module"):
        for layer in range(layers):
            at = f"model.{stack}.layers.{layer}"
            names[f"{at}.attn.gqkv_proj.weight"] = (4 * width, hidden)
            names[f"{at}.attn.o_proj.weight"] = (hidden, width)
            names[f"{at}.mlp.gate_up_proj.weight"] = (2 * intermediate, hidden)
            names[f"{at}.mlp.down_proj.weight"] = (hidden, intermediate)
    return names


def test_the_1b_on_the_meta_device():
    with torch.device("meta"):
        model = CausalLM(load_class("configuration_hrm_text.HrmTextConfig")())
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert state == published_names(16, 1536, 4096, 1536, 65536)
    assert len(state) == 131 and sum(tensor.numel() for tensor in model.state_dict().values()) == 1_182_795_264


def test_fresh_process_loads_our_classes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    for module in ROOT.glob("*_hrm_text.py"):
        (tmp_path / "model" / module.name).write_bytes(module.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_hrm_text.HrmTextConfig",
        "AutoModel": "modeling_hrm_text.HrmTextModel",
        "AutoModelForCausalLM": "modeling_hrm_text.HrmTextForCausalLM",
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    program = (
        "import sys, torch\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):\n"
        "    loaded = auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "    assert type(loaded).__module__.startswith('transformers_modules.'), type(loaded)\n"
        "print(loaded(torch.tensor([[20, 30, 40]])).logits.sum().item())\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    expected = model(torch.tensor([[20, 30, 40]])).logits.sum().item()
    assert float(result.stdout) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_save_and_load(shards, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == bool(shards)
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert sorted(names) == sorted(published_names(2, 32, 48, 32, 96))
    loaded, info = CausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("keywords", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"device_map": "cpu"}])
def test_loading_arguments(keywords, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path, **keywords).eval()
    assert loaded.dtype == keywords.get("dtype", torch.float32)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    error = (loaded(IDS).logits.float() - model(IDS).logits).abs().max()
    assert error < (0.25 if "dtype" in keywords else 1e-6)


def test_model_spread_over_devices(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "model.z_L_init": "cpu"}
    device_map |= {"model.L_module": "cpu", "model.H_module": "disk"}
    loaded = CausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload").eval()
    types = torch.zeros_like(IDS)
    types[:, :6] = 1
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS, token_type_ids=types).logits, model(IDS, token_type_ids=types).logits)


def test_outputs():
    model = tiny_model()
    slots = model.config.num_hidden_layers
    outputs = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == slots + 1 and len(outputs.attentions) == slots
    assert all(state.shape == (2, 11, 32) for state in outputs.hidden_states)
    assert all(weights.shape == (2, 4, 11, 11) for weights in outputs.attentions)
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    first = model.model.embed_tokens(IDS) * model.config.embedding_scale + model.model.z_L_init
    torch.testing.assert_close(outputs.hidden_states[0], first)
    as_tuple = model(IDS, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.allclose(as_tuple[0], outputs.logits, atol=1e-5)
    assert model(IDS, use_cache=False).past_key_values is None


def test_chosen_hidden_states():
    model = tiny_model()
    last = model.config.num_hidden_layers
    every = model(IDS, output_hidden_states=True).hidden_states
    for chosen, kept in ((3, {3}), ([0, 5, -1], {0, 5, last}), ([-2], {last - 1})):
        states = model(IDS, output_hidden_states=chosen).hidden_states
        assert {i for i, state in enumerate(states) if state is not None} == kept and len(states) == last + 1
        assert all(torch.equal(states[i], every[i]) for i in kept)
    with pytest.raises(ValueError, match=f"`output_hidden_states` is .*below {last + 1}"):
        model(IDS, output_hidden_states=[last + 1])


def test_embeddings_and_positions():
    model = tiny_model()
    logits = model(IDS).logits
    embeds = model.get_input_embeddings()(IDS)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits)
    shifted = torch.arange(11)[None] + 40
    torch.testing.assert_close(model(IDS, position_ids=shifted).logits, logits, atol=1e-4, rtol=0)
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids"):
            model(**wrong)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_floats_of_a_whole_mask_are_added(backend):
    """log 2 on a key counts it twice, as a second copy of the token at its position would."""
    model = tiny_model(attn_implementation=backend)
    a, b, c = 20, 30, 40
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    twice = model(
        torch.tensor([[a, b, b, c]]), attention_mask=everything, position_ids=torch.tensor([[0, 1, 1, 2]])
    ).logits[:, [0, 1, 3]]
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1] = math.log(2)
    once = model(torch.tensor([[a, b, c]]), attention_mask=bias).logits
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bool"):
        model(torch.tensor([[a, b, c]]), attention_mask=bias.long())


@pytest.mark.parametrize("types", [None, 0, 1])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_padding_sees_nothing_that_is_yet_to_come(backend, types):
    """So a prompt that is padded on the right goes on alike, whether one token is tried at a time or several."""
    model = tiny_model(attn_implementation=backend)
    ids = torch.randint(12, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    prompt = {} if types is None else {"token_type_ids": torch.full((2, 6), types)}
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in prompt.items()}
    alone = model(ids[:, :6], attention_mask=mask, **prompt).logits
    followed = model(ids, attention_mask=torch.nn.functional.pad(mask, (0, 3), value=1), **longer).logits
    assert (followed[:, :6] - alone).abs().max() < 1e-4


@torch.no_grad()
def test_weights_span_a_static_cache():
    """As in the library's classes, whatever part of the cache is filled."""
    model = tiny_model(attn_implementation="eager")
    cache = StaticCache(config=model.config, max_cache_len=9)
    for tokens in (6, 1):
        weights = model(torch.full((2, tokens), 20), past_key_values=cache, output_attentions=True).attentions
        assert {tuple(w.shape) for w in weights} == {(2, 4, tokens, 9)}
        assert all((w.sum(dim=-1) - 1).abs().max() < 1e-5 for w in weights)


def test_logits_to_keep_and_labels():
    model = tiny_model()
    logits = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])
    labels = IDS.clone()
    labels[:, :5] = -100
    loss = model(IDS, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(logits[:, 4:-1].reshape(-1, 96), labels[:, 5:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(IDS, labels=labels, num_items_in_batch=24).loss, expected * 12 / 24)
    half = tiny_model().to(torch.bfloat16)
    assert half(IDS, labels=labels).loss.dtype == torch.float32


def test_initialisation():
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, intermediate_size=512, initializer_range=0.1, vocab_size=512)
    model = CausalLM(config)
    std = {name: parameter.std().item() for name, parameter in model.named_parameters()}
    for name, value in std.items():
        expected = 0.1 * (128 / 512) ** 0.5 if "down_proj" in name else 1.0 if "z_L_init" in name else 0.1
        assert value == pytest.approx(expected, rel=0.15 if "z_L" in name else 0.02), name
    weight = model.model.H_module.layers[0].attn.gqkv_proj.weight
    assert weight.abs().max() <= 2 * 0.1 / 0.8796 + 1e-6


def test_resize_token_embeddings():
    model = tiny_model()
    logits = model(IDS).logits
    model.resize_token_embeddings(104)
    assert model.lm_head.weight.shape == (104, 32) and model.config.vocab_size == 104
    torch.testing.assert_close(model(IDS).logits[..., :96], logits)


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(CausalLM.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)


def _change(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("what", ["missing", "left over", "split", "misnamed", "miscounted"])
def test_folders_whose_stacks_do_not_fit_are_refused(what, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    key = "model.L_module.layers.1.mlp.down_proj.weight"
    if what == "missing":
        _change(tmp_path, lambda state: state.pop(key))
    elif what == "left over":
        _change(tmp_path, lambda state: state.update({key.replace(".1.", ".2."): state[key].clone()}))
    elif what == "split":
        at = "model.L_module.layers.1.attn"
        _change(tmp_path, lambda state: state.update({f"{at}.q_proj.weight": state.pop(f"{at}.gqkv_proj.weight")}))
    elif what == "misnamed":
        # As in a training checkpoint: not one tensor of a layer has the name that is looked for.
        state = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("_module.", "_level.core."): value for name, value in state.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["num_hidden_layers"] = 4
        del config["num_layers_per_stack"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"convert_weights\.py"):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [[], ["model.embed_tokens.weight"], ["unrelated"]])
def test_a_folder_without_any_layer_loads_as_in_the_library(kept, tmp_path):
    """Nothing fits in part: transformers warns that the model is as initialized, and says of which tensors."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = {name: model.state_dict().get(name, torch.ones(2)).clone() for name in kept}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = CausalLM.from_pretrained(tmp_path, output_loading_info=True)
    wanted = set(model.state_dict()) - set(kept)
    assert set(info["missing_keys"]) == wanted and set(info["unexpected_keys"]) == set(kept) - set(model.state_dict())
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_rope_scaling(rope_type, tmp_path):
    model = tiny_model(rope_parameters={"rope_theta": 10000.0, "rope_type": rope_type, "factor": 4.0})
    plain, logits = tiny_model(), model(IDS).logits
    long = torch.randint(12, 96, (1, 300))
    assert not torch.allclose(model(long).logits, plain(long).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(CausalLM.from_pretrained(tmp_path).eval()(IDS).logits, logits)
