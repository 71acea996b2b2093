"""Trains a small assistant for HRM-Text-Nano: a draft model that `generate(assistant_model=...)` takes.

One layer a stack and one cycle of each: two layer calls a token where Nano has sixteen. Vocabulary, tokenizer,
questions and recipe are Nano's own (`training/nano.py`), so that its drafts are Nano's tokens.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from training.hub_folder import load_class, save_nano
from training.nano import EVERYTHING, PHASES, make_config, make_tokenizer, train


STEPS = 1500
SHAPE = {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]}

EPILOG = """example:
  python -m benchmarks.assistant --output runs/assistant

The same command goes on after an interruption.
exit status: 0 the model is written, 2 wrong arguments"""


def assistant_config() -> Any:
    """Nano's config with fewer layers and cycles."""
    fields = make_config().to_dict()
    # Follows from the others.
    fields.pop("num_hidden_layers")
    return load_class("configuration_hrm_text.HrmTextConfig")(**{**fields, **SHAPE})


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.assistant",
        description="Train a small assistant for HRM-Text-Nano, in minutes on a CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the assistant, ready to load")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give a number above zero")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output.resolve()
    set_seed(0)
    tokenizer = make_tokenizer()
    model = load_class("modeling_hrm_text.HrmTextForCausalLM")(assistant_config())
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    # Two module calls are all that there is to backpropagate through, so there is nothing to warm up. Every task is
    # asked from the start: there is no time for stages.
    phase = replace(
        PHASES[0],
        steps=options.steps,
        decay_from=0.4,
        average=0.99,
        gradient_warmup=0.0,
        stages=((sys.maxsize, EVERYTHING),),
    )
    average = train(model, tokenizer, phase, output.with_name(output.name + "-training"), seed=1)
    with torch.no_grad():
        for parameter, mean in zip((each for each in model.parameters() if each.requires_grad), average):
            parameter.copy_(mean)
    save_nano(model, tokenizer, output)
    print(f"{output}: the assistant")
    return 0


if __name__ == "__main__":
    sys.exit(main())
