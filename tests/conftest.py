"""Tests run offline, on the CPU's float32, with a module cache of their own."""

import os
import tempfile

import pytest
import torch

from .time_limit import pytest_addoption, pytest_configure, pytest_runtest_protocol, pytest_unconfigure  # noqa: F401


# transformers and the packages below it read these when they are imported, which the tests do after this file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One for every process, workers of xdist included: remote code that two of them copy to one place at a time, perhaps
# for two versions of transformers, is now and then half of the one and half of the other.
_MODULES = tempfile.TemporaryDirectory(prefix="modules_", ignore_cleanup_errors=True)
os.environ["HF_MODULES_CACHE"] = _MODULES.name


@pytest.fixture(autouse=True)
def _fresh():
    """Seeds, and lets each test see the warnings that are given once, whatever ran before it."""
    from transformers.utils import logging  # which reads the settings above

    torch.manual_seed(0)
    getattr(logging.warning_once, "cache_clear", lambda: None)()


@pytest.fixture(autouse=True)
def _fast_kernels_are_on(request):
    """Tests of the fast kernels run with them, also where `HRM_TEXT_KERNELS=0` switches them off for all others."""
    if not request.path.name.startswith(("test_kernels", "test_inference", "test_decoding", "test_compiled")):
        yield
        return
    from .tiny import load_class

    with load_class("modeling_hrm_text.HrmTextForCausalLM").use_fast_kernels(True):
        yield
