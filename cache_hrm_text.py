"""The cache of HRM-Text: one slot for each attention call, each growing in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


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
        self._length = 0
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
        return None if self._value_storage is None else self._value_storage[:, :, : self._length]

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._value_storage = tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        value_states = key_states if value_states is None else value_states
        self._key_storage = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self._value_storage = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self._length = 0
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
        self._length = end
        return self._key_storage[:, :, :end], self._value_storage[:, :, :end]

    def _concatenates(self, key_states: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and (key_states.requires_grad or self._key_storage.requires_grad)

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Makes room for new positions of this kind behind those that are held; returns whether there was too little.

        An empty slot takes the device of what it is given, since another slot's may have been expected.
        """
        if not self.is_initialized or (self._length == 0 and self._key_storage.device != key_states.device):
            self.lazy_initialization(key_states, value_states)
        length = self._length + key_states.shape[2]
        if length <= self._key_storage.shape[2] or self._concatenates(key_states):
            return False
        self._grow(length)
        return True

    def _grow(self, length: int) -> None:
        capacity = length + min(_MOST_SLACK, max(_LEAST_SLACK, length // 4))
        for name in ("_key_storage", "_value_storage"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : self._length] = old[:, :, : self._length]
            setattr(self, name, new)

    def _each_storage(self, change: Any) -> None:
        if self.is_initialized:
            self._key_storage = change(self._key_storage)
            self._value_storage = change(self._value_storage)

    def get_seq_length(self) -> int:
        """Number of positions held."""
        return self._length

    def reset(self) -> None:
        """Empties the slot; the next update allocates anew."""
        self._key_storage = self._value_storage = None
        self._length = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes positions from the end.

        Args:
            tokens_to_remove: below zero, how many to remove; above, the length to keep (as transformers 4 counts).
        """
        kept = self._length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self._length = max(0, min(self._length, kept))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the rows `beam_idx`, with their room to grow."""
        self._each_storage(lambda storage: storage.index_select(0, beam_idx.to(storage.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self._each_storage(lambda storage: storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        self._each_storage(lambda storage: storage[indices, ...])


class HrmTextCache(DynamicCache):
    """A DynamicCache with one in-place growing slot for each attention call of a forward pass.

    Args:
        config: the model's config, which says how many slots there are; None adds slots as they are written.

    Where one slot needs room, all get it: storages that are made between the passing results of a long prompt's layers
    would keep the heap of a CPU from using the room of those again.

    A slot's storage is never longer than its content by more than a quarter (from 128 to 1024 positions), 32 positions
    below, or 256 above. It is reallocated once in as many steps, so n steps copy each position O(log n) times at first
    and once a block of 256 later on.
    """

    def __init__(self, config: Any = None):
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
        if config is not None:
            self.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new positions to one slot; see `GrowingLayer.update`."""
        if layer_idx < len(self.layers) and self.layers[layer_idx].make_room(key_states, value_states):
            for layer in self.layers[layer_idx + 1 :]:
                layer.make_room(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, max_length: int) -> None:
        """Removes positions from the end: below zero, how many; above, the length to keep."""
        for layer in self.layers:
            layer.crop(max_length)


class OneSlot:
    """One slot with the interface of a cache: the graph of a compiled layer then holds no slot number."""

    def __init__(self, layer: Any):
        self.layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, slot: int, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes the new positions [batch, heads, new, head_dim] on to the slot."""
        return self.layer.update(key_states, value_states, cache_kwargs)


__all__ = ["GrowingLayer", "HrmTextCache", "OneSlot"]
