"""vLLM in this process, so that its scheduler can be looked at."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]


def prepare() -> None:
    """Sets what vLLM reads when it is imported: offline, and the engine in this process with its threads."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )


@contextmanager
def running(folder: Path = ROOT, **options: Any) -> Iterator[Any]:
    """An `LLM` that serves a folder in float32, and is taken down after use; one at a time."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"max_num_seqs": 16, "block_size": 32, "enforce_eager": True, "dtype": "float32", **options}
    llm = LLM(model=str(folder), seed=0, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def count_preemptions(llm: Any) -> list[str]:
    """A list that grows by a request's id whenever one is preempted."""
    scheduler, preempted = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return preempted
