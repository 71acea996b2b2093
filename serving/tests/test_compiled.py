"""A compiled engine, which is vLLM's default, gives the same answers; the other tests run without compiling."""

from __future__ import annotations

from typing import Any

from serving.measure.engine import count_preemptions
from serving.measure.material import Reference, check, generate


def test_a_compiled_engine(
    reference: Reference, questions_asked: list[list[int]], chats: list[list[int]], serve: Any
) -> None:
    """Questions, conversations and causal prompts together, in chunks, with preemption."""
    prompts = [prompt for prompt in chats if len(prompt) < 200][:30] + questions_asked[:10]
    prompts += [prompt[:-1] for prompt in questions_asked[10:14]]
    with serve(enforce_eager=False, num_gpu_blocks_override=20, max_model_len=256) as llm:
        preempted = count_preemptions(llm)
        check(reference, generate(llm, prompts))
    assert preempted
