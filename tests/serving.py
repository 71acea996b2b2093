"""For tests of pipelines and servers: a random model at a scale where the mask matters, and `transformers serve`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from conversion.output import AUTO_CLASSES

from .tiny import ROOT, load_class


QUESTIONS = ["What is 48 + 27?", "Reverse the word stone.", "Sort 52, 7, 19 in ascending order."]
NEW_TOKENS = 12
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
CLI = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
START_SECONDS = 600


def make_folder(folder: Path, seed: int = 0) -> Path:
    """Saves a random HRM-Text with the tokenizer of the repository; it answers NEW_TOKENS tokens, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    torch.manual_seed(seed)
    config = load_class("configuration_hrm_text.HrmTextConfig")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_layers_per_stack=2,
        num_attention_heads=4,
        initializer_range=0.2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        prefix_end_token_id=tokenizer.prefix_end_token_id,
    )
    model = load_class("modeling_hrm_text.HrmTextForCausalLM")(config).eval()
    model.generation_config.max_new_tokens = NEW_TOKENS
    model.generation_config.do_sample = False
    # Letters and digits alone, so that a random answer survives a terminal and a stream; the end token never comes.
    readable = {i for t, i in tokenizer.get_vocab().items() if t.lstrip("Ġ").isascii() and t.lstrip("Ġ").isalnum()}
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - readable)
    model.config.auto_map = AUTO_CLASSES
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for module in ROOT.glob("*_hrm_text.py"):
        shutil.copyfile(module, folder / module.name)
    return folder


@contextmanager
def served(folder: str | Path, log: Path) -> Iterator[str]:
    """The address of `transformers serve` with a folder, on loopback, while it runs; `log` gets what it prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [*CLI, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("w") as sink:
        server = subprocess.Popen([*command, "--port", str(port)], env=ENVIRONMENT, stdout=sink, stderr=sink)
        try:
            _wait_until_up(server, address, log)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            finally:
                server.kill()


def _wait_until_up(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"the server did not start within {START_SECONDS} s: {log.read_text()}")


@torch.no_grad()
def explicit_answer(model: Any, tokenizer: Any, encoding: Any, causal: bool = False, **arguments: Any) -> list[str]:
    """The answers of `generate` to a batch of tensors with `token_type_ids` spelled out, or all zero for causal."""
    types = torch.zeros_like(encoding["input_ids"]) if causal else encoding["token_type_ids"]
    output = model.generate(
        input_ids=encoding["input_ids"],
        attention_mask=encoding["attention_mask"],
        token_type_ids=types,
        **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments},
    )
    return tokenizer.batch_decode(output[:, encoding["input_ids"].shape[1] :], skip_special_tokens=True)
