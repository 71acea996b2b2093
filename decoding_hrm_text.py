"""Decoding one token at a time over static buffers, replayed as a CUDA graph.

A decoding step of HRM-Text launches thousands of small kernels, and launching them takes several times as long as
running them. So the step is captured once for each bucket of rows and of cache capacity, and replayed. The keys and
values of the cache that is being decoded lie in the buffers of the graph; the cache's layers view them, so everything
else (prefill, crop, reading `keys`) goes on as if nothing had happened.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.utils import logging

from .attention_hrm_text import AttentionPlan
from .cache_hrm_text import HrmTextCache
from .layout_hrm_text import CacheRecord, values_are_readable
from .operations_hrm_text import rotary_tables


logger = logging.get_logger(__name__)

# Capacities of one graph, and of the memory behind all graphs, in positions.
CAPACITY_STEP, ARENA_STEP = 256, 1024
_WARM_UP_RUNS = 2
_TIMED_REPLAYS = 5


class StaticSlot:
    """The keys and values [rows, heads, capacity, head_dim] of one cache slot, written at `index`, int64 [1]."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor):
        self.keys, self.values, self.index = keys, values, index
        self.max_cache_len = keys.shape[2]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one position [rows, heads, 1, head_dim] at `index`; returns all of the buffer."""
        self.keys.index_copy_(2, self.index, key)
        self.values.index_copy_(2, self.index, value)
        return self.keys, self.values


class _Slots:
    """Passes each attention call on to its slot."""

    def __init__(self, layers: list[StaticSlot]):
        self.layers = layers

    def update(
        self, key: torch.Tensor, value: torch.Tensor, slot: int, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[slot].update(key, value)


class _Bucket:
    """The static inputs, the buffers and the graph of one number of rows and one capacity."""

    def __init__(self, model: Any, arena: torch.Tensor, rows: int, capacity: int):
        config, device = model.config, arena.device
        shape = (rows, config.num_attention_heads, capacity, config.head_dim)
        size = rows * config.num_attention_heads * capacity * config.head_dim
        parts = arena[: 2 * config.num_hidden_layers * size].view(config.num_hidden_layers, 2, *shape)
        self.rows, self.capacity = rows, capacity
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.input_ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.mask = torch.ones(rows, 1, 1, capacity, dtype=torch.bool, device=device)
        self.slots = _Slots(
            [StaticSlot(part[0], part[1], self.index) for part in (parts[i] for i in range(len(parts)))]
        )
        self.plan = AttentionPlan("sdpa", mask=self.mask)
        self.logits: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def compute(self, model: Any) -> torch.Tensor:
        """One step from the static inputs: logits [rows, 1, vocab]."""
        self.mask.index_fill_(3, self.index, True)
        network = model.model
        embeds = network.embed_tokens(self.input_ids)
        tables = rotary_tables(*network.rotary_emb(embeds, self.position_ids))
        z_H = network._recur(embeds * model.config.embedding_scale, (tables, self.plan, self.slots), None, None)
        return model.lm_head(z_H)

    def capture(self, model: Any, pool: Any) -> None:
        """Captures `compute` with either attention for single queries, and keeps the graph that replays faster.

        `index` must be set, since the runs before and during the capture write there.
        """
        best = float("inf")
        for products in (False, True):
            self.plan.products = products
            graph, logits = self._captured(model, pool)
            seconds = _replay_seconds(graph)
            # The products round the scores to the dtype of the cache, so they have to be worth it.
            if seconds * (1.05 if products else 1.0) < best:
                best, self.graph, self.logits = seconds, graph, logits

    def _captured(self, model: Any, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self.compute(model)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self.compute(model)
        return graph, logits

    def run(self, model: Any) -> torch.Tensor:
        """The logits of the static inputs; on a device without graphs the step is computed each time."""
        if self.graph is None:
            return self.compute(model)
        self.graph.replay()
        return self.logits


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(_TIMED_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


class StaticDecoder:
    """Serves the decoding steps of `generate` from captured graphs; keeps one cache in its buffers at a time."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._arena: torch.Tensor | None = None
        self._pool: Any = None
        self._weights: tuple[int, ...] = ()
        self._cache: Any = lambda: None
        self._bucket: _Bucket | None = None
        self._views: list[torch.Tensor] = []
        self._expected_length = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticDecoder:
        return StaticDecoder()

    def __reduce__(self) -> tuple[Any, ...]:
        return (StaticDecoder, ())

    # ---- what is served ----------------------------------------------------------------------------------------

    @staticmethod
    def refusal(model: Any, cache: Any, trusted_layout: bool, attention_mask: torch.Tensor | None) -> str | None:
        """Why a call with one new token is not served, or None where it is."""
        if not trusted_layout:
            return "it did not come from `generate`, so its layout has to be checked"
        if type(cache) is not HrmTextCache:
            return f"its cache is a {type(cache).__name__}: leave `past_key_values` and `cache_implementation` unset"
        if model.config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            return "its rotary table depends on the length of the text"
        if attention_mask is not None and attention_mask.dim() != 2:
            return "its attention mask is a 4-D one"
        if model.config.output_attentions or model.config.output_hidden_states:
            return "its config asks for attentions or hidden states"
        if model.config._attn_implementation not in (None, "sdpa"):
            return f"its attention is {model.config._attn_implementation!r}: use 'sdpa'"
        devices = {layer.device for layer in cache.layers if layer.is_initialized}
        if devices != {model.lm_head.weight.device}:
            return "the model is spread over several devices"
        return None

    @torch.no_grad()
    def step(
        self,
        model: Any,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
        trusted_layout: bool,
    ) -> torch.Tensor | None:
        """The logits [batch, 1, vocab] of one new token a row, or None for a call that is not served.

        Args:
            model: an HrmTextForCausalLM.
            input_ids: [batch, 1]; anything else is not a decoding step and is left to the caller in silence.
            attention_mask: [batch, cached + 1], 0 at padding, or None.
            position_ids: [batch or 1, 1], or None.
            cache: the live cache; it holds the new token afterwards.
            trusted_layout: whether `generate` has checked the layout.
        """
        length = cache.get_seq_length() if cache is not None else 0
        if input_ids is None or input_ids.shape[1] != 1 or not isinstance(length, int) or length == 0:
            return None
        batch, bucket = input_ids.shape[0], self._bucket
        if not trusted_layout or not self._goes_on(cache, batch, length):
            if not values_are_readable():
                return None
            reason = self.refusal(model, cache, trusted_layout, attention_mask)
            if reason is not None:
                logger.warning_once(f"`optimize_for_inference`: a decoding step runs uncaptured, because {reason}.")
                return None
            bucket = self._place(model, cache, batch, length)
            self._begin(bucket, attention_mask, batch, length)
        bucket.index.fill_(length)
        bucket.input_ids[:batch].copy_(input_ids)
        bucket.position_ids[:batch] = _positions(position_ids, attention_mask, length)
        if bucket.graph is None and self._arena.is_cuda:
            bucket.capture(model, self._pool)
        logits = bucket.run(model)[:batch].clone()
        for layer in cache.layers:
            layer._length = length + 1
        self._expected_length = length + 1
        CacheRecord.settle(cache, length + 1, batch)
        return logits

    def _goes_on(self, cache: Any, batch: int, length: int) -> bool:
        """Whether this step follows the last one, in the same bucket."""
        return (
            self._bucket is not None
            and length == self._expected_length < self._bucket.capacity
            and self._views[0].shape[0] == batch
            and self._is_attached(cache)
        )

    # ---- buffers -----------------------------------------------------------------------------------------------

    def _begin(self, bucket: _Bucket, attention_mask: torch.Tensor | None, batch: int, length: int) -> None:
        """Marks which cached positions are visible; rows that only fill the bucket see everything."""
        self._bucket = bucket
        bucket.mask[:batch] = False
        bucket.mask[:batch, 0, 0, :length] = True if attention_mask is None else attention_mask[:, :length] != 0

    def _place(self, model: Any, cache: Any, batch: int, length: int) -> _Bucket:
        """The bucket for one more position, with the keys and values of the cache in its buffers."""
        weights = tuple(parameter.data_ptr() for parameter in model.parameters())
        if weights != self._weights:
            self.release()
            self._weights = weights
        rows, capacity = bucket_rows(batch), _round_up(length + 1, CAPACITY_STEP)
        attached = self._is_attached(cache)
        bucket = self._buckets.get((rows, capacity))
        if attached and bucket is self._bucket and self._views[0].shape[0] == batch:
            return bucket
        # Buffers outlive the call, and may be written in a mode other than this one's.
        with torch.inference_mode(False), torch.no_grad():
            self._detach_other(cache)
            return self._attach(model, cache, batch, rows, capacity)

    def _attach(self, model: Any, cache: Any, batch: int, rows: int, capacity: int) -> _Bucket:
        config, first = model.config, cache.layers[0]._key_storage
        entries = 2 * config.num_hidden_layers
        position = rows * config.num_attention_heads * config.head_dim
        needed = entries * position * capacity
        # In place, and only where every part moves towards the end: the last one first.
        attached, before = self._is_attached(cache), self._bucket
        grows_in_place = (
            attached
            and before is not None
            and (before.rows, before.capacity <= capacity) == (rows, True)
            and needed <= self._arena.numel()
        )
        sources = [(layer.keys, layer.values) for layer in cache.layers]
        if self._arena is None or needed > self._arena.numel() or first.dtype != self._arena.dtype:
            size = entries * position * _round_up(capacity, ARENA_STEP)
            self._arena, self._buckets = torch.zeros(size, dtype=first.dtype, device=first.device), {}
            self._pool = torch.cuda.graph_pool_handle() if first.is_cuda else None
        elif attached and not grows_in_place:
            sources = [(keys.clone(), values.clone()) for keys, values in sources]
        if (rows, capacity) not in self._buckets:
            self._buckets[rows, capacity] = _Bucket(model, self._arena, rows, capacity)
        bucket = self._buckets[rows, capacity]
        self._views = []
        for layer, slot, (keys, values) in reversed(list(zip(cache.layers, bucket.slots.layers, sources))):
            length = layer._length
            for target, source in ((slot.values, values), (slot.keys, keys)):
                target[:batch, :, :length] = source.clone() if grows_in_place else source
            layer._key_storage, layer._value_storage = slot.keys[:batch], slot.values[:batch]
            self._views.append(layer._key_storage)
        self._views.reverse()
        self._cache, self._bucket, self._expected_length = weakref.ref(cache), None, -1
        return bucket

    def _is_attached(self, cache: Any) -> bool:
        return self._cache() is cache and all(
            layer._key_storage is view for layer, view in zip(cache.layers, self._views)
        )

    def _detach_other(self, cache: Any) -> None:
        """Gives the cache that lies in the buffers storage of its own, where it is another one and still in use."""
        other = self._cache()
        if other is None or other is cache or not self._views:
            return
        for layer, view in zip(other.layers, self._views):
            if layer._key_storage is view:
                layer._key_storage, layer._value_storage = layer.keys.clone(), layer.values.clone()

    def release(self) -> None:
        """Frees graphs and buffers; a cache that lies in them is given storage of its own."""
        self._detach_other(None)
        self.__init__()


def bucket_rows(batch: int) -> int:
    """The number of rows of the graph that serves a batch: the next power of two."""
    return 1 << (batch - 1).bit_length()


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _positions(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, length: int
) -> torch.Tensor | int:
    """Positions of the new tokens, [batch or 1, 1]; without any given, real tokens are counted."""
    if position_ids is not None:
        return position_ids.view(-1, 1)
    if attention_mask is not None:
        return (attention_mask != 0).sum(dim=1, keepdim=True) - 1
    return length


__all__ = ["StaticDecoder", "bucket_rows"]
