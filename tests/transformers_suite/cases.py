"""The test case: every mixin of transformers' tests on one implementation in one variant.

`python -m tests.transformers_suite` starts pytest on this file, once for each implementation and variant; pytest does
not collect it by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import unittest
from unittest import mock

import torch
import transformers
import transformers.utils
from transformers.testing_utils import slow

from tests.transformers_suite import distributed
from tests.transformers_suite.overrides import admit_our_heads, our_overrides
from tests.transformers_suite.testers import OURS, HrmTextTester, half_as_asked, load_classes, selected


# Some mixins import transformers from the source tree beside their folder; here it is the installed package.
transformers.utils.direct_transformers_import = lambda path, file="__init__.py": transformers

from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import (  # noqa: E402
    GenerationTesterMixin,
    ModelTesterMixin,
    ids_tensor,
)


half_as_asked()
IMPLEMENTATION, VARIANT = selected()
CLASSES = load_classes(IMPLEMENTATION)
IS_OURS = IMPLEMENTATION == OURS


def _mixin(module: str, name: str) -> type:
    """A mixin that not every version of transformers has; an empty class where it is absent."""
    try:
        return getattr(importlib.import_module(f"transformers_tests.{module}"), name)
    except ImportError:
        return type(f"No{name}", (), {})


if IS_OURS:
    admit_our_heads()
    distributed.lift_model_gate()


class HrmTextSuite(
    our_overrides(ModelTesterMixin, _mixin("test_tensor_parallel_mixin", "TensorParallelTesterMixin")),
    _mixin("test_memory_cleanup_mixin", "MemoryCleanupMixin"),
    ModelTesterMixin,
    GenerationTesterMixin,
    _mixin("test_pipeline_mixin", "PipelineTesterMixin"),
    _mixin("test_training_mixin", "TrainingTesterMixin"),
    _mixin("test_tensor_parallel_mixin", "TensorParallelTesterMixin"),
    _mixin("test_fsdp_mixin", "FSDPTesterMixin"),
    unittest.TestCase,
):
    model_tester = None  # the mixins declare it as a property; setUp fills it
    run_under_no_grad = False
    # z_L_init never trains, in either implementation.
    test_all_params_have_gradient = False
    # The year of a model is read off a path in the library; remote code has none and would be taken for an old one.
    test_can_init_all_missing_weights_before_2023 = True
    # Where a mixin feeds the main input alone, it feeds these with it.
    additional_model_inputs = ["token_type_ids"]
    _torch_compile_train_cls = CLASSES.causal_lm if IS_OURS else None
    pipeline_model_mapping = {
        task: model_class
        for task, model_class in (
            ("feature-extraction", CLASSES.base),
            ("text-generation", CLASSES.causal_lm),
            ("text-classification", CLASSES.sequence_classification),
            ("token-classification", CLASSES.token_classification),
        )
        if model_class is not None
    }

    def setUp(self):
        super().setUp()
        self.model_tester = HrmTextTester(CLASSES, VARIANT)
        self.all_model_classes = self.model_tester.all_model_classes
        self.config_tester = ConfigTester(self, config_class=CLASSES.config, hidden_size=32, num_attention_heads=2)

    # What the library keeps in `causal_lm_tester.py` and every model runs.

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = CLASSES.base(config).eval()
        shape = (self.model_tester.batch_size, self.model_tester.seq_length, self.model_tester.hidden_size)
        self.assertEqual(model(**inputs).last_hidden_state.shape, shape)
        self.assertEqual(model(inputs["input_ids"]).last_hidden_state.shape, shape)

    # What the library asks of its own class in `models/hrm_text/`. It also asks that flash attention be refused with a
    # prefix; ours serves it, see tests/test_one_answer_backends.py.

    def test_prefix_lm_forward(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.prefix_lm = True
        model = CLASSES.causal_lm(config).eval()
        types = torch.zeros_like(inputs["input_ids"])
        types[:, : types.shape[1] // 2] = 1
        with torch.no_grad():
            causal = model(inputs["input_ids"], use_cache=False).logits
            prefix = model(inputs["input_ids"], token_type_ids=types, use_cache=False).logits
        self.assertGreater((causal - prefix).abs().max().item(), 1e-4)

    def _sequence_classification(self, problem_type, labels):
        if CLASSES.sequence_classification is None:
            self.skipTest("Model does not support sequence classification")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_labels = self.model_tester.num_labels
        config.problem_type = problem_type
        outputs = CLASSES.sequence_classification(config).eval()(**inputs, labels=labels)
        self.assertEqual(outputs.logits.shape, (self.model_tester.batch_size, self.model_tester.num_labels))
        self.assertTrue(torch.isfinite(outputs.loss))

    def test_sequence_classification_model(self):
        self._sequence_classification(None, ids_tensor([self.model_tester.batch_size], 2))

    def test_sequence_classification_model_for_single_label(self):
        labels = ids_tensor([self.model_tester.batch_size], 2)
        self._sequence_classification("single_label_classification", labels)

    def test_sequence_classification_model_for_multi_label(self):
        labels = ids_tensor([self.model_tester.batch_size, self.model_tester.num_labels], 2).float()
        self._sequence_classification("multi_label_classification", labels)

    def test_token_classification_model(self):
        if CLASSES.token_classification is None:
            self.skipTest("Model does not support token classification")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.num_labels = self.model_tester.num_labels
        shape = [self.model_tester.batch_size, self.model_tester.seq_length]
        model = CLASSES.token_classification(config).eval()
        outputs = model(**inputs, labels=ids_tensor(shape, config.num_labels))
        self.assertEqual(outputs.logits.shape, (*shape, config.num_labels))

    # Overrides. Each repeats the library's test with one thing changed.

    @contextlib.contextmanager
    def _counting_attention_calls(self):
        """`tester.num_hidden_layers` is the number of attention calls, not of layers in a stack."""
        self.model_tester.num_hidden_layers = self.model_tester.attention_calls
        yield

    def test_attention_outputs(self):
        # Changed: a layer that is called several times reports an attention each time.
        with self._counting_attention_calls():
            super().test_attention_outputs()

    def test_hidden_states_output(self):
        # Changed: a layer that is called several times reports a hidden state each time.
        with self._counting_attention_calls():
            super().test_hidden_states_output()

    def test_retain_grad_hidden_states_attentions(self):
        # Changed: every module call carries gradient, else the first hidden state of the loop has none by design.
        prepare = self.model_tester.prepare_config_and_inputs_for_common

        def prepare_with_all_gradient_steps():
            config, inputs = prepare()
            config.L_bp_cycles = [3, 3]
            return config, inputs

        with mock.patch.object(
            self.model_tester, "prepare_config_and_inputs_for_common", prepare_with_all_gradient_steps
        ):
            super().test_retain_grad_hidden_states_attentions()

    @slow
    def test_torch_compile_for_training(self):
        # Changed: it runs on the CPU too, and a parameter that never trains has a zero gradient to compare, not none.
        if self._torch_compile_train_cls is None:
            self.skipTest("the library's class sets no `_torch_compile_train_cls`")

        def build(config):
            model = CLASSES.causal_lm(config)
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            model.zero_grad = lambda: torch.nn.Module.zero_grad(model, set_to_none=False)
            return model

        with mock.patch.object(type(self), "_torch_compile_train_cls", staticmethod(build)):
            inspect.unwrap(ModelTesterMixin.test_torch_compile_for_training)(self)


# A version of transformers that lacks a test has nothing to override.
for _name in ("test_retain_grad_hidden_states_attentions", "test_torch_compile_for_training"):
    if not hasattr(super(HrmTextSuite, HrmTextSuite), _name):
        delattr(HrmTextSuite, _name)
