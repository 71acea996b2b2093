"""Scheduling that knows of prefix blocks: where a prefill may end, and which cache pages two requests may share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import BlockHash, generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .blocks import Block, Envelope, last_cut, page_key


def prompt_blocks(envelope: Envelope, request: Request) -> list[Block]:
    """The blocks of a request's prompt, found once and kept on the request."""
    known = getattr(request, "_hrm_text_blocks", None)
    if known is None or known[0] != request.num_prompt_tokens:
        known = request.num_prompt_tokens, envelope.blocks(request.prompt_token_ids or ())
        request._hrm_text_blocks = known
    return known[1]


def page_hasher(
    envelope: Envelope, page_size: int, hash_function: Callable[[Any], bytes]
) -> Callable[[Request], list[BlockHash]]:
    """A hasher of a request's full cache pages, chained as vLLM's own, that also covers what blocks make of them.

    Keys and values inside a block depend on all of its tokens, so that a page whose last block goes on behind it may
    only be shared by prompts in which the block goes on alike. With that in the hash, a hit may end inside a block.
    """

    def new_hashes(request: Request) -> list[BlockHash]:
        blocks, token_ids = prompt_blocks(envelope, request), request.all_token_ids
        hashes: list[BlockHash] = []
        parent = request.block_hashes[-1] if request.block_hashes else None
        first = len(request.block_hashes) * page_size
        for start in range(first, request.num_tokens - page_size + 1, page_size):
            stop = start + page_size
            keys, _ = generate_block_hash_extra_keys(request, start, stop, 0)
            own = page_key(blocks, token_ids, start, stop)
            if own is not None:
                keys = (*(keys or ()), own)
            parent = hash_block_tokens(hash_function, parent, token_ids[start:stop], keys)
            hashes.append(parent)
        return hashes

    return new_hashes


class BlockScheduling:
    """What is added to a scheduler of vLLM."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._envelope = Envelope.of_config(vllm_config.model_config.hf_config)
        algorithm = vllm_config.cache_config.prefix_caching_hash_algo
        self._page_hasher = page_hasher(self._envelope, self.hash_block_size, get_hash_fn_by_name(algorithm))

    def add_request(self, request: Request) -> None:
        """Takes a request, and hashes its cache pages anew.

        Raises:
            ValueError: a session whose prompt comes in parts, so that a block could come in parts too.
        """
        if request.resumable:
            raise ValueError("HRM-Text cannot read a prompt that comes in parts: pass each turn as a whole prompt.")
        if request._block_hasher is not None:
            request._block_hasher = self._page_hasher
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Takes the end of a chunk back to where no block is split; 0 leaves the request to a step with more room.

        vLLM asks here for every request and every chunk. The budget of a step holds a whole prompt (see `settings`),
        so that a block that is left now is taken at the latest when the requests before it have ended.
        """
        new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if new_tokens <= 0 or num_computed_tokens >= request.num_prompt_tokens:
            return new_tokens
        stop = num_computed_tokens + new_tokens
        return last_cut(prompt_blocks(self._envelope, request), num_computed_tokens, stop) - num_computed_tokens


class BlockScheduler(BlockScheduling, Scheduler):
    """vLLM's scheduler, with blocks kept whole."""


class AsyncBlockScheduler(BlockScheduling, AsyncScheduler):
    """vLLM's asynchronous scheduler, with blocks kept whole."""


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine; vLLM decides only after `settings` whether it is an asynchronous one."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    return (AsyncBlockScheduler if asynchronous else BlockScheduler)(vllm_config, *args, **kwargs)


__all__ = ["AsyncBlockScheduler", "BlockScheduler", "make_scheduler", "page_hasher", "prompt_blocks"]
