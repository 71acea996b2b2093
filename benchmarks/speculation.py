"""Speculative decoding on HRM-Text-Nano: tokens a step and seconds a token, beside plain greedy decoding.

Drafts come from the text itself (`prompt_lookup_num_tokens`) or from a small HRM-Text (`assistant_model`); the model
checks all drafts of a step in one forward call. What is written must be what plain greedy decoding writes, and that is
compared in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import Figure, describe_machine, interleaved
from benchmarks.models import ROOT
from training.nano_tasks import TASKS, draw


GREEDY = "plain greedy"
CONDITION = "synth,cot"
LONGEST = 200

EPILOG = """examples:
  python -m benchmarks.speculation
  python -m benchmarks.assistant --output runs/assistant
  python -m benchmarks.speculation --assistant runs/assistant --output runs/speculation.json

exit status: 0 every way writes what plain greedy decoding writes, 1 some do not, 2 wrong arguments"""


@dataclass
class Steps:
    """Forward calls of the model while it writes answers: how many, and how many drafted tokens they checked."""

    calls: int = 0
    drafted: int = 0

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook. The first call of an answer reads the prompt, whose types come with it."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.calls += 1
        # Later releases call it `cache`.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and int(cache.get_seq_length()):
            self.drafted += ids.shape[1] - 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of a model that answers Nano's questions")
    parser.add_argument("--assistant", type=Path, help="folder of a smaller one with the same vocabulary")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8], help="most drafted tokens a step")
    parser.add_argument("--questions", type=int, default=4, help="questions of each of the eight tasks")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: one for each core")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file of the figures")
    options = parser.parse_args(arguments)
    for name in ("questions", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: give a number above zero")
    if any(value < 1 for value in options.drafts):
        parser.error("--drafts: give numbers above zero")
    for name in ("model", "assistant"):
        folder = getattr(options, name)
        if folder is not None and not (folder / "config.json").is_file():
            parser.error(f"--{name}: there is no model in {folder}; python -m benchmarks.assistant makes an assistant")
    return options


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder.resolve(), trust_remote_code=True).eval()


def prompts_of(tokenizer: Any, count: int) -> list[dict[str, torch.Tensor]]:
    """So many held-out questions of each task, each as a prompt of one row."""
    asked = []
    for task in TASKS:
        rng = Random(f"speculation {task}")
        asked += [draw(task, rng, held_out=True).instruction for _ in range(count)]
    encoded = tokenizer.encode_prompt(asked, CONDITION)
    names = ("input_ids", "token_type_ids")
    return [{name: torch.tensor([row]) for name, row in zip(names, rows)} for rows in zip(*map(encoded.get, names))]


def ways(assistant: Any, drafts: list[int]) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `generate`."""
    found: dict[str, dict[str, Any]] = {GREEDY: {}}
    for count in drafts:
        found[f"prompt lookup, {count} drafts"] = {"prompt_lookup_num_tokens": count}
    for count in drafts if assistant is not None else ():
        found[f"assistant, {count} drafts"] = {"assistant_model": assistant, "num_assistant_tokens": count}
    return found


def answers(model: Any, prompts: list[dict[str, torch.Tensor]], **arguments: Any) -> list[list[int]]:
    """The new tokens of each prompt, greedily."""
    if "num_assistant_tokens" in arguments:
        # `generate` reads these of the assistant's own settings.
        settings = assistant_settings(arguments.pop("num_assistant_tokens"))
        arguments["assistant_model"].generation_config.update(**settings)
    written = []
    for prompt in prompts:
        ids = model.generate(**prompt, **{"max_new_tokens": LONGEST, "do_sample": False, **arguments})
        written.append(ids[0, prompt["input_ids"].shape[1] :].tolist())
    return written


def assistant_settings(count: int) -> dict[str, Any]:
    """Always `count` drafts, however sure the assistant is of them."""
    return {
        "num_assistant_tokens": count,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def count_steps(model: Any, run: Callable[[], list[list[int]]]) -> tuple[list[list[int]], Steps]:
    """What `run` writes, and the forward calls of the model that it took."""
    steps = Steps()
    hook = model.register_forward_pre_hook(steps, with_kwargs=True)
    try:
        return run(), steps
    finally:
        hook.remove()


def row_of(
    name: str, written: list[list[int]], wanted: list[list[int]], steps: Steps, figure: Figure
) -> dict[str, Any]:
    tokens = sum(map(len, written))
    return {
        "section": "speculation",
        "variant": name,
        "unit": "s",
        "case": "a token",
        "tokens": tokens,
        "tokens_a_step": tokens / steps.calls,
        # A step's own token is the model's; what it writes beyond that was drafted.
        "accepted_a_step": (tokens - steps.calls) / steps.calls,
        "accepted": (tokens - steps.calls) / steps.drafted if steps.drafted else None,
        "same": sum(ours == greedy for ours, greedy in zip(written, wanted)),
        "answers": len(wanted),
        **figure.row(),
    }


@torch.inference_mode()
def measure(options: argparse.Namespace) -> int:
    """Runs every way on the same questions; returns the exit status."""
    model = load(options.model)
    assistant = load(options.assistant) if options.assistant else None
    tokenizer = AutoTokenizer.from_pretrained(options.model.resolve(), trust_remote_code=True)
    prompts = prompts_of(tokenizer, options.questions)
    runs = {name: partial(answers, model, prompts, **more) for name, more in ways(assistant, options.drafts).items()}
    counted = {name: count_steps(model, run) for name, run in tqdm(runs.items(), desc="counting", leave=False)}
    wanted = counted[GREEDY][0]
    figures = interleaved("cpu", runs, options.rounds, steps=sum(map(len, wanted)))
    rows = [row_of(name, *counted[name][:1], wanted, counted[name][1], figures[name]) for name in runs]
    print(f"{'':26} tokens a step  drafts accepted  ms a token  times greedy  same answers")
    for row in rows:
        row["times_greedy"] = figures[row["variant"]].times(figures[GREEDY])
        accepted = "" if row["accepted"] is None else f"{row['accepted']:.0%}"
        print(
            f"{row['variant']:26} {row['tokens_a_step']:13.2f}  {accepted:>15}  {1000 * row['median']:10.2f}  "
            f"{row['times_greedy']:12.2f}  {row['same']} of {row['answers']}"
        )
    if options.output is not None:
        result = {"rows": rows, "machine": describe_machine("cpu", torch.get_num_threads())}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print("written:", options.output)
    if any(row["same"] < row["answers"] for row in rows):
        print("some answers are not those of plain greedy decoding; see above", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
