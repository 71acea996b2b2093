"""The test case for the tokenizer: transformers' tokenizer mixins on our class, loaded as remote code.

`python -m tests.transformers_suite.tokenizer` starts pytest on this file; pytest does not collect it by itself.
"""

from __future__ import annotations

import shutil
import tempfile
import unittest
from unittest import mock

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers_tests import test_tokenization_common as common

from tests.transformers_suite.testers import ROOT


# transformers 4 has the tests of the fast backend in the one mixin.
BACKEND = [common.TokenizersBackendTesterMixin] if transformers.__version__[0] != "4" else []


class HrmTextTokenizerSuite(common.TokenizerTesterMixin, *BACKEND, unittest.TestCase):
    from_pretrained_id = [str(ROOT)]
    from_pretrained_kwargs = {"trust_remote_code": True}
    tokenizer_class = rust_tokenizer_class = type(AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True))
    # All of the tokenization is in tokenizer.json: there is no slow twin, and nothing to rebuild from the vocabulary.
    test_slow_tokenizer = False
    test_tokenizer_from_extractor = False
    test_seq2seq = False
    space_between_special_tokens = False

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # The library saves here in some versions only.
        shutil.rmtree(cls.tmpdirname)
        cls.tmpdirname = tempfile.mkdtemp()
        AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True).save_pretrained(cls.tmpdirname)
        # The integration test compares with recorded tokens; ours come from the tokenizers library itself.
        encoding = (backend := Tokenizer.from_file(str(ROOT / "tokenizer.json"))).encode(
            cls.integration_test_input_string
        )
        cls.integration_expected_tokens = encoding.tokens
        cls.integration_expected_token_ids = encoding.ids
        cls.integration_expected_decoded_text = backend.decode(encoding.ids, skip_special_tokens=False)

    def get_tokenizers(self, **kwargs):
        # Changed: `fast=False` asks for the slow twin alone; ours stands in for it.
        kwargs.pop("fast", None)
        return [self.get_tokenizer(**kwargs)]

    if not BACKEND:
        integration_test_input_string = "What is 92000?\n\n 生活的真谛是 😊  Hello <s>"

        def test_padding_warning_message_fast_tokenizer(self):
            # Changed: the library gives the warning to classes by the end of their name.
            named_fast = type("HrmTextTokenizerFast", (self.rust_tokenizer_class,), {})
            with mock.patch.object(type(self), "rust_tokenizer_class", named_fast):
                super().test_padding_warning_message_fast_tokenizer()
