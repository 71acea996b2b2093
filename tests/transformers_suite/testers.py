"""The model testers that transformers' mixins ask for, and the classes that they are given.

One tester serves both implementations, ours and the library's: the same tiny sizes, inputs and seeds.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers


ROOT = Path(__file__).resolve().parents[2]
OURS, LIBRARY = "ours", "library"


@dataclass(frozen=True)
class Variant:
    """One way to run every test: is the prefix on, is half of each row a prefix block, how large are the weights."""

    name: str
    prefix_lm: bool
    half_row: bool
    initializer_range: float

    @property
    def description(self) -> str:
        layout = "causal" if not self.prefix_lm else "prefix_lm, half of each row" if self.half_row else "prefix_lm"
        return f"{layout}, init {self.initializer_range}"


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("causal", False, False, 0.02),
        Variant("prefix", True, False, 0.02),
        Variant("half", True, True, 0.02),
        # At 0.02 the hidden states barely depend on one another and a wrong mask goes unseen.
        Variant("causal-0.1", False, False, 0.1),
        Variant("prefix-0.1", True, False, 0.1),
        Variant("half-0.1", True, True, 0.1),
    )
}


# The library's test case for its own class, in its own layout and sizes; only a checkout holds it.
CAUSAL_LM = "causal-lm"
# Three layouts, and once more where masks matter; the other two are there to look closer.
DEFAULT_VARIANTS = ("causal", "prefix", "half", "half-0.1")


def load_classes(implementation: str) -> SimpleNamespace:
    """The config class and the four model classes of an implementation; a head that it lacks is None.

    Ours come through transformers' loader of remote code, exactly as `trust_remote_code=True` gets them.
    """
    names = {
        "config": "HrmTextConfig",
        "base": "HrmTextModel",
        "causal_lm": "HrmTextForCausalLM",
        "sequence_classification": "HrmTextForSequenceClassification",
        "token_classification": "HrmTextForTokenClassification",
    }
    if implementation == LIBRARY:
        return SimpleNamespace(**{role: getattr(transformers, name, None) for role, name in names.items()})
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return SimpleNamespace(
        **{
            role: get_class_from_dynamic_module(
                f"{'configuration' if role == 'config' else 'modeling'}_hrm_text.{name}", str(ROOT)
            )
            for role, name in names.items()
        }
    )


def half_as_asked() -> None:
    """Puts float32 in the place of half precision where the runner asks for it."""
    if os.environ.get("HRM_TEXT_SUITE_FLOAT32"):
        # Every use of half precision in the tests goes through these names.
        torch.bfloat16 = torch.float16 = torch.half = torch.float32


class HrmTextTester:
    """Tiny configurations and inputs, in the shape that `ModelTesterMixin` and its relatives expect."""

    is_training = True
    batch_size = 13
    seq_length = 7
    # The mixins want two layers at most. A model of two stacks reports one hidden state and one attention per call, so
    # the tests that count those put `attention_calls` here.
    num_hidden_layers = 2
    layers_per_stack = 2
    attention_calls = layers_per_stack * 2 * (3 + 1)
    hidden_size = 32
    num_attention_heads = 2
    num_labels = 3
    vocab_size = 99

    def __init__(self, classes: SimpleNamespace, variant: Variant):
        self.classes = classes
        self.variant = variant
        self.config_class = classes.config
        self.base_model_class = classes.base
        self.causal_lm_class = classes.causal_lm
        self.sequence_classification_class = classes.sequence_classification
        self.token_classification_class = classes.token_classification
        self.question_answering_class = None
        self.all_model_classes = tuple(
            model_class
            for model_class in (
                classes.base,
                classes.causal_lm,
                classes.sequence_classification,
                classes.token_classification,
            )
            if model_class is not None
        )

    def get_config(self) -> Any:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.layers_per_stack,
            H_cycles=2,
            L_cycles=3,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            max_position_embeddings=512,
            initializer_range=self.variant.initializer_range,
            prefix_lm=self.variant.prefix_lm,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        common = importlib.import_module("transformers_tests.test_modeling_common")
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": common.ids_tensor(shape, self.vocab_size)}
        # A staircase: row i sees its first i + 1 tokens, so every amount of padding occurs.
        inputs["attention_mask"] = torch.tril(torch.ones(shape, dtype=torch.long))
        if self.variant.half_row:
            inputs["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
            inputs["token_type_ids"][:, : self.seq_length // 2] = 1
        return self.get_config(), inputs

    # Older mixins ask for the inputs under this name.
    prepare_config_and_inputs = prepare_config_and_inputs_for_common


def selected() -> tuple[str, Variant]:
    """The implementation and the variant that this process was started for."""
    # The conversions of the library's class, which the test case of a checkout asks for, are the same in each.
    name = os.environ["HRM_TEXT_SUITE_VARIANT"]
    return os.environ["HRM_TEXT_SUITE_IMPLEMENTATION"], VARIANTS["causal" if name == CAUSAL_LM else name]
