"""The cache of HRM-Text: one slot for each attention call, growing in place, and the facts of each cached position."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from .versions_hrm_text import CROP_KEEPS, cached_length


# Slack of a slot's storage in positions: a quarter of its length, within these bounds. A 1B position weighs 786 KB in
# all slots, so the upper bound matters to memory; the lower one keeps short conversations from growing at every step.
_LEAST_SLACK, _MOST_SLACK = 32, 256


class GrowingLayer(DynamicLayer):
    """A slot whose keys and values lie in storage with room for more, so that appending copies no earlier position.

    `keys` and `values` are exact-length views [batch, heads, length, head_dim] of that storage. Where gradients flow
    through the cache, positions are concatenated instead, since autograd forbids writing over what it has saved.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._key_storage: torch.Tensor | None = None
        self._value_storage: torch.Tensor | None = None
        self._length = self._value_length = 0
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._key_storage is None else self._key_storage[:, :, : self._length]

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._key_storage = tensor
        self._length = 0 if tensor is None or tensor.dim() < 4 else tensor.shape[2]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._value_storage is None else self._value_storage[:, :, : self._value_length]

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._value_storage = tensor
        self._value_length = 0 if tensor is None or tensor.dim() < 4 else tensor.shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        value_states = key_states if value_states is None else value_states
        with _normal_tensors():
            self._key_storage = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
            self._value_storage = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.hold(0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new positions.

        Args:
            key_states, value_states: [batch, heads, new, head_dim].

        Returns:
            Keys and values of all positions, [batch, heads, length, head_dim].
        """
        self.make_room(key_states, value_states)
        start = self._length
        end = start + key_states.shape[2]
        if self._concatenates(key_states):
            self._key_storage = torch.cat([self._key_storage[:, :, :start], key_states], dim=2)
            self._value_storage = torch.cat([self._value_storage[:, :, :start], value_states], dim=2)
        else:
            self._key_storage[:, :, start:end] = key_states
            self._value_storage[:, :, start:end] = value_states
        self.hold(end)
        return self._key_storage[:, :, :end], self._value_storage[:, :, :end]

    def hold(self, length: int) -> None:
        """Says that the storages hold so many positions."""
        # Two numbers, since tools that cut `keys` and `values` set one after the other.
        self._length = self._value_length = length

    def _concatenates(self, key_states: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (key_states.requires_grad or self._key_storage.requires_grad)

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Makes room for new positions of this kind behind those that are held; returns whether there was too little.

        An empty slot takes the device of what it is given, since another slot's may have been expected.
        """
        if not self.is_initialized or (self._length == 0 and self._key_storage.device != key_states.device):
            self.lazy_initialization(key_states, value_states)
        length = self._length + key_states.shape[2]
        if self._concatenates(key_states):
            return False
        if length <= self._key_storage.shape[2] and _may_be_written(self._key_storage):
            return False
        self._grow(length)
        return True

    def _grow(self, length: int) -> None:
        capacity = length + min(_MOST_SLACK, max(_LEAST_SLACK, length // 4))
        with _normal_tensors():
            for name in ("_key_storage", "_value_storage"):
                old = getattr(self, name)
                new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : self._length] = old[:, :, : self._length]
                setattr(self, name, new)

    def _each_storage(self, change: Any) -> None:
        if self.is_initialized:
            with _normal_tensors():
                self._key_storage = change(self._key_storage)
                self._value_storage = change(self._value_storage)

    def get_seq_length(self) -> int:
        """Number of positions held."""
        return self._length

    def reset(self) -> None:
        """Empties the slot; the next update allocates anew."""
        self._key_storage = self._value_storage = None
        self.hold(0)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int | None = None, *, max_length: int | None = None) -> None:
        """Removes positions from the end.

        Args:
            tokens_to_remove: below zero, how many to remove; above, the length to keep, as older releases of
                transformers count. 0 is what it is to the installed release: all of them in 5.9, none in 5.16.
            max_length: the length to keep.
        """
        self.hold(kept_length(self._length, tokens_to_remove, max_length))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the rows `beam_idx`, with their room to grow."""
        self._each_storage(lambda storage: storage.index_select(0, beam_idx.to(storage.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self._each_storage(lambda storage: storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        self._each_storage(lambda storage: storage[indices, ...])


def kept_length(length: int, tokens_to_remove: int | None, max_length: int | None) -> int:
    """How many of `length` positions a call of `crop` keeps.

    Raises:
        TypeError: both arguments, or neither.
    """
    if (tokens_to_remove is None) == (max_length is None):
        raise TypeError("crop takes one argument: how many tokens to remove, below zero, or `max_length`")
    number = max_length if tokens_to_remove is None else tokens_to_remove
    keeps = number > 0 or (number == 0 and (CROP_KEEPS or tokens_to_remove is None))
    return max(0, min(length, number if keeps else length + number))


class HrmTextCache(DynamicCache):
    """A DynamicCache with one in-place growing slot for each attention call of a forward pass, and a history.

    Args:
        config: the model's config, which says how many slots there are; None adds slots as they are written.

    When one slot needs room, all get it: storages that are made between the passing results of a long prompt's layers
    would keep the heap of a CPU from reusing the memory of those.

    A slot's storage is never longer than its content by more than a quarter (from 128 to 1024 positions), 32 positions
    below, or 256 above. It is reallocated once in as many steps, so n steps copy each position O(log n) times at first
    and once a block of 256 later on.
    """

    def __init__(self, config: Any = None):
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
        if config is not None:
            self.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    @property
    def history(self) -> History | None:
        """The facts of the cached positions; None before the first forward pass."""
        return History.of(self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new positions to one slot; see `GrowingLayer.update`."""
        self.make_room(layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def make_room(self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes room for new positions in a slot and, where it had too little, in those behind it."""
        if layer_idx < len(self.layers) and self.layers[layer_idx].make_room(key_states, value_states):
            for layer in self.layers[layer_idx + 1 :]:
                layer.make_room(key_states, value_states)

    def crop(self, tokens_to_remove: int | None = None, *, max_length: int | None = None) -> None:
        """Removes positions from the end; see `GrowingLayer.crop`."""
        for layer in self.layers:
            layer.crop(tokens_to_remove, max_length=max_length)

    def reset(self) -> None:
        """Empties all slots and the history."""
        for layer in self.layers:
            layer.reset()
        History.forget(self)

    def _select(self, rows: torch.Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(rows)
        if self.history is not None:
            self.history.select(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the rows `beam_idx`, history included."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (numbers or a bool mask), history included."""
        indices = torch.as_tensor(indices)
        self._select(indices.nonzero().flatten() if indices.dtype is torch.bool else indices.flatten())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, history included."""
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)
        if self.history is not None:
            rows = torch.arange(self.history.rows, device=self.history.ids.device)
            self.history.select(rows.repeat_interleave(repeats))


class OneSlot:
    """One slot with the interface of a cache: the graph of a compiled layer then holds no slot number."""

    def __init__(self, layer: Any):
        self.layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, slot: int, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes the new positions [batch, heads, new, head_dim] on to the slot."""
        return self.layer.update(key_states, value_states, cache_kwargs)


# ---- the history ----------------------------------------------------------------------------------------------------


@dataclass
class Facts:
    """What is known of each token of some rows; every tensor is [rows, tokens].

    Attributes:
        ids: int64, -1 where embeddings were given.
        types: int8, 1 in a prefix block, 2 where one opens, 0 for causal tokens.
        stated: bool, whether the type was given (or the token generated) rather than inferred from the ids.
        positions: int64.
        real: bool, False at padding.
    """

    ids: torch.Tensor
    types: torch.Tensor
    stated: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Facts:
        """The facts with each tensor changed."""
        return Facts(*(change(getattr(self, name)) for name in FACTS))


FACTS = tuple(field.name for field in fields(Facts))
# A few elements of a position's last key, by which the position is known again: they depend on all that it has read.
_MARK_WIDTH = 4


class History:
    """The facts of every cached position, kept on a cache of any class; 35 bytes a token.

    It holds facts only: what a call needs to know of the past is derived from them by the functions of
    `layout_hrm_text.py`. Each position also has a mark, a few elements of its key in the last slot. Where marks and
    keys differ, the cache was changed without the history: rows are then found again by their marks.

    Attributes:
        length: number of cached positions; None after a compiled or captured step, which may not count in Python.
        end: facts up to here, beyond `length`, are those of positions that were cropped away and not replaced.
        unseen: so many positions at the beginning were written by others; their facts are only the plainest guess.
        packed, padded, blocks: whether some row holds a border of sequences, padding, or a prefix block; None where
            no value could be read that would have told.
        is_plain: whether every position is known to be its index.
        doubtful: positions from here on were written by a call that ended half way; None where there are none.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device):
        with _normal_tensors():
            dtypes = (torch.int64, torch.int8, torch.bool, torch.int64, torch.bool)
            for name, dtype in zip(FACTS, dtypes):
                setattr(self, name, torch.zeros(rows, capacity, dtype=dtype, device=device))
            self.marks = torch.full((rows, capacity, _MARK_WIDTH), float("nan"), device=device)
        self.length: int | None = 0
        self.end = self.unseen = 0
        self.packed: bool | None = False
        self.padded: bool | None = False
        self.blocks: bool | None = False
        self.is_plain = True
        self.doubtful: int | None = None

    @staticmethod
    def of(cache: Any) -> History | None:
        """The history of a cache, None where no forward pass of ours has written to it."""
        return getattr(cache, "_hrm_text_history", None)

    @staticmethod
    def forget(cache: Any) -> None:
        """Takes the history off a cache."""
        cache._hrm_text_history = None

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def capacity(self) -> int:
        return self.ids.shape[1]

    def facts(self, start: int, stop: int) -> Facts:
        """The facts of the positions start ... stop - 1, as views."""
        return Facts(*(getattr(self, name)[:, start:stop] for name in FACTS))

    def append(self, new: Facts, start: int | torch.Tensor) -> None:
        """Writes the facts of new positions, from `start` on; reads nothing from the device.

        Args:
            new: [rows or 1, new] each.
            start: index of the first; a 0-d tensor where it lies on the device, as with a static cache while
                compiling.
        """
        count = new.ids.shape[1]
        if isinstance(start, torch.Tensor):
            index = start + torch.arange(count, device=self.ids.device)
            for name in FACTS:
                target = getattr(self, name)
                target.index_copy_(1, index, getattr(new, name).to(target.dtype).expand(self.rows, -1))
            self.marks.index_fill_(1, index, float("nan"))
            self.length = None
            return
        stop = start + count
        self.unseen = min(self.unseen, start)
        if self.doubtful is not None and start <= self.doubtful:
            self.doubtful = None
        self._make_room(stop)
        for name in FACTS:
            getattr(self, name)[:, start:stop] = getattr(new, name)
        self.marks[:, start:stop] = float("nan")
        self.length = self.end = stop

    def _make_room(self, length: int) -> None:
        """Room for `length` positions, in tensors that may be written in every mode."""
        room = self.capacity
        if length > room:
            room = length + min(_MOST_SLACK, max(_LEAST_SLACK, length // 4))
        elif _may_be_written(self.ids):
            return
        with _normal_tensors():
            for name in (*FACTS, "marks"):
                old = getattr(self, name)
                new = old.new_zeros(old.shape[0], room, *old.shape[2:])
                new[:, : old.shape[1]] = old
                setattr(self, name, new)

    def select(self, rows: torch.Tensor) -> None:
        """Takes the rows with these numbers, in this order."""
        with _normal_tensors():
            for name in (*FACTS, "marks"):
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def to(self, device: torch.device) -> None:
        """Moves the facts to where the tokens are."""
        if self.ids.device != device:
            with _normal_tensors():
                for name in (*FACTS, "marks"):
                    setattr(self, name, getattr(self, name).to(device))

    # ---- is it still this cache's? ------------------------------------------------------------------------------

    def note_marks(self, cache: Any, start: int, stop: int) -> None:
        """Notes the marks of positions that a forward pass has just written."""
        marks = read_marks(cache, start, stop)
        if marks is not None and marks.shape[0] == self.rows:
            self.marks[:, start:stop] = marks.to(self.marks.device)

    def deviates(self, cache: Any, rows: int, length: int) -> torch.Tensor | bool:
        """Whether the cache holds other rows than those of which the history speaks; a bool [] on the device."""
        if rows != self.rows:
            return True
        marks = read_marks(cache, 0, length)
        if marks is None:
            # Nothing tells whether the rows were moved, which matters where they differ.
            known = [getattr(self, name)[:, :length] for name in ("types", "positions", "real")]
            return torch.stack([(fact != fact[:1]).any() for fact in known]).any()
        noted = self.marks[:, :length]
        return ~((marks.to(noted.device) == noted) | noted.isnan()).all()

    def find_rows(self, cache: Any, length: int) -> bool:
        """Takes its rows in the order in which the cache holds them now; False where a row is none of them."""
        marks = read_marks(cache, 0, length)
        if marks is None:
            return False
        noted, marks = self.marks[:, :length], marks.to(self.marks.device)
        same = ((marks[:, None] == noted[None]) | noted[None].isnan()).all(dim=(2, 3))
        # A row without marks is like any other.
        if bool(noted.isnan().all(dim=(1, 2)).any()) or not bool(same.any(dim=1).all()):
            return False
        self.select(same.long().argmax(dim=1))
        return True


def read_marks(cache: Any, start: int, stop: int) -> torch.Tensor | None:
    """Marks [rows, stop - start, 4] of cached positions, float32; None where the keys cannot be read as they are."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[-1], "keys", None) if layers else None
    # A quantized slot keeps its latest keys alone.
    if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or keys.shape[2] < stop or hasattr(layers[-1], "nbits"):
        return None
    return keys[:, 0, start:stop, :_MARK_WIDTH].detach().float()


def kept_whole(cache: Any) -> contextlib.AbstractContextManager[None]:
    """Takes back what a call has written to a cache if the call ends in an error or is interrupted.

    Otherwise some slots would hold its tokens and others not, or a caller who got no answer would give them again.
    What cannot be taken back (from quantized slots, and static ones of older releases) is noted in the history.
    """
    if getattr(cache, "layers", None) is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return contextlib.nullcontext()
    # Slots that differ before the call are refused, and stay as they are.
    return contextlib.nullcontext() if slots_differ(cache) is True else _taken_back(cache)


@contextlib.contextmanager
def _taken_back(cache: Any) -> Iterator[None]:
    before = cached_length(cache)
    if isinstance(before, torch.Tensor):
        before = before.clone()  # a static cache counts in place
    try:
        yield
    except BaseException:
        before, history = int(before), History.of(cache)
        for layer in cache.layers:
            written = int(layer.get_seq_length()) - before
            if written > 0 and hasattr(layer, "crop") and not hasattr(layer, "nbits"):
                layer.crop(-written)
            elif written > 0 and history is not None:
                history.doubtful = before
        raise


def slots_differ(cache: Any) -> bool | torch.Tensor:
    """Whether slots hold different numbers of tokens; a bool [] on the device where a static cache counts there.

    A call fills them in order, so that the first and the last tell whether one has ended half way.
    """
    layers = getattr(cache, "layers", None)
    return cached_length(layers[0]) != cached_length(layers[-1]) if layers else False


def rows_of(cache: Any) -> int | None:
    """Number of rows that the first slot holds; None where that cannot be seen."""
    keys = getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None
    return keys.shape[0] if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None


@contextlib.contextmanager
def _leave_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _normal_tensors() -> Any:
    """Tensors made here may be written in every mode; those made in inference mode only there."""
    inside = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _leave_inference_mode() if inside else contextlib.nullcontext()


def _may_be_written(tensor: torch.Tensor) -> bool:
    """Whether this mode may write into the tensor: one made in inference mode is closed outside of it."""
    return torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled()


__all__ = [
    "FACTS",
    "Facts",
    "GrowingLayer",
    "History",
    "HrmTextCache",
    "OneSlot",
    "kept_whole",
    "read_marks",
    "rows_of",
    "slots_differ",
]
