"""Classification heads: the whole text is one prefix block, unless the caller says otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from .tiny import ROOT, tiny_model


HEADS = {
    "sequence": "modeling_hrm_text.HrmTextForSequenceClassification",
    "token": "modeling_hrm_text.HrmTextForTokenClassification",
}
AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


def head(kind: str, **overrides) -> torch.nn.Module:
    return tiny_model(cls=HEADS[kind], **{"num_labels": 3, **overrides})


def text(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(12, 96, (rows, tokens))


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_the_whole_text_is_one_block(kind):
    model, ids = head(kind), text()
    logits = model(ids).logits
    torch.testing.assert_close(logits, model(ids, token_type_ids=torch.ones_like(ids)).logits)
    causal = model(ids, token_type_ids=torch.zeros_like(ids)).logits
    assert (logits - causal).abs().max() > 0.05
    assert logits.shape == ((2, 3) if kind == "sequence" else (2, 9, 3))


@torch.no_grad()
def test_the_first_token_reads_the_last_one():
    model, ids = head("token"), text()
    other = ids.clone()
    other[:, -1] = (other[:, -1] - 11) % 84 + 12
    moved = (model(ids).logits - model(other).logits).abs()[:, 0].max()
    assert moved > 1e-3
    zeros = torch.zeros_like(ids)
    causal = model(ids, token_type_ids=zeros).logits - model(other, token_type_ids=zeros).logits
    assert torch.equal(causal[:, 0], torch.zeros_like(causal[:, 0]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_padding_changes_nothing(kind, side, implementation):
    model, ids = head(kind, attn_implementation=implementation), text(rows=1)
    alone = model(ids).logits
    pads = torch.full((1, 4), model.config.pad_token_id)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    batch = torch.cat([padded, text(rows=1, tokens=13)])
    logits = model(batch, attention_mask=(batch != model.config.pad_token_id).long()).logits[:1]
    if kind == "token":
        logits = logits[:, 4:] if side == "left" else logits[:, :9]
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_prefix_lm_it_is_causal():
    plain, ids = head("token", prefix_lm=False), text()
    zeros = torch.zeros_like(ids)
    torch.testing.assert_close(plain(ids).logits, head("token")(ids, token_type_ids=zeros).logits)


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    model, ids = head("token"), text()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (None, torch.tensor([0, 2])),
        ("single_label_classification", torch.tensor([1, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        ("regression", torch.tensor([[0.5, 1, 2], [3, 4, 5]])),
    ],
)
def test_losses_of_every_problem_type(problem, labels):
    loss = head("sequence", problem_type=problem)(text(), labels=labels).loss
    assert torch.isfinite(loss)
    loss.backward()


@pytest.mark.parametrize("kind", HEADS)
def test_a_causal_folder_loads_but_for_the_head(kind, tmp_path):
    causal = tiny_model(seed=4)
    causal.save_pretrained(tmp_path)
    model, info = type(head(kind)).from_pretrained(tmp_path, output_loading_info=True, num_labels=3)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    for name, tensor in causal.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_auto_classes_and_round_trip(kind, tmp_path):
    model, ids = head(kind, seed=5), text()
    model.save_pretrained(tmp_path)
    for module in ROOT.glob("*_hrm_text.py"):
        shutil.copy(module, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_hrm_text.HrmTextConfig", AUTO[kind].__name__: HEADS[kind]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AUTO[kind].from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert Path(again.__module__.replace(".", "/")).name == "modeling_hrm_text"
    assert again.config.num_labels == 3
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_it_learns_what_only_a_bidirectional_reader_can():
    """Every token's label is the parity of the last token; judged at the first token of rows that were held out."""
    ids = torch.randint(12, 20, (700, 5))
    labels = (ids[:, -1:] % 2).repeat(1, 5)
    accuracy = {}
    for name, type_id in (("block", 1), ("causal", 0)):
        types = torch.full_like(ids, type_id)
        small = {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1}
        model = head("token", num_labels=2, classifier_dropout=0.0, **small).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(60):
            model(ids[:600], token_type_ids=types[:600], labels=labels[:600]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            logits = model.eval()(ids[600:], token_type_ids=types[600:]).logits
        accuracy[name] = logits.argmax(-1).eq(labels[600:])[:, 0].float().mean().item()
    assert accuracy["block"] > 0.9
    assert accuracy["causal"] < 0.7
