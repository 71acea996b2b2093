"""Reloads a converted folder in a new process, as a user would, and compares it with its source.

`verify` starts this module as a program. The request goes in as JSON on standard input, the findings come back on
standard output, and neither side shares memory with the other.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError


ROOT = Path(__file__).resolve().parent.parent
PROMPT_LENGTH, RESPONSE_LENGTH = 16, 8


@dataclass(frozen=True)
class Verification:
    """Findings of a reload. `differences` is empty where the folder is what the source was."""

    loaded_as: str
    tensors: int
    logits: str
    tokenizer: str
    differences: list[str]

    def lines(self) -> list[str]:
        """The report, a line an item."""
        return [
            f"loaded as  {self.loaded_as}",
            f"tensors    {self.tensors} equal to the source",
            f"logits     {self.logits}",
            f"tokenizer  {self.tokenizer}",
            *(f"DIFFERS    {line}" for line in self.differences),
        ]


def verify(
    folder: Path, source: dict[str, Any], config: dict[str, Any], digests: dict[str, str], remote_code: bool
) -> Verification:
    """Compares a folder with its source in a new process.

    Args:
        folder: the converted folder.
        source: the arguments of `open_source` that opened the source, JSON-ready.
        config: the config that was written, as it is in memory.
        digests: SHA-256 of each tensor's bytes in the config's dtype, taken when the source was read.
        remote_code: load through the folder's own modules; else through transformers' class.

    Raises:
        ConversionError: the process failed; the message ends in its last line.
    """
    request = {
        "folder": str(folder),
        "source": source,
        "config": config,
        "digests": digests,
        "remote_code": remote_code,
    }
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as modules:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": modules,
            "PYTHONPATH": os.pathsep.join(path),
        }
        done = subprocess.run(
            [sys.executable, "-m", "conversion.verify"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConversionError(f"{folder} does not load ({lines[-1]}): nothing was put in place; report this")
    return Verification(**json.loads(done.stdout.splitlines()[-1]))


def _findings(request: dict[str, Any]) -> dict[str, Any]:
    import transformers
    from transformers import AutoModelForCausalLM

    folder, expected = request["folder"], request["digests"]
    if not request["remote_code"] and not hasattr(transformers, "HrmTextConfig"):
        return _files_only(Path(folder), expected, transformers.__version__)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=request["remote_code"], dtype="auto", output_loading_info=True
    )
    differences = [
        f"{kind.removesuffix('_keys')} on loading: {key}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in info[kind]
    ]
    state = model.state_dict()
    differences += [f"{name} is not in the loaded model" for name in expected.keys() - state.keys()]
    differences += [f"{name} is in the loaded model only" for name in state.keys() - expected.keys()]
    differences += _unequal(expected, state)

    prompt = _fixed_prompt(request["config"])
    logits = _logits(model, prompt)
    model_class, config_class = type(model), type(model.config)
    attention = model.config._attn_implementation
    del model, state

    in_memory = _in_memory(model_class, config_class, request, attention)
    difference = (logits - _logits(in_memory, prompt)).abs().max().item()
    allowed = 1e-5 if request["config"]["dtype"] in ("float32", "float64") else 2e-2
    if not logits.isfinite().all():
        differences.append("the logits hold NaN or infinite values")
    elif not difference <= allowed * max(1.0, logits.abs().max().item()):
        differences.append(f"the logits differ from the in-memory model's by {difference:.3g}")
    tokenizer, faults = _tokenizer(folder, request)
    return {
        "loaded_as": f"{model_class.__name__}, transformers {transformers.__version__}",
        "tensors": len(expected) - sum(" differs" in line for line in differences),
        "logits": f"{tuple(logits.shape[1:])} finite, within {difference:.2g} of the in-memory model",
        "tokenizer": tokenizer,
        "differences": differences + faults,
    }


def _in_memory(model_class: Any, config_class: Any, request: dict[str, Any], attention: str) -> Any:
    """A model made from the config and the source's tensors in memory, which no file of the folder has part in."""
    import torch

    from .layout import split_names
    from .sources import open_source

    source = {**request["source"], "path": Path(request["source"]["path"])}
    if source.get("tokenizer"):
        source["tokenizer"] = Path(source["tokenizer"])
    opened = open_source(**source)
    config = config_class(**{key: value for key, value in request["config"].items() if key != "auto_map"})
    config._attn_implementation = attention
    dtype = getattr(torch, request["config"]["dtype"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Every weight is filled below: this process, which ends soon, need not draw random ones for a minute.
        base = next(ancestor for ancestor in model_class.__mro__ if "_init_weights" in vars(ancestor))
        base._init_weights = lambda model, module: None
        model = model_class(config).eval()
    finally:
        torch.set_default_dtype(default)
    state = model.state_dict()
    with torch.no_grad():
        for name in opened.specs:
            parts = (name,) if name in state else split_names(name)
            for part, value in zip(parts, opened.read(name).chunk(len(parts)), strict=True):
                state[part].copy_(value)
    return model


def _tokenizer(folder: str, request: dict[str, Any]) -> tuple[str, list[str]]:
    """What the folder's tokenizer is, and where it disagrees with the config."""
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").exists():
        return "none was found: pass --tokenizer to make the folder complete", []
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    faults = []
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        said, found = request["config"][field], getattr(tokenizer, field)
        if found not in (said if isinstance(said, list) else [said]):
            faults.append(f"{field} is {said} in the config and {found} in the tokenizer")
    return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens", faults


def _files_only(folder: Path, expected: dict[str, str], version: str) -> dict[str, Any]:
    """The comparison that is left where the installed transformers has no class for the split layout."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    differences = [f"{name} is in one of them only" for name in expected.keys() ^ state.keys()]
    differences += _unequal(expected, state)
    return {
        "loaded_as": f"plain files: transformers {version} has no hrm_text class (5.9 has)",
        "tensors": len(expected) - len(differences),
        "logits": "not computed",
        "tokenizer": "not loaded",
        "differences": differences,
    }


def _unequal(expected: dict[str, str], state: dict[str, Any]) -> list[str]:
    from .writer import tensor_digest

    return [
        f"{name} differs from the source"
        for name in expected.keys() & state.keys()
        if tensor_digest(state[name]) != expected[name]
    ]


def _fixed_prompt(config: dict[str, Any]) -> dict[str, Any]:
    """A prompt of one prefix block and the beginning of its response, [1, 24]."""
    import torch

    length = min(PROMPT_LENGTH + RESPONSE_LENGTH, config["max_position_embeddings"])
    ids = (torch.arange(length)[None] * 7919 + 13) % config["vocab_size"]
    types = (torch.arange(length)[None] < PROMPT_LENGTH).long()
    return {"input_ids": ids, "token_type_ids": types, "use_cache": False}


def _logits(model: Any, prompt: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(**prompt).logits.float()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = json.dumps(_findings(json.load(sys.stdin)))
    print(answer)
