"""llama.cpp's figures on the same weights, where it is built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Figure, merged
from benchmarks.models import OURS, ROOT


# Prompts up to this length; longer ones take it minutes.
LONGEST_PROMPT = 512


def measure_llama(bench: Any, folder: Path, threads: int) -> None:
    """Converts our random weights to GGUF and times `llama-bench` on them, between two runs of our own.

    Args:
        bench: a `Bench` with its models; rows are appended to it.
        folder: holds `llama-bench` and, here or in a folder above, `convert_hf_to_gguf.py`.
        threads: CPU threads.

    Raises:
        FileNotFoundError: either program is missing.
    """
    program = _find(folder, "llama-bench")
    converter = _find(folder, "convert_hf_to_gguf.py")
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "model", Path(work) / "model.gguf"
        bench.models[OURS].save_pretrained(source)
        _make_convertible(source)
        convert(converter, source, target)
        command = [str(program), "-m", str(target), "-t", str(threads), "-r", str(bench.plan.rounds), "-o", "json"]
        command += ["-ngl", "0" if bench.device == "cpu" else "99"]

        def between(case: str, ours: Callable[[], dict[str, Figure]], arguments: list[str], tokens: int) -> None:
            before = ours()
            seconds = tokens / json.loads(_run([*command, *arguments]))[0]["avg_ts"]
            figures = merged([before, ours()])
            bench.note("llama.cpp", case, {**figures, "llama.cpp": Figure((seconds,))})

        for context in sorted({context for batch, context in bench.plan.decode if batch == 1}):
            between(
                f"step at context {context}",
                partial(bench.time_decode, 1, context),
                ["-p", "0", "-n", "8", "-d", str(context)],
                1,
            )
        for tokens in (tokens for tokens in bench.plan.prefill if tokens <= LONGEST_PROMPT):
            between(
                f"prompt of {tokens}",
                partial(bench.time_prefill, tokens, 1),
                ["-n", "0", "-p", str(tokens)],
                tokens,
            )


def convert(converter: Path, source: Path, target: Path) -> None:
    """Runs llama.cpp's converter on a folder whose tokenizer it does not know, as bfloat16.

    The converter refuses tokenizers by a fingerprint of how they split a test text, and that of the repository is not
    on its list; how text is split does not matter to a benchmark.
    """
    code = (
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(converter.parent)!r}, {str(converter.parent / 'gguf-py')!r}]\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'\n"
        f"sys.argv = ['convert', {str(source)!r}, '--outtype', 'bf16', '--outfile', {str(target)!r}]\n"
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


def _find(folder: Path, name: str) -> Path:
    for place in (folder, *folder.parents):
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(
        f"--llama-cpp: {name} is neither in {folder} nor in a folder above it; build llama.cpp there"
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    return done.stdout
