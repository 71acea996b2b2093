"""vLLM in this process, one thread, offline; and the port beside it, which every answer is compared with."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from serving.measure.engine import prepare, running  # noqa: E402
from serving.measure.material import Reference, chat_prompts, question_prompts  # noqa: E402


prepare()


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(ROOT)


@pytest.fixture(scope="session")
def questions_asked(reference: Reference) -> list[list[int]]:
    return question_prompts(reference, 80)


@pytest.fixture(scope="session")
def chats(reference: Reference) -> list[list[int]]:
    return chat_prompts(reference, 80)


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with running() as llm:
        yield llm


@pytest.fixture
def serve() -> Callable[..., Any]:
    return running


@pytest.fixture(autouse=True)
def _seeded_and_timed() -> Iterator[None]:
    """An engine that waits for ever ends the run, with the stacks of all threads."""
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(3600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
