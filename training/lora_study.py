"""Which adapters learn what all weights learn, and what each of them forgets: the measurements behind `--lora`.

    python -m training.lora_study --output DIR

Three tasks that the model in the root cannot do are taught by full training and by adapters of many kinds, each with
several seeds. `results.jsonl` gets a line for every run: the share of held-out questions answered exactly, and the
share of the old skills that is left. The same command goes on after an interruption; `--table` shows what is there.

rsLoRA has no cases of its own at rank 16: it scales by alpha / sqrt(rank) in place of alpha / rank, so that its alpha
of 32 is LoRA's alpha of 128 there. What it says about another rank is a case.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from .answers import exact_matches
from .credit import GradientStepsWarmup
from .data import PrefixLMCollator, encode_rows
from .hub_folder import ROOT
from .nano_tasks import TASKS, draw
from .plots import plot_learned_and_kept
from .trainer import HrmTextTrainer


ALL = ("gqkv_proj", "o_proj", "gate_up_proj", "down_proj")
HELD_OUT = 150
OLD_SKILLS = 12  # questions of each task that Nano was trained for
BATCH = 16


def _double(rng: Random) -> dict[str, str]:
    number = rng.randrange(10, 1000)
    return {"instruction": f"Double {number}.", "response": str(2 * number), "condition": "direct"}


def _three(rng: Random) -> dict[str, str]:
    a, b, c = (rng.randrange(1, 10) for _ in range(3))
    return {"instruction": f"What is {a} + {b} + {c}?", "response": str(a + b + c), "condition": "direct"}


def _listed(rng: Random) -> dict[str, str]:
    a, b = (rng.randrange(10, 100) for _ in range(2))
    listed = f"[{', '.join(str(a + b))}]"
    return {"instruction": f"What is {a} + {b}?", "response": listed, "condition": "noisy"}


class Task(NamedTuple):
    """What is taught: a draw of one row, how many rows there are to train on, and the optimizer steps."""

    draw: Callable[[Random], dict[str, str]]
    rows: int
    steps: int


TASKS_TAUGHT = {
    "easy": Task(_double, 800, 40),  # a sum that Nano knows, asked in other words
    "hard": Task(_three, 579, 120),  # three operands, where Nano knows two: 729 questions in all
    # Sums it knows, answered as [7, 5] under `noisy`. Brackets and condition are tokens that it was never trained on.
    "format": Task(_listed, 2000, 60),
}


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        rank: rank of the adapters, 0 for all weights.
        alpha: scale of the adapters.
        rate: peak of the learning rate.
        targets: names of the layers with an adapter.
        stack: "H" or "L" for one stack alone.
        kind: "lora", "rslora" or "dora".
        gradient_steps: module calls that carry gradient, from the first step on.
        divided: whether alpha is divided by L_cycles in the L stack, which acts so many times where H acts once.
    """

    rank: int = 16
    alpha: float = 16
    rate: float = 3e-3
    targets: tuple[str, ...] = ALL
    stack: str = ""
    kind: str = "lora"
    gradient_steps: int = 5
    divided: bool = False

    def name(self) -> str:
        """A short label, the same for the same case."""
        if not self.rank:
            return f"full, lr {self.rate:g}, {self.gradient_steps} gradient steps"
        parts = [f"{self.kind} r{self.rank} alpha {self.alpha:g}", f"lr {self.rate:g}"]
        parts += [f"{self.stack} stack"] if self.stack else []
        parts += ["+".join(self.targets)] if self.targets != ALL else []
        parts += [f"{self.gradient_steps} gradient steps"] if self.gradient_steps != 5 else []
        parts += ["divided in L"] if self.divided else []
        return ", ".join(parts)


FULL = Case(rank=0, rate=1e-3)
SCALED = Case(alpha=128, rate=1e-3)
DIVIDED = Case(alpha=256, rate=1e-3, divided=True)  # what `--lora` does
COMMON = (FULL, Case(), SCALED)
WITH_HEAD = replace(SCALED, targets=(*ALL, "lm_head"))
DIVIDED_WITH_HEAD = replace(DIVIDED, targets=(*ALL, "lm_head"))
# All seeds of a group come before the next one, and what the defaults rest on comes first.
CASES: tuple[tuple[tuple[str, Case], ...], ...] = (
    (
        *(("hard", case) for case in COMMON),
        ("hard", DIVIDED),
        ("hard", replace(SCALED, stack="H")),
    ),
    (
        ("format", DIVIDED_WITH_HEAD),
        ("easy", DIVIDED),
        ("hard", replace(DIVIDED, alpha=128)),
        ("hard", Case(alpha=256, rate=1e-3)),
        ("hard", Case(rank=64, alpha=32, rate=1e-3, kind="rslora")),
        ("hard", Case(rank=64, alpha=512, rate=1e-3)),
        ("hard", Case(rate=1e-2)),
        ("hard", replace(SCALED, kind="dora")),
        *(("format", case) for case in (SCALED, WITH_HEAD, FULL, Case())),
        *(("easy", case) for case in COMMON),
    ),
    (
        *(("hard", replace(SCALED, gradient_steps=steps)) for steps in (2, 8)),
        ("hard", replace(SCALED, stack="L")),
        ("hard", replace(SCALED, targets=("gqkv_proj", "o_proj"))),
    ),
    (
        ("hard", WITH_HEAD),
        ("format", replace(SCALED, targets=(*ALL, "lm_head", "embed_tokens"))),
        ("hard", Case(alpha=128)),
        ("hard", Case(rank=0, rate=3e-3)),
        ("hard", Case(rank=64, alpha=64)),
        ("hard", Case(alpha=128, rate=1e-2)),
    ),
)


def rows(task: str, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on and rows held out, no instruction in both."""
    taught, rng = TASKS_TAUGHT[task], Random(f"{task} {seed}")
    drawn: dict[str, dict[str, str]] = {}
    while len(drawn) < taught.rows + HELD_OUT:
        row = taught.draw(rng)
        drawn[row["instruction"]] = row
    several = list(drawn.values())
    return several[HELD_OUT:], several[:HELD_OUT]


def old_skills(seed: int) -> list[dict[str, str]]:
    """Held-out questions of the tasks that Nano was trained for."""
    rng = Random(f"old {seed}")
    return [draw(task, rng, held_out=True).row("direct") for task in TASKS for _ in range(OLD_SKILLS)]


def prepare(case: Case) -> torch.nn.Module:
    """Nano, ready to be trained as the case says."""
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype="float32")
    if not case.rank:
        return model
    from peft import LoraConfig, get_peft_model

    names = "|".join(re.escape(name) for name in case.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=case.rank,
        lora_alpha=case.alpha,
        alpha_pattern={r".*L_module.*": case.alpha / model.config.L_cycles} if case.divided else {},
        target_modules=rf".*{case.stack}_module\..*({names})" if case.stack else rf".*({names})",
        use_rslora=case.kind == "rslora",
        use_dora=case.kind == "dora",
    )
    return get_peft_model(model, config)


def measure(task: str, case: Case, seed: int, tokenizer: Any) -> dict[str, Any]:
    """Trains once; returns the line for `results.jsonl`."""
    started = time.monotonic()
    set_seed(seed)
    model = prepare(case)
    train, held_out = rows(task, seed)
    steps = TASKS_TAUGHT[task].steps
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=case.rate,
            warmup_steps=20,
            lr_scheduler_type="cosine_warmup_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            max_grad_norm=1.0,
            logging_steps=steps,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            report_to=[],
        )
        trainer = HrmTextTrainer(
            model,
            arguments,
            train_dataset=encode_rows(train, tokenizer, 200)[0],
            data_collator=PrefixLMCollator(tokenizer.pad_token_id),
            callbacks=[GradientStepsWarmup(case.gradient_steps, case.gradient_steps)],
        )
        loss = trainer.train().training_loss
    asked = [encode_rows(several, tokenizer, 200)[0] for several in (held_out, old_skills(seed))]
    model.eval()
    learned, kept = (exact_matches(model, tokenizer, examples, 160) / len(examples) for examples in asked)
    return {
        "task": task,
        "case": case.name(),
        "seed": seed,
        "learned": round(learned, 4),
        "kept": round(kept, 4),
        "loss": round(loss, 5),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(time.monotonic() - started, 1),
        **{name: value for name, value in asdict(case).items() if name != "targets"},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds in Markdown, in the order of `CASES`; of what was learned, the lowest and highest too."""
    tasks = list(TASKS_TAUGHT)
    asked = [(task, case.name()) for group in CASES for task, case in group]
    order = {key: (tasks.index(key[0]), place) for place, key in enumerate(asked)}
    lines = [
        "| task | trained how | seeds | learned | lowest to highest | kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    done = dict.fromkeys((line["task"], line["case"]) for line in results)
    for key in sorted(done, key=lambda key: order.get(key, (len(tasks), 0))):
        runs = [line for line in results if (line["task"], line["case"]) == key]
        learned = [run["learned"] for run in runs]
        lines.append(
            f"| {key[0]} | {key[1]} | {len(runs)} | {mean(learned):.2f} | {min(learned):.2f} to {max(learned):.2f} | "
            f"{mean(run['kept'] for run in runs):.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.lora_study",
        description="Measure full training and adapters of many kinds on Nano.",
        epilog="example: python -m training.lora_study --output runs/lora --seeds 3",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of results.jsonl and hard.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case (default %(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing: table and plot of what is there")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give at least 1")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.jsonl"
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    if not options.table:
        done = {(line["task"], line["case"], line["seed"]) for line in results}
        tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
        runs = ((task, case, seed) for cases in CASES for seed in range(options.seeds) for task, case in cases)
        for task, case, seed in runs:
            if (task, case.name(), seed) in done:
                continue
            results.append(measure(task, case, seed, tokenizer))
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(results[-1]) + "\n")
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))
    hard = [line for line in results if line["task"] == "hard"]
    points: dict[str, list[tuple[float, float]]] = {}
    for line in hard:
        points.setdefault(line["case"], []).append((line["learned"], line["kept"]))
    plot_learned_and_kept(points, options.output / "hard.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
