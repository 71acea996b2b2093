"""One answer in every mode: one reference function, and one list of the modes that must agree with it.

The logits of a position are a function of the tokens, the block layout and the position alone. A mode is a way to get
logits from a model (a cache, padding, packing, a decoding strategy); it returns `Answer`s, and each says of which
sequence, with which layout spelled out, it gives the logits. The reference is one plain, uncached forward over that
sequence. A new mode is one line in `FORWARD_MODES` or `GENERATE_MODES`.

Modes use nothing but what transformers offers, so that the same list runs on other HRM-Text classes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache


NEW_TOKENS = 5
CAPACITY = 64
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@dataclass(frozen=True)
class Row:
    """A sequence and its layout: `types` is 1 inside prefix blocks."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Row:
        return Row(self.ids[part], self.types[part])

    def followed_by(self, ids: Sequence[int], type_: int = 0) -> Row:
        return Row((*self.ids, *ids), (*self.types, *[type_] * len(ids)))

    def parts(self) -> list[tuple[int, int]]:
        """Begin and end of each maximal run of one type."""
        cuts = [i for i in range(1, len(self)) if self.types[i] != self.types[i - 1]]
        return list(zip([0, *cuts], [*cuts, len(self)]))


@dataclass
class Answer:
    """Logits [positions, vocab] that a mode gave for positions start, start + 1, ... of a sequence."""

    row: Row
    start: int
    logits: torch.Tensor


def make_row(*segments: tuple[int, int], seed: int = 0) -> Row:
    """A random sequence of segments (type, length), of ordinary tokens."""
    rng = random.Random(f"{segments}{seed}")
    types = [type_ for type_, length in segments for _ in range(length)]
    return Row(tuple(rng.randrange(20, 96) for _ in types), tuple(types))


ONE_BLOCK = [make_row((1, 7))]
CONVERSATION = [make_row((1, 5), (0, 3), (1, 6))]
PREFIX_AND_RESPONSE = [make_row((1, 5), (0, 4))]
CAUSAL = [make_row((0, 8))]
REPEATING = [Row((30, 31, 32, 33, 30, 31, 32, 34, 30, 31), (1,) * 10)]
RAGGED = [make_row((1, 7)), make_row((1, 3)), make_row((1, 9))]
MIXED = [make_row((1, 6), (0, 3)), make_row((0, 5)), make_row((1, 2), (0, 3), (1, 4), (0, 2)), make_row((1, 8))]


def reference_logits(model: Any, row: Row) -> torch.Tensor:
    """[tokens, vocab]: one plain, uncached forward over the sequence, with the layout spelled out."""
    with torch.no_grad():
        ids, types = torch.tensor([row.ids]), torch.tensor([row.types])
        return model(input_ids=ids, token_type_ids=types, use_cache=False).logits[0]


def deviation(reference: Any, answers: Sequence[Answer]) -> float:
    """The largest difference from the reference, relative to logits of size 1 and above; NaN counts as infinite."""
    worst = 0.0
    for answer in answers:
        wanted = reference_logits(reference, answer.row)[answer.start : answer.start + len(answer.logits)]
        assert wanted.shape == answer.logits.shape, (wanted.shape, answer.logits.shape)
        difference = (answer.logits.float() - wanted).abs() / wanted.abs().clamp(min=1)
        worst = max(worst, difference.max().item() if bool(torch.isfinite(difference).all()) else float("inf"))
    return worst


def is_greedy(reference: Any, answers: Sequence[Answer]) -> bool:
    """Whether every token that an answer led to is the reference's most likely one."""
    for answer in answers:
        best = reference_logits(reference, answer.row).argmax(dim=-1).tolist()
        if any(best[i] != answer.row.ids[i + 1] for i in range(answer.start, len(answer.row) - 1)):
            return False
    return True


# ---- batches --------------------------------------------------------------------------------------------------------


def padded(rows: Sequence[Row], side: str = "left", width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows in one batch: `input_ids`, `token_type_ids` and `attention_mask`, each [rows, width]."""
    width = width or max(len(row) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    for row in rows:
        room = width - len(row)
        left = {"left": room, "right": 0, "both": room // 2}[side]
        for name, values, fill in (
            ("input_ids", row.ids, 5),
            ("token_type_ids", row.types, 0),
            ("attention_mask", [1] * len(row), 0),
        ):
            columns[name].append([fill] * left + list(values) + [fill] * (room - left))
    return {name: torch.tensor(values) for name, values in columns.items()}


def positions_of(mask: torch.Tensor, first: int = 0, fill: int = 0) -> torch.Tensor:
    """Positions that count real tokens from `first`, `fill` at padding; [rows, width]."""
    return torch.where(mask != 0, mask.cumsum(dim=1) - 1 + first, fill)


def from_nine(mask: torch.Tensor) -> torch.Tensor:
    return positions_of(mask, 9)


def unpadded(rows: Sequence[Row], logits: torch.Tensor, mask: torch.Tensor) -> list[Answer]:
    return [Answer(row, 0, logits[i][mask[i] != 0]) for i, row in enumerate(rows)]


# ---- modes of the forward pass --------------------------------------------------------------------------------------


def forward_padded(model: Any, rows: Sequence[Row], side: str, positions: Callable | None = None, **more: Any) -> list:
    batch = padded(rows, side, max(len(row) for row in rows) + 3)
    if positions is not None:
        batch["position_ids"] = positions(batch["attention_mask"])
    logits = model(**batch, **more).logits
    return unpadded(rows, logits, batch["attention_mask"])


def forward_with_empty_row(model: Any, rows: Sequence[Row], side: str) -> list[Answer]:
    batch = padded([*rows, Row((), ())], side)
    logits = model(**batch).logits
    assert torch.isfinite(logits).all(), "padding is not finite"
    return unpadded(rows, logits, batch["attention_mask"])


def forward_packed(model: Any, rows: Sequence[Row], mask: bool = False, pad: int = 0, **more: Any) -> list[Answer]:
    """All rows in one, with restarting positions; `pad` puts that much padding in front of each."""
    if pad:
        batch = padded(rows, "left", max(len(row) for row in rows) + pad)
        real = batch["attention_mask"]
        batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        batch["position_ids"] = positions_of(real, fill=1).reshape(1, -1)
        logits = model(**batch, use_cache=False, **more).logits.view(*real.shape, -1)
        return unpadded(rows, logits, real)
    ids = torch.tensor([[i for row in rows for i in row.ids]])
    types = torch.tensor([[t for row in rows for t in row.types]])
    positions = torch.tensor([[p for row in rows for p in range(len(row))]])
    if mask:
        more["attention_mask"] = torch.ones_like(ids)
    logits = model(input_ids=ids, token_type_ids=types, position_ids=positions, use_cache=False, **more).logits[0]
    return [Answer(row, 0, part) for row, part in zip(rows, logits.split([len(row) for row in rows]))]


def forward_in_parts(
    model: Any,
    rows: Sequence[Row],
    cache: Callable[[Any], Any],
    cuts: Callable[[Row], list[tuple[int, int]]] = Row.parts,
) -> list[Answer]:
    """Each row on a live cache, one call for each part."""
    answers = []
    for row in rows:
        live = cache(model)
        for begin, end in cuts(row):
            part = {
                "input_ids": torch.tensor([row.ids[begin:end]]),
                "token_type_ids": torch.tensor([row.types[begin:end]]),
            }
            output = model(**part, past_key_values=live, use_cache=True)
            live = output.past_key_values
            answers.append(Answer(row, begin, output.logits[0]))
    return answers


def forward_batch_in_parts(model: Any, rows: Sequence[Row], cache: Callable[[Any], Any], cut: int) -> list[Answer]:
    """All rows, padded on the left, in two calls; `cut` counts columns from the right, outside every block."""
    batch = padded(rows, "left")
    at = batch["input_ids"].shape[1] - cut
    live, logits = cache(model), []
    for begin, end in ((0, at), (at, at + cut)):
        part = {name: batch[name][:, begin:end] for name in ("input_ids", "token_type_ids")}
        output = model(**part, attention_mask=batch["attention_mask"][:, :end], past_key_values=live, use_cache=True)
        live = output.past_key_values
        logits.append(output.logits)
    return unpadded(rows, torch.cat(logits, dim=1), batch["attention_mask"])


def forward_embeddings(model: Any, rows: Sequence[Row]) -> list[Answer]:
    batch = padded(rows, "left")
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    return unpadded(rows, model(inputs_embeds=embeds, **batch).logits, batch["attention_mask"])


def single_tokens_after_blocks(row: Row) -> list[tuple[int, int]]:
    """Blocks whole, responses token by token."""
    return [
        cut
        for begin, end in row.parts()
        for cut in ([(begin, end)] if row.types[begin] else [(i, i + 1) for i in range(begin, end)])
    ]


def growing(model: Any) -> Any:
    return None


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=CAPACITY)


Mode = Callable[[Any], list[Answer]]

FORWARD_MODES: dict[str, Mode] = {
    "block + response + block": lambda m: forward_padded(m, CONVERSATION, "left"),
    "padded left": lambda m: forward_padded(m, MIXED, "left"),
    "padded right": lambda m: forward_padded(m, MIXED, "right"),
    "padded on both sides": lambda m: forward_padded(m, MIXED, "both"),
    "one-block rows padded left": lambda m: forward_padded(m, RAGGED, "left"),
    "causal rows padded left": lambda m: forward_padded(m, [CAUSAL[0], CAUSAL[0][:3]], "left"),
    "a row of padding alone, left": lambda m: forward_with_empty_row(m, MIXED, "left"),
    "a row of padding alone, right": lambda m: forward_with_empty_row(m, MIXED, "right"),
    "positions given": lambda m: forward_padded(m, MIXED, "left", positions_of),
    "positions given, padding at 1": lambda m: forward_padded(m, MIXED, "both", lambda mask: positions_of(mask, 0, 1)),
    "positions starting at 9": lambda m: forward_padded(m, MIXED, "right", from_nine),
    "padded left, without a cache": lambda m: forward_padded(m, MIXED, "left", use_cache=False),
    "embeddings, padded left": lambda m: forward_embeddings(m, MIXED),
    "packed": lambda m: forward_packed(m, MIXED),
    "packed, with a mask": lambda m: forward_packed(m, MIXED, mask=True),
    "packed, blocks meeting": lambda m: forward_packed(m, [ONE_BLOCK[0], RAGGED[1], CONVERSATION[0]]),
    "packed, one block each": lambda m: forward_packed(m, RAGGED),
    "packed, plain causal": lambda m: forward_packed(m, [CAUSAL[0], CAUSAL[0][:3], make_row((0, 5))]),
    "packed, with padding between": lambda m: forward_packed(m, MIXED, pad=2),
    "block and response on a live cache": lambda m: forward_in_parts(m, MIXED, growing),
    "block and response on DynamicCache": lambda m: forward_in_parts(m, MIXED, dynamic),
    "block and response on StaticCache": lambda m: forward_in_parts(m, MIXED, static),
    "responses token by token": lambda m: forward_in_parts(m, MIXED, growing, single_tokens_after_blocks),
    "responses token by token, static": lambda m: forward_in_parts(m, MIXED, static, single_tokens_after_blocks),
    "padded batch in two calls": lambda m: forward_batch_in_parts(m, MIXED[:2], growing, 3),
    "padded batch in two calls, static": lambda m: forward_batch_in_parts(m, MIXED[:2], static, 3),
}


# ---- modes of generate ----------------------------------------------------------------------------------------------


def answers_of(output: Any, rows: Sequence[Row], copies: int = 1) -> list[Answer]:
    """What `generate` said, `copies` sequences a row; takes the logits of the beam that each token came from."""
    count, answers = len(output.logits), []
    prompt = output.sequences.shape[1] - count
    beams = getattr(output, "beam_indices", None)
    for i, sequence in enumerate(output.sequences):
        row = rows[i // copies]
        at = [i] * count if beams is None else beams[i, :count].tolist()
        logits = torch.stack([output.logits[step][at[step]] for step in range(count)])
        generated = sequence[prompt:].tolist()
        answers.append(Answer(row.followed_by(generated), len(row) - 1, logits))
    return answers


def generated(
    model: Any,
    rows: Sequence[Row],
    copies: int = 1,
    embeddings: bool = False,
    positions: Callable | None = None,
    **arguments: Any,
) -> list[Answer]:
    """Answers of `generate` on the rows, padded on the left."""
    batch = padded(rows, "left")
    if positions is not None:
        batch["position_ids"] = positions(batch["attention_mask"])
    if embeddings:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_return_sequences": copies, **arguments}
    output = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True, output_scores=True)
    if embeddings:
        prompt = torch.zeros_like(batch["token_type_ids"])
        output.sequences = torch.cat([prompt.repeat_interleave(copies, dim=0), output.sequences], dim=1)
    return answers_of(output, rows, copies)


def generated_on_cache(
    model: Any, cache: Callable[[Any], Any], new_ids_only: bool = False, new_types_only: bool = False, **arguments: Any
) -> list[Answer]:
    """Two turns of `generate` on one live cache, and both answers."""
    first, second = ONE_BLOCK[0], CONVERSATION[0][:5]
    live = cache(model)
    options = dict(GREEDY)
    if live is not None:
        options["past_key_values"] = live
    one = model.generate(**padded([first]), **options)
    answers = answers_of(one, [first])
    whole = answers[0].row.followed_by(second.ids, 1)
    held = len(first) + NEW_TOKENS - 1
    batch = padded([whole])
    if new_ids_only:
        batch["input_ids"] = batch["input_ids"][:, held:]
    if new_types_only:
        batch["token_type_ids"] = batch["token_type_ids"][:, held:]
    options.update(past_key_values=one.past_key_values, **arguments)
    return answers + answers_of(model.generate(**batch, **options), [whole])


def generated_padded_conversation(model: Any, cache: Callable[[Any], Any]) -> list[Answer]:
    """Two turns of a ragged batch on one live cache."""
    batch, live = padded(RAGGED, "left"), cache(model)
    options = dict(GREEDY)
    if live is not None:
        options["past_key_values"] = live
    one = model.generate(**batch, **options)
    answers = answers_of(one, RAGGED)
    turn = CONVERSATION[0][:5]
    wholes = [answer.row.followed_by(turn.ids, 1) for answer in answers]
    batch = padded(wholes, "left")
    options["past_key_values"] = one.past_key_values
    return answers + answers_of(model.generate(**batch, **options), wholes)


GENERATE_MODES: dict[str, Mode] = {
    "greedy": lambda m: generated(m, ONE_BLOCK),
    "greedy, block + response + block": lambda m: generated(m, CONVERSATION),
    "greedy, block + response": lambda m: generated(m, PREFIX_AND_RESPONSE),
    "greedy, plain causal": lambda m: generated(m, CAUSAL),
    "ragged batch": lambda m: generated(m, RAGGED),
    "ragged batch of all layouts": lambda m: generated(m, MIXED),
    "all layouts, without cache": lambda m: generated(m, MIXED, use_cache=False),
    "all layouts, static cache": lambda m: generated(m, MIXED, cache_implementation="static"),
    "all layouts, beam search": lambda m: generated(m, MIXED, num_beams=3),
    "all layouts, sampling": lambda m: generated(m, MIXED, do_sample=True),
    "one new token": lambda m: generated(m, RAGGED, max_new_tokens=1),
    "without cache": lambda m: generated(m, RAGGED, use_cache=False),
    "dynamic cache": lambda m: generated(m, RAGGED, cache_implementation="dynamic"),
    "static cache": lambda m: generated(m, RAGGED, cache_implementation="static"),
    "static cache, block + response + block": lambda m: generated(m, CONVERSATION, cache_implementation="static"),
    "given DynamicCache": lambda m: generated(m, RAGGED, past_key_values=dynamic(m)),
    "given StaticCache": lambda m: generated(m, RAGGED, past_key_values=static(m)),
    "embeddings": lambda m: generated(m, RAGGED, embeddings=True),
    "positions given": lambda m: generated(m, RAGGED, positions=positions_of),
    "positions starting at 9": lambda m: generated(m, MIXED, positions=from_nine),
    "positions starting at 9, static cache": lambda m: generated(
        m, MIXED, positions=from_nine, cache_implementation="static"
    ),
    "positions starting at 9, in chunks": lambda m: generated(m, MIXED, positions=from_nine, prefill_chunk_size=3),
    "positions starting at 9, assisted": lambda m: generated(
        m, CONVERSATION, positions=from_nine, assistant_model=m, max_new_tokens=12, eos_token_id=0
    ),
    "several returned samples": lambda m: generated(m, RAGGED, copies=3, do_sample=True),
    "sampling": lambda m: generated(m, RAGGED, do_sample=True, temperature=2.0),
    "sampling, static cache": lambda m: generated(m, RAGGED, do_sample=True, cache_implementation="static"),
    "beam search": lambda m: generated(m, RAGGED, num_beams=3),
    "beam search, several returned": lambda m: generated(m, RAGGED, copies=2, num_beams=3),
    "beam search, static cache": lambda m: generated(m, RAGGED, num_beams=3, cache_implementation="static"),
    "beam search, without cache": lambda m: generated(m, RAGGED, num_beams=3, use_cache=False),
    "beam search, embeddings": lambda m: generated(m, RAGGED, num_beams=2, embeddings=True),
    "prompt lookup": lambda m: generated(m, REPEATING, prompt_lookup_num_tokens=3, max_new_tokens=12, eos_token_id=0),
    "assisted by itself": lambda m: generated(m, ONE_BLOCK, assistant_model=m, max_new_tokens=12),
    "assisted by itself, conversation": lambda m: generated(m, CONVERSATION, assistant_model=m, max_new_tokens=12),
    **{
        f"chunks of {size}, {name}": lambda m, rows=rows, size=size: generated(m, rows, prefill_chunk_size=size)
        for size in (1, 3, 4, 100)
        for name, rows in {
            "one block": ONE_BLOCK,
            "block + response + block": CONVERSATION,
            "plain causal": CAUSAL,
            "ragged batch": MIXED,
        }.items()
    },
    "chunks of 3, static cache": lambda m: generated(m, MIXED, prefill_chunk_size=3, cache_implementation="static"),
    "chunks of 3, beam search": lambda m: generated(m, MIXED, prefill_chunk_size=3, num_beams=2),
    "chunks of 3, embeddings": lambda m: generated(m, MIXED, prefill_chunk_size=3, embeddings=True),
    "second turn on a live cache": lambda m: generated_on_cache(m, growing),
    "second turn on DynamicCache": lambda m: generated_on_cache(m, dynamic),
    "second turn on StaticCache": lambda m: generated_on_cache(m, static),
    "second turn, types of the new tokens": lambda m: generated_on_cache(m, growing, new_types_only=True),
    "second turn, new ids alone": lambda m: generated_on_cache(m, growing, new_ids_only=True),
    "second turn, new ids alone, static": lambda m: generated_on_cache(m, static, new_ids_only=True),
    "second turn, new ids and types alone": lambda m: generated_on_cache(m, growing, True, True),
    "second turn, new ids alone, in chunks": lambda m: generated_on_cache(m, growing, True, prefill_chunk_size=2),
    "second turn in chunks": lambda m: generated_on_cache(m, growing, prefill_chunk_size=2),
    "second turn, prompt lookup": lambda m: generated_on_cache(m, growing, prompt_lookup_num_tokens=2, eos_token_id=0),
    "second turn, assisted by itself": lambda m: generated_on_cache(m, growing, assistant_model=m),
    "second turn of a ragged batch": lambda m: generated_padded_conversation(m, growing),
    "second turn of a ragged batch, static": lambda m: generated_padded_conversation(m, static),
}
# Modes whose tokens are drawn or ranked, so that they need not be the most likely ones.
NOT_GREEDY = tuple(name for name in GENERATE_MODES if "beam" in name or "sampl" in name)
