"""The library's test case for its own HRM-Text class, on one implementation; a checkout of the repository holds it.

`python -m tests.transformers_suite` starts pytest on this file beside `cases.py`; pytest does not collect it itself.
"""

from __future__ import annotations

import unittest
from unittest import mock

import transformers
import transformers.utils

from tests.transformers_suite.overrides import admit_our_heads, our_overrides
from tests.transformers_suite.testers import OURS, half_as_asked, load_classes, selected


# Some mixins import transformers from the source tree beside their folder; here it is the installed package.
transformers.utils.direct_transformers_import = lambda path, file="__init__.py": transformers

from transformers_tests.models.hrm_text import test_modeling_hrm_text as library  # noqa: E402


half_as_asked()
CLASSES = load_classes(selected()[0])
IS_OURS = selected()[0] == OURS
if IS_OURS:
    admit_our_heads()


class Tester(library.HrmTextModelTester):
    base_model_class = CLASSES.base
    config_class = CLASSES.config
    causal_lm_class = CLASSES.causal_lm
    sequence_classification_class = CLASSES.sequence_classification
    token_classification_class = CLASSES.token_classification

    @property
    def config_args(self) -> list[str]:
        # The tester's activation is the GELU of other models. HRM-Text has SwiGLU, and ours refuses another one.
        return [name for name in super().config_args if name != "hidden_act"]


class HrmTextCausalLMSuite(our_overrides(library.HrmTextModelTest), library.HrmTextModelTest, unittest.TestCase):
    model_tester_class = Tester
    # The year of a model is read off a path in the library; remote code has none and would be taken for an old one.
    test_can_init_all_missing_weights_before_2023 = True
    if IS_OURS:
        # Flash attention serves prefix blocks: `tests/test_one_answer_backends.py` holds it to the same logits.
        test_flash_attention_rejected_when_prefix_lm = None

    def setUp(self) -> None:
        super().setUp()
        patched = mock.patch.object(library, "HrmTextForCausalLM", CLASSES.causal_lm)
        patched.start()
        self.addCleanup(patched.stop)
