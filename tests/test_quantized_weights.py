"""Weights of 8 and 4 bits: their products, the one answer of each quantized model, and what undoing gives back."""

from __future__ import annotations

import copy
import pickle
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.nano_tasks import questions

from .harness import FORWARD_MODES, deviation
from .one_answer_models import one_answer_model
from .optimized_models import sibling
from .tiny import ROOT, load_class, tiny_config, tiny_model


KINDS = ("int8", "int4")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "num_attention_heads": 4}
# A number of an input that lies between two steps may fall to either side, by the last bit of what was computed
# before: one step is 1/254 of the largest number of its token. Through all layer calls this adds up to some percent.
ONE_STEP = 0.05


@pytest.fixture(scope="module")
def module():
    return sibling(tiny_model(), "quantized_hrm_text")


def quantized(kind: str, keep: bool = True, dtype: torch.dtype = torch.float32):
    return tiny_model(**WIDE).to(dtype).optimize_for_inference(weights=kind, keep_weights=keep)


def matrices(model) -> list:
    return [
        value._packed for value in model.parameters() if type(getattr(value, "_packed", None)).__name__ != "NoneType"
    ]


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.detach().double() - wanted.double()).detach().norm() / wanted.double().norm())


@pytest.mark.parametrize("digits, bound", [(1, 2e-2), (2, 1e-4)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_a_product_is_that_of_the_rounded_weights(module, bits, digits, bound, rows):
    weight, x = torch.randn(192, 96), torch.randn(rows, 96)
    matrix = module.quantize(weight, bits, digits)
    assert relative(matrix.multiply(x, x.dtype), x @ matrix.dequantized().mT) < bound
    narrow = x.to(torch.bfloat16)
    got = matrix.multiply(narrow, narrow.dtype)
    assert got.dtype is torch.bfloat16 and relative(got, narrow.float() @ matrix.dequantized().mT) < bound + 5e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("digits", [1, 2])
def test_every_way_sums_the_same_whole_numbers(module, bits, digits):
    matrix = module.quantize(torch.randn(128, 256), bits, digits)
    x = torch.randn(40, 256)
    together = matrix.multiply(x, x.dtype)
    alone = torch.cat([matrix.multiply(row[None], x.dtype) for row in x])
    with tiny_model().use_fast_kernels(False):
        plain = matrix.multiply(x, x.dtype)
    # Equal but for inputs within the last bit of the middle between two steps.
    for other in (alone, plain):
        assert ((together - other).abs() < 1e-4 * together.abs().max()).float().mean() > 0.97


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(module, bits, dtype):
    matrix = module.quantize(torch.randn(128, 64), bits)
    row, others = torch.randn(1, 64).to(dtype), torch.randn(2, 3, 64).to(dtype)
    first = matrix.multiply(torch.cat((row, others[0])), dtype)[0]
    assert torch.equal(first, matrix.multiply(torch.cat((row, 1000 * others[1])), dtype)[0])


def test_rounding_errors(module):
    """One scale a row, and steps of groups: relative error of normal weights."""
    weight = torch.randn(256, 1536)
    assert relative(module.quantize(weight, 8).dequantized(), weight) < 0.0095
    # As four bits with the largest of a group as the end of its scale: 0.095.
    assert relative(module.quantize(weight, 4).dequantized(), weight) < 0.078


def test_zeros_and_extremes(module):
    weight = torch.zeros(64, 64)
    weight[1], weight[2, 5], weight[3] = 1e-30, 3.0, torch.linspace(-2, 2, 64)
    for bits in (8, 4):
        matrix = module.quantize(weight, bits, 2)
        x = torch.randn(3, 64)
        assert torch.isfinite(matrix.multiply(x, x.dtype)).all()
        assert matrix.multiply(torch.zeros(2, 64), x.dtype).abs().max() < 1e-30
        assert matrix.multiply(x[:0], x.dtype).shape == (0, 64)
        assert abs(float(matrix.dequantized()[2, 5]) - 3) < 0.05


def test_what_the_operators_do_not_take(module):
    """Odd shapes are stored in 8 bits, with the values of 4 where groups fit."""
    weight = torch.randn(24, 64)
    matrix = module.quantize(weight, 4)
    assert type(matrix) is module.QuantizedMatrix
    assert relative(matrix.dequantized(), module.GroupedMatrix.dequantized(matrix)) == 0
    assert 0.03 < relative(matrix.dequantized(), weight) < 0.12
    assert relative(module.quantize(torch.randn(24, 40), 4).dequantized(), torch.zeros(24, 40) + 1) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_operators_the_plain_formula_serves(module, kind, monkeypatch):
    wanted = quantized(kind)(IDS, token_type_ids=TYPES).logits
    monkeypatch.setattr(module, "rows_are_exact", lambda: False)
    monkeypatch.setattr(module, "codes_are_exact", lambda: False)
    model = quantized(kind)
    assert all(not matrix._stored.is_mkldnn for matrix in matrices(model))
    assert relative(model(IDS, token_type_ids=TYPES).logits, wanted) < ONE_STEP


IDS = torch.tensor([[6, 20, 31, 42, 7, 33, 50], [6, 9, 55, 60, 7, 71, 80]])
TYPES = torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", FORWARD_MODES)
def test_the_one_answer_of_a_quantized_model(kind, mode):
    """Padded, packed, cached, chunked, in a batch: as by one plain forward of the quantized model itself."""
    model = one_answer_model().optimize_for_inference(weights=kind)
    assert deviation(model, FORWARD_MODES[mode](model)) < ONE_STEP


@pytest.mark.parametrize("kind", KINDS)
def test_switching_kernels_off_keeps_the_quantized_answer(kind):
    model = quantized(kind)
    with torch.no_grad():
        wanted = model(IDS, token_type_ids=TYPES).logits
        with model.use_fast_kernels(False):
            off = model(IDS, token_type_ids=TYPES).logits
            assert model.is_optimized_for_inference
            before = quantized(kind)(IDS, token_type_ids=TYPES).logits
        plain = tiny_model(**WIDE)(IDS, token_type_ids=TYPES).logits
    assert torch.equal(off, before)
    assert relative(off, wanted) < ONE_STEP and relative(plain, wanted) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through_train", [True, False])
def test_undoing_gives_back_the_very_parameters(kind, through_train):
    model = tiny_model(**WIDE)
    before = {name: (value, value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    model.optimize_for_inference(weights=kind)
    assert len(matrices(model)) == 17 and model.is_optimized_for_inference
    assert all(torch.equal(value, before[name][1]) for name, value in model.state_dict().items())
    model.train() if through_train else model.undo_inference_optimization()
    assert not matrices(model) and not model.is_optimized_for_inference
    for name, value in model.named_parameters():
        found, copied, flag = before[name]
        assert value is found and torch.equal(value, copied) and value.requires_grad is flag


@pytest.mark.parametrize("kind", KINDS)
def test_given_up_weights_are_the_rounded_ones(kind, tmp_path):
    model = quantized(kind, keep=False)
    assert all(matrix.plain is None for matrix in matrices(model))
    with torch.no_grad():
        wanted = model(IDS, token_type_ids=TYPES).logits
        model.save_pretrained(tmp_path)
        model.undo_inference_optimization()
        rounded = model(IDS, token_type_ids=TYPES).logits
        loaded = load_class("modeling_hrm_text.HrmTextForCausalLM").from_pretrained(tmp_path)
        assert torch.equal(loaded(IDS, token_type_ids=TYPES).logits, rounded)
    # Inputs are rounded no longer.
    assert 0 < relative(rounded, wanted) < ONE_STEP


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [True, False])
def test_copies_are_the_same_model(kind, keep):
    model = quantized(kind, keep)
    with torch.no_grad():
        wanted = model(IDS, token_type_ids=TYPES).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
            assert [type(one).__name__ for one in matrices(twin)] == [type(one).__name__ for one in matrices(model)]
            assert torch.equal(twin(IDS, token_type_ids=TYPES).logits, wanted)
    if keep:
        twin.undo_inference_optimization()
        assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values()))


def test_casting_quantizes_the_cast_weights():
    model = quantized("int8").to(torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16} and len(matrices(model)) == 17
    assert all(matrix.dtype is torch.bfloat16 for matrix in matrices(model))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_matrix_is_held(kind):
    model = quantized(kind, keep=False, dtype=torch.bfloat16)
    for value in model.parameters():
        if getattr(value, "_packed", None) is not None:
            with torch._C.DisableTorchFunctionSubclass():
                assert value.untyped_storage().nbytes() == 2


def test_what_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="'int8' or 'int4'"):
        model.optimize_for_inference(weights="int2")
    assert not model.is_optimized_for_inference
    with pytest.raises(ValueError, match="move it to 'cpu'"):
        tiny_model().to("meta").optimize_for_inference(weights="int8")


def test_adapters_go_on_top_of_quantized_weights():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gqkv_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(**WIDE), config).eval()
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        model.base_model.model.optimize_for_inference(weights="int8")
        assert len(matrices(model)) == 17
        assert relative(model(input_ids=IDS).logits, plain) < 4 * ONE_STEP
        merged = model.merge_and_unload()
        assert relative(merged(input_ids=IDS).logits, plain) < 4 * ONE_STEP


def test_shared_weights_stay_whole():
    model = tiny_model(**WIDE, tie_word_embeddings=True).optimize_for_inference(weights="int4")
    assert len(matrices(model)) == 16 and model.lm_head.weight is model.get_input_embeddings().weight
    assert tiny_config().tie_word_embeddings is False


@pytest.mark.parametrize("kind, most", [("int8", 2e-5), ("int4", 1e-3)])
def test_quality_on_trained_weights(kind, most):
    """Mean KL divergence from the model in float32, over the answers to Nano's held-out questions."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32)
    rows = []
    for question in islice(questions(11, held_out=True), 32):
        prompt = tokenizer.encode_prompt([question.instruction], "synth,cot")["input_ids"][0]
        response = tokenizer(question.response("synth,cot"), add_special_tokens=False)["input_ids"]
        rows.append((prompt, response))

    @torch.no_grad()
    def log_probabilities() -> torch.Tensor:
        found = []
        for prompt, response in rows:
            ids = torch.tensor([prompt + response])
            types = torch.tensor([[1] * len(prompt) + [0] * len(response)])
            found.append(model(ids, token_type_ids=types).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1))
        return torch.cat(found)

    wanted = log_probabilities()
    model.optimize_for_inference(weights=kind)
    got = log_probabilities()
    assert float((wanted.exp() * (wanted - got)).sum(dim=-1).mean()) < most
