"""Runs MATH, GSM8K, ARC-C, DROP and MMLU with lm-eval in the set-up of HRM-Text's authors.

Prints each score beside the published one. evaluation/README.md says what the set-up is and where it differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tasks import BENCHMARKS, tasks


EPILOG = """examples:
  python -m evaluation.paper --model hrm-text-1b --output scores.json
  python -m evaluation.paper --model hrm-text-1b --only gsm8k --limit 50
  python -m evaluation.paper --model . --data evaluation/rows --only gsm8k arc drop mmlu

exit code: 0 done, 1 the model, a package or the data is missing or does not fit, 2 wrong arguments
"""


def evaluate(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Scores of benchmarks, by name.

    Args:
        model, tokenizer: an HRM-Text of this repository.
        names: keys of `BENCHMARKS`.
        data: a folder of rows in place of the public data sets, see `tasks`.
        limit: the first questions of each task only.
        batch_size: questions at a time.

    Returns:
        For each benchmark the `score` and all `metrics` in per cent, the number of `questions`, solved examples
        (`shots`, at most) before each, how many prompts were `too_long` for the context (answered with nothing, as the
        authors' engine does), and lm-eval's `samples`.

    Raises:
        ValueError: the model is not a class of this repository, or rows are missing.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from .harness import EvaluatedModel

    if not hasattr(tokenizer, "encode_prompt") or not hasattr(model, "optimize_for_inference"):
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} is not the class of this repository: load the model and "
            "its tokenizer with trust_remote_code=True from a folder that convert_weights.py wrote"
        )
    manager = TaskManager(include_defaults=False)
    scores = {}
    for name in names:
        benchmark = BENCHMARKS[name]
        harness = EvaluatedModel(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=model.config.max_position_embeddings,
            chat_template_args={"condition": benchmark.condition},
        )
        parts = tasks(name, harness.max_length, data)
        shots = max(part["num_fewshot"] for part in parts)
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=parts,
            task_manager=manager,
            apply_chat_template=True,
            # The examples and the question are one prompt, hence one prefix block.
            fewshot_as_multiturn=False,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
        )
        scores[name] = summarize(name, found) | {"shots": shots, "too_long": harness.too_long}
    return scores


def summarize(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one benchmark, from lm-eval's results of its tasks."""
    benchmark = BENCHMARKS[name]
    metrics: dict[str, float] = {}
    parts = found["samples"]
    for metric in ("em", "f1") if name == "drop" else ("acc", "invalid"):
        values = [[float(sample[metric]) for sample in samples] for samples in parts.values()]
        groups = values if benchmark.macro else [[value for group in values for value in group]]
        metrics[metric] = 100 * sum(sum(group) / len(group) for group in groups) / len(groups)
    samples = [sample for group in parts.values() for sample in group]
    return {"score": metrics[benchmark.metric], "metrics": metrics, "questions": len(samples), "samples": samples}


def table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores in Markdown."""
    lines = [
        "| benchmark | condition | shots | questions | too long | score | published |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, score in scores.items():
        benchmark = BENCHMARKS[name]
        label = f"{score['score']:.1f} ({benchmark.metric})"
        cells = (name, benchmark.condition, score["shots"], score["questions"], score["too_long"], label)
        lines.append("| " + " | ".join(map(str, cells)) + f" | {benchmark.published} |")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.paper",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder written by convert_weights.py, or its Hub id"
    )
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--data", type=Path, metavar="DIR", help="rows from files in place of the public data sets")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at a time (default: 8)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write scores and all answers to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Loads the model and evaluates it. Raises what `evaluate` raises, ImportError and OSError."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError('evaluation needs lm-eval: pip install -e ".[evaluate]"') from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .scoring import require_math_verify

    names = options.only or list(BENCHMARKS)
    if "math" in names:
        require_math_verify()
    for name in names:
        tasks(name, 1024, options.data)  # missing rows are named before the model loads
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype="auto").to(device).eval()
    return evaluate(model, tokenizer, names, options.data, options.limit, options.batch_size)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        scores = run(options)
        if options.output is not None:
            options.output.write_text(json.dumps(scores, indent=1, default=str), encoding="utf-8")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    print(table(scores))
    if options.data is not None or options.limit is not None:
        print("These are not all questions of the public data sets: do not compare with the published scores.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
