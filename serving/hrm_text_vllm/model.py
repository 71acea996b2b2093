"""vLLM's HRM-Text with attention that follows the prefix blocks.

Each attention layer keeps vLLM's kernel. Before a step, its metadata is rewritten: a request that computes tokens of a
block becomes several virtual requests over the same cache pages, cut at the block borders. A block is one that sees
all of its positions; a run of causal tokens is one with the causal flag, where the kernel takes the flag for each
request, and otherwise one for each token. A step without blocks, every decoding step, is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import PrefillPrefixLMAttention
from vllm.model_executor.models.hrm_text import HrmTextForCausalLM
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionType,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import KVCacheSpec

from .blocks import Envelope, split_rows
from .embedding import serve_on_processors


# Backends that may be split, and whether they take a causal flag for each request.
TAKES_CAUSAL_FLAGS = {"CPU_ATTN": True, "TRITON_ATTN": True, "FLASH_ATTN": False}

serve_on_processors()


class StepLayout:
    """Which blocks the requests of the current step hold; one for each model, shared by its attention layers.

    Attributes:
        envelope: of the model's config.
        runner: the model runner, whose batch names the requests; set by `worker`.
    """

    def __init__(self, envelope: Envelope) -> None:
        self.envelope = envelope
        self.runner: Any = None
        self._in_step = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Marks a real step; a dummy one has rows that belong to no request."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def split(self, metadata: CommonAttentionMetadata, causal_flags: bool) -> CommonAttentionMetadata:
        """The metadata of the step's requests, cut at their block borders.

        Args:
            metadata: of the step, a row for each request.
            causal_flags: whether the backend takes a causal flag for each request.

        Raises:
            RuntimeError: the model runner is not known, since another worker class is in charge.
            ValueError: a block that would be split over two steps.
        """
        if metadata.max_query_len == 1 or not self._in_step:
            if self.runner is None:
                raise RuntimeError(
                    "hrm-text-vllm needs its own worker class and another one is in charge: leave `--worker-cls` out."
                )
            return metadata.replace(causal=True)
        batch, offsets = self.runner.input_batch, metadata.query_start_loc_cpu.tolist()
        starts, lengths, blocks = [], [], []
        for row, request_id in enumerate(batch.req_ids[: metadata.num_reqs]):
            start, length = int(batch.num_computed_tokens_cpu[row]), offsets[row + 1] - offsets[row]
            state = self.runner.requests[request_id]
            in_prompt = length > 1 and start < state.num_prompt_tokens
            starts.append(start)
            lengths.append(length)
            blocks.append(self.envelope.blocks(state.prompt_token_ids or ()) if in_prompt else ())
        segments = split_rows(starts, lengths, blocks, causal_flags)
        if segments is None:
            return metadata.replace(causal=True)

        device, table = metadata.query_start_loc.device, metadata.block_table_tensor
        query_lengths = torch.tensor(segments.query_length, dtype=torch.int32)
        query_start = torch.zeros(len(segments.row) + 1, dtype=torch.int32)
        query_start[1:] = query_lengths.cumsum(0)
        seq_lens = torch.tensor(segments.seq_length, dtype=torch.int32)
        rows = torch.tensor(segments.row)
        # A query of one token sees the same with either flag.
        mixed = any(causal and length > 1 for causal, length in zip(segments.causal, segments.query_length))
        return metadata.replace(
            query_start_loc=query_start.to(device),
            query_start_loc_cpu=query_start,
            seq_lens=seq_lens.to(device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(segments.row),
            max_query_len=max(segments.query_length),
            max_seq_len=max(segments.seq_length),
            block_table_tensor=table[rows.to(table.device)].contiguous(),
            causal=torch.tensor(segments.causal, dtype=torch.int32, device=device) if mixed else False,
            is_prefilling=None if metadata.is_prefilling is None else metadata.is_prefilling[rows],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


@functools.lru_cache
def block_backend(underlying: type[AttentionBackend]) -> type[AttentionBackend]:
    """The attention backend `underlying` with metadata that follows the blocks.

    Raises:
        ValueError: a backend with which this was not made to work.
    """
    name = underlying.get_name()
    if name not in TAKES_CAUSAL_FLAGS:
        raise ValueError(
            f"hrm-text-vllm does not know the attention backend {name}: choose one of {', '.join(TAKES_CAUSAL_FLAGS)} "
            "with --attention-backend."
        )

    class BlockMetadataBuilder(underlying.get_builder_cls()):  # type: ignore[misc]
        """Builds the metadata of a step for virtual requests."""

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            layers = self.vllm_config.compilation_config.static_forward_context
            layout: StepLayout = layers[self.layer_names[0]].step_layout
            split = layout.split(common_attn_metadata, TAKES_CAUSAL_FLAGS[name])
            # The common prefix of the requests is a shortcut for causal ones.
            return super().build(0, split, fast_build)

    return subclass_attention_backend("HrmText", underlying, BlockMetadataBuilder)


class BlockAttention(PrefillPrefixLMAttention):
    """An attention layer of vLLM's model, made to follow the blocks.

    vLLM's model builds its own layers; they are turned into this class afterwards.
    """

    step_layout: StepLayout

    @classmethod
    def take_over(cls, layer: PrefillPrefixLMAttention, step_layout: StepLayout) -> None:
        """Turns a layer of vLLM's model into one of this class."""
        underlying = get_attn_backend(
            layer.head_size, torch.get_default_dtype(), layer.kv_cache_dtype, attn_type=AttentionType.DECODER
        )
        if not issubclass(layer.attn_backend, underlying):
            raise ValueError(
                f"vLLM gave an HRM-Text layer the attention backend {layer.attn_backend.__name__} and chooses "
                f"{underlying.__name__}: name one with --attention-backend."
            )
        layer.__class__ = cls
        layer.attn_backend = block_backend(underlying)
        layer.step_layout = step_layout

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """As of a causal layer: scheduler and page hashes know of the blocks, nothing need be switched off."""
        spec = super().get_kv_cache_spec(vllm_config)
        return spec if spec is None else replace(spec, non_causal=False)


class ExactHrmTextForCausalLM(HrmTextForCausalLM):
    """vLLM's HRM-Text, whose attention follows the prefix blocks of each prompt."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.step_layout = StepLayout(Envelope.of_config(self.config))
        layers = [module for module in self.modules() if isinstance(module, PrefillPrefixLMAttention)]
        if not layers:
            raise RuntimeError("vLLM's HRM-Text holds no prefix attention: install a vLLM that hrm-text-vllm knows.")
        for layer in layers:
            BlockAttention.take_over(layer, self.step_layout)


__all__ = ["BlockAttention", "ExactHrmTextForCausalLM", "StepLayout", "block_backend"]
