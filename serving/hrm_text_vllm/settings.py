"""What is chosen for HRM-Text when vLLM starts, and everything that is refused then."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .blocks import Envelope
from .registration import MODE, what_is_missing


if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


logger = init_logger(f"vllm.{__name__}")

SCHEDULER = "hrm_text_vllm.scheduler.make_scheduler"
RUNNER_SWITCH = "VLLM_USE_V2_MODEL_RUNNER"


class RefusedSettings(VerifyAndUpdateConfig):
    """Refuses to load HRM-Text."""

    reason: str

    @classmethod
    def because(cls, reason: str) -> type[RefusedSettings]:
        """Settings that refuse with this sentence."""
        return type("RefusedSettings", (cls,), {"reason": reason})

    @classmethod
    def verify_and_update_model_config(cls, model_config: ModelConfig) -> None:
        """Refuses."""
        raise ValueError(cls.reason)


class Settings(VerifyAndUpdateConfig):
    """Chooses scheduler, worker and tokenizer; refuses what would not be exact."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Settings of the model alone.

        Raises:
            ValueError: a vLLM that lacks what the plug-in needs, or a config without an envelope.
        """
        if missing := what_is_missing():
            raise ValueError(
                f"this vLLM lacks {', '.join(missing)}, which hrm-text-vllm needs: install a newer hrm-text-vllm, or "
                "a vLLM of the versions that it names."
            )
        Envelope.of_config(model_config.hf_config)
        if model_config.runner_type != "generate":
            raise ValueError(f"hrm-text-vllm generates text and does not serve as {model_config.runner_type!r}.")
        if model_config.enable_prompt_embeds:
            raise ValueError(
                "`enable_prompt_embeds` gives prompts without token ids, in which no block can be found: leave it out."
            )
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = MODE
        if model_config.generation_config != "vllm":
            _greedy_as_in_generate(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Settings of the whole engine.

        Raises:
            ValueError: an option with which answers would not be exact.
        """
        _refuse_options(vllm_config)
        _refuse_four_bits_in_float32(vllm_config.model_config)
        _choose_runner(vllm_config)
        _choose_parts(vllm_config)
        _make_room(vllm_config)


def _greedy_as_in_generate(model_config: ModelConfig) -> None:
    """vLLM does not read `do_sample`: a folder that asks for greedy decoding would be sampled at temperature 1."""
    chosen = model_config.override_generation_config
    written = model_config.try_get_generation_config()
    if not written.get("do_sample", False) and "temperature" not in chosen:
        chosen["temperature"] = 0.0
        logger.info("generation_config.json does not ask for sampling: requests without a temperature are greedy.")


def _refuse_options(vllm_config: VllmConfig) -> None:
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    speculation = vllm_config.speculative_config
    refused = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--long-prefill-token-threshold": scheduling.long_prefill_token_threshold > 0,
        "--enable-lora": vllm_config.lora_config is not None,
        "--speculative-config (other than method ngram)": speculation is not None and speculation.method != "ngram",
    }
    if named := [name for name, used in refused.items() if used]:
        raise ValueError(f"hrm-text-vllm cannot keep answers exact with {', '.join(named)}: leave it out.")


def _refuse_four_bits_in_float32(model_config: ModelConfig) -> None:
    """vLLM's product with 4-bit matrices on processors has no float32, and would end the first step."""
    if not current_platform.is_cpu() or model_config.dtype is not torch.float32:
        return
    written = getattr(model_config.hf_config, "quantization_config", None) or {}
    groups = written.get("config_groups", {}).values()
    if any((group.get("weights") or {}).get("num_bits") == 4 for group in groups):
        raise ValueError(
            "vLLM has no product of float32 with matrices in 4 bits on processors: pass --dtype bfloat16 or "
            "float16, or serve a folder in 8 bits (convert_weights.py --quantize w8a8)."
        )


def _choose_runner(vllm_config: VllmConfig) -> None:
    if os.environ.get(RUNNER_SWITCH) is None:
        os.environ[RUNNER_SWITCH] = "0"
    if vllm_config.use_v2_model_runner:
        raise ValueError(f"hrm-text-vllm works with vLLM's first model runner: set {RUNNER_SWITCH}=0.")


def _choose_parts(vllm_config: VllmConfig) -> None:
    parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
    on_cpu = current_platform.is_cpu()
    if not on_cpu and not current_platform.is_cuda():
        raise ValueError(f"hrm-text-vllm knows processors and CUDA, not {current_platform.device_name}.")
    worker = f"hrm_text_vllm.worker.{'Cpu' if on_cpu else 'Gpu'}BlockWorker"
    if parallel.worker_cls not in ("auto", worker):
        raise ValueError(
            f"hrm-text-vllm needs its own worker and --worker-cls is {parallel.worker_cls}: leave it out."
        )
    if scheduling.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f"hrm-text-vllm needs its own scheduler and --scheduler-cls is {scheduling.scheduler_cls}: leave it out."
        )
    parallel.worker_cls = worker
    scheduling.scheduler_cls = SCHEDULER
    if not on_cpu:
        _limit_graphs(vllm_config)


def _limit_graphs(vllm_config: VllmConfig) -> None:
    """A captured attention call keeps the causal flag it was captured with: only single-token steps may have one."""
    from vllm.config.compilation import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        raise ValueError(
            "a full CUDA graph of a prefill cannot follow prefix blocks: choose the cudagraph_mode PIECEWISE or "
            "FULL_AND_PIECEWISE in --compilation-config."
        )
    if vllm_config.speculative_config is not None and compilation.cudagraph_mode is not CUDAGraphMode.NONE:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        logger.info("CUDA graphs are piecewise: with speculation, a short prompt looks like a decoding step.")


def _make_room(vllm_config: VllmConfig) -> None:
    """A block is computed in one step, and one may be as long as the context."""
    scheduling: Any = vllm_config.scheduler_config
    needed = vllm_config.model_config.max_model_len + scheduling.max_num_seqs
    if scheduling.max_num_batched_tokens < needed:
        logger.info("max_num_batched_tokens is raised from %d to %d.", scheduling.max_num_batched_tokens, needed)
        scheduling.max_num_batched_tokens = needed
    limit = scheduling.max_num_scheduled_tokens
    if limit is not None and limit < needed:
        scheduling.max_num_scheduled_tokens = needed
    if not scheduling.enable_chunked_prefill:
        logger.info("Chunked prefill is off: a prompt waits until a step has room for all of it.")


__all__ = ["RefusedSettings", "Settings"]
