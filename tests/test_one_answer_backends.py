"""Every attention backend gives the answer of the reference, in every mode of the forward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from .flash_stand_in import flash_3_stand_in, flash_stand_in
from .harness import (
    CONVERSATION,
    FORWARD_MODES,
    GENERATE_MODES,
    MIXED,
    NOT_GREEDY,
    Answer,
    Row,
    deviation,
    is_greedy,
    padded,
    reference_logits,
)
from .one_answer_models import shallow_model


# Attention of a response that goes through other kernels than the reference's may differ by more than one of float32.
TOLERANCE = {"eager": 1e-4, "sdpa": 1e-4, "flex_attention": 2e-3, "flash_attention_2": 1e-4, "flash_attention_3": 1e-4}
GENERATE_SUBSET = (
    "greedy, block + response + block",
    "ragged batch of all layouts",
    "static cache",
    "beam search",
    "assisted by itself",
    "chunks of 3, ragged batch",
    "second turn of a ragged batch",
)


@pytest.fixture(scope="module")
def reference():
    return shallow_model()


@pytest.fixture
def backend_model(request, monkeypatch):
    """A model with the backend of the test's parameter, switched to at run time."""
    name = request.param
    model = shallow_model()
    if name.startswith("flash"):
        kernel = flash_stand_in if name.endswith("2") else flash_3_stand_in
        monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
        monkeypatch.setattr(flash_utils, "_flash_varlen_fn", kernel, raising=False)
        # The library refuses flash attention without its package; everything below that check is real.
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)
    model.backend = name
    return model


@pytest.mark.parametrize("backend_model", list(TOLERANCE), indirect=True)
@pytest.mark.parametrize("mode", FORWARD_MODES)
@torch.no_grad()
def test_forward(reference, backend_model, mode):
    assert deviation(reference, FORWARD_MODES[mode](backend_model)) < TOLERANCE[backend_model.backend]


@pytest.mark.parametrize("backend_model", [name for name in TOLERANCE if name != "sdpa"], indirect=True)
@pytest.mark.parametrize("mode", GENERATE_SUBSET)
def test_generate(reference, backend_model, mode):
    answers = GENERATE_MODES[mode](backend_model)
    assert deviation(reference, answers) < TOLERANCE[backend_model.backend]
    assert mode in NOT_GREEDY or is_greedy(reference, answers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend_model", ["eager", "sdpa", "flex_attention", "flash_attention_2"], indirect=True)
@torch.no_grad()
def test_padding_is_finite_and_changes_nothing_in_half_precision(backend_model, dtype):
    """Real tokens give the same in any company; padding itself, whole rows of it too, gives no NaN."""
    model = backend_model.to(dtype)
    for side in ("left", "both"):
        rows = [MIXED[0], Row((), ()), MIXED[1]]
        batch = padded(rows, side, 16)
        logits = model(**batch).logits
        assert torch.isfinite(logits).all()
        garbage = torch.where(batch["attention_mask"] != 0, batch["input_ids"], 77)
        other = model(**{**batch, "input_ids": garbage}).logits
        for i, row in enumerate(rows):
            real = batch["attention_mask"][i] != 0
            torch.testing.assert_close(logits[i][real], other[i][real], atol=0, rtol=0)
            if len(row):
                torch.testing.assert_close(logits[i][real], reference_logits(model, row), atol=0.05, rtol=0.05)


@torch.no_grad()
def test_flash_by_a_name_of_the_kernels_hub(reference, monkeypatch):
    model = shallow_model()
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", flash_stand_in, raising=False)
    model.config._attn_implementation = "kernels-community/flash-attn2"
    assert deviation(reference, FORWARD_MODES["packed, with padding between"](model)) < 1e-4


@torch.no_grad()
def test_switching_at_run_time(reference):
    """One model goes through the backends and back, in the middle of a conversation on a live cache."""
    model, row = shallow_model(), CONVERSATION[0]
    live, answers = None, []
    for name, (begin, end) in zip(("eager", "flex_attention", "sdpa"), row.parts()):
        model.set_attn_implementation(name)
        output = model(
            input_ids=torch.tensor([row.ids[begin:end]]),
            token_type_ids=torch.tensor([row.types[begin:end]]),
            past_key_values=live,
            use_cache=True,
        )
        live = output.past_key_values
        answers.append(Answer(row, begin, output.logits[0]))
    assert deviation(reference, answers) < 2e-3
