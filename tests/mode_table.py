"""Runs the modes of `tests/harness.py` on this port and on transformers' own HRM-Text class, and writes the table.

Both load the same folder of random weights; the reference of both columns is one plain, uncached forward pass of this
port over the whole sequence with the block layout spelled out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, modeling_flash_attention_utils
from transformers.utils import logging

from .flash_stand_in import flash_stand_in
from .harness import (
    FORWARD_MODES,
    GENERATE_MODES,
    MIXED,
    NEW_TOKENS,
    NOT_GREEDY,
    ONE_BLOCK,
    Answer,
    deviation,
    forward_in_parts,
    forward_padded,
    growing,
    is_greedy,
)
from .one_answer_models import one_answer_model


TOLERANCE = 1e-4


def with_flash(model: Any) -> list[Answer]:
    """A padded batch through flash attention; a stand-in takes the kernel's place, so that this runs anywhere."""
    before = model.config._attn_implementation
    with (
        mock.patch.object(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *a, **k: None),
        mock.patch.object(modeling_flash_attention_utils, "_flash_varlen_fn", flash_stand_in, create=True),
    ):
        model.config._attn_implementation = "flash_attention_2"
        try:
            return forward_padded(model, MIXED, "left")
        finally:
            model.config._attn_implementation = before


def with_continuous_batching(model: Any) -> list[Answer]:
    """`generate_batch`, whose answer is compared through the tokens alone."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=5)
    # Without a size the library's cache takes nine tenths of the memory that is free.
    size = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch([list(ONE_BLOCK[0].ids)], config, size)
    tokens = next(iter(results.values())).generated_tokens
    return [Answer(ONE_BLOCK[0].followed_by(tokens), len(ONE_BLOCK[0]) - 1, torch.zeros(0, 96))]


MORE_MODES: dict[str, Callable[[Any], list[Answer]]] = {
    "flash attention, padded left": with_flash,
    "half of a block, then the rest, on a live cache": lambda m: forward_in_parts(
        m, ONE_BLOCK, growing, lambda row: [(0, 4), (4, len(row))]
    ),
    "continuous batching": with_continuous_batching,
}
# What the README shows of it.
SUMMARY = (
    "one-block rows padded left",
    "block + response + block",
    "packed, one block each",
    "packed, plain causal",
    "flash attention, padded left",
    "block and response on a live cache",
    "half of a block, then the rest, on a live cache",
    "greedy",
    "greedy, block + response + block",
    "ragged batch",
    "without cache",
    "static cache",
    "embeddings",
    "sampling",
    "beam search",
    "prompt lookup",
    "assisted by itself",
    "chunks of 3, one block",
    "chunks of 3, plain causal",
    "second turn on a live cache",
    "second turn on StaticCache",
    "second turn of a ragged batch",
    "continuous batching",
)


def all_modes() -> dict[str, Callable[[Any], list[Answer]]]:
    """Every mode by its name; those of the forward pass first."""
    return {**FORWARD_MODES, **MORE_MODES, **GENERATE_MODES}


def outcome(reference: Any, model: Any, name: str, mode: Callable[[Any], list[Answer]]) -> str:
    """What a mode does on a model: "same", how far it is off, or how it refuses."""
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            answers = mode(model)
            off = deviation(reference, [answer for answer in answers if len(answer.logits)])
            decides = name in GENERATE_MODES or mode is with_continuous_batching
            greedy = not decides or name in NOT_GREEDY or is_greedy(reference, answers)
    except (ValueError, NotImplementedError) as error:
        return f"refused: {str(error).split(':')[0].split('. ')[0]}"
    except Exception as error:  # what a user would meet, whatever it is
        return f"fails: {type(error).__name__}"
    if off < TOLERANCE and greedy:
        return "same"
    size = "infinite or NaN" if off == float("inf") else f"{off:.1g}"
    return f"**other logits** (off by {size})" if off >= TOLERANCE else "**other tokens**"


def both_models(folder: str) -> tuple[Any, Any | None]:
    """This port and the library's own class (None where it has none) on the same weights."""
    ours = one_answer_model()
    ours.save_pretrained(folder)
    try:
        library = importlib.import_module("transformers.models.hrm_text")
    except ImportError:
        return ours, None
    theirs = library.HrmTextForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    theirs.generation_config.eos_token_id = None
    return ours, theirs


def table(names: list[str], brief: bool = False) -> tuple[str, bool]:
    """The table in Markdown, and whether this port gave one answer, or a refusal, in every mode.

    Args:
        names: of the modes, in order.
        brief: leave out the words of refusals.
    """
    modes = all_modes()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = both_models(folder)
    lines = [f"| mode | here | transformers {transformers.__version__} |", "| --- | --- | --- |"]
    right = True
    for name in tqdm(names, desc="modes", unit="mode"):
        here = outcome(ours, ours, name, modes[name])
        there = "no class of its own" if theirs is None else outcome(ours, theirs, name, modes[name])
        right = right and (here == "same" or here.startswith("refused"))
        if brief:
            here, there = here.split(":")[0], there.split(":")[0]
        lines.append(f"| {name} | {here} | {there} |")
    return "\n".join(lines) + "\n", right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mode_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m tests.mode_table --summary\n"
        "  python -m tests.mode_table --output docs/modes.md\n\n"
        "exit code: 0 if this port gives one answer, or refuses, in every mode; 1 if not; 2 for wrong arguments",
    )
    parser.add_argument("--summary", action="store_true", help="only the modes that the README shows")
    parser.add_argument("--only", default="", help="only modes whose name contains this")
    parser.add_argument("--output", type=Path, help="write the page to this file rather than to the screen")
    options = parser.parse_args(arguments)
    names = [name for name in (SUMMARY if options.summary else all_modes()) if options.only in name]
    if not names:
        parser.error(f"no mode has {options.only!r} in its name")
    logging.set_verbosity(logging.CRITICAL)
    text, right = table(names, brief=options.summary)
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(
            "# One answer in every mode\n\n"
            "Each line is a way of calling the model. *same* means: the logits of one plain, uncached forward pass\n"
            "over the whole sequence with the block layout spelled out, to 1e-4 in float32, and the same greedy\n"
            "tokens. Random weights of `initializer_range` 0.15, where masks matter. Written by\n"
            "`python -m tests.mode_table --output docs/modes.md`.\n\n" + text
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
