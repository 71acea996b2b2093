"""lm-eval's model for `transformers`; it answers a prompt that is too long with nothing, and does not cut it."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM


class EvaluatedModel(HFLM):
    """Counts the prompts that do not fit in `too_long`.

    HFLM cuts such a prompt on the left. Its envelope would be broken, and the model would read the rest causally.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.too_long = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        fits = [
            len(self.tok_encode(request.args[0])) + request.args[1]["max_gen_toks"] <= self.max_length
            for request in requests
        ]
        self.too_long += fits.count(False)
        kept = [request for request, fit in zip(requests, fits) if fit]
        answers = iter(super().generate_until(kept, disable_tqdm=disable_tqdm) if kept else [])
        return [next(answers) if fit else "" for fit in fits]
