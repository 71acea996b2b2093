"""What is changed in tests of the library for our classes: each repeats the library's test with one thing changed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from tests.transformers_suite import distributed
from tests.transformers_suite.testers import LIBRARY, OURS, HrmTextTester, load_classes, selected


CLASSES = load_classes(selected()[0])
COMMON = "transformers_tests.test_modeling_common"


def admit_our_heads() -> None:
    """Adds our classes to the lists of names by which the mixins choose labels; the library lists its own."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for mapping, name in (
        ("MODEL_MAPPING_NAMES", "HrmTextModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "HrmTextForCausalLM"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "HrmTextForSequenceClassification"),
        ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "HrmTextForTokenClassification"),
    ):
        getattr(auto, mapping).setdefault("hrm_text", name)


class OurOverrides:
    """A mixin that comes before the library's."""

    def test_load_with_mismatched_shapes(self) -> None:
        # Changed: the auto classes are ours, since the library's do not find remote code in a folder without it.
        ours = {"AutoModelForSequenceClassification": CLASSES.sequence_classification, "AutoModel": CLASSES.base}
        with mock.patch.multiple(sys.modules[COMMON], **ours):
            super().test_load_with_mismatched_shapes()

    @contextlib.contextmanager
    def _conversions_of_the_library(self) -> Iterator[None]:
        """Hands the tests what the library's class converts, since ours converts nothing and would skip."""
        library = load_classes(LIBRARY)
        if library.base is None:
            self.skipTest("this version has no HRM-Text of its own, hence no conversions")
        common: Any = sys.modules[COMMON]
        config = HrmTextTester(library, selected()[1]).get_config()
        mapping = common.get_model_conversion_mapping(library.base(config), add_legacy=False)
        with mock.patch.object(common, "get_model_conversion_mapping", lambda model, **kwargs: mapping):
            yield

    def test_reverse_loading_mapping(self) -> None:
        # Changed: the names that are saved are those of the model itself. They must still be what the library's class
        # converts from, and come out the same however the model was made.
        with self._conversions_of_the_library():
            super().test_reverse_loading_mapping(check_keys_were_modified=False)

    def test_can_load_from_already_mapped_keys(self) -> None:
        # Changed: it runs although there is nothing to convert; `save_original_format` must not matter.
        with self._conversions_of_the_library():
            super().test_can_load_from_already_mapped_keys()

    def test_tp_backward(self) -> None:
        # Changed: the reference gradient of gqkv_proj is cut into four packed parts, not two or one.
        with distributed.four_part_reference_gradients():
            super().test_tp_backward()


def our_overrides(*mixins: type) -> type:
    """The overrides of those tests that a version's mixins have; for the library's class none."""
    for name in [name for name in vars(OurOverrides) if name.startswith("test_")]:
        if not any(hasattr(mixin, name) for mixin in mixins):
            delattr(OurOverrides, name)
    return OurOverrides if selected()[0] == OURS else type("NoOverrides", (), {})
