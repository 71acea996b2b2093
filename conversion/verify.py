"""Reloads a converted folder in a new process, as a user would, and compares it with its source.

`verify` starts this module as a program. The request goes in as JSON on standard input, the findings come back on
standard output, and neither side shares memory with the other.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .reading import said


ROOT = Path(__file__).resolve().parent.parent
PROMPT_LENGTH, RESPONSE_LENGTH = 16, 8
ROUGH_TOLERANCE = 2e-2
OVERFLOW = (
    "its weights are so large that the logits overflow: the file is damaged, or was saved from a run that diverged"
)


@dataclass(frozen=True)
class Verification:
    """Findings of a reload. `differences` is empty where the folder is what the source was.

    `damage` says what is wrong with the source itself: its logits are not finite, or its tokenizer does not load.
    """

    loaded_as: str
    tensors: int
    logits: str
    tokenizer: str
    differences: list[str]
    damage: str | None = None
    quality: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report, one line per item."""
        return [
            f"loaded as  {self.loaded_as}",
            f"tensors    {self.tensors} equal to the source",
            *(f"quantized  {line}" for line in self.quality),
            f"logits     {self.logits}",
            f"tokenizer  {self.tokenizer}",
            *(f"DIFFERS    {line}" for line in self.differences),
        ]


def verify(folder: Path, request: dict[str, Any]) -> Verification:
    """Compares a folder with its source in a new process.

    Args:
        folder: the converted folder.
        request: JSON-ready. `source` has the arguments of `open_source` that opened it; `config` is what was written,
            as it is in memory; `remote_code` says whether to load through the folder's own modules, or else through
            transformers' class; `quantization`, where weights are, has `name` and `group_size` of the scheme, and the
            `calibration` rows or None.

    Raises:
        ConversionError: the process failed; the message ends in its last line.
    """
    request = {"folder": str(folder), **request}
    done = run_apart("conversion.verify", request)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConversionError(
            f"{request['source']['path']} was converted to a folder that does not load ({lines[-1]}): nothing was put "
            "in place; report this"
        )
    return Verification(**json.loads(done.stdout.splitlines()[-1]))


def run_apart(module: str, request: dict[str, Any], quiet: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a module of this package as a program, offline, with a request as JSON on its standard input.

    Args:
        quiet: keep what it writes on standard error, its progress, instead of showing it.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as modules:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": modules,
            "PYTHONPATH": os.pathsep.join(path),
        }
        return subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(request),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            cwd=ROOT,
            env=environment,
        )


def _findings(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    from .sources import open_source
    from .writer import same_bits

    if request.get("quantization"):
        from .quality import quantized_findings

        return quantized_findings(request)
    folder, config = Path(request["folder"]), request["config"]
    source, written = open_requested(request), open_source(folder)
    if not request["remote_code"] and library_class() is None:
        differences = _unequal_files(source, written, list(source.specs))
        return {
            "loaded_as": f"plain files: transformers {transformers.__version__} has no hrm_text class (5.9 has)",
            "tensors": len(source.specs) - len(differences),
            "logits": "not computed",
            "tokenizer": "not loaded",
            "differences": differences,
        }
    dtype = getattr(torch, config["dtype"])
    # A tensor that the file keeps wider than the model is rounded on loading, which could hide a difference.
    differences = _unequal_files(
        source, written, [name for name, spec in written.specs.items() if spec.dtype != dtype]
    )

    # The model in memory comes first and goes before the other is loaded, and then the source is read again tensor by
    # tensor: no two copies of a large model are held.
    prompt = fixed_prompt(config)
    wanted = logits_of(model_in_memory(request, lambda names: tensors_of(source, names, dtype)), prompt)
    # NaN in a tensor has been refused before it was written.
    damage = None if wanted.isfinite().all() else OVERFLOW
    give_memory_back()
    model, misfits = load_folder(folder, request["remote_code"])
    differences += misfits
    state = model.state_dict()
    equal, seen = 0, set()
    for name, tensor in tensors_of(source, state.keys(), dtype):
        same = name in state and same_bits(state[name], tensor)
        seen.add(name)
        equal += same
        if not same:
            differences.append(
                f"{name} " + ("differs from the source" if name in state else "is not in the loaded model")
            )
    differences += [f"{name} is in the loaded model only" for name in state.keys() - seen]

    logits = logits_of(model, prompt)
    difference, unlike = compare_logits(logits, wanted, tolerance(config), "the in-memory model's")
    differences += unlike
    tokenizer, faults, fault_of_source = checked_tokenizer(folder, request)
    return {
        "loaded_as": f"{type(model).__name__}, transformers {transformers.__version__}",
        "tensors": equal,
        "logits": f"{tuple(logits.shape[1:])} finite, within {difference:.2g} of the in-memory model",
        "tokenizer": tokenizer,
        "differences": differences + faults,
        "damage": damage or fault_of_source,
    }


def load_folder(folder: Path, remote_code: bool) -> tuple[Any, list[str]]:
    """The model that a user's `from_pretrained` makes of a folder, and the tensors that did not fit."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=remote_code, dtype="auto", output_loading_info=True
    )
    misfits = [
        f"{kind.removesuffix('_keys')} on loading: {key}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in info[kind]
    ]
    return model, misfits


def tolerance(config: dict[str, Any]) -> float:
    """How far logits may be apart that were summed in another order, over the largest of them (or 1)."""
    return 1e-5 if config["dtype"] in ("float32", "float64") else ROUGH_TOLERANCE


def compare_logits(logits: Any, wanted: Any, allowed: float, whose: str) -> tuple[float, list[str]]:
    """How far logits are from those that are wanted, `whose` these are, and what is wrong with them."""
    difference = (logits - wanted).abs().max().item()
    wrong = []
    if not logits.isfinite().all():
        wrong.append("the logits hold NaN or infinite values")
    elif not difference <= allowed * max(1.0, wanted.abs().max().item()):
        wrong.append(f"the logits differ from {whose} by {difference:.3g}")
    return difference, wrong


def open_requested(request: dict[str, Any]) -> Any:
    """The source that a request names."""
    from .sources import open_source

    opening = {**request["source"], "path": Path(request["source"]["path"])}
    if opening.get("tokenizer"):
        opening["tokenizer"] = Path(opening["tokenizer"])
    return open_source(**opening)


def give_memory_back() -> None:
    """Frees cycles of references, which models have, and makes Linux's allocator return free memory to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def library_class() -> Any:
    """Transformers' own class, None where it has none (before 5.9)."""
    import transformers

    return getattr(transformers, "HrmTextForCausalLM", None)


def model_in_memory(request: dict[str, Any], tensors: Callable[[Collection[str]], Iterable[tuple[str, Any]]]) -> Any:
    """A model built in memory from the request's config; of the folder it uses only the code.

    Args:
        tensors: gives the values of these parameters, each with its name.
    """
    import torch
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = request["config"]
    if request["remote_code"]:
        model_class = get_class_from_dynamic_module(config["auto_map"]["AutoModelForCausalLM"], request["folder"])
    else:
        model_class = library_class()
    left_out = ("auto_map", "quantization_config")
    settings = model_class.config_class(**{key: value for key, value in config.items() if key not in left_out})
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, config["dtype"]))
    try:
        with _parameters_without_memory():
            model = model_class(settings).eval()
    finally:
        torch.set_default_dtype(default)
    model.load_state_dict(dict(tensors(model.state_dict().keys())), assign=True)
    return model


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters made inside are on the meta device, one at a time; buffers, such as rotary frequencies, are real.

    accelerate has this too, but converting needs torch and transformers alone.
    """
    import torch

    register = torch.nn.Module.register_parameter

    def register_empty(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def tensors_of(source: Any, names: Collection[str], dtype: Any) -> Iterator[tuple[str, Any]]:
    """The source's tensors in a dtype, one read at a time, by their names in a model, which may have them split."""
    from .layout import split_names

    for name in source.specs:
        parts = (name,) if name in names else split_names(name)
        yield from zip(parts, source.read(name).to(dtype).chunk(len(parts)), strict=True)


def checked_tokenizer(folder: Path, request: dict[str, Any]) -> tuple[str, list[str], str | None]:
    """What `read_tokenizer` finds, and what is wrong with the source where its tokenizer does not load."""
    try:
        return *read_tokenizer(folder, request), None
    except Exception as error:  # whatever the tokenizers library makes of a damaged file
        fault = f"its tokenizer does not load ({type(error).__name__}: {said(error)}): pass another with --tokenizer"
        return "does not load", [], fault


def read_tokenizer(folder: Path, request: dict[str, Any]) -> tuple[str, list[str]]:
    """What the folder's tokenizer is, and where it disagrees with the config."""
    from transformers import AutoTokenizer

    from .tokenizer import find_tokenizer

    if find_tokenizer(folder, required=False) is None:
        return "none was found: pass --tokenizer to make the folder complete", []
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    faults = []
    # A tokenizer that was kept as it is may disagree with its config, as it did in the source.
    for name in () if not hasattr(tokenizer, "encode_prompt") else ("bos_token_id", "eos_token_id", "pad_token_id"):
        said, found = request["config"][name], getattr(tokenizer, name)
        if found not in (said if isinstance(said, list) else [said]):
            faults.append(f"{name} is {said} in the config and {found} in the tokenizer")
    return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens", faults


def _unequal_files(source: Any, written: Any, names: list[str]) -> list[str]:
    """The tensors of these published names that differ between the source and the files of the folder."""
    from .writer import same_bits

    return [
        f"{name} differs from the source"
        for name in names
        if not same_bits(written.read(name), source.read(name).to(written.specs[name].dtype))
    ]


def fixed_prompt(config: dict[str, Any]) -> dict[str, Any]:
    """A prompt of one prefix block and the beginning of its response, [1, 24]."""
    import torch

    length = min(PROMPT_LENGTH + RESPONSE_LENGTH, config["max_position_embeddings"])
    ids = (torch.arange(length)[None] * 7919 + 13) % config["vocab_size"]
    types = (torch.arange(length)[None] < PROMPT_LENGTH).long()
    return {"input_ids": ids, "token_type_ids": types, "use_cache": False}


def logits_of(model: Any, prompt: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(**prompt).logits.float()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = json.dumps(_findings(json.load(sys.stdin)))
    print(answer)
