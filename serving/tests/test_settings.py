"""What is chosen when vLLM starts, and what is refused then; no engine is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.measure.engine import ROOT


FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def configured(folder: Path = ROOT, **options: Any) -> Any:
    """The settings of an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder), **{"dtype": "float32", "enforce_eager": True, **options}
    ).create_engine_config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of Nano whose config can be changed."""
    for name in FILES:
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def change(folder: Path, name: str, **values: Any) -> None:
    """Sets values of a JSON file; None removes one."""
    content = {**json.loads((folder / name).read_text()), **values}
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_what_is_chosen() -> None:
    config = configured(max_num_batched_tokens=128, max_num_seqs=8)
    assert config.scheduler_config.scheduler_cls == "hrm_text_vllm.scheduler.make_scheduler"
    assert config.parallel_config.worker_cls == "hrm_text_vllm.worker.CpuBlockWorker"
    assert config.model_config.tokenizer_mode == "hrm_text"
    assert config.scheduler_config.max_num_batched_tokens == 1024 + 8
    assert config.cache_config.enable_prefix_caching and config.scheduler_config.enable_chunked_prefill
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.0, "max_tokens": 128}
    roomy = configured(max_num_batched_tokens=5000, max_num_seqs=8)
    assert roomy.scheduler_config.max_num_batched_tokens == 5000


def test_sampling_that_the_folder_or_the_user_asks_for_stays(folder: Path) -> None:
    assert configured(generation_config="vllm").model_config.get_diff_sampling_param() == {}
    chosen = configured(override_generation_config={"temperature": 0.5}).model_config.get_diff_sampling_param()
    assert chosen["temperature"] == 0.5
    change(folder, "generation_config.json", do_sample=True, temperature=0.7)
    assert configured(folder).model_config.get_diff_sampling_param()["temperature"] == 0.7


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
        ({"long_prefill_token_threshold": 64}, "--long-prefill-token-threshold"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"runner": "pooling"}, "generates text"),
        ({"speculative_config": {"method": "suffix", "num_speculative_tokens": 2}}, ""),
    ],
)
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, ImportError), match=says):
        configured(**options)


def test_the_second_model_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        configured()


def test_a_config_without_an_envelope(folder: Path) -> None:
    """As in a published checkpoint that was not converted."""
    change(folder, "config.json", prefix_end_token_id=None)
    with pytest.raises(ValueError, match="prefix_end_token_id"):
        configured(folder)
    assert configured(folder, hf_overrides={"prefix_end_token_id": 7})


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_in_four_bits_need_two_bytes(folder: Path, bits: int) -> None:
    """vLLM's product with them on processors has no float32."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    change(
        folder,
        "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    )
    assert configured(folder, dtype="bfloat16") and configured(folder, dtype="float16")
    if bits == 8:
        assert configured(folder)
        return
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        configured(folder)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.1", "1.0"])
def test_a_vllm_that_is_not_known(version: str) -> None:
    """HRM-Text is refused with a sentence; what another model needs is not touched."""
    code = (
        f"import vllm; vllm.__version__ = {version!r}\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.model_executor.models import ModelRegistry\n"
        "try:\n"
        f"    EngineArgs(model={str(ROOT)!r}).create_engine_config()\n"
        "except ValueError as error:\n"
        "    assert 'install vLLM 0.32' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('it was accepted')\n"
        "assert 'hrm_text_vllm' not in repr(ModelRegistry.models['HrmTextForCausalLM'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_vllm_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from hrm_text_vllm import registration
    from vllm.v1.core.sched.scheduler import Scheduler

    assert registration.what_is_missing() == []
    monkeypatch.delattr(Scheduler, "_reserve_prefill_lookahead")
    assert registration.what_is_missing() == ["vllm.v1.core.sched.scheduler.Scheduler._reserve_prefill_lookahead"]
    with pytest.raises(ValueError, match="_reserve_prefill_lookahead"):
        configured()
