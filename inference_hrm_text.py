"""`optimize_for_inference`: packed weights or compiled decoding on the CPU, captured decoding on CUDA.

A decoding step of HRM-Text launches thousands of small kernels, and launching them takes several times as long as
running them. So a step is captured in a CUDA graph over static buffers, and replayed. Each call of `generate` has
buffers of its own, an *arena*; the storages of its cache view them, so everything else (prefill, crop, reading `keys`)
goes on as if nothing had happened. Arenas of caches that are gone serve later calls, with the graphs over them.

What this room asks of others, all of it:

- of the network, `model._static_step(input_ids, position_ids, visible, slots, products)`: logits [rows, 1, vocab] of
  one step without any decision that reads a value; `visible` is bool [rows, 1, 1, keys], `slots` has the interface of
  a cache, `products` says whether attention is two batched products;
- of the network, `model._note_captured_step(cache, input_ids, attention_mask, position_ids)`: tells the history of the
  cache what the new tokens are, reading nothing from the device;
- of `HrmTextCache`, its `layers`, and of each `keys`, `values`, `_key_storage`, `_value_storage` and `_length`;
- of `forward`, to ask `model._captured_step(...)` for calls of `generate` with one new token a row;
- of `generate`, to take the cache that `model._captured_cache(...)` gives at every call;
- of a stack, to ask `compiled_layer(layer, cache)` for one new token a row.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .cache_hrm_text import HrmTextCache
from .compiled_hrm_text import compile_model
from .folder_hrm_text import adopt_model, give_back_model, is_adopted
from .kernels_hrm_text import has_own_call, is_enabled, use_kernels
from .packed_hrm_text import is_packed, pack_model, quantize_model, unpack_model
from .versions_hrm_text import static_capacity


logger = logging.get_logger(__name__)


# ---- one compiled layer for all -------------------------------------------------------------------------------------

# The options of `torch.compile` for the layers of the call that this thread is in, None where nothing is compiled.
_layer_options: ContextVar[dict[str, Any] | None] = ContextVar("hrm_text_layer_options", default=None)
_compiled: dict[Any, Callable[..., Any]] = {}
_DEFAULT_OPTIONS = {"dynamic": False}


@contextlib.contextmanager
def compiling_layers(options: dict[str, Any] | None) -> Iterator[None]:
    """Within it, layers that decode over a static cache run compiled with these options of `torch.compile`."""
    token = _layer_options.set(options)
    try:
        yield
    finally:
        _layer_options.reset(token)


def compiles_layers() -> bool:
    """Whether decoding steps run compiled layers now, so that every plan must have the shape of the last one."""
    return not torch.compiler.is_compiling() and _layer_options.get() is not None


def compiled_layer(layer: nn.Module, cache: Any) -> Callable[..., Any] | None:
    """What runs this layer compiled, with the layer as its first argument; None where it is called as a module.

    The graph serves every layer of its class and every cache slot: torch guards what the layer holds.
    """
    if not compiles_layers() or static_capacity(cache) is None:
        return None
    forward, options = type(layer).forward, _layer_options.get()
    key = (forward, _hashable(options))
    if key not in _compiled:
        _compiled[key] = torch.compile(forward, **options)
    return _compiled[key]


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted(((repr(key), _hashable(item)) for key, item in value.items()), key=lambda pair: pair[0]))
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    return value


def calls_modules(model: nn.Module) -> bool:
    """Whether a part of the model has hooks or a `forward` of its own, which only calls of modules reach."""
    return any(has_own_call(module) for module in model.modules() if module is not model)


# ---- arenas ---------------------------------------------------------------------------------------------------------

# Steps of the capacity, in positions, of one graph and of an arena.
CAPACITY_STEP, ARENA_STEP = 256, 1024
# For how many computations (adapters on and off, ...) an arena keeps graphs.
_MOST_COMPUTATIONS = 4
_WARM_UP_RUNS, _TIMED_REPLAYS = 2, 5
# The products round the scores to the dtype of the cache, so they have to be worth it.
_PRODUCTS_MARGIN = 1.05


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


class StaticSlots:
    """The slots of one step, with the interface of a cache."""

    def __init__(self, layers: list[StaticSlot]):
        self.layers = layers

    def update(
        self, key: torch.Tensor, value: torch.Tensor, slot: int, cache_kwargs: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes a position on to its slot."""
        return self.layers[slot].update(key, value)


class CudaGraph:
    """A step captured in a CUDA graph."""

    def __init__(self, compute: Callable[[], torch.Tensor], pool: Any):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = compute()

    def replay(self) -> torch.Tensor:
        """The logits, in memory that the next replay overwrites."""
        self._graph.replay()
        return self._logits

    def seconds(self) -> float:
        """How long a replay takes."""
        self.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(_TIMED_REPLAYS):
            self.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / _TIMED_REPLAYS


class Arena:
    """The static inputs and buffers of one cache at a time, and the steps captured over them."""

    def __init__(self, slots: int, rows: int, capacity: int, like: torch.Tensor):
        heads, head_dim, device = like.shape[1], like.shape[3], like.device
        self.rows, self.capacity = rows, capacity
        self.storage = torch.zeros(slots, 2, rows, heads, capacity, head_dim, dtype=like.dtype, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.input_ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.visible = torch.ones(rows, 1, 1, capacity, dtype=torch.bool, device=device)
        self.pool = torch.cuda.graph_pool_handle() if self.storage.is_cuda else None
        self._slots: dict[int, StaticSlots] = {}
        self._steps: dict[int, dict[int, Any]] = {}
        self._others = self._references() - 1

    def _references(self) -> int:
        return torch._C._storage_Use_Count(self.storage.untyped_storage()._cdata)

    def is_free(self) -> bool:
        """Whether no tensor outside of the arena views its memory: keys that a user kept, or a cache."""
        own = 1 + sum(2 * len(slots.layers) for slots in self._slots.values())
        return self._references() == own + self._others

    def fits(self, slots: int, rows: int, like: torch.Tensor) -> bool:
        """Whether it is of the shape for `rows` rows of slots like this one, [batch, heads, length, head_dim]."""
        wanted = (slots, 2, rows, like.shape[1], like.shape[3], like.dtype, like.device)
        return (*self.storage.shape[:4], self.storage.shape[5], self.storage.dtype, self.storage.device) == wanted

    def step(self, model: Any, key: int, length: int, options: dict[str, Any] | None, capture: Any) -> Any:
        """The captured step that appends position `length`, for the computation that `key` stands for."""
        bucket = min(_round_up(length + 1, CAPACITY_STEP), self.capacity)
        if key not in self._steps:
            while len(self._steps) >= _MOST_COMPUTATIONS:
                self._steps.pop(next(iter(self._steps)))
        steps = self._steps[key] = self._steps.pop(key, {})
        if bucket not in steps:
            if bucket not in self._slots:
                parts = (self.storage[i, :, :, :, :bucket] for i in range(len(self.storage)))
                self._slots[bucket] = StaticSlots([StaticSlot(*part.unbind(0), self.index) for part in parts])
            with torch.inference_mode(False), torch.no_grad():
                steps[bucket] = self._captured(model, bucket, options, capture)
        return steps[bucket]

    def _captured(self, model: Any, bucket: int, options: dict[str, Any] | None, capture: Any) -> Any:
        """Captures the step with either attention for single queries where that may be chosen; the faster one."""
        slots, visible = self._slots[bucket], self.visible[..., :bucket]

        def compute(products: bool) -> torch.Tensor:
            visible.index_fill_(3, self.index, True)
            with compiling_layers(options):
                return model._static_step(self.input_ids, self.position_ids, visible, slots, products)

        stock = capture(functools.partial(compute, False), self.pool)
        if not is_enabled():
            return stock
        products = capture(functools.partial(compute, True), self.pool)
        return products if products.seconds() * _PRODUCTS_MARGIN < stock.seconds() else stock


class CapturedDecoder:
    """The arenas that no cache lies in, and how steps over them are captured.

    Args:
        options: of `torch.compile` for the layers of the steps, None for none.
        capture: makes the object that replays a step, from a function and a memory pool.
    """

    def __init__(self, options: dict[str, Any] | None = None, capture: Any = CudaGraph):
        self.options, self.capture = options, capture
        self.capture_lock = threading.Lock()
        self._lock = threading.RLock()  # a cache may be collected, and give its arena back, while it is held
        self._free: list[Arena] = []
        self._numbers: dict[Any, int] = {}

    def number_of(self, key: Any) -> int:
        """A number for a key of `computation_key`, which is long and slow to compare."""
        with self._lock:
            return self._numbers.setdefault(key, len(self._numbers))

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedDecoder:
        return CapturedDecoder(self.options, self.capture)

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedDecoder, (self.options, self.capture)

    def take(self, slots: int, rows: int, length: int, like: torch.Tensor) -> Arena:
        """An arena of the caller's own for `length` positions, an earlier one where that is large enough."""
        capacity = _round_up(length, ARENA_STEP)
        with self._lock:
            # What somebody still looks at is left to them.
            self._free = [arena for arena in self._free if arena.is_free()]
            fitting = [arena for arena in self._free if arena.fits(slots, rows, like)]
            found = next((arena for arena in fitting if arena.capacity >= capacity), None)
            dropped = [found] if found is not None else fitting
            self._free = [arena for arena in self._free if not any(arena is other for other in dropped)]
        if found is not None:
            return found
        try:
            return Arena(slots, rows, capacity, like)
        except torch.OutOfMemoryError:
            with self._lock:
                self._free = []
            torch.cuda.empty_cache()
            return Arena(slots, rows, capacity, like)

    def give(self, arena: Arena) -> None:
        """Takes back an arena that its cache has left."""
        with self._lock:
            self._free.append(arena)


class CapturedRun:
    """The captured decoding of one cache, which holds it; used by one thread at a time, as a cache is.

    Args:
        decoder: of the model.
    """

    def __init__(self, decoder: CapturedDecoder):
        self.decoder = decoder
        self._key = -1
        self._arena: Arena | None = None
        self._views: list[torch.Tensor] = []
        self._expected_length = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __del__(self) -> None:
        self._leave()

    def begin_call(self, model: Any) -> None:
        """Asks anew what the steps compute, which may have changed since the last call of `generate`."""
        self._key, self._expected_length = self.decoder.number_of(computation_key(model)), -1

    def _leave(self) -> None:
        if self._arena is not None:
            arena, self._arena, self._views = self._arena, None, []
            self.decoder.give(arena)

    @torch.no_grad()
    def step(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """See `InferenceMixin._captured_step`; the cache holds something already."""
        length, batch = cache.layers[0]._length, input_ids.shape[0]
        if not (length == self._expected_length < self._arena.capacity and self._lies_in(cache, batch)):
            with torch.inference_mode(False):
                self._begin(cache, attention_mask, batch, length)
        arena = self._arena
        arena.index.fill_(length)
        arena.input_ids[:batch].copy_(input_ids)
        arena.position_ids[:batch] = _positions(position_ids, attention_mask, length)
        with self.decoder.capture_lock:
            captured = arena.step(model, self._key, length, self.decoder.options, self.decoder.capture)
        logits = captured.replay()[:batch].clone()
        for layer in cache.layers:
            layer.hold(length + 1)
        self._expected_length = length + 1
        model._note_captured_step(cache, input_ids, attention_mask, position_ids)
        return logits

    def _lies_in(self, cache: Any, batch: int) -> bool:
        """Whether the storages of the cache are still the views of the arena that it was given."""
        return len(self._views) == len(cache.layers) and all(
            layer._key_storage is view and len(view) == batch for layer, view in zip(cache.layers, self._views)
        )

    def _begin(self, cache: Any, attention_mask: torch.Tensor | None, batch: int, length: int) -> None:
        """Lets the cache lie in an arena with room for one more position, and hides everything else in there."""
        first, slots, rows = cache.layers[0].keys, len(cache.layers), bucket_rows(batch)
        arena = self._arena
        if arena is not None and not (arena.fits(slots, rows, first) and length < arena.capacity):
            arena = None
        if arena is None or not self._lies_in(cache, batch):
            arena = self._move(cache, arena or self.decoder.take(slots, rows, length + 1, first), batch)
        # No number of an earlier conversation is left: one that is not finite would reach even those who hide it.
        arena.storage[..., length:, :].zero_()
        arena.storage[:, :, batch:].zero_()
        arena.visible.fill_(True)
        arena.visible[:batch] = False
        arena.visible[:batch, 0, 0, :length] = True if attention_mask is None else attention_mask[:, :length] != 0

    def _move(self, cache: Any, arena: Arena, batch: int) -> Arena:
        """Moves the cache into the arena, slot by slot, and leaves the one it was in."""
        views = []
        own = arena.storage.untyped_storage().data_ptr()
        for part, layer in zip(arena.storage, cache.layers):
            sources = (layer.keys, layer.values)
            if any(source.untyped_storage().data_ptr() == own for source in sources):
                sources = tuple(source.clone() for source in sources)
            for target, source in zip(part, sources):
                target[:batch, :, : layer._length] = source
            layer._key_storage, layer._value_storage = (target[:batch] for target in part)
            views.append(layer._key_storage)
        if arena is not self._arena:
            self._leave()
        self._arena, self._views = arena, views
        return arena


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


def computation_key(model: nn.Module) -> Any:
    """Stands for everything that decides what a step computes and from which memory, except the values in it.

    Where tensors lie and of which kind they are, the classes of modules and their attributes (adapters switched on and
    their scale, modes, numbers), the config (cycles, backend), and the settings of torch that choose kernels.
    """
    parts: list[Any] = [_facts(vars(model.config)), is_enabled(), torch.get_float32_matmul_precision()]
    cuda = torch.backends.cuda
    parts += [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]
    parts += [cuda.cudnn_sdp_enabled(), cuda.matmul.allow_tf32, cuda.matmul.allow_bf16_reduced_precision_reduction]
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not model:
            parts.append((name, type(module), _facts(vars(module))))
    return tuple(parts)


def _facts(value: Any, depth: int = 4) -> Any:
    """Something that compares equal as long as the numbers, words and tensors in a value are the same ones."""
    if type(value) in (torch.Tensor, nn.Parameter):
        return value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, value)))
    if depth and isinstance(value, (list, tuple)):
        return tuple(_facts(item, depth - 1) for item in value)
    if depth and isinstance(value, (dict, nn.ParameterDict)):
        return tuple((str(key), _facts(item, depth - 1)) for key, item in value.items())
    return type(value)


# ---- what a model offers --------------------------------------------------------------------------------------------


class InferenceMixin:
    """Speed at inference that a model switches on and off as a whole."""

    _decoder: CapturedDecoder | None = None
    compiles_decoding = False

    def optimize_for_inference(
        self, compile_layers: bool = False, weights: str | None = None, keep_weights: bool = True
    ) -> Any:
        """Makes decoding (and on the CPU prefill) faster; outputs are the same within rounding.

        On the CPU the linear layers take oneDNN's packed layout where a quick measurement says that it pays (bfloat16
        and float32). Their Parameters stay the same objects, hold no second copy, and are laid out plainly again by
        whatever uses their values: an optimizer, a merge of adapters. On CUDA the steps of `generate` are captured in
        CUDA graphs over static buffers, one for each bucket of rows and of lengths. `state_dict()` and
        `save_pretrained` work as before. `model.train()`, `undo_inference_optimization()` and resizing the embeddings
        end it; moving or casting the model keeps it where it applies. Where the fast kernels are switched off (see
        `use_fast_kernels`), or torch is in deterministic mode, nothing is measured and nothing packed.

        Args:
            compile_layers: one layer is compiled, for all layer calls. On the CPU that is done at once, in up to half
                a minute the first time on a machine, and asks for a C++ compiler; a new token of one row is then read
                at the speed of the memory. Weights keep the plain layout for it, in which prompts take up to a tenth
                longer than in the packed one, and steps of several rows up to half as long again. Without a compiler,
                that is said and the weights are packed. On CUDA it concerns the captured steps.
            weights: on the CPU, "int8" or "int4" also rounds the weights of the projections and of the output head,
                in seconds; see `quantized_hrm_text.py`. Answers then are those of the rounded weights, by whatever
                path and also with the fast kernels switched off (slowly). None leaves them as they are.
            keep_weights: with `weights`, whether undoing gives back the weights before rounding, which stay in memory
                for it (and are what `state_dict()` and `save_pretrained` see). False frees them: from then on the
                rounded ones are the weights of the model.

        Returns:
            The model itself.

        Raises:
            ValueError: `weights` is another word, or the model is not on a CPU.
        """
        if weights not in (None, "int8", "int4"):
            raise ValueError(f"`weights` is {weights!r}: give 'int8' or 'int4', or None to leave them as they are.")
        if weights is not None and self.device.type != "cpu":
            raise ValueError(
                f"`weights={weights!r}` rounds for a processor and the model is on {self.device.type!r}: move it to "
                "'cpu', or quantize the folder with `convert_weights.py`."
            )
        self.undo_inference_optimization()
        self.eval()
        if self.device.type == "cpu":
            compiles = compile_layers and is_enabled()
            quantized = 0 if weights is None else quantize_model(self, weights, keep_weights, compiles)
            quantized += adopt_model(self, compiles)
            if compiles and self._compile_decoding():
                return self
            if pack_model(self) + quantized == 0:
                logger.warning_once(
                    "`optimize_for_inference` packed nothing: the fast kernels are switched off, torch is in "
                    "deterministic mode, or oneDNN's packed weights are missing here or not faster for this model. "
                    "It runs as it is."
                )
        elif self.device.type == "cuda":
            self._decoder = CapturedDecoder(_DEFAULT_OPTIONS if compile_layers else None)
        else:
            logger.warning_once(f"`optimize_for_inference` does nothing on {self.device.type!r}.")
        return self

    def _compile_decoding(self) -> bool:
        """Whether the layers of decoding are compiled now; where that failed, weights take the operators' layout."""
        parts = [module for module in self.modules() if hasattr(module, "compiles_decoding")]
        stacks = [module for module in parts if hasattr(module, "layers")]
        failure = compile_model(self, stacks, self.get_output_embeddings())
        if failure is not None:
            logger.warning_once(f"torch could not compile the layers for decoding, which runs uncompiled: {failure}")
            return False
        for module in parts:
            module.compiles_decoding = True
        return True

    def undo_inference_optimization(self) -> Any:
        """Reverses `optimize_for_inference`; returns the model itself."""
        for module in self.modules():
            if hasattr(module, "compiles_decoding"):
                module.compiles_decoding = False
        unpack_model(self)
        give_back_model(self)
        self._decoder = None
        return self

    @property
    def is_optimized_for_inference(self) -> bool:
        """Whether weights are packed or quantized, or decoding is captured or compiled."""
        return self.compiles_decoding or self._decoder is not None or is_packed(self) or is_adopted(self)

    @staticmethod
    def use_fast_kernels(enabled: bool) -> contextlib.AbstractContextManager:
        """Switches all fast kernels of this process on or off; also for a `with` block. See `kernels_hrm_text.py`."""
        return use_kernels(enabled)

    def train(self, mode: bool = True) -> Any:
        """As in torch; training ends the optimization for inference."""
        if mode and self.is_optimized_for_inference:
            logger.warning_once("`train()` undoes `optimize_for_inference()`.")
            self.undo_inference_optimization()
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; layers of a compressed-tensors folder are given back first, for that library to save."""
        give_back_model(self)
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ends the optimization for inference."""
        self.undo_inference_optimization()
        return super().resize_token_embeddings(*args, **kwargs)

    # ---- captured decoding -------------------------------------------------------------------------------------

    def _captured_cache(self, generation_config: Any, given: Any) -> HrmTextCache | None:
        """The cache with which a call of `generate` decodes captured: one of its own, or the one it was `given`.

        None where decoding is not captured, or not for this call, which is said once.
        """
        if self._decoder is None:
            return None
        reason = self._why_not_captured(generation_config, given)
        if reason is not None:
            logger.warning_once(f"`optimize_for_inference`: decoding runs uncaptured, because {reason}.")
            if type(given) is HrmTextCache:
                given._captured = None
            return None
        cache = HrmTextCache(config=self.config) if given is None else given
        run = getattr(cache, "_captured", None)
        if run is None or run.decoder is not self._decoder:
            run = cache._captured = CapturedRun(self._decoder)
        run.begin_call(self)
        return cache

    def _why_not_captured(self, generation_config: Any, given: Any) -> str | None:
        config = self.config
        if generation_config.use_cache is False:
            return "`use_cache` is False"
        kind = generation_config.cache_implementation
        if given is not None and type(given) is not HrmTextCache:
            return f"its cache is a {type(given).__name__}: leave `past_key_values` unset"
        if given is None and kind not in (None, "dynamic", "dynamic_full"):
            return f"`cache_implementation` is {kind!r}: leave it unset"
        if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
            return "the rotary table depends on the length of the text"
        if any(getattr(source, f"output_{what}") for source in (config, generation_config) for what in _OUTPUTS):
            return "attentions or hidden states are asked for"
        if config._attn_implementation not in (None, "sdpa"):
            return f"the attention is {config._attn_implementation!r}: use 'sdpa'"
        if len({tensor.device for tensor in (*self.parameters(), *self.buffers())}) > 1:
            return "the model is spread over several devices"
        if torch.is_autocast_enabled(self.device.type):
            return "autocast is on: load or cast the model to that dtype instead"
        if calls_modules(self):
            return "hooks or wrappers on its modules have to run at every step"
        return None

    def _captured_step(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor | None:
        """The logits [batch, 1, vocab] of one new token a row, or None for a call that is not served.

        Only for calls of `generate` whose layout leaves nothing to check: the new tokens are real and causal, and no
        row is packed.

        Args:
            input_ids: [batch, 1]; anything else is not a decoding step.
            attention_mask: [batch, cached + 1], 0 at padding, or None.
            position_ids: [batch or 1, 1], or None.
            cache: the live cache; it holds the new token afterwards.
        """
        run = getattr(cache, "_captured", None)
        if run is None or run.decoder is not self._decoder or input_ids is None or input_ids.shape[1] != 1:
            return None
        if torch.compiler.is_compiling() or cache.get_seq_length() == 0:
            return None
        if attention_mask is not None and attention_mask.dim() != 2:
            return None
        return run.step(self, input_ids, attention_mask, position_ids, cache)

    # ---- `generate` with `CompileConfig` -----------------------------------------------------------------------

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What `generate` calls for a decoding step on a static cache: the model with one layer compiled.

        Unrolled, the loop is 128 layer calls for the 1B, which take minutes to compile; one layer takes seconds, and
        the same graph serves all of them. CUDA graphs of single layers would cost more than they save, so the mode
        "reduce-overhead" becomes the default one: `optimize_for_inference` captures whole steps.
        """
        if is_packed(self) or is_adopted(self):
            logger.warning_once(
                "packed weights cannot be compiled: `generate` runs as `optimize_for_inference` left it."
            )
            return self.__call__
        options = compile_config.to_dict() if compile_config is not None else {}
        if options.get("mode") == "reduce-overhead":
            options["mode"] = None
        kept = ("backend", "dynamic", "fullgraph", "mode", "options")
        chosen = {key: options[key] for key in kept if options.get(key) is not None}
        # Under the name by which transformers tells that `generate` has compiled.
        self._compiled_call = functools.partial(self._call_with_compiled_layers, chosen)
        return self._compiled_call

    def _call_with_compiled_layers(self, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with compiling_layers(None if calls_modules(self) else options):
            return self(*args, **kwargs)


_OUTPUTS = ("attentions", "hidden_states")


__all__ = ["InferenceMixin", "compiled_layer", "compiles_layers"]
