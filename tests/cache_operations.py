"""Operations on a live cache and on a plain model of its facts: forwards, crops, moved rows, copies, `generate`.

Each takes the state and a random generator, from which it draws what it does in the state it meets.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .facts import (
    BOS,
    CACHES,
    END,
    GREEDY,
    PAD,
    TOLERANCE,
    Token,
    followed_by,
    largest_difference,
    truth,
)


MOST_ROWS, MOST_TOKENS = 4, 26
SPECIAL = (PAD, BOS, END, 11)


class Wrong(AssertionError):
    """A step that was neither right nor refused."""


@dataclass
class Row:
    """What the cache holds of a row, and what a crop took away of the block that it cut."""

    tokens: list[Token] = field(default_factory=list)
    lost: list[Token] = field(default_factory=list)

    def real(self) -> list[Token]:
        return [token for token in self.tokens if token.real]

    def last_sequence(self) -> list[Token]:
        real = self.real()
        start = 0
        for i in range(1, len(real)):
            if real[i].position <= real[i - 1].position:
                start = i
        return real[start:]

    def in_block(self) -> bool:
        real = self.real()
        return bool(real) and real[-1].type != 0


@dataclass
class State:
    """A live cache and its facts.

    Attributes:
        kind: its class, as in `CACHES`.
        foreign: whether its keys were taken from elsewhere, so that no facts came with them.
        foreign_length: how many; a crop inside of them, before a call, would leave nothing that could tell of it.
        restated: whether a cropped conversation was read again with types for all of it, so that what had been
            inferred of its beginning may be stated now.
        counts: of calls answered and refused, and of those that a sane caller makes on a cache that remembers.
        log: what was done, a line for each operation.
    """

    model: Any
    kind: str
    live: Any
    rows: list[Row]
    foreign: bool = False
    foreign_length: int = 0
    restated: bool = False
    counts: Counter = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.rows[0].tokens)

    def remembers(self) -> bool:
        return self.kind == "HrmTextCache" and not self.foreign

    def history(self) -> list[list[Token]]:
        return [row.tokens for row in self.rows]

    def held(self) -> int:
        return int(self.live.get_seq_length())

    def is_packed(self) -> bool:
        return any(len(row.last_sequence()) != len(row.real()) for row in self.rows)

    def is_open(self, row: Row) -> bool:
        """Whether an envelope was opened and not closed in the row's last sequence, and read causally."""
        return any(token.id == BOS and token.type == 0 for token in row.last_sequence())


# ---- what an operation draws ----------------------------------------------------------------------------------------


def draw_row(rng: random.Random, row: Row, length: int, split: bool) -> list[Token]:
    """`length` tokens of ordinary text in segments; where `split`, a block of the cache may be gone on with."""
    tokens: list[Token] = []
    inside = row.in_block()
    while len(tokens) < length:
        count = min(rng.randint(1, 4), length - len(tokens))
        type_ = rng.choice((0, 1))
        first = type_
        if type_ and inside and (tokens or not split):
            first = 2
        tokens += [Token(rng.randrange(20, 96), first if i == 0 else type_, 0) for i in range(count)]
        inside = type_ == 1
    return tokens


def draw_envelopes(rng: random.Random, row: Row, length: int) -> list[Token]:
    """`length` ids with envelopes in them, some of them open; typed by the rule read aloud."""
    ids: list[int] = []
    while len(ids) < length:
        text = [rng.randrange(20, 96) for _ in range(rng.randint(0, 2))]
        ids += rng.choice(([BOS, *text, END], [BOS, *text, END], text, [BOS, *text] if rng.random() < 0.2 else text))
    ids, types, inside = ids[:length], [], row.in_block()
    for i, id_ in enumerate(ids):
        if types and types[-1] and ids[i - 1] != END:
            types.append(1)
        elif id_ == BOS and END in ids[i:]:
            types.append(2 if (types[-1] if types else inside) else 1)
        else:
            types.append(0)
    return [Token(id_, type_, 0) for id_, type_ in zip(ids, types)]


def with_padding(rng: random.Random, new: list[list[Token]]) -> list[list[Token]]:
    """Some rows get padding in place of their first or last tokens."""
    hole = Token(PAD, 0, 0, real=False)
    padded = []
    for row in new:
        count = rng.randint(0, len(row) - 1) if rng.random() < 0.5 else 0
        if not count:
            padded.append(row)
        elif rng.random() < 0.7:
            kept = row[: len(row) - count]
            padded.append([hole] * count + kept)
        else:
            padded.append(row[: len(row) - count] + [hole] * count)
    return padded


def placed(state: State, new: list[list[Token]], restart: bool) -> list[list[Token]]:
    """The new tokens with their positions: counted on, or from 0 in rows whose new sequence begins here."""
    whole = followed_by(state.history(), new)
    new = [row[state.length :] for row in whole]
    if restart:
        for i, row in enumerate(new):
            first = next((token.position for token in row if token.real), 0)
            new[i] = [replace(token, position=token.position - first) if token.real else token for token in row]
    return new


# ---- calls ----------------------------------------------------------------------------------------------------------


def call_forward(state: State, new: list[list[Token]], sane: bool, must_refuse: bool, **more: Any) -> None:
    """One forward: right, or refused with the cache as it was; facts follow where it was answered."""
    ids = torch.tensor([[token.id for token in row] for row in new])
    history = state.history()
    call: dict[str, Any] = {"input_ids": ids, "token_type_ids": torch.tensor([[t.type for t in row] for row in new])}
    real = torch.tensor([[token.real for token in (*old, *row)] for old, row in zip(history, new)])
    if not bool(real.all()):
        call["attention_mask"] = real.long()
    call = {name: value for name, value in {**call, **more}.items() if value is not None}
    state.counts["sane" if sane else "odd"] += state.remembers()
    before = state.held()
    try:
        with torch.no_grad():
            logits = state.model(**call, past_key_values=state.live, use_cache=True).logits
    except ValueError as refusal:
        refused(state, sane, before, refusal)
        return
    if must_refuse:
        raise Wrong("answered, though no answer can be right")
    whole = [[*old, *row] for old, row in zip(history, new)]
    difference = largest_difference(logits, truth(state.model, whole)[:, -len(new[0]) :], new)
    if not difference < TOLERANCE:
        raise Wrong(f"off by {difference:.3g}")
    state.counts["answered"] += 1
    for row, tokens in zip(state.rows, new):
        row.tokens = [*row.tokens, *tokens]
        row.lost = []
    if state.held() != state.length:
        raise Wrong(f"the cache holds {state.held()} positions and not {state.length}")


def refused(state: State, sane: bool, before: int, refusal: ValueError) -> None:
    state.counts["refused"] += 1
    state.counts["sane, refused"] += sane and state.remembers()
    state.log[-1] += f" -> refused: {str(refusal)[:90]}"
    if state.held() != before:
        raise Wrong(f"refused, and the cache went from {before} to {state.held()} positions")


def is_continued(row: Row, tokens: list[Token]) -> bool:
    """Whether the first real new token goes on with the block that the cache ends in."""
    real = [token for token in tokens if token.real]
    before = row.real()
    return bool(real and before) and real[0].type == 1 and row.in_block() and real[0].position > before[-1].position


def do_forward(state: State, rng: random.Random) -> None:
    length = rng.choice((1, 1, 2, 3, 4, 5, 6))
    if state.length + length > MOST_TOKENS:
        return
    split = rng.random() < 0.1
    new = [draw_row(rng, row, length, split) for row in state.rows]
    if rng.random() < 0.3:
        new = with_padding(rng, new)
    restart = rng.random() < 0.15 and state.length > 0
    new = placed(state, new, restart)
    more: dict[str, Any] = {}
    if restart or rng.random() < 0.15:
        # The position of padding is nobody's: the library's own are 1 and 0, here it repeats the one before.
        more["position_ids"] = torch.tensor([[token.position for token in row] for row in new])
    if rng.random() < 0.2:
        more["inputs_embeds"] = state.model.get_input_embeddings()(
            torch.tensor([[token.id for token in row] for row in new])
        ).detach()
        more["input_ids"] = None
    if state.length == 0 and rng.random() < 0.3 and not more:
        shift = rng.randint(1, 9)
        new = [[replace(t, position=t.position + shift) if t.real else t for t in row] for row in new]
        more["position_ids"] = torch.tensor([[token.position for token in row] for row in new])
    cut = any(row.lost and any(token.real for token in tokens) for row, tokens in zip(state.rows, new))
    continued = any(is_continued(row, tokens) for row, tokens in zip(state.rows, new))
    call_forward(state, new, sane=not cut and not continued, must_refuse=False, **more)


def do_infer(state: State, rng: random.Random) -> None:
    length = rng.choice((1, 2, 3, 5, 7))
    if state.length + length > MOST_TOKENS:
        return
    new = placed(state, [draw_envelopes(rng, row, length) for row in state.rows], restart=False)
    closes = any(
        state.is_open(row) and any(token.id == END for token in tokens) for row, tokens in zip(state.rows, new)
    )
    cut = any(row.lost for row in state.rows)
    # Nobody can know of an envelope in keys that came from elsewhere.
    must_refuse = closes and not state.foreign and not state.restated
    call_forward(state, new, sane=not closes and not cut, must_refuse=must_refuse, token_type_ids=None)


def do_refeed(state: State, rng: random.Random) -> None:
    """Feeds again what a crop took of the blocks that it cut, with a response behind it."""
    if not any(row.lost for row in state.rows):
        return
    length = max(len(row.lost) for row in state.rows) + rng.randint(0, 2)
    if rng.random() < 0.15:
        length = max(1, length - 1)
    response = [Token(rng.randrange(20, 96), 0, 0) for _ in range(length)]
    new = [[*row.lost, *response][:length] for row in state.rows]
    whole = all(len(row.lost) <= length for row in state.rows)
    call_forward(state, placed(state, new, restart=False), sane=whole, must_refuse=False)


def do_generate(state: State, rng: random.Random) -> None:
    length, steps = rng.randint(1, 4), rng.randint(1, 2)
    if state.length + length + steps > MOST_TOKENS:
        return
    new = placed(state, [draw_row(rng, row, length, split=False) for row in state.rows], restart=False)
    whole = rng.random() < 0.5 or not state.length
    given = [[*old, *row] for old, row in zip(state.history(), new)]
    call: dict[str, Any] = {}
    shown = given if whole else new
    call["input_ids"] = torch.tensor([[token.id for token in row] for row in shown])
    types = given if whole and rng.random() < 0.7 else new
    call["token_type_ids"] = torch.tensor([[token.type for token in row] for row in types])
    real = torch.tensor([[int(token.real) for token in row] for row in given])
    if not bool(real.all()) or rng.random() < 0.3:
        call["attention_mask"] = real
    cut, packed = any(row.lost for row in state.rows), state.is_packed()
    # Positions that do not count from 0 can be told to `generate` by `position_ids` alone.
    shifted = any(row.last_sequence() and row.last_sequence()[0].position for row in state.rows)
    before = state.held()
    sane = not (cut or packed or shifted) and bool(real[:, -1].all())
    seen = {"whole": whole, "cut": cut, "packed": packed, "shifted": shifted}
    state.log[-1] += "".join(f" {name}" for name, holds in seen.items() if holds)
    state.counts["sane" if sane else "odd"] += state.remembers()
    options = {**GREEDY, "max_new_tokens": steps, "suppress_tokens": list(SPECIAL)}
    try:
        output = state.model.generate(**call, past_key_values=state.live, **options)
    except ValueError as refusal:
        refused(state, sane, before, refusal)
        return
    answers = output.sequences[:, len(shown[0]) :].tolist()
    final = followed_by(given, [[Token(id_, 0, 0) for id_ in answer] for answer in answers])
    logits = torch.stack(output.logits, dim=1)
    wanted = truth(state.model, final)[:, len(given[0]) - 1 : -1]
    difference = ((logits - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    if not difference < TOLERANCE:
        raise Wrong(f"off by {difference:.3g}")
    state.counts["answered"] += 1
    state.live = output.past_key_values
    state.rows = [Row(row[:-1]) for row in final]
    state.restated = state.restated or (cut and whole and types is given)
    if state.held() != state.length:
        raise Wrong(f"the cache holds {state.held()} positions and not {state.length}")


# ---- operations on the cache ----------------------------------------------------------------------------------------


def do_crop(state: State, rng: random.Random) -> None:
    if state.kind in ("StaticCache", "QuantizedCache") or not state.length:
        return
    kept = rng.randint(0, state.length - 1)
    if 0 < kept < state.foreign_length:
        return
    rows = copy.deepcopy(state.rows)
    for row in rows:
        cut_row(row, kept)
    if state.foreign and any(row.lost for row in rows):
        return  # nobody can know of a block in keys that came from elsewhere
    state.live.crop(kept - state.length)
    state.rows = rows
    state.log[-1] += f" to {kept}"


def cut_row(row: Row, kept: int) -> None:
    """Cuts the facts, and keeps what is lost of the block that the cut goes through."""
    whole = [*row.tokens, *row.lost]
    rest = whole[kept:]
    row.tokens = whole[:kept]
    row.lost = []
    before = row.real()
    if not row.in_block():
        return
    lost: list[Token] = []
    for token in rest:
        at = lost[-1].position if lost and lost[-1].real else before[-1].position
        if token.real and (token.type != 1 or token.position <= at):
            break
        lost.append(token)
    while lost and not lost[-1].real:
        lost.pop()
    row.lost = lost


def do_reorder(state: State, rng: random.Random) -> None:
    take_rows(state, [rng.randrange(len(state.rows)) for _ in state.rows], "reorder_cache")


def do_select(state: State, rng: random.Random) -> None:
    if state.kind in ("StaticCache", "QuantizedCache"):
        return
    count = rng.randint(1, len(state.rows))
    take_rows(state, [rng.randrange(len(state.rows)) for _ in range(count)], "batch_select_indices")


def take_rows(state: State, indices: list[int], name: str) -> None:
    if not state.length:
        return
    getattr(state.live, name)(torch.tensor(indices))
    state.rows = [copy.deepcopy(state.rows[i]) for i in indices]
    state.log[-1] += f" {indices}"


def do_repeat(state: State, rng: random.Random) -> None:
    if state.kind in ("StaticCache", "QuantizedCache") or not state.length or 2 * len(state.rows) > MOST_ROWS:
        return
    state.live.batch_repeat_interleave(2)
    state.rows = [copy.deepcopy(row) for row in state.rows for _ in range(2)]


def do_copy(state: State, rng: random.Random) -> None:
    """Goes on with a copy, or with the original after the copy was written to."""
    twin = copy.deepcopy(state.live)
    kept, other = (twin, state.live) if rng.random() < 0.5 else (state.live, twin)
    with torch.no_grad():
        try:
            real = torch.tensor([[*(int(t.real) for t in row.tokens), 1] for row in state.rows])
            ids = torch.full((len(state.rows), 1), 33)
            state.model(
                ids, token_type_ids=torch.zeros_like(ids), attention_mask=real, past_key_values=other, use_cache=True
            )
        except ValueError:
            pass
    state.live = kept


def do_pickle(state: State, rng: random.Random) -> None:
    state.live = pickle.loads(pickle.dumps(state.live))


def do_move(state: State, rng: random.Random) -> None:
    for layer in state.live.layers:
        for name in ("offload", "prefetch"):
            if hasattr(layer, name) and getattr(layer, "is_initialized", True):
                getattr(layer, name)()


def do_reset(state: State, rng: random.Random) -> None:
    if state.kind == "QuantizedCache" or not state.length:
        return  # the library's reset leaves the quantized positions where they are
    state.live.reset()
    count = len(state.rows) if state.kind == "StaticCache" else rng.randint(1, 3)
    state.rows, state.foreign, state.restated = [Row() for _ in range(count)], False, False


def do_switch(state: State, rng: random.Random) -> None:
    """Keys and values in a cache of another class, where the plain reading of a foreign cache is the right one.

    That is text without padding that leaves no envelope open.
    """
    plain = all(
        not row.lost
        and not state.is_open(row)
        and all(token.real and token.position == i for i, token in enumerate(row.tokens))
        for row in state.rows
    )
    if not plain or not state.length or state.kind in ("StaticCache", "QuantizedCache"):
        return
    state.kind = rng.choice(("HrmTextCache", "DynamicCache"))
    taken = CACHES[state.kind](state.model)
    for slot, layer in enumerate(state.live.layers):
        taken.update(layer.keys.clone(), layer.values.clone(), slot)
    state.live, state.foreign, state.foreign_length = taken, True, state.length
    state.log[-1] += f" to {state.kind}"


DO = {name.removeprefix("do_"): function for name, function in list(globals().items()) if name.startswith("do_")}
