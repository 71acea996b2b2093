"""Weights in 8 and 4 bits: how they are rounded and stored, what is refused, and what the 1B comes to."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import convert_weights
from conversion import quantize
from conversion.errors import ConversionError
from conversion.gptq import solve
from conversion.layout import Dimensions, TensorSpec, split_names
from conversion.quantize import Precision, dequantize, make_scheme, restore, round_to_nearest, store
from convert_weights import convert, main

from .checkpoints import assert_refused, published_tensors, save_published, save_training
from .tiny import ROOT


PRECISIONS = [Precision(8, activations=True), Precision(8), Precision(4, 32), Precision(4, 8), Precision(4)]


def weight(rows: int = 24, columns: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(precision: Precision) -> str:
    return f"{precision.format}-{precision.bits}-{precision.group}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", PRECISIONS, ids=name_of)
def test_numbers_are_in_range_and_as_near_as_they_can_be(precision, dtype):
    values = weight(dtype=dtype)
    values[3], values[4, :32] = 0.0, 0.0
    numbers, scales = round_to_nearest(values, precision)
    least, most = quantize.limits(precision.bits)
    assert numbers.dtype is torch.int8
    assert scales.dtype is dtype
    assert scales.shape == (24, 96 // (precision.group or 96))
    assert numbers.min() >= least
    assert numbers.max() <= most
    step = scales.float().repeat_interleave(precision.group or 96, dim=1)
    exact = numbers.float() * step
    for other in (numbers - 1, numbers + 1):
        allowed = (other >= least) & (other <= most)
        worse = (other.float() * step - values.float()).abs() >= (exact - values.float()).abs() - 1e-6
        assert (worse | ~allowed).all()
    restored = dequantize(numbers, scales)
    assert restored[3].eq(0).all()
    bound = 0.01 if precision.bits == 8 else 0.12
    assert (restored.float() - values.float()).norm() < bound * values.float().norm() * (1 if precision.group else 1.5)


def test_four_bits_search_their_scale():
    """The end of the range that reaches further takes the largest value, and some values may be cut off."""
    values = weight(512, 32)
    numbers, scales = round_to_nearest(values, Precision(4, 32))
    assert (scales < 0).any()
    assert (scales > 0).any()
    plain = values.abs().amax(1, keepdim=True) / 7.5
    usual = (values / plain).round().clamp(-8, 7) * plain
    assert (dequantize(numbers, scales) - values).norm() < 0.9 * (usual - values).norm()


@pytest.mark.parametrize("precision", PRECISIONS, ids=name_of)
def test_what_is_stored_comes_back(precision):
    numbers, scales = round_to_nearest(weight(), precision)
    stored = store("x.weight", numbers, scales, precision)
    specs = precision.specs("x.weight", TensorSpec((24, 96), torch.float32))
    assert {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in stored.items()} == specs
    back = restore("x.weight", stored, precision)
    assert torch.equal(back[0], numbers)
    assert torch.equal(back[1], scales)


def test_the_first_number_of_a_word_lies_in_its_lowest_bits():
    numbers = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 4]], dtype=torch.int8)
    stored = store("x.weight", numbers, torch.ones(1, 1), Precision(4))
    word = int(stored["x.weight_packed"].item()) & 0xFFFFFFFF
    assert [(word >> 4 * place) & 15 for place in range(8)] == [0, 1, 8, 15, 9, 10, 11, 12]
    assert stored["x.weight_shape"].tolist() == [1, 8]


@pytest.mark.parametrize("precision", [Precision(4, 32), Precision(8)], ids=name_of)
def test_gptq_makes_a_smaller_error_of_the_product(precision):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2000, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    inputs[:, 5] = 0.0  # an input that never comes
    values = weight()
    results = [solve(values, inputs.T @ inputs, precision), round_to_nearest(values, precision)]
    ours, nearest = ((inputs @ (dequantize(*result) - values).T).norm() for result in results)
    assert ours < 0.8 * nearest


def test_gptq_takes_sums_of_few_inputs():
    """Three rows leave most directions open, and nothing at all leaves all of them."""
    inputs = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    for hessian in (inputs.T @ inputs, torch.zeros(96, 96)):
        restored = dequantize(*solve(weight(), hessian, Precision(4, 32)))
        assert restored.isfinite().all()
        assert (restored - weight()).norm() < 0.5 * weight().norm()


@pytest.mark.parametrize(("name", "most"), [("w8a8", 1.3e9), ("w4a16", 0.75e9)])
def test_the_folder_of_the_1b(name, most):
    shapes = Dimensions(16, 1536, 4096, 1536, 65536).shapes()
    specs = {tensor: TensorSpec(shape, torch.bfloat16) for tensor, shape in shapes.items()}
    stored = make_scheme(name).specs(specs, torch.bfloat16)
    assert 0.9 * most < sum(spec.nbytes for spec in stored.values()) < most
    assert "model.z_L_init" in stored


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantize": "w3a3"}, "unknown: choose one of w8a8, w4a16"),
        ({"quantize": "w4a16", "group_size": 24}, r"24 does not divide the 32 columns of model\."),
        ({"quantize": "w4a16", "group_size": 12}, "no multiple of 8"),
        ({"quantize": "w4a16", "group_size": 0}, "no multiple of 8"),
        ({"quantize": "w4a16", "group_size": -32}, "no multiple of 8"),
        ({"quantize": "w8a8", "group_size": 32}, "--group-size is for w4a16"),
        ({"group_size": 32}, "--group-size is for --quantize"),
        ({"calibration": "rows.jsonl"}, "--calibration is for --quantize"),
        ({"quantize": "w4a16", "calibration": "no-such-file"}, "there is no such file"),
    ],
)
def test_wrong_arguments_are_refused_at_once(tmp_path, options, match):
    assert_refused(save_published(tmp_path / "source"), match, **options)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "has 0 rows with an answer"),
        ('{"prompt": "1 + 1", "completion": "2"}\n', "has 1 rows with an answer"),
        ('{"prompt": "1 + 1"}\n{"prompt": "2 + 1"}\n', "has 0 rows with an answer"),
        ('{"text": "no prompt"}\n', "row 1: `text`"),
        ('{"prompt": "1 + 1", "compltion": "2"}\n', "row 1: the field"),
        ("not JSON\n", "rows.jsonl"),
        ("\0\xff", "rows.jsonl"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, content, match):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content, encoding="latin-1")
    source = save_published(tmp_path / "source")
    assert_refused(source, match, quantize="w4a16", calibration=rows)


def test_rows_need_an_envelope(tmp_path):
    """Without a tokenizer nothing says what a prompt looks like."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1", "completion": "2"}\n' * 3)
    source = save_published(tmp_path / "source")
    assert_refused(source, "has no tokenizer, which turns rows into tokens", quantize="w4a16", calibration=rows)


@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_quantized_weights_are_not_quantized_again(tmp_path, name):
    done = convert(save_published(tmp_path / "s"), tmp_path / "q", quantize=name, verification=False, progress=False)
    assert done.verification is None
    (tmp_path / "s").rename(tmp_path / "source")
    (tmp_path / "q").rename(tmp_path / "quantized")
    assert_refused(tmp_path / "quantized", "the weights are quantized; convert the checkpoint before", quantize=name)
    assert_refused(tmp_path / "quantized", "the weights are quantized; convert the checkpoint before")


def test_verification_needs_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_weights, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install compressed-tensors, or pass --no-verify"):
        convert(save_published(tmp_path / "source"), tmp_path / "out", quantize="w8a8", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, capsys):
    source = save_published(tmp_path / "source")
    command = [str(source), "--output", str(tmp_path / "out"), "--no-verify"]
    assert main([*command, "--quantize", "w4a16", "--group-size", "7"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*command, "--quantize", "w4a16", "--group-size", "16"]) == 0
    with pytest.raises(SystemExit) as caught:
        main([*command, "--quantize", "w2"])
    assert caught.value.code == 2
    help_text = subprocess.run(
        [sys.executable, "convert_weights.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    ).stdout
    assert "--quantize w4a16 --calibration rows.jsonl" in help_text


# ---- folders --------------------------------------------------------------------------------------------------------


def expected(tensors: dict, name: str, precision: Precision | None) -> torch.Tensor:
    return tensors[name] if precision is None else dequantize(*round_to_nearest(tensors[name], precision))


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("name", ["w8a8", "w4a16"])
def test_every_tensor_of_a_folder(tmp_path, name, layout):
    """Those that are not quantized are as they were; parts of a split projection are rows of the fused one."""
    tensors = published_tensors()
    source = save_published(tmp_path / "source", tensors)
    done = convert(source, tmp_path / "out", quantize=name, layout=layout, verification=False, progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scheme = make_scheme(name, layout=layout)
    assert list(stored) and set(stored) == set(done.plan.specs)
    assert torch.equal(stored["model.z_L_init"], tensors["model.z_L_init"])
    for published in tensors:
        precision = scheme.of(published)
        parts = split_names(published) if layout == "split" else (published,)
        values = [
            stored[part] if precision is None else dequantize(*restore(part, stored, precision)) for part in parts
        ]
        assert torch.equal(torch.cat(values), expected(tensors, published, precision)), published
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {name}, rounded to nearest: projections of the layers in {8 if name == 'w8a8' else 4} bits" in card


def test_shards_hold_a_weight_and_its_scales_in_order(tmp_path):
    source = save_published(tmp_path / "source")
    convert(source, tmp_path / "out", quantize="w4a16", max_shard_size=4000, verification=False, progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    loaded = {}
    for file in set(index.values()):
        loaded |= load_file(tmp_path / "out" / file)
    assert loaded.keys() == index.keys()


def test_a_training_checkpoint_in_another_dtype(tmp_path):
    """Scales have the dtype of the model, for which the numbers are chosen."""
    raw = published_tensors(seed=3)
    source = save_training(tmp_path / "run", {1: (raw, raw)})
    convert(source, tmp_path / "out", quantize="w8a8", dtype="bfloat16", verification=False, progress=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.H_module.layers.0.mlp.down_proj.weight"
    numbers, scales = round_to_nearest(raw[name].bfloat16(), make_scheme("w8a8").of(name))
    assert torch.equal(stored[name], numbers)
    assert torch.equal(stored[f"{name}_scale"], scales)


def test_a_calibrated_folder(tmp_path):
    """Nano's rounding follows the rows that it is given, the same each time, and other rows give another."""
    rows = ROOT / "tests" / "fixtures" / "rows.jsonl"
    options = {"quantize": "w4a16", "verification": False, "progress": False}
    for folder in ("a", "b"):
        convert(ROOT, tmp_path / folder, calibration=rows, **options)
    convert(ROOT, tmp_path / "nearest", **options)
    a, b, nearest = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "b", "nearest"))
    name = "model.L_module.layers.0.mlp.down_proj.weight_packed"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], nearest[name])
    assert torch.equal(a["model.embed_tokens.weight_packed"], nearest["model.embed_tokens.weight_packed"])
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == sorted(
        entry.name for entry in (tmp_path / "nearest").iterdir()
    )
    assert "GPTQ on" in (tmp_path / "a" / "README.md").read_text()
