"""A plain model of what a cache holds, and the one answer that must follow from it.

Each cached position is a `Token`. The truth about a row is one plain, uncached forward over all of its tokens, whose
4-D mask is written down here, token by token, from what a block is: nothing of the model's own reading of layouts
takes part in it. What a call gives is compared with that, or the call is refused with a ValueError.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from .one_answer_models import one_answer_model
from .tiny import load_class


BOS, END, PAD = 6, 7, 5
TOLERANCE = 1e-4
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@dataclass(frozen=True)
class Token:
    """`type` is 1 inside a block, 2 where a block opens right after another one, and 0 elsewhere."""

    id: int
    type: int
    position: int
    real: bool = True


Rows = Sequence[Sequence[Token]]


def facts_model(seed: int = 0, **overrides: Any) -> Any:
    """A tiny model that finds envelopes itself, at a scale where every mask matters."""
    return one_answer_model(seed, **{"prefix_end_token_id": END, **overrides})


def row_of(*segments: tuple[int, int], seed: int = 0, start: int = 0) -> list[Token]:
    """A row of segments (type, length) of ordinary tokens; the first token of a segment of type 2 alone opens."""
    draw = torch.Generator().manual_seed(1000 * seed + 17)
    row: list[Token] = []
    for type_, length in segments:
        for i in range(length):
            id_ = int(torch.randint(20, 96, (1,), generator=draw))
            row.append(Token(id_, 1 if type_ == 2 and i else type_, start + len(row)))
    return row


def padded_left(rows: Rows, width: int | None = None) -> list[list[Token]]:
    width = max(len(row) for row in rows) if width is None else width
    return [[Token(PAD, 0, 0, real=False)] * (width - len(row)) + list(row) for row in rows]


def followed_by(history: Rows, new: Rows) -> list[list[Token]]:
    """History and new tokens side by side, the positions of the new ones counted on from the last real one."""
    whole = []
    for old, row in zip(history, new):
        real = [token.position for token in old if token.real]
        at, tail = (real[-1] + 1 if real else 0), []
        for token in row:
            tail.append(replace(token, position=at) if token.real else token)
            at += token.real
        whole.append([*old, *tail])
    return whole


# ---- the truth ------------------------------------------------------------------------------------------------------


def visible(row: Sequence[Token]) -> list[list[bool]]:
    """[tokens][tokens]: whether a token (first index) sees another (second); padding sees itself alone."""
    sequence, block, sequences, blocks = [], [], 0, 0
    before: Token | None = None
    for token in row:
        if not token.real:
            sequence.append(-1)
            block.append(-1)
            continue
        restarts = before is not None and token.position <= before.position
        sequences += restarts
        if token.type in (1, 2) and (restarts or before is None or before.type == 0 or token.type == 2):
            blocks += 1
        sequence.append(sequences)
        block.append(blocks if token.type in (1, 2) else -1)
        before = token
    seen = []
    for q in range(len(row)):
        together = [sequence[k] == sequence[q] >= 0 for k in range(len(row))]
        seen.append([k == q or (together[k] and (k < q or (block[k] == block[q] >= 0))) for k in range(len(row))])
    return seen


@torch.no_grad()
def truth(model: Any, rows: Rows) -> torch.Tensor:
    """[rows, tokens, vocab]: one plain, uncached forward with the whole mask spelled out."""
    mask = torch.tensor([visible(row) for row in rows])[:, None]
    ids = torch.tensor([[token.id for token in row] for row in rows])
    positions = torch.tensor([[token.position for token in row] for row in rows])
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


# ---- calls ----------------------------------------------------------------------------------------------------------


def arguments_of(new: Rows, history: Rows | None = None, types: bool = True, mask: bool | None = None) -> dict:
    """`input_ids`, `token_type_ids` (where `types`) and, where anything pads or `mask`, the mask of all columns."""
    call = {"input_ids": torch.tensor([[token.id for token in row] for row in new])}
    if types:
        call["token_type_ids"] = torch.tensor([[token.type for token in row] for row in new])
    history = [[] for _ in new] if history is None else history
    real = torch.tensor([[token.real for token in (*old, *row)] for old, row in zip(history, new)])
    if mask or (mask is None and not real.all()):
        call["attention_mask"] = real.long()
    return call


def largest_difference(logits: torch.Tensor, wanted: torch.Tensor, new: Rows) -> float:
    """Over the real tokens; NaN counts as infinite."""
    real = torch.tensor([[token.real for token in row] for row in new])
    if not bool(real.any()):
        return 0.0
    difference = ((logits - wanted).abs() / wanted.abs().clamp(min=1))[real].max().item()
    return difference if difference == difference else float("inf")


def feed(model: Any, live: Any, history: Rows, new: Rows, grad: bool = False, **more: Any) -> Any:
    """One forward of the new tokens on a live cache, whose logits must be right; returns the cache.

    `history` is what the cache holds, `more` overrides the call's arguments (None takes one away).
    """
    call = {**arguments_of(new, history), **more}
    call = {name: value for name, value in call.items() if value is not None}
    with torch.set_grad_enabled(grad):
        output = model(**call, past_key_values=live, use_cache=True)
    difference = largest_difference(output.logits, truth(model, followed_by(history, new))[:, -len(new[0]) :], new)
    assert difference < TOLERANCE, f"off by {difference:.3g}"
    return output.past_key_values


def is_refused(call: Callable[[], Any]) -> bool:
    """Whether a call that checks its own answer is refused; anything but an answer or a ValueError is raised."""
    try:
        call()
    except ValueError as refusal:
        assert len(str(refusal)) > 40, f"a refusal that says nothing: {refusal}"
        return True
    return False


def generate_on(
    model: Any,
    live: Any,
    history: Rows,
    new: Rows,
    steps: int = 3,
    whole: bool = True,
    types: bool = True,
    **more: Any,
) -> tuple[Any, list[list[Token]]]:
    """`generate` on a live cache, whose logits must be right; returns the cache and what it should hold now."""
    given = followed_by(history, new)
    call = arguments_of(given if whole else new, None if whole else history, types=types)
    call = {name: value for name, value in {**call, **more}.items() if value is not None}
    if "cache" not in call:
        call.setdefault("past_key_values", live)
    with warnings.catch_warnings():
        # Transformers 5.23 renames the argument to `cache`; both names are tested where both are known.
        warnings.filterwarnings("ignore", ".*past_key_values.*deprecated", FutureWarning)
        output = model.generate(**call, **{"max_new_tokens": steps, **GREEDY})
    answers = output.sequences[:, call["input_ids"].shape[1] :].tolist()
    final = followed_by(given, [[Token(id_, 0, 0) for id_ in answer] for answer in answers])
    total = len(given[0])
    wanted = truth(model, final)[:, total - 1 : -1]
    logits = torch.stack(output.logits, dim=1)
    difference = ((logits - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    assert difference < TOLERANCE, f"off by {difference:.3g}"
    return output.past_key_values, [row[:-1] for row in final]


# ---- caches ---------------------------------------------------------------------------------------------------------


class LosslessLayer(QuantizedLayer):
    """A quantized slot whose quantization keeps every bit, so that answers can be compared; all else is the library's.

    Old positions lie in `_quantized_keys` and only the newest four in `keys`.
    """

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.clone()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class LosslessCache(DynamicCache):
    """What `QuantizedCache` is, without a backend that would have to be installed."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = [LosslessLayer() for _ in range(config.num_hidden_layers)]


def own(model: Any) -> Any:
    return load_class("cache_hrm_text.HrmTextCache")(config=model.config)


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def bare_dynamic(model: Any) -> Any:
    return DynamicCache()


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=64)


def quantized(model: Any) -> Any:
    return LosslessCache(model.config)


CACHES: dict[str, Callable[[Any], Any]] = {
    "HrmTextCache": own,
    "DynamicCache": dynamic,
    "DynamicCache without config": bare_dynamic,
    "StaticCache": static,
    "QuantizedCache": quantized,
}
# Those that remember, so that nothing sane is refused.
REMEMBERING = ("HrmTextCache",)


def reordered(indices: Sequence[int]) -> Callable[[Any, list], tuple[Any, list]]:
    def change(live: Any, rows: list) -> tuple[Any, list]:
        live.reorder_cache(torch.tensor(indices))
        return live, [rows[i] for i in indices]

    return change


def selected(indices: Sequence[int]) -> Callable[[Any, list], tuple[Any, list]]:
    def change(live: Any, rows: list) -> tuple[Any, list]:
        live.batch_select_indices(torch.tensor(indices))
        return live, [rows[i] for i in indices]

    return change


def repeated(live: Any, rows: list) -> tuple[Any, list]:
    live.batch_repeat_interleave(2)
    return live, [row for row in rows for _ in range(2)]


def deep_copied(live: Any, rows: list) -> tuple[Any, list]:
    return copy.deepcopy(live), rows


def pickled(live: Any, rows: list) -> tuple[Any, list]:
    return pickle.loads(pickle.dumps(live)), rows


def moved(live: Any, rows: list) -> tuple[Any, list]:
    """To another place and back, slot by slot, as the library's offloading does it."""
    for layer in live.layers:
        for name in ("offload", "prefetch"):
            if hasattr(layer, name):
                getattr(layer, name)()
    return live, rows


Change = Callable[[Any, list], tuple[Any, list]]
CHANGES: dict[str, Change] = {
    "nothing": lambda live, rows: (live, rows),
    "rows turned round": reordered([2, 1, 0]),
    "rows in a circle": reordered([1, 2, 0]),
    "one row for all": reordered([1, 1, 1]),
    "rows selected, turned round": selected([2, 0, 1]),
    "two rows selected": selected([2, 0]),
    "one row selected": selected([2]),
    "rows repeated": repeated,
    "deep copy": deep_copied,
    "pickle": pickled,
    "moved": moved,
    "repeated, then turned round": lambda live, rows: reordered([5, 0, 4, 1, 3, 2])(*repeated(live, rows)),
    "turned round, then copied": lambda live, rows: deep_copied(*reordered([2, 0, 1])(live, rows)),
}
# What a class of the library cannot do at all.
_NO_SELECTION = (
    "rows selected, turned round",
    "two rows selected",
    "one row selected",
    "rows repeated",
    "repeated, then turned round",
)
# Quantized slots change `keys` alone here, and leave the quantized positions as they were.
UNABLE = {"StaticCache": _NO_SELECTION, "QuantizedCache": _NO_SELECTION}
