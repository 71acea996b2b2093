"""Fine-tunes an HRM-Text on rows of questions and answers: all weights, or LoRA adapters.

    python -m training.sft --model DIR --data rows.jsonl --output DIR

In several processes: `accelerate launch -m training.sft ...` or `torchrun --nproc-per-node 2 -m training.sft ...`.
The output folder gets the average weights, `raw/` in it the last ones, `training/` checkpoints, log and loss curve.
After an interruption the same command goes on from the last checkpoint.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from .answers import exact_matches
from .credit import GradientStepsWarmup
from .data import IGNORED, EncodingReport, Example, PrefixLMCollator, encode_rows, keep_fitting, pack, read_rows
from .optimization import OPTIMIZERS, AverageWeights
from .plots import plot_curves
from .tokenized import is_tokenized, read_tokenized
from .trainer import HrmTextTrainer, last_checkpoint


logger = logging.getLogger(__name__)

# Every linear layer of both stacks. gate, q, k and v lie in one matrix, as do gate and up of the MLP.
LORA_TARGETS = ("gqkv_proj", "o_proj", "gate_up_proj", "down_proj")
# Scale of the adapters by their rank: `lora_study.py` says why.
LORA_ALPHA_OF_RANK = 16
WORK = "training"
OPTIONS_FILE = "options.json"


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, Any, torch.dtype]:
    """Model, tokenizer and the dtype in which the model was stored and will be saved.

    Raises:
        ValueError: the folder is not one of this port, has fewer module calls than `--gradient-steps` asks for, or its
            tokenizer does not know the condition.
        ImportError: LoRA without peft.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype="auto")
    if not (hasattr(model, "set_gradient_steps") and hasattr(tokenizer, "encode_prompt")):
        raise ValueError(
            f"--model {options.model} is not an HRM-Text folder of this port: run convert_weights.py on it first"
        )
    calls, last = model.config.H_cycles * (model.config.L_cycles + 1), options.gradient_steps[1]
    if last > calls:
        raise ValueError(
            f"--gradient-steps ends at {last} and this model makes {calls} module calls: end there or below"
        )
    try:
        tokenizer.encode_prompt("", options.condition)
    except ValueError as error:
        raise ValueError(f"--condition {options.condition}: {error}") from error
    if options.tools:
        tokenizer.trained_on_tools = True
    stored = model.dtype
    if not options.lora:
        # Small updates would be rounded away in bfloat16.
        return model.float(), tokenizer, stored
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--lora needs peft: pip install peft") from error
    linear = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    if unknown := [name for name in options.lora_targets if name.rsplit(".", 1)[-1] not in linear]:
        raise ValueError(f"--lora-targets {' '.join(unknown)}: the linear layers are {', '.join(sorted(linear))}")
    alpha = options.lora_alpha or LORA_ALPHA_OF_RANK * options.lora
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora,
        lora_alpha=alpha,
        # An adapter of the L stack acts L_cycles times where one of the H stack acts once.
        alpha_pattern=dict.fromkeys(adapted_in_L(model, options.lora_targets), alpha / model.config.L_cycles),
        target_modules=list(options.lora_targets),
    )
    if not options.bf16:
        model = model.float()
    return get_peft_model(model, adapters), tokenizer, stored


def adapted_in_L(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers of the L stack that get an adapter."""
    linear = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    return [
        name for name in linear if ".L_module." in name and any(f".{name}".endswith(f".{each}") for each in targets)
    ]


def read_examples(
    options: argparse.Namespace, tokenizer: Any, longest: int, progress: bool
) -> tuple[list[Example], EncodingReport]:
    """What `--data` holds, and what became of it: rows of any known form, or a tokenized folder."""
    if is_tokenized(options.data):
        if options.condition is not None or options.ignore_fields:
            raise ValueError(f"--data {options.data} holds ids: leave --condition and --ignore-fields out")
        stored = tqdm(read_tokenized(options.data, tokenizer), desc="reading", unit=" rows", disable=not progress)
        return keep_fitting(stored, longest)
    rows = tqdm(read_rows(options.data), desc="reading", unit=" rows", disable=not progress)
    return encode_rows(rows, tokenizer, longest, options.condition, options.ignore_fields)


def never_written(model: torch.nn.Module, examples: list[Example]) -> Counter[int]:
    """Labels whose row of the output head is that of the padding token, which no model is trained to write.

    Tokens that never occurred in training come to have one row, so that no adapter below the head tells them apart.
    """
    labels = Counter(label for example in examples for label in example["labels"] if label != IGNORED)
    rows = model.get_output_embeddings().weight.detach()
    ids = torch.tensor(list(labels))
    alike = torch.cosine_similarity(rows[ids].float(), rows[model.config.pad_token_id].float(), dim=-1) > 0.999
    return Counter({token: labels[token] for token in ids[alike].tolist()})


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples held out, at random."""
    order = list(range(len(examples)))
    Random(seed).shuffle(order)
    held_out = set(order[: round(share * len(order))])
    return (
        [example for index, example in enumerate(examples) if index not in held_out],
        [example for index, example in enumerate(examples) if index in held_out],
    )


def save(trainer: HrmTextTrainer, tokenizer: Any, folder: Path, origin: Path, dtype: torch.dtype) -> None:
    """Writes the model as it is in memory, whole in one process, in the dtype that it came in; adapters as they are.

    Modules of the folder that it came from which the model does not need itself (classification heads) go along.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        adapters = hasattr(model, "peft_config")
        if not adapters:
            if trainer.is_fsdp_enabled:
                # Sharding put a class of torch's own around the model's, whose code would be saved as the model's.
                model = AutoModelForCausalLM.from_pretrained(origin, trust_remote_code=True)
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
            model.config.dtype = dtype
        # An adapter on `lm_head` would take the whole embeddings along, which it leaves as they are.
        model.save_pretrained(folder, state_dict=state, **({"save_embedding_layers": False} if adapters else {}))
        tokenizer.save_pretrained(folder)
        for module in origin.glob("*_hrm_text.py"):
            if not (adapters or (folder / module.name).exists()):
                shutil.copyfile(module, folder / module.name)
    trainer.accelerator.wait_for_everyone()


def judge(trainer: HrmTextTrainer, options: argparse.Namespace, tokenizer: Any, held_out: list[Example]) -> float:
    """Share of the held-out examples that are answered exactly; every process asks its part of them."""
    accelerator = trainer.accelerator
    # Sharded weights cannot generate: each process reads what was saved.
    model = (
        _load_saved(options).to(accelerator.device)
        if options.fsdp
        else accelerator.unwrap_model(trainer.model_wrapped)
    )
    mine = held_out[accelerator.process_index :: accelerator.num_processes]
    label = "exact match" if accelerator.is_main_process else None
    right = exact_matches(model, tokenizer, mine, options.batch_size, progress=label)
    counts = accelerator.reduce(torch.tensor(float(right), device=accelerator.device), reduction="sum")
    return counts.item() / len(held_out)


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """What `Trainer` reads: all but optimizer, warm-up of credit assignment and average. Sets up several processes."""
    several = _processes() > 1
    on_cpu = options.cpu or not torch.cuda.is_available()
    if options.fsdp:
        os.environ.setdefault("FSDP_VERSION", "2")  # which older transformers do not say themselves
    # What older transformers know as two words is one switch from 5.16 on, or somewhat before.
    sharded = True if hasattr(TrainingArguments, "_apply_legacy_fsdp_to_config") else "full_shard auto_wrap"
    renamed = hasattr(TrainingArguments, "activation_checkpointing")
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return TrainingArguments(
        output_dir=str(options.output / WORK),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps if options.max_steps < 1 else min(options.warmup_steps, options.max_steps),
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        # At 2 gradient steps the embedding gets none.
        ddp_find_unused_parameters=True if several else None,
        ddp_backend="gloo" if several and on_cpu else None,
        # Only this kind goes together with parameters that a step leaves without a gradient.
        **{checkpointing: options.gradient_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
        bf16=options.bf16,
        use_cpu=on_cpu,
        fsdp=sharded if options.fsdp else None,
        fsdp_config={"transformer_layer_cls_to_wrap": ["HrmTextDecoderLayer"]} if options.fsdp else None,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        save_steps=options.save_steps,
        save_total_limit=3,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        seed=options.seed,
        report_to=options.report_to,
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes as the options of the command line say; returns what was done, in numbers."""
    work = options.output / WORK
    arguments = training_arguments(options)
    set_seed(options.seed)
    # One process at a time copies the folder's modules to where Python finds them.
    with arguments.main_process_first(desc="loading the model"):
        model, tokenizer, dtype = load(options)
    first = arguments.process_index == 0
    longest = min(options.length, model.config.max_position_embeddings)
    examples, report = read_examples(options, tokenizer, longest, progress=first)
    if first:
        logger.info("%s (above %d tokens)", report, longest)
    below = not any(name.endswith("lm_head") for name in options.lora_targets)
    if first and options.lora and below and (strange := never_written(model, examples)):
        logger.warning(
            "%d labels are tokens that the model was never trained to write (%s), which no adapter below the output "
            "head can teach: add lm_head to --lora-targets, or train all weights",
            strange.total(),
            ", ".join(tokenizer.convert_ids_to_tokens([token for token, _ in strange.most_common(8)])),
        )
    train, held_out = split(examples, options.held_out, options.seed)
    if not train:
        raise ValueError(
            f"--data {options.data}: nothing to train on ({report}); see --length {options.length} and --held-out"
        )
    items: list[Any] = pack(train, longest) if options.packed else train
    averages = _processes() if options.fsdp else 1
    _same_options(options, work)
    resume = last_checkpoint(work, with_average=bool(options.average), averages=averages)
    warmup = GradientStepsWarmup(*options.gradient_steps, options.gradient_warmup)
    average = AverageWeights(options.average, resume) if options.average else None
    trainer = HrmTextTrainer(
        model,
        arguments,
        train_dataset=items,
        data_collator=PrefixLMCollator(tokenizer.pad_token_id, packed=options.packed),
        processing_class=tokenizer,
        optimizer=options.optimizer,
        callbacks=[warmup, average] if average else [warmup],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.accelerator.unwrap_model(trainer.model_wrapped).config.use_cache = True  # the trainer switches it off
    if average is not None:
        save(trainer, tokenizer, options.output / "raw", Path(options.model), dtype)
        average.swap(trainer.model_wrapped)
    save(trainer, tokenizer, options.output, Path(options.model), dtype)
    log = trainer.state.log_history
    loss = next((entry["loss"] for entry in reversed(log) if "loss" in entry), float("nan"))
    rows = {"kept": report.kept, "left_out": report.left_out}
    summary: dict[str, Any] = {"rows": rows, "steps": trainer.state.global_step, "loss": loss}
    if held_out:
        summary["held_out"] = len(held_out)
        summary["exact_match"] = judge(trainer, options, tokenizer, held_out)
    trainer.save_state()
    if first:
        (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        try:
            plot_curves(log, work / "loss.png")
        except ImportError as error:
            logger.warning("no loss.png: %s", error)
    trainer.accelerator.wait_for_everyone()
    return summary


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _load_saved(options: argparse.Namespace) -> torch.nn.Module:
    if not options.lora:
        return AutoModelForCausalLM.from_pretrained(options.output, trust_remote_code=True, dtype="auto")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype="auto")
    return PeftModel.from_pretrained(base, str(options.output))


def _same_options(options: argparse.Namespace, work: Path) -> None:
    """Keeps the options of a run beside its checkpoints, and refuses to go on with others."""
    given = {"processes": _processes(), **vars(options)}
    current = {name: str(list(x) if isinstance(x, tuple) else x) for name, x in sorted(given.items())}
    path = work / OPTIONS_FILE
    if path.exists() and last_checkpoint(work, with_average=False) is not None:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in current | before if current.get(name) != before.get(name))
        if changed:
            raise ValueError(
                f"{work} holds checkpoints of a run with other options ({', '.join(changed)}): repeat the same ones "
                "to go on with it, or choose another --output"
            )
    elif os.environ.get("RANK", "0") == "0":
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(current, indent=2) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m training.sft",
        description="Fine-tune an HRM-Text on rows of questions and answers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m training.sft --model . --data rows.jsonl --output tuned --cpu
  python -m training.sft --model DIR --data rows.jsonl --output adapter --lora 16 --learning-rate 1e-4 --bf16
  torchrun --nproc-per-node 2 -m training.sft --model DIR --data rows.jsonl --output tuned --bf16 --fsdp

A row is {"instruction": ..., "response": ..., "condition": ...} or {"messages": [...], "condition": ...}, or has the
fields of Alpaca, ShareGPT, or prompt and completion; with --tools also {"messages": [...], "tools": [...]}, where
answers may have `tool_calls` and `tool` messages follow. A field that is unknown is an error.""",
    )
    add = result.add_argument
    add("--model", required=True, help="folder to start from")
    add(
        "--data",
        required=True,
        type=Path,
        help="rows (see training/formats.py) as JSON Lines, JSON, CSV or Parquet, a folder that `datasets` saved, or "
        "one of tokens, as the training repository makes it",
    )
    add("--ignore-fields", nargs="+", default=(), metavar="NAME", help="fields of the rows that are left aside")
    add("--output", required=True, type=Path, help="folder of the result")
    add("--condition", help="condition of the rows that name none, as `direct` or `synth,cot`")
    add(
        "--tools", action="store_true", help="rows may name `tools` and call them; kept in the tokenizer of the result"
    )
    add("--held-out", type=float, default=0.02, help="share of the rows kept for exact match (default %(default)s)")
    add("--length", type=int, default=4096, help="most tokens of a row; longer ones are dropped (default %(default)s)")
    add("--packed", action="store_true", help="pack short rows into rows of --length")
    add("--epochs", type=float, default=1.0, help="passes through the data (default %(default)s)")
    add("--max-steps", type=int, default=-1, help="optimizer steps, in place of --epochs")
    add("--batch-size", type=int, default=8, help="rows a step and process (default %(default)s)")
    add("--accumulate", type=int, default=1, help="batches that make one step (default %(default)s)")
    add("--learning-rate", type=float, default=2e-5, help="peak (default %(default)s)")
    add("--warmup-steps", type=int, default=20, help="steps to the peak (default %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="decoupled weight decay (default %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="auto", help="auto: AdamATan2 where installed, else AdamW")
    add("--average", type=float, default=0.99, help="decay of the average weights, 0 for none (default %(default)s)")
    add(
        "--gradient-steps",
        type=int,
        nargs=2,
        default=(2, 5),
        metavar=("FIRST", "LAST"),
        help="module calls that carry gradient, at the beginning and after the warm-up (default 2 5)",
    )
    add("--gradient-warmup", type=float, default=0.2, help="share of the training that goes from FIRST to LAST")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--bf16", action="store_true", help="compute in bfloat16; full training keeps float32 weights")
    add("--lora", type=int, default=0, metavar="RANK", help="train LoRA adapters of this rank in place of all weights")
    add(
        "--lora-alpha",
        type=float,
        help=f"scale of the adapters (default: {LORA_ALPHA_OF_RANK} ranks); the L stack's is divided by L_cycles",
    )
    add(
        "--lora-targets",
        nargs="+",
        default=LORA_TARGETS,
        metavar="LAYER",
        help="linear layers with an adapter, lm_head among them (default: all of both stacks)",
    )
    add("--fsdp", action="store_true", help="shard weights and optimizer over the processes (accelerators only)")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add("--logging-steps", type=int, default=10, help="steps between log entries (default %(default)s)")
    add("--report-to", nargs="+", default=[], metavar="NAME", help="trackers that get the log, as tensorboard, wandb")
    add("--save-steps", type=int, default=200, help="steps between checkpoints (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of order and split (default %(default)s)")
    return result


def check(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, naming one of them and the remedy; None where nothing is."""
    for names, fits, remedy in (
        ("length batch_size accumulate logging_steps save_steps", lambda value: value >= 1, "give at least 1"),
        ("warmup_steps weight_decay lora", lambda value: value >= 0, "give 0 or more"),
        ("learning_rate epochs", lambda value: value > 0, "give a number above 0"),
        ("held_out average", lambda value: 0 <= value < 1, "a share, from 0 to below 1"),
    ):
        for name in names.split():
            if not fits(value := getattr(options, name)):
                return f"--{name.replace('_', '-')} {value}: {remedy}"
    if options.max_steps != -1 and options.max_steps < 1:
        return f"--max-steps {options.max_steps}: give at least 1, or leave it out to train for --epochs"
    first, last = options.gradient_steps
    if not 2 <= first <= last:
        return f"--gradient-steps {first} {last}: from at least 2 up, as in 2 5"
    if not 0 <= options.gradient_warmup <= 1:
        return f"--gradient-warmup {options.gradient_warmup}: a share of the training, from 0 to 1"
    if options.lora_alpha is not None and options.lora_alpha <= 0:
        return f"--lora-alpha {options.lora_alpha}: give a number above 0"
    if not options.lora and (options.lora_alpha is not None or tuple(options.lora_targets) != LORA_TARGETS):
        return "--lora-alpha and --lora-targets are of adapters: add --lora RANK, as in --lora 16"
    if options.output.exists() and not options.output.is_dir():
        return f"--output {options.output} is a file: name a folder"
    if options.output.resolve() == Path(options.model).resolve():
        return "--output is the folder of --model, whose weights it would replace: choose another"
    if options.fsdp and _processes() < 2:
        return "--fsdp shards over processes: start several, as in torchrun --nproc-per-node 2 -m training.sft ..."
    if options.fsdp and (options.cpu or not torch.cuda.is_available()):
        return "--fsdp shards over accelerators: leave it out on the CPU, where every process holds all weights"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 data or a model that cannot be used, 2 wrong arguments."""
    command = parser()
    options = command.parse_args(arguments)
    if problem := check(options):
        command.error(problem)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        summary = run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return 0
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
