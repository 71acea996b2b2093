"""Training mode: batches, packed rows, checkpointing and backends give one loss and one gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from .flash_stand_in import flash_stand_in
from .harness import MIXED, Row, padded, positions_of
from .one_answer_models import one_answer_model


def labels_of(row: Row) -> list[int]:
    """What a trainer asks for: the response, and never a sequence's first token, which nothing precedes."""
    return [-100 if type_ or i == 0 else id_ for i, (id_, type_) in enumerate(zip(row.ids, row.types))]


COUNT = sum(label != -100 for row in MIXED for label in labels_of(row))
LABELLED = [row for row in MIXED if any(label != -100 for label in labels_of(row))]


def one_by_one() -> list[dict[str, torch.Tensor]]:
    return [
        {
            "input_ids": torch.tensor([row.ids]),
            "token_type_ids": torch.tensor([row.types]),
            "labels": torch.tensor([labels_of(row)]),
        }
        for row in LABELLED
    ]


def padded_batch(side: str) -> list[dict[str, torch.Tensor]]:
    batch = padded(LABELLED, side)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["attention_mask"] != 0] = torch.tensor([label for row in LABELLED for label in labels_of(row)])
    return [{**batch, "labels": labels}]


def packed_batch(**more: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    calls = one_by_one()
    whole = {name: torch.cat([call[name] for call in calls], dim=1) for name in calls[0]}
    whole["position_ids"] = torch.tensor([[p for row in LABELLED for p in range(len(row))]])
    if more:
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    return [whole]


def flattening_collator_batch() -> list[dict[str, torch.Tensor]]:
    """What the flash-attention collators of transformers and TRL add to a packed row."""
    call = packed_batch()[0]
    offsets = torch.tensor([0, *[len(row) for row in LABELLED]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(len(row) for row in LABELLED)
    return [
        {**call, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    ]


def positioned_batch() -> list[dict[str, torch.Tensor]]:
    call = padded_batch("left")[0]
    return [{**call, "position_ids": positions_of(call["attention_mask"], fill=1)}]


BATCHES = {
    "padded left": lambda: padded_batch("left"),
    "padded right": lambda: padded_batch("right"),
    "padded left, positions given": positioned_batch,
    "packed": packed_batch,
    "packed, with a mask": lambda: packed_batch(mask=True),
    "packed by a flattening collator": flattening_collator_batch,
}


def loss_and_gradients(model, calls) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for call in calls:
        loss = model(**call, num_items_in_batch=COUNT, use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained_model(bp_steps: int, **overrides):
    model = one_answer_model(L_cycles=2, **overrides).train()
    model.set_gradient_steps(bp_steps)
    return model


def assert_same(actual, expected) -> None:
    assert actual[0] == pytest.approx(expected[0], abs=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module", params=[2, 5])
def expected(request):
    return request.param, loss_and_gradients(trained_model(request.param), one_by_one())


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(expected, batch):
    bp_steps, wanted = expected
    assert_same(loss_and_gradients(trained_model(bp_steps), BATCHES[batch]()), wanted)


@pytest.mark.parametrize("batch", ["padded left", "packed"])
@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "flash_attention_2"])
def test_backends(expected, monkeypatch, implementation, batch):
    bp_steps, wanted = expected
    model = trained_model(bp_steps)
    if implementation.startswith("flash"):
        monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: None)
        monkeypatch.setattr(flash_utils, "_flash_varlen_fn", flash_stand_in, raising=False)
        model.config._attn_implementation = implementation
    else:
        model.set_attn_implementation(implementation)
    assert_same(loss_and_gradients(model, BATCHES[batch]()), wanted)


@pytest.mark.parametrize("batch", ["padded left", "packed"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(expected, reentrant, batch):
    bp_steps, wanted = expected
    model = trained_model(bp_steps)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(loss_and_gradients(model, BATCHES[batch]()), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(expected, dtype, checkpointing):
    bp_steps, (loss, _) = expected
    model = trained_model(bp_steps)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", dtype=dtype):
        mixed = loss_and_gradients(model, BATCHES["packed"]())
    assert mixed[0] == pytest.approx(loss, rel=0.02)
    assert all(torch.isfinite(gradient).all() for gradient in mixed[1].values())
    assert all(gradient.dtype == torch.float32 for gradient in mixed[1].values())
