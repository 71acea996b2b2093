"""llama.cpp's figures on the same weights, where it is built."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Figure, merged
from benchmarks.models import ROOT


# Names of `llama-quantize`; BF16 is what the converter writes.
TYPES = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
# Prompts up to this length; longer ones take it minutes.
LONGEST_PROMPT = 512
# Steps of one timed run: after a context of its own, which takes longer than they do.
STEPS = 8
# Seconds that a program may take: a context of 3072 of the 1B is read in minutes.
_PATIENCE = 3600
_TRIES = 5


@dataclass
class LlamaCpp:
    """The programs of a build, and the files that they were given.

    Attributes:
        folder: holds `llama-bench`, `llama-quantize` and `llama-perplexity`; the converter `convert_hf_to_gguf.py`
            lies there or in a folder above.
        kept: where converted files stay for later runs; None for a folder that goes with this object.
        types: of `TYPES`.
        threads: CPU threads.
        layers_on_gpu: 0 for the CPU.
    """

    folder: Path
    kept: Path | None
    types: tuple[str, ...]
    threads: int
    layers_on_gpu: int = 0
    _own: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("llama-bench", "llama-quantize", "llama-perplexity", "convert_hf_to_gguf.py"):
            self.program(name)
        if self.kept is None:
            self._own = tempfile.TemporaryDirectory()
            self.kept = Path(self._own.name)
        # In full: `llama-quantize` takes a name that opens with a digit for the number of a type.
        self.kept = self.kept.expanduser().resolve()
        self.kept.mkdir(parents=True, exist_ok=True)

    def program(self, name: str) -> Path:
        """Where a program is.

        Raises:
            FileNotFoundError: it is neither in the folder nor above.
        """
        for place in (self.folder, *self.folder.parents):
            if (place / name).is_file():
                return place / name
        raise FileNotFoundError(
            f"--llama-cpp: {name} is neither in {self.folder} nor in a folder above it; build llama.cpp there"
        )

    def files(self, model: Any, label: str) -> dict[str, Path]:
        """One file for each type, made from the weights of our model unless an earlier run left it.

        Args:
            model: ours, as loaded.
            label: opens the names; a checksum of the weights follows.
        """
        stem = self.kept / f"{label}-{checksum(model):08x}"
        whole = "BF16" if model.dtype is torch.bfloat16 else "F32"
        first = stem.with_suffix(f".{whole}.gguf")
        if not first.is_file():
            with tempfile.TemporaryDirectory(dir=self.kept) as work:
                source = Path(work) / "model"
                model.save_pretrained(source)
                _make_convertible(source)
                unfinished = Path(work) / "model.gguf"
                convert(self.program("convert_hf_to_gguf.py"), source, unfinished, whole.lower())
                unfinished.replace(first)
        found = {}
        for kind in self.types:
            found[kind] = stem.with_suffix(f".{kind}.gguf")
            if not found[kind].is_file():
                unfinished = found[kind].with_suffix(".part")
                _run([str(self.program("llama-quantize")), str(first), str(unfinished), kind, str(self.threads)])
                unfinished.replace(found[kind])
        return found

    def seconds(self, file: Path, arguments: list[str], tokens: int, rounds: int) -> Figure:
        """What `llama-bench` measures: seconds for one of `tokens`, in each of `rounds` runs after a warm-up."""
        command = [str(self.program("llama-bench")), "-m", str(file), "-t", str(self.threads), "-r", str(rounds)]
        # Read into memory of its own: mapped pages of a large file come and go with what else the machine does.
        command += ["-o", "json", "-lm", "none", "-ngl", str(self.layers_on_gpu), *arguments]
        (answer,) = json.loads(_run(command))
        return Figure(tuple(nanoseconds / 1e9 / tokens for nanoseconds in answer["samples_ns"]))

    def divergence(self, file: Path, base: Path, context: int) -> float:
        """Mean KL divergence from the probabilities in `base` (see `quality.write_base`), over its scored positions.

        Args:
            file: of the model.
            base: what `llama-perplexity --kl-divergence-base` reads.
            context: tokens of a chunk.
        """
        command = [str(self.program("llama-perplexity")), "-m", str(file), "--kl-divergence"]
        command += ["--kl-divergence-base", str(base), "-c", str(context), "-b", str(context)]
        command += ["-t", str(self.threads), "-ngl", str(self.layers_on_gpu)]
        # Its log is written by a thread that the end of the program sometimes outruns, and the mean comes last.
        for _ in range(_TRIES - 1):
            with contextlib.suppress(ValueError):
                return divergence_printed(_run(command, both=True))
        return divergence_printed(_run(command, both=True))


def divergence_printed(text: str) -> float:
    """The mean KL divergence in what `llama-perplexity` prints."""
    found = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", text)
    if found is None:
        raise ValueError(f"llama-perplexity printed no mean KLD:\n{text[-2000:]}")
    return float(found.group(1))


def checksum(model: Any) -> int:
    """Of the first bytes of every tensor and of what else computes, so that a file is not taken for other weights."""
    config = model.config
    # Not the whole config: saving adds to it.
    numbers = (config.H_cycles, config.L_cycles, config.num_attention_heads, config.embedding_scale)
    value = zlib.crc32(repr((*numbers, config.rms_norm_eps, config.rope_parameters["rope_theta"])).encode())
    for parameter in model.parameters():
        first = parameter.data.reshape(-1)[: 1 << 14].cpu().contiguous().view(torch.uint8)
        value = zlib.crc32(first.numpy().tobytes(), value)
    return value


def measure_llama(bench: Any) -> None:
    """Times each file of `bench.llama` between two turns of our own variants, at batch 1.

    Args:
        bench: a `Bench` with its models and its `LlamaCpp`; rows are appended to it.
    """
    files = bench.llama_files
    for kind, file in files.items():
        bench.note_bytes("bytes", "weights", {f"llama.cpp {kind}": {"median": float(file.stat().st_size)}})

    def between(case: str, ours: Callable[[], dict[str, Figure]], arguments: list[str], tokens: int) -> None:
        parts, theirs = [ours()], {}
        for kind, file in files.items():
            theirs[f"llama.cpp {kind}"] = bench.llama.seconds(file, arguments, tokens, bench.plan.rounds)
            parts.append(ours())
        bench.note("llama.cpp", case, {**merged(parts), **theirs})

    for context in sorted({context for batch, context in bench.plan.decode if batch == 1}):
        between(
            f"step at context {context}",
            partial(bench.time_decode, 1, context, 1),
            ["-p", "0", "-n", str(STEPS), "-d", str(context)],
            STEPS,
        )
    for tokens in (tokens for tokens in bench.plan.prefill if tokens <= LONGEST_PROMPT):
        between(f"prompt of {tokens}", partial(bench.time_prefill, tokens, 1), ["-n", "0", "-p", str(tokens)], 1)


def convert(converter: Path, source: Path, target: Path, kind: str = "bf16") -> None:
    """Runs llama.cpp's converter on a folder whose tokenizer it does not know.

    The converter refuses tokenizers by a fingerprint of how they split a test text, and that of the repository is not
    on its list; how text is split does not matter to a benchmark.
    """
    code = (
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(converter.parent)!r}, {str(converter.parent / 'gguf-py')!r}]\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'\n"
        f"sys.argv = ['convert', {str(source)!r}, '--outtype', {kind!r}, '--outfile', {str(target)!r}]\n"
        f"runpy.run_path({str(converter)!r}, run_name='__main__')\n"
    )
    _run([sys.executable, "-c", code])


def _make_convertible(folder: Path) -> None:
    """Gives the folder a plain tokenizer and a config without remote code; the converter pads the vocabulary."""
    shutil.copy(ROOT / "tokenizer.json", folder)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|box_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    path.write_text(json.dumps(config), encoding="utf-8")


def _run(command: list[str], both: bool = False) -> str:
    """What a program prints, with `both` its log too.

    Raises:
        RuntimeError: it failed.
        subprocess.TimeoutExpired: it hangs.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr if both else done.stdout
