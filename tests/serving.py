"""A model folder for the tests of pipelines and servers: random weights, at a scale where the mask matters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from conversion.output import AUTO_CLASSES

from .tiny import ROOT, load_class


QUESTIONS = ["What is 48 + 27?", "Reverse the word stone.", "Sort 52, 7, 19 in ascending order."]
NEW_TOKENS = 12


def make_folder(folder: Path, seed: int = 0) -> Path:
    """Saves a random HRM-Text with the tokenizer of the repository; it answers NEW_TOKENS tokens, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    torch.manual_seed(seed)
    config = load_class("configuration_hrm_text.HrmTextConfig")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_layers_per_stack=2,
        num_attention_heads=4,
        initializer_range=0.2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        prefix_end_token_id=tokenizer.prefix_end_token_id,
    )
    model = load_class("modeling_hrm_text.HrmTextForCausalLM")(config).eval()
    model.generation_config.max_new_tokens = NEW_TOKENS
    model.generation_config.do_sample = False
    # Letters and digits alone, so that a random answer survives a terminal and a stream; the end token never comes.
    readable = {i for t, i in tokenizer.get_vocab().items() if t.lstrip("Ġ").isascii() and t.lstrip("Ġ").isalnum()}
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - readable)
    model.config.auto_map = AUTO_CLASSES
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for module in ROOT.glob("*_hrm_text.py"):
        shutil.copyfile(module, folder / module.name)
    return folder


@torch.no_grad()
def explicit_answer(model: Any, tokenizer: Any, encoding: Any, causal: bool = False, **arguments: Any) -> list[str]:
    """The answers of `generate` to a batch of tensors with `token_type_ids` spelled out, or all zero for causal."""
    types = torch.zeros_like(encoding["input_ids"]) if causal else encoding["token_type_ids"]
    output = model.generate(
        input_ids=encoding["input_ids"],
        attention_mask=encoding["attention_mask"],
        token_type_ids=types,
        **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments},
    )
    return tokenizer.batch_decode(output[:, encoding["input_ids"].shape[1] :], skip_special_tokens=True)
