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
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from .answers import exact_match
from .data import Example, PrefixLMCollator, encode_rows, pack, read_rows
from .optimization import OPTIMIZERS
from .plots import plot_curves
from .trainer import LOG_FILE, HrmTextTrainer, Recipe, last_checkpoint, read_log


logger = logging.getLogger(__name__)

# Every linear layer of both stacks. gate, q, k and v lie in one matrix, as do gate and up of the MLP.
LORA_TARGETS = ("gqkv_proj", "o_proj", "gate_up_proj", "down_proj")
OPTIONS_FILE = "options.json"


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, Any, torch.dtype]:
    """Model, tokenizer and the dtype in which the model was stored and will be saved."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype="auto")
    if not hasattr(model, "set_gradient_steps"):
        raise ValueError(f"{options.model} is not an HRM-Text folder of this port: run convert_weights.py on it first")
    stored = model.dtype
    if not options.lora:
        # Small updates would be rounded away in bfloat16.
        return model.float(), tokenizer, stored
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft") from error
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora,
        lora_alpha=options.lora_alpha or options.lora,
        target_modules=list(options.lora_targets),
    )
    if not options.bf16:
        model = model.float()
    return get_peft_model(model, adapters), tokenizer, stored


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
    """Writes the model as it is in memory, whole in one process, in the dtype that it came in.

    Modules of the folder that it came from which the model does not need itself (classification heads) go along.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        if not hasattr(model, "peft_config"):
            model.config.dtype = dtype
            model.config.use_cache = True  # the trainer switches it off
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        for module in origin.glob("*_hrm_text.py"):
            if not (hasattr(model, "peft_config") or (folder / module.name).exists()):
                shutil.copyfile(module, folder / module.name)
    trainer.accelerator.wait_for_everyone()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes as the options of the command line say; returns what was done, in numbers."""
    work = options.output / "training"
    set_seed(options.seed)
    model, tokenizer, dtype = load(options)
    longest = min(options.length, model.config.max_position_embeddings)
    examples, report = encode_rows(read_rows(options.data), tokenizer, longest, options.condition)
    logger.info("%s", report)
    train, held_out = split(examples, options.held_out, options.seed)
    if not train:
        raise ValueError(f"{options.data}: nothing to train on ({report}); see --length and --held-out")
    items: list[Any] = pack(train, longest) if options.packed else train
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = options.cpu or not torch.cuda.is_available()
    if options.gradient_checkpointing:
        # Only this kind goes together with parameters that a step leaves without a gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        # At 2 gradient steps the embedding gets none.
        ddp_find_unused_parameters=True if several else None,
        ddp_backend="gloo" if several and on_cpu else None,
        bf16=options.bf16,
        use_cpu=on_cpu,
        fsdp="full_shard auto_wrap" if options.fsdp else "",
        fsdp_config={"transformer_layer_cls_to_wrap": ["HrmTextDecoderLayer"]} if options.fsdp else None,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        save_steps=options.save_steps,
        save_total_limit=3,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        seed=options.seed,
        report_to=[],
    )
    recipe = Recipe(
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        average=options.average,
        first_gradient_steps=options.gradient_steps[0],
        last_gradient_steps=options.gradient_steps[1],
        gradient_warmup=options.gradient_warmup,
    )
    _same_options(options, work)
    trainer = HrmTextTrainer(
        model,
        arguments,
        recipe,
        items,
        PrefixLMCollator(tokenizer.pad_token_id, packed=options.packed),
        resume=last_checkpoint(work, with_average=bool(options.average)),
        processing_class=tokenizer,
    )
    loss = trainer.run()
    if trainer.average is None:
        save(trainer, tokenizer, options.output, Path(options.model), dtype)
    else:
        save(trainer, tokenizer, options.output / "raw", Path(options.model), dtype)
        trainer.average.swap(trainer.model_wrapped)
        save(trainer, tokenizer, options.output, Path(options.model), dtype)
    summary: dict[str, Any] = {"rows": vars(report), "steps": trainer.state.global_step, "loss": loss}
    if trainer.is_world_process_zero():
        plot_curves(read_log(work / LOG_FILE), work / "loss.png")
        if held_out:
            # The saved folder is what is judged, and sharded weights cannot generate.
            judged = (
                _load_saved(options, trainer.args.device)
                if options.fsdp
                else trainer.accelerator.unwrap_model(trainer.model_wrapped)
            )
            summary["held_out"] = len(held_out)
            summary["exact_match"] = exact_match(judged, tokenizer, held_out, options.batch_size)
        (work / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return summary


def _load_saved(options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    if not options.lora:
        return AutoModelForCausalLM.from_pretrained(options.output, trust_remote_code=True, dtype="auto").to(device)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype="auto")
    return PeftModel.from_pretrained(base, str(options.output)).to(device)


def _same_options(options: argparse.Namespace, work: Path) -> None:
    """Keeps the options of a run beside its checkpoints, and refuses to go on with others."""
    current = {name: str(value) for name, value in sorted(vars(options).items())}
    path = work / OPTIONS_FILE
    if path.exists() and last_checkpoint(work, with_average=False) is not None:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in current | before if current.get(name) != before.get(name))
        if changed:
            raise ValueError(
                f"{work} holds checkpoints of a run with other options ({', '.join(changed)}): repeat the same ones "
                "to go on with it, or choose another --output"
            )
    if os.environ.get("RANK", "0") != "0":
        return
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

A row is {"instruction": ..., "response": ..., "condition": ...} or {"messages": [...], "condition": ...}.""",
    )
    add = result.add_argument
    add("--model", required=True, help="folder to start from")
    add("--data", required=True, type=Path, help="JSON Lines, or a folder saved by `datasets`")
    add("--output", required=True, type=Path, help="folder of the result")
    add("--condition", help="condition of the rows that name none, as `direct` or `synth,cot`")
    add("--held-out", type=float, default=0.02, help="share of the rows kept for exact match (default %(default)s)")
    add("--length", type=int, default=4096, help="most tokens of a row; longer ones are dropped (default %(default)s)")
    add("--packed", action="store_true", help="pack short rows into rows of --length")
    add("--epochs", type=float, default=1.0, help="passes through the data (default %(default)s)")
    add("--max-steps", type=int, default=-1, help="optimizer steps, in place of --epochs")
    add("--batch-size", type=int, default=8, help="rows a step and process (default %(default)s)")
    add("--accumulate", type=int, default=1, help="batches that make one step (default %(default)s)")
    add("--learning-rate", type=float, default=2e-5, help="peak (default %(default)s; about 1e-4 for LoRA)")
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
    add("--lora-alpha", type=float, help="scale of the adapters (default: the rank)")
    add("--lora-targets", nargs="+", default=LORA_TARGETS, choices=LORA_TARGETS, help="layers with an adapter")
    add("--fsdp", action="store_true", help="shard weights and optimizer over the processes (accelerators only)")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add("--logging-steps", type=int, default=10, help="steps between log entries (default %(default)s)")
    add("--save-steps", type=int, default=200, help="steps between checkpoints (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of order and split (default %(default)s)")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 data or a model that cannot be used, 2 wrong arguments."""
    command = parser()
    options = command.parse_args(arguments)
    for name in ("length", "batch_size", "accumulate", "logging_steps", "save_steps"):
        if getattr(options, name) < 1:
            command.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    if not 0 <= options.held_out < 1:
        command.error(f"--held-out {options.held_out}: a share of the rows from 0 to below 1")
    if options.learning_rate <= 0:
        command.error(f"--learning-rate {options.learning_rate}: give a number above 0")
    if options.output.resolve() == Path(options.model).resolve():
        command.error("--output is the folder of --model, whose weights it would replace: choose another")
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
