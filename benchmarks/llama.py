"""llama.cpp's figures on the same weights, where it is built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.models import LIBRARY, OURS, ROOT


def measure_llama(bench: Any, folder: Path, threads: int) -> None:
    """Converts our random weights to GGUF and times prefill and decoding with `llama-bench`.

    Args:
        bench: a `Bench` with its models; rows are appended to it.
        folder: holds `llama-bench` and, here or in a folder above, `convert_hf_to_gguf.py`.
        threads: CPU threads.

    Raises:
        FileNotFoundError: either program is missing.
    """
    program = _find(folder, "llama-bench")
    converter = _find(folder, "convert_hf_to_gguf.py")
    model = bench.models[OURS]
    if model.device.type == "meta":
        raise ValueError("llama.cpp is measured on the weights themselves: leave out the sections memory and compile")
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "model", Path(work) / "model.gguf"
        model.save_pretrained(source)
        _add_tokenizer(source, model.config.vocab_size)
        _run([sys.executable, str(converter), str(source), "--outtype", "bf16", "--outfile", str(target)])
        contexts = sorted({context for batch, context in bench.plan.decode if batch == 1})
        command = [str(program), "-m", str(target), "-t", str(threads), "-r", str(bench.plan.rounds), "-o", "json"]
        command += ["-ngl", "0" if bench.device == "cpu" else "99", "-n", "8", "-p", "0"]
        found = json.loads(_run([*command, "-d", ",".join(map(str, contexts))]))
        for context, one in zip(contexts, found):
            _note(bench, "decode", f"batch 1, context {context}", 1 / one["avg_ts"])
        prompts = ",".join(map(str, bench.plan.prefill))
        found = json.loads(_run([*command[:-4], "-n", "0", "-p", prompts]))
        for tokens, one in zip(bench.plan.prefill, found):
            _note(bench, "prefill", f"{tokens} tokens", tokens / one["avg_ts"])


def _note(bench: Any, section: str, case: str, seconds: float) -> None:
    rows = [row for row in bench.rows if (row["section"], row["case"]) == (section, case) and "median" in row]
    bench.note(section, case, {"llama.cpp": {"median": seconds}}, rows[0].get("limit") if rows else None)
    library = next((row["median"] for row in rows if row["variant"] == LIBRARY), None)
    if library:
        bench.rows[-1]["times_library"] = library / seconds


def _add_tokenizer(folder: Path, vocab_size: int) -> None:
    """The converter wants a tokenizer; the one of the repository is padded to the size of the random model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / name, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    known = set(vocab.values()) | {token["id"] for token in content.get("added_tokens", [])}
    for number in range(vocab_size):
        if number not in known:
            vocab[f"<unused {number}>"] = number
    path.write_text(json.dumps(content), encoding="utf-8")


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
