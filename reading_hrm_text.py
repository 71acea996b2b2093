"""Reads the arguments of a call and the history of its cache: gives the layout, and raises every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .cache_hrm_text import Facts, History, rows_of, slots_differ
from .layout_hrm_text import (
    PromptLayout,
    StepLayout,
    TokenLayout,
    at,
    find_blocks,
    find_sequences,
    infer_token_types,
    last_true,
    next_true,
    values_are_readable,
)
from .versions_hrm_text import cached_length, static_capacity


logger = logging.get_logger(__name__)


@dataclass
class Call:
    """The arguments of a forward pass that say what its tokens are.

    Attributes:
        shape: rows and new tokens.
        device: where they are.
        input_ids: int64 [batch, count], None where embeddings were given.
        attention_mask: [batch, cached + count], 0 at padding, or None.
        position_ids: [batch or 1, count], or None.
        token_type_ids: int [batch, count], or None.
        cache: the live cache, or None.
        cache_position: [count], indices of the new tokens in the cache, where the caller has them.
        labels: [batch, count] of a training step, or None.
        prompt: what `generate` says of these tokens, in place of `token_type_ids`.
        embedded: of embeddings, the ids [batch, count] of those that open and close prompts, -1 for others; and bool
            [batch, count], which lie before the first of them and are no token's, as an adapter's virtual tokens are.
    """

    shape: tuple[int, int]
    device: torch.device
    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    cache: Any = None
    cache_position: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    prompt: PromptLayout | None = None
    embedded: tuple[torch.Tensor, torch.Tensor] | None = None


SPLIT_BLOCK = (
    "this call would extend a prefix block that is already in the cache, whose tokens could not see the new ones: "
    "pass the whole block in one call, crop the cache to the block's start first, or give type 2 to the first token "
    "of a new block."
)
SPLIT_ENVELOPE = (
    "this call closes a prompt envelope that an earlier call on the same cache opened, and the first part of that "
    "prefix block was read causally: pass the whole envelope in one call, or `token_type_ids` of zeros to read it "
    "causally throughout."
)
INFERRED_BLOCK_AGAIN = (
    "the cache was cropped inside a prefix block that was inferred, which is read again now, and `token_type_ids` "
    "cover only what follows: give them for the whole conversation, or not at all."
)
FOREIGN_CACHE = (
    "the cache does not hold what this model wrote to it, or the model cannot tell: its rows or positions were "
    "replaced, another model wrote to it, or its keys are quantized and its rows differ. Start with a new cache, "
    "leave `past_key_values` unset where rows differ, or change a cache only through its methods (`crop`, "
    "`reorder_cache`, `batch_select_indices`, `batch_repeat_interleave`, `reset`)."
)

BEHIND_UNSEEN = (
    "a packed sequence begins in this call behind keys that this model did not write (an adapter's virtual tokens), "
    "and would not see them: give each sequence a row of its own (in TRL, without `packing` and `padding_free`)."
)

UNEVEN_CACHE = (
    "the slots of the cache do not hold the same tokens: a call on it was interrupted, or only some of its layers "
    "were changed. Begin with a new cache."
)


def read_layout(config: Any, call: Call) -> TokenLayout:
    """Reads what the new tokens of a call are, refuses what cannot be right, and notes their facts in the cache.

    This takes one read from the device. Where values cannot be read (compiling, exporting, capturing), what would be
    refused stops the graph instead.

    Raises:
        ValueError: shapes or types that do not fit, a block or an envelope that would be split over two calls, a
            cache whose content is not what this model wrote.
    """
    reading = _followed(config, call)
    reading.warn()
    reading.note()
    return reading.layout()


def _followed(config: Any, call: Call) -> _Reading:
    """The reading of a call, with the history in line with the cache and every refusal raised."""
    _check_shapes(call)
    reading = _Reading(config, call)
    if reading.values.get("changed"):
        follow_changes(call.cache, call.shape[0])
        reading = _Reading(config, call)
        if reading.values.get("changed"):
            raise ValueError(FOREIGN_CACHE)
    reading.refuse()
    return reading


def read_prompt(config: Any, call: Call) -> PromptLayout:
    """Reads the new tokens of a prompt as `read_layout` does and refuses what it would, but notes nothing.

    Returns:
        Their types, [batch, new].
    """
    reading = _followed(config, call)
    types = torch.zeros(call.shape, dtype=torch.int64, device=call.device) if reading.types is None else reading.types
    return PromptLayout(types.long(), reading.stated, bool(reading.values.get("padded")))


def last_border(cache: Any, input_ids: torch.Tensor) -> int:
    """Up to where a cropped cache can be continued with these ids [batch, tokens], which begin with the cached ones.

    That is its length, or where the block begins that the crop has cut and that goes on otherwise now.
    """
    history, past = History.of(cache), int(cached_length(cache))
    if history is None or past == 0 or history.end <= past:
        return past
    whole, block, number = _cropped_blocks(history, past)
    cut = (block == number) & (number >= 0)
    common = min(history.end, input_ids.shape[1])
    other = cut.clone()
    other[:, :common] &= input_ids[:, :common] != whole.ids[:, :common]
    changed = other[:, past:].any(dim=1, keepdim=True)
    starts = torch.where(changed & cut.any(dim=1, keepdim=True), cut.long().argmax(dim=1, keepdim=True), past)
    return int(starts.amin())


def _cropped_blocks(history: History, past: int) -> tuple[Facts, torch.Tensor, torch.Tensor]:
    """All facts, those of cropped tokens too, their blocks, and the block [rows, 1] that the last kept token read."""
    whole = history.facts(0, history.end)
    block = find_blocks(whole.types, whole.real, find_sequences(whole.positions, whole.real))
    last = last_true(whole.real[:, :past])[:, -1:]
    return whole, block, torch.where(last >= 0, at(block, last), -1)


def read_step(call: Call, step: StepLayout, past: int | torch.Tensor) -> TokenLayout:
    """The layout of generated tokens, of which nothing has to be read; notes their facts in the cache.

    Args:
        past: number of cached positions before them.
    """
    (rows, count), mask, position_ids = call.shape, call.attention_mask, call.position_ids
    if position_ids is None:
        index = past + torch.arange(count, device=call.device)
        position_ids = index[None]
        if mask is not None:
            counted = mask.long().cumsum(dim=1) - 1
            position_ids = counted.index_select(1, index.clamp(max=mask.shape[1] - 1))
    if call.cache is not None and not _is_exporting():
        ones = torch.ones(rows, count, dtype=torch.bool, device=call.device)
        ids = torch.full_like(ones, -1, dtype=torch.int64) if call.input_ids is None else call.input_ids
        _note(call.cache, past, Facts(ids, torch.zeros_like(ids), ones, position_ids.expand(rows, -1), ones))
    real = (mask != 0) if step.padded and mask is not None else None
    return TokenLayout(past, count, position_ids, real=real, lead=0, sees_all=count == 1)


def _note(cache: Any, past: int | torch.Tensor, new: Facts, cached: Facts | None = None) -> History:
    history = History.of(cache)
    rows, count = new.ids.shape
    if history is None or history.rows != rows:
        capacity = static_capacity(cache) or (past + count if isinstance(past, int) else count)
        history = cache._hrm_text_history = History(rows, capacity, new.ids.device)
        if cached is None and isinstance(past, int) and past:
            cached = _unseen(rows, past, None, new.ids.device)
        if cached is not None:
            history.append(cached, 0)
            history.unseen = cached.ids.shape[1]
    history.to(new.ids.device)
    history.append(new, past)
    return history


def _unseen(rows: int, length: int, mask: torch.Tensor | None, device: torch.device) -> Facts:
    """What is assumed of positions that others wrote, such as an adapter's virtual tokens: one causal sequence."""
    real = torch.ones(rows, length, dtype=torch.bool, device=device)
    if mask is not None:
        real = mask[:, :length] != 0
        real = F.pad(real, (0, length - real.shape[1]))
    nothing = torch.zeros(rows, length, dtype=torch.int64, device=device)
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    return Facts(nothing - 1, nothing, torch.ones_like(real), positions, real)


def _is_exporting() -> bool:
    """Whether a graph is traced that will not carry the cache's Python side along."""
    exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.jit.is_tracing()


def _check_shapes(call: Call) -> None:
    rows, count = call.shape
    mask, positions, types = call.attention_mask, call.position_ids, call.token_type_ids
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != rows):
        raise ValueError(
            f"`attention_mask` has the shape {tuple(mask.shape)}: give [{rows}, cached + new tokens] with 0 at "
            "padding, or a whole 4-D mask [batch, 1, new tokens, cached + new tokens] without `token_type_ids`."
        )
    if positions is not None:
        if positions.dim() == 1:
            positions = call.position_ids = positions[None]
        if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != count:
            raise ValueError(
                f"`position_ids` has the shape {tuple(positions.shape)} and there are {count} new tokens in {rows} "
                "rows: give one position for each new token."
            )
    if types is not None:
        if tuple(types.shape) != (rows, count):
            raise ValueError(
                f"`token_type_ids` has the shape {tuple(types.shape)} and the new tokens [{rows}, {count}]: give one "
                "type for each new token, and none for cached ones."
            )
        if types.is_floating_point() or types.is_complex():
            raise ValueError(f"`token_type_ids` is of {types.dtype}: give integers, 1 for tokens of a prefix block.")


def follow_changes(cache: Any, rows: int) -> None:
    """Updates the history after a cache was changed from outside its own methods; reads the device.

    Raises:
        ValueError: the content of the cache cannot be recognised.
    """
    history, length = History.of(cache), int(cached_length(cache))
    if history is None:
        return
    if history.length is not None and length > history.length:
        raise ValueError(FOREIGN_CACHE)
    history.length = length
    held = rows_of(cache)
    if length and held is not None and held != rows:
        raise ValueError(
            f"the cache holds {held} rows and this call has {rows} (beams and returned sequences count): repeat its "
            "rows with `batch_repeat_interleave`, or choose some with `batch_select_indices`."
        )
    if length and bool(history.deviates(cache, rows, length)) and not history.find_rows(cache, length):
        raise ValueError(FOREIGN_CACHE)


class _Reading:
    """What a call's tokens are, derived from the facts of whole rows [batch, keys], cached tokens first.

    Attributes:
        values: what decides something, read from the device at once: names to ints. Empty where nothing may be read.
    """

    def __init__(self, config: Any, call: Call):
        self.config, self.call = config, call
        self.rows, self.count = call.shape
        self.readable = values_are_readable()
        self.refusals: list[tuple[torch.Tensor, str | Callable[[], str]]] = []
        self.history = None if call.cache is None or _is_exporting() else History.of(call.cache)
        self.past = self._past_length()
        self._refuse_uneven_slots()
        self.values: dict[str, int] = {}
        if self.history is not None and isinstance(self.past, int) and 0 < self.past < self.history.unseen:
            # Cropped into what this model did not write, where a block may have been cut.
            raise ValueError(FOREIGN_CACHE)
        if self.history is not None and self.readable and self._has_other_size():
            self.values["changed"] = 1
            return
        self.cached = self._cached_facts()
        self.new_real = self._read_mask()
        self.position_ids = self._positions()
        self.real = self._whole_real()
        self.sequence = self._sequences()
        self._refuse_sequences_behind_unseen()
        self.types, self.stated = self._types()
        self.block = self._blocks()
        if self.readable:
            self.values = _read_at_once(self._questions())
        else:
            for wrong, message in self.refusals:
                torch._assert_async(~wrong, message if isinstance(message, str) else SPLIT_BLOCK)

    # ---- the facts of the whole row -------------------------------------------------------------------------------

    def _past_length(self) -> int | torch.Tensor:
        """Number of cached positions; a 0-d tensor where it lies on the device and may not be read."""
        call, past = self.call, cached_length(self.call.cache)
        if not isinstance(past, torch.Tensor):
            return past
        if not self.readable:
            return past if call.cache_position is None else call.cache_position[0]
        counted = None if self.history is None else self.history.length
        mask = call.attention_mask
        too_narrow = mask is not None and counted is not None and mask.shape[1] < counted + self.count
        if counted is None or too_narrow:
            return int(past)
        # Taken on trust, to save a read: `_questions` asks whether it is so.
        return counted

    def _refuse_uneven_slots(self) -> None:
        uneven = slots_differ(self.call.cache) if self.readable else False
        if isinstance(uneven, torch.Tensor):
            self.refusals.append((uneven.to(self.call.device), UNEVEN_CACHE))
        elif uneven:
            raise ValueError(UNEVEN_CACHE)

    def _has_other_size(self) -> bool:
        """Whether the cache's size alone, which Python knows, tells that it was changed since."""
        if self.history.length is None:
            self.history.length = self.past
        return self.past != self.history.length or (self.past > 0 and self.rows != self.history.rows)

    def _index(self) -> torch.Tensor:
        """Where the new tokens lie on the key axis; [count]."""
        return self.past + torch.arange(self.count, device=self.call.device)

    def _cached_facts(self) -> Facts | None:
        """Facts of the cached tokens: [batch, past], or [batch, capacity] where the past lies on the device."""
        on_device = isinstance(self.past, torch.Tensor)
        if not on_device and self.past == 0:
            return None
        length = static_capacity(self.call.cache) if on_device else self.past
        if self.history is not None:
            self.history.to(self.call.device)
            facts = self.history.facts(0, length)
        else:
            facts = _unseen(self.rows, length, self.call.attention_mask, self.call.device)
        if on_device:
            facts.real = facts.real & (torch.arange(length, device=self.call.device) < self.past)
        return facts

    def _read_mask(self) -> torch.Tensor | None:
        """Which new tokens are real, [batch, count]; None where no mask was given."""
        mask, past = self.call.attention_mask, self.past
        if mask is None:
            return None
        mask = mask != 0
        if isinstance(past, torch.Tensor):
            return mask.index_select(1, self._index().clamp(max=mask.shape[1] - 1))
        # A mask of the capacity may come with a static cache, whose shapes stay the same.
        if not past + self.count <= mask.shape[1] <= max(past + self.count, static_capacity(self.call.cache) or 0):
            raise ValueError(
                f"`attention_mask` covers {mask.shape[1]} positions and there are {past} cached and {self.count} new "
                "tokens: give one entry for each of them, the cached ones too."
            )
        if self.cached is not None and self.history is not None:
            differs = (mask[:, :past] != self.cached.real).any()
            message = (
                f"`attention_mask` says of the {past} cached tokens what it did not say when they were read: give it "
                "the same zeros at padding, or leave it out."
            )
            self.refusals.append((differs, message))
        return mask[:, past : past + self.count]

    def _join(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """A fact of whole rows, from that of the new tokens [batch or 1, count]."""
        new = new.expand(self.rows, -1)
        if self.cached is None:
            return new
        cached = getattr(self.cached, name).to(new.dtype).expand(self.rows, -1)
        if isinstance(self.past, torch.Tensor):
            return cached.index_copy(1, self._index(), new)
        return torch.cat([cached, new], dim=1)

    def _new(self, row: torch.Tensor) -> torch.Tensor:
        """The part of whole rows that is new."""
        if isinstance(self.past, torch.Tensor):
            return row.index_select(1, self._index())
        return row[:, self.past : self.past + self.count]

    def _is_cached(self) -> torch.Tensor:
        """bool [keys]: which of a whole row's tokens are cached."""
        keys = self.count if self.cached is None else self._join("real", self._ones()).shape[1]
        return torch.arange(keys, device=self.call.device) < self.past

    def _ones(self) -> torch.Tensor:
        return torch.ones(1, self.count, dtype=torch.bool, device=self.call.device)

    # ---- what follows from them -----------------------------------------------------------------------------------

    def _positions(self) -> torch.Tensor:
        """Given positions, or those that count real tokens on from the last cached one."""
        if self.call.position_ids is not None:
            return self.call.position_ids
        steps = self._ones() if self.new_real is None else self.new_real
        steps = steps.long().cumsum(dim=1)
        if self.cached is None:
            return (steps - 1).clamp(min=0)
        if self.history is not None and self.history.is_plain and not isinstance(self.past, torch.Tensor):
            return (steps + (self.past - 1)).clamp(min=0)
        last = last_true(self.cached.real)[:, -1:]
        return (torch.where(last >= 0, at(self.cached.positions, last), -1) + steps).clamp(min=0)

    def _whole_real(self) -> torch.Tensor | None:
        known = self.history is not None and self.history.padded is False and not isinstance(self.past, torch.Tensor)
        if self.new_real is None and (self.cached is None or known):
            return None
        return self._join("real", self._ones() if self.new_real is None else self.new_real)

    def _sequences(self) -> torch.Tensor | None:
        if self.call.position_ids is None and (self.history is None or self.history.packed is False):
            return None
        return find_sequences(self._join("positions", self.position_ids), self.real)

    def _refuse_sequences_behind_unseen(self) -> None:
        unseen = self.past if self.history is None else self.history.unseen
        if self.sequence is None or self.cached is None or not isinstance(unseen, int) or not unseen:
            return
        # Virtual tokens shift all positions: a sequence that counts from 0 does not count on them.
        begun = self._new(self.sequence) > 0
        self.refusals.append((begun.any() & ~(begun & (self.position_ids < unseen)).any(), BEHIND_UNSEEN))

    def _types(self) -> tuple[torch.Tensor | None, bool]:
        """Types of the new tokens, int64 [batch, count] of 0, 1 and 2, or None where all are causal; and whether they
        were stated rather than inferred."""
        config, call = self.config, self.call
        if call.prompt is not None:
            return (call.prompt.types.to(call.device) if config.prefix_lm else None), call.prompt.stated
        if call.token_type_ids is not None:
            if not config.prefix_lm:
                warn_types_are_ignored()
                return None, True
            types = call.token_type_ids.long()
            return torch.where((types == 1) | (types == 2), types, 0), True
        if not infers_blocks(config):
            return None, False
        runs = (config.prefix_start, config.prefix_end)
        new_ids = self._new_ids()
        if new_ids is None:
            return None, False
        if self.cached is None:
            types, _ = infer_token_types(new_ids, *runs, self.real, self.sequence)
            if call.input_ids is None:
                before = types.cumsum(dim=1) == 0
                types = torch.where(before & call.embedded[1] & types.any(dim=1, keepdim=True), 1, types)
            return types, False
        # Tokens that were stated to be causal, and those that the model has generated, open no envelope. Of those that
        # were stated to be in a block, the end of an envelope closes one that was inferred.
        ids, stated = self._join("ids", new_ids), self._join("stated", ~self._ones())
        in_block = self._join("types", torch.zeros_like(self._ones(), dtype=torch.int8)) > 0
        closes = in_block & torch.isin(ids, ids.new_tensor(config.prefix_end))
        ids = ids.masked_fill(stated & ~closes, -1)
        types, _ = infer_token_types(ids, *runs, self.real, self.sequence)
        unlike = (types > 0) != (self._join("types", self._new(types)) > 0)
        unlike = unlike & self._is_cached() & ~stated
        if self.real is not None:
            unlike = unlike & self.real
        if self.history is None or self.history.unseen > 0:
            # What opened an envelope may be cached, and is not known.
            unlike = unlike | ((ids == config.prefix_end[-1]) & (types == 0) & ~self._is_cached())
        self.refusals.append((unlike.any(), SPLIT_ENVELOPE))
        return self._new(self._opened_behind(types)), False

    def _new_ids(self) -> torch.Tensor | None:
        """Ids of the new tokens; of embeddings those that were recognised and -1, or None where none could be."""
        if self.call.input_ids is None:
            return None if self.call.embedded is None else self.call.embedded[0]
        return self.call.input_ids

    def _opened_behind(self, types: torch.Tensor) -> torch.Tensor:
        """Inferred types of whole rows, with 2 on an envelope that opens directly behind a cached block."""
        is_cached = self._is_cached()
        present = torch.ones_like(types, dtype=torch.bool) if self.real is None else self.real
        last, first = last_true(present & is_cached)[:, -1:], next_true(present & ~is_cached)[:, :1]
        behind = (last >= 0) & (at(self._join("types", self._new(types)), last) > 0) & (at(types, last) == 0)
        opens = behind & (first < types.shape[1]) & (at(types, first) == 1)
        return types.scatter(1, first.clamp(max=types.shape[1] - 1), torch.where(opens, 2, at(types, first)))

    def _blocks(self) -> torch.Tensor | None:
        """Numbers of the blocks in whole rows, or None; notes the refusal of one that began in the cache."""
        before = self.history is not None and self.cached is not None and self.history.blocks is not False
        if self.types is None and not before:
            return None
        types = self._ones().long() - 1 if self.types is None else self.types
        block = find_blocks(self._join("types", types), self.real, self.sequence)
        if self.cached is None:
            return block
        is_cached = self._is_cached()
        present = torch.ones_like(block, dtype=torch.bool) if self.real is None else self.real
        last = last_true(present & is_cached)[:, -1:]
        first = next_true(present & ~is_cached)[:, :1]
        open_block = torch.where(last >= 0, at(block, last), -1)
        extends = (open_block >= 0) & (first < block.shape[1]) & (at(block, first) == open_block)
        if self.call.token_type_ids is not None and (self.history is None or self.history.unseen > 0):
            # The last cached token may be one that others wrote, and the beginning of this block.
            unseen = self.past if self.history is None else self.history.unseen
            continues = (first < block.shape[1]) & (at(self._join("types", types), first) == 1)
            extends = extends | ((last >= 0) & (last < unseen) & continues)
        cut = self._cut_blocks(block, open_block)
        self.refusals.append(((extends if cut is None else extends & ~cut).any(), SPLIT_BLOCK))
        return block

    def _cut_blocks(self, block: torch.Tensor, open_block: torch.Tensor) -> torch.Tensor | None:
        """Rows [batch, 1] whose last cached token has read tokens that were cropped away; None where there is none.

        Only the very same tokens may follow it; anything else is noted as a refusal.
        """
        history, past = self.history, self.past
        if history is None or isinstance(past, torch.Tensor) or history.end <= past:
            return None
        whole, read, number = _cropped_blocks(history, past)
        width = max(self.count, history.end - past)

        def beside(values: torch.Tensor, fill: int) -> torch.Tensor:
            return F.pad(values.expand(self.rows, -1).long(), (0, width - values.shape[1]), value=fill)

        wanted = beside((read[:, past:] == number) & (number >= 0), 0)
        given = beside((block[:, past:] == open_block) & (open_block >= 0), 0)
        ids = beside(self._ones().long() - 3 if self.call.input_ids is None else self.call.input_ids, -2)
        same = (ids == beside(whole.ids[:, past:], -3)) & (
            beside(self.position_ids, -2) == beside(whole.positions[:, past:], -3)
        )
        cut = wanted.any(dim=1, keepdim=True)
        wrong = cut & ((wanted != given) | ((wanted == 1) & ~same)).any(dim=1, keepdim=True)

        def sentence() -> str:
            row = int(wrong[:, 0].long().argmax())
            start, stop = int((read[row] == number[row]).long().argmax()), past + int(wanted[row].sum())
            return (
                f"the cache was cropped inside a prefix block (positions {start} to {stop - 1} of row {row}), whose "
                "tokens have read the rest of it: feed that very rest again in one call, or crop the cache to "
                f"{start}, where the block begins, and pass the whole block."
            )

        self.refusals.append((wrong.any(), sentence))
        return cut

    # ---- one read, and what comes of it ---------------------------------------------------------------------------

    def _questions(self) -> dict[str, Any]:
        """What has to be known of the values, by name."""
        call, asked = self.call, {}
        if self.cached is not None and self.history is not None:
            asked["changed"] = self.history.deviates(call.cache, self.rows, self.past)
            length = cached_length(call.cache)
            if isinstance(length, torch.Tensor):
                asked["changed"] = asked["changed"] | (length.to(call.device) != self.past)
        asked |= {f"refused {i}": wrong for i, (wrong, _) in enumerate(self.refusals)}
        real = None if self.real is None else self._new(self.real)
        if real is not None:
            asked["padded"] = ~self.real.all()
        if self.sequence is not None:
            asked["packed"] = self.sequence.amax() > 0
        if self.block is not None:
            block = self._new(self.block)
            inside = block >= 0
            asked["blocks"] = inside.any()
            lead = (inside & (block == block[:, :1])).long().cumprod(dim=1).sum(dim=1)
            uniform = (lead == lead[:1]).all() & (inside.sum(dim=1) == lead).all()
            asked["lead"] = torch.where(uniform, lead[0], -1)
            one = inside & (block == block.amax(dim=1, keepdim=True))
            asked["one block"] = (one if real is None else one | ~real).all()
            if call.labels is not None and call.labels.shape == block.shape:
                labelled = call.labels[:, 1:].to(block.device) != -100
                asked["leaks"] = (labelled & inside[:, 1:] & (block[:, 1:] == block[:, :-1])).any()
        if call.prompt is None and not self.stated and infers_blocks(self.config):
            if call.input_ids is None:
                # Said whatever is found: prompts that open in another way are not recognised by their vectors.
                asked["without block"] = 1
            elif self.cached is None:
                without = self._ones()[:, 0] if self.block is None else ~inside.any(dim=1)
                asked["without block"] = (without if real is None else without & real.any(dim=1)).any()
        if call.position_ids is not None and self.count > 1:
            asked["last position"] = self.position_ids.amax()
        return asked

    def refuse(self) -> None:
        """Raises a ValueError for the first refusal that holds."""
        doubtful = None if self.history is None else self.history.doubtful
        if doubtful is not None and isinstance(self.past, int) and self.past > doubtful:
            raise ValueError(UNEVEN_CACHE)
        for i, (_, message) in enumerate(self.refusals):
            if self.values.get(f"refused {i}"):
                raise ValueError(message if isinstance(message, str) else message())

    def warn(self) -> None:
        """Warns once of what is probably a mistake."""
        if not self.readable:
            return
        last = self.past + self.count - 1 if self.call.position_ids is None else self.values.get("last position", -1)
        if last >= self.config.max_position_embeddings:
            logger.warning_once(
                f"position {last} is beyond `max_position_embeddings` ({self.config.max_position_embeddings}): the "
                "model was not trained on such positions and its answers will be worse. Shorten the input."
            )
        if self.values.get("leaks"):
            logger.warning_once(
                "`labels` include tokens of a prefix block, which earlier tokens have already seen: the loss on them "
                "measures nothing. Set the labels of prompts to -100 (`training.data.PrefixLMCollator` does)."
            )
        if self.values.get("without block"):
            warn_without_block(self.config, self.call.input_ids is None, "A row")

    def note(self) -> None:
        """Notes the facts of the new tokens in the cache, for the calls to come."""
        if self.call.cache is None or _is_exporting():
            return
        shape, device = self.call.shape, self.call.device
        ids = self._new_ids()
        ids = torch.full(shape, -1, device=device) if ids is None else ids
        real = self._ones().expand(shape) if self.new_real is None else self.new_real
        types = torch.zeros_like(ids) if self.types is None else self.types
        stated = torch.full(shape, self.stated, device=device)
        new = Facts(ids, types, stated, self.position_ids.expand(shape), real)
        unseen = self.cached if self.history is None else None
        history = _note(self.call.cache, self.past, new, unseen)
        history.is_plain = history.is_plain and self.readable and self.call.position_ids is None and self.real is None
        for name in ("padded", "packed", "blocks"):
            if not self.readable:
                setattr(history, name, None)
            elif self.values.get(name):
                setattr(history, name, True)

    def layout(self) -> TokenLayout:
        """The layout, with what no token needs left out."""
        layout = TokenLayout(self.past, self.count, self.position_ids, self.real, self.sequence, self.block)
        if not self.readable:
            return layout
        if not self.values.get("padded"):
            layout.real = None
        if not self.values.get("packed"):
            layout.sequence = None
        if not self.values.get("blocks"):
            layout.block = None
        layout.lead = self.values["lead"] if layout.block is not None else 0
        layout.sees_all = self.count == 1 or (layout.block is not None and bool(self.values["one block"]))
        return layout


def _read_at_once(asked: dict[str, Any]) -> dict[str, int]:
    """The values of 0-d tensors (or of what Python knows), with one read from the device."""
    tensors = [value for value in asked.values() if isinstance(value, torch.Tensor)]
    read = iter(torch.stack([tensor.long() for tensor in tensors]).tolist() if tensors else [])
    return {name: next(read) if isinstance(value, torch.Tensor) else int(value) for name, value in asked.items()}


def infers_blocks(config: Any) -> bool:
    """Whether blocks are inferred when no `token_type_ids` are given."""
    return config.prefix_lm and bool(config.prefix_end)


# ---- warnings, once each --------------------------------------------------------------------------------------------


def warn_types_are_ignored() -> None:
    """Warns once that a model without PrefixLM ignores `token_type_ids`."""
    logger.warning_once(
        "`token_type_ids` are ignored because `config.prefix_lm` is False: attention is causal everywhere."
    )


def warn_without_block(config: Any, has_no_ids: bool = False, what: str = "The prompt") -> None:
    """Warns once that a row without a prompt envelope is read causally."""
    if has_no_ids:
        logger.warning_once(
            "`inputs_embeds` were given without `token_type_ids`: HRM-Text finds only prompts whose opening and "
            "closing tokens are in the embeddings. It reads everything else causally and answers much worse. Give "
            "`token_type_ids` with 1 on the tokens of the prompt."
        )
        return
    logger.warning_once(
        f"{what} holds no prefix block, so HRM-Text reads it causally and answers much worse. It expects prompts that "
        f"open with the token ids {config.prefix_start} and close with {config.prefix_end}, which "
        "`tokenizer.apply_chat_template` writes (and `encode_prompt`, where the tokenizer has it); or give "
        "`token_type_ids` with 1 on the tokens of the prompt (all zeros ask for causal attention)."
    )


def warn_nothing_says_what_is_prompt() -> None:
    """Warns once that neither the caller nor the config marks the prompt."""
    logger.warning_once(
        "Nothing marks the prompt: there are no `token_type_ids`, and `prefix_end_token_id` in the config is None. "
        "HRM-Text reads everything causally and answers much worse. Set `prefix_end_token_id` in the config (and "
        "`prefix_start_token_ids`, unless the bos token opens a prompt), or give `token_type_ids` with 1 on the "
        "tokens of the prompt and 0 elsewhere."
    )


__all__ = [
    "INFERRED_BLOCK_AGAIN",
    "Call",
    "follow_changes",
    "infers_blocks",
    "last_border",
    "read_layout",
    "read_prompt",
    "read_step",
    "warn_nothing_says_what_is_prompt",
    "warn_types_are_ignored",
    "warn_without_block",
]
