"""Speculation with n-grams; the last file, since vLLM 0.32 starts no further engine in a process with numba."""

from __future__ import annotations

from typing import Any

from serving.measure.material import Reference, check, generate


def test_speculation_with_ngrams(reference: Reference, chats: list[list[int]], serve: Any) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with serve(speculative_config=speculation) as llm:
        check(reference, generate(llm, chats[:40]))
