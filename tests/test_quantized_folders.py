"""Folders in 8 and 4 bits, loaded as compressed-tensors does: verified, right in every mode, saved, loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.errors import ConversionError
from conversion.verify import verify
from convert_weights import convert
from training.data import encode_rows, read_rows

from .harness import FORWARD_MODES, GENERATE_MODES, NOT_GREEDY, deviation, is_greedy
from .one_answer_models import one_answer_model
from .tiny import ROOT


pytest.importorskip("compressed_tensors", reason="its releases with embeddings are for Python 3.11 and later")

ROWS = ROOT / "tests" / "fixtures" / "rows.jsonl"
SCHEMES = {"w8a8": {}, "w4a16": {}, "w4a16, GPTQ": {"calibration": ROWS}}
# Inputs are rounded in 8 bits: where two ways of summing meet a tie, one of 255 steps lies between them.
BOUND = {"w8a8": 5e-2, "w4a16": 1e-4}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """Verified conversions of Nano."""
    folder = tmp_path_factory.mktemp("nano")
    return {
        name: (folder / name, convert(ROOT, folder / name, quantize=name[:5].strip(","), progress=False, **options))
        for name, options in SCHEMES.items()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders of the model of the one-answer tests, and the options that made them."""
    folder = tmp_path_factory.mktemp("small")
    one_answer_model().save_pretrained(folder / "source")
    for name, options in {"w8a8": {}, "w4a16": {"group_size": 16}}.items():
        convert(folder / "source", folder / name, quantize=name, verification=False, progress=False, **options)
    return folder


@pytest.fixture(scope="module", params=["w8a8", "w4a16"])
def model(request, small):
    model = load(small / request.param)
    model.generation_config.eos_token_id = None
    return request.param, model


# ---- how near they are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_the_reload_is_what_the_plain_formulas_say(nano, name):
    _, done = nano[name]
    assert done.verification.differences == []
    assert "within 0 of the plain formulas" in done.verification.logits
    assert len(done.verification.quality) == {"w8a8": 2, "w4a16": 3, "w4a16, GPTQ": 4}[name]


@pytest.mark.skipif(
    not hasattr(transformers, "HrmTextForCausalLM"), reason="this transformers has no class of its own"
)
@pytest.mark.parametrize("options", [{"quantize": "w8a8"}, {"quantize": "w4a16", "calibration": ROWS}])
def test_transformers_own_class_loads_the_split_layout(tmp_path, options):
    done = convert(ROOT, tmp_path / "out", layout="split", progress=False, **options)
    assert done.verification.differences == []
    assert done.verification.loaded_as.startswith("HrmTextForCausalLM")
    assert "within 0 of the plain formulas" in done.verification.logits


@torch.no_grad()
def divergence(source: Any, other: Any, examples: list[dict[str, list[int]]]) -> float:
    """KL in nats a token, over the answers."""
    total, count = 0.0, 0
    for example in examples:
        ids, types = (torch.tensor([example[name]]) for name in ("input_ids", "token_type_ids"))
        asked = torch.tensor(example["labels"])[1:] != -100
        p, q = (
            model(ids, token_type_ids=types).logits[0, :-1][asked].float().log_softmax(-1) for model in (source, other)
        )
        total += (p.exp() * (p - q)).sum().item()
        count += int(asked.sum())
    return total / count


@pytest.mark.parametrize(("name", "most"), [("w8a8", 2e-4), ("w4a16", 4e-3), ("w4a16, GPTQ", 3e-3)])
def test_nano_stays_near_to_itself(nano, name, most):
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    examples, _ = encode_rows(read_rows(ROWS), tokenizer, 256)
    assert 0 < divergence(load(ROOT), load(nano[name][0]), examples) < most


def test_the_card_says_what_was_done(nano):
    card = (nano["w4a16, GPTQ"][0] / "README.md").read_text()
    assert "w4a16, GPTQ on 56 calibration rows" in card
    assert "KL of the quantized model to the source" in card
    assert "pip install compressed-tensors" in card
    assert "rounded to nearest" in (nano["w8a8"][0] / "README.md").read_text()


# ---- the one rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_one_answer(model, mode):
    name, model = model
    with torch.no_grad():
        assert deviation(model, FORWARD_MODES[mode](model)) < BOUND[name]


@pytest.mark.parametrize("mode", GENERATE_MODES)
def test_one_answer_of_generate(model, mode):
    name, model = model
    answers = GENERATE_MODES[mode](model)
    assert deviation(model, answers) < BOUND[name]
    if mode not in NOT_GREEDY and name != "w8a8":
        assert is_greedy(model, answers)


# ---- saved and loaded again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_saved_and_loaded_again(nano, tmp_path, name, used):
    """At its first use the library unpacks every layer, and what is saved then holds them unpacked."""
    ids = torch.arange(20)[None] + 30
    model = load(nano[name][0])
    with torch.no_grad():
        wanted = model(ids).logits if used else load(nano[name][0])(ids).logits
        model.save_pretrained(tmp_path / "again")
        for turn in ("again", "and again"):
            reloaded = load(tmp_path / turn)
            torch.testing.assert_close(reloaded(ids).logits, wanted, atol=1e-4 if name == "w4a16" else 2e-2, rtol=0)
            reloaded.save_pretrained(tmp_path / "and again")


def test_a_stack_that_does_not_fit_is_refused(nano, tmp_path):
    folder = shutil.copytree(nano["w4a16"][0], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.L_module.layers.1.attn.o_proj.weight_packed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks"):
        load(folder)


# ---- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors["model.L_module.layers.0.mlp.down_proj.weight_packed"][3].add_(1), "rounded"),
        (lambda tensors: tensors["model.H_module.layers.1.attn.o_proj.weight_scale"][5].mul_(1.01), "rounded"),
        (lambda tensors: tensors["model.z_L_init"][0].add_(0.5), "z_L_init differs"),
        (lambda tensors: tensors.pop("lm_head.weight_scale"), "lm_head.weight_scale is missing"),
    ],
)
def test_every_kind_of_difference_is_seen(nano, tmp_path, change, said):
    folder, done = nano["w4a16"]
    folder = shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    request = {
        "source": {"path": str(ROOT), "epoch": None, "weights": "ema", "tokenizer": None},
        "config": done.plan.config,
        "remote_code": True,
        "quantization": {"name": "w4a16", "group_size": None, "calibration": None},
    }
    try:
        found = " ".join(verify(folder, request).differences)
    except ConversionError as error:
        found = str(error)
    assert said in found


def test_a_scheme_that_the_config_does_not_say(nano, tmp_path):
    """The logits are compared with formulas that the file has no part in."""
    folder, done = nano["w8a8"]
    folder = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["num_bits"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    request = {
        "source": {"path": str(ROOT), "epoch": None, "weights": "ema", "tokenizer": None},
        "config": done.plan.config,
        "remote_code": True,
        "quantization": {"name": "w8a8", "group_size": None, "calibration": None},
    }
    assert any("plain formulas" in line for line in verify(folder, request).differences)
