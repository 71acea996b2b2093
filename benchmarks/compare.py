"""Measures this port beside transformers' own HRM-Text class: same weights, same machine, one run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.llama import measure_llama
from benchmarks.measure import describe_machine
from benchmarks.models import COMPILED, LIBRARY, OPTIMIZED, OURS, SIZES, library_is_there
from benchmarks.plots import draw
from benchmarks.sections import QUICK, Bench, Plan, first_compiled_token, peak_memory


SECTIONS = ("agreement", "prefill", "decode", "training", "cache", "memory", "compile")
QUICK_SECTIONS = SECTIONS[:3]
RESULTS = Path(__file__).resolve().parent / "results"

EPILOG = """examples:
  python -m benchmarks.compare --quick
  python -m benchmarks.compare --output benchmarks/results/my_machine
  python -m benchmarks.compare --size 1b --only decode --batch 1 4 --context 1024
  python -m benchmarks.compare --size 1b --layers 4 --only prefill training --rounds 21
  python -m benchmarks.compare --device cuda --compile-layers
  python -m benchmarks.compare --llama-cpp ~/llama.cpp/build/bin --quick
  python -m benchmarks.compare --plot benchmarks/results/my_machine.json

exit status: 0 all outputs agree, 1 some do not, 2 wrong arguments"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--size", nargs="+", choices=list(SIZES), default=["nano", "1b"], help="random models to build"
    )
    parser.add_argument("--layers", type=int, help="layers of a stack; fewer give steadier figures in the same time")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), help="default: bfloat16, nano float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: one for each core")
    parser.add_argument("--quick", action="store_true", help="the main figures only, in two minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes of decoding")
    parser.add_argument("--context", nargs="+", type=int, help="contexts of decoding")
    parser.add_argument("--prompt", nargs="+", type=int, help="prompt lengths of prefill")
    parser.add_argument("--rounds", type=int, help="how often each run is timed")
    parser.add_argument("--compile-layers", action="store_true", help="add the optimized model with a compiled layer")
    parser.add_argument("--llama-cpp", metavar="DIR", help="folder of llama-bench, to be measured too")
    parser.add_argument("--output", type=Path, help="path of the JSON and PNG files, without suffix")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plots of an earlier run")
    # For the processes that the program starts itself.
    parser.add_argument("--peak", nargs=3, metavar=("VARIANT", "TASK", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--first-compiled", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    for name in ("batch", "context", "prompt"):
        if any(value < 1 for value in getattr(options, name) or []):
            parser.error(f"--{name}: give numbers above zero")
    for name in ("layers", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: give a number above zero")
    if options.plot is not None and not options.plot.is_file():
        parser.error(f"--plot: there is no file {options.plot}")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for."""
    plan = QUICK if options.quick else Plan()
    changes: dict[str, Any] = {}
    if options.batch or options.context:
        batches = options.batch or sorted({batch for batch, _ in plan.decode})
        contexts = options.context or sorted({context for _, context in plan.decode})
        changes["decode"] = tuple((batch, context) for batch in batches for context in contexts)
    if options.prompt:
        changes["prefill"] = tuple(options.prompt)
    if options.rounds:
        changes["rounds"] = options.rounds
    return dataclasses.replace(plan, **changes)


def dtype_of(options: argparse.Namespace, size: str) -> torch.dtype:
    return getattr(torch, options.dtype or ("float32" if size == "nano" else "bfloat16"))


def subject(options: argparse.Namespace, size: str) -> tuple[str, int | None, torch.dtype, str]:
    """Which model is measured: its size, the layers of a stack where they differ from the size's, dtype and device."""
    return size, options.layers, dtype_of(options, size), options.device


def measure(options: argparse.Namespace) -> int:
    """Runs the sections for each size; returns the exit status."""
    plan, agree, result = plan_of(options), True, {"rows": [], "limits": {}}
    if options.layers:
        result["layers_per_stack"] = options.layers
    result["machine"] = describe_machine(options.device, torch.get_num_threads())
    if not library_is_there():
        tqdm.write("this transformers has no HRM-Text class (it came with 5.9): only our own figures are measured")
    chosen = options.only or (QUICK_SECTIONS if options.quick else SECTIONS)
    wanted = [name for name in SECTIONS if name in chosen]
    steps = len(options.size) * (len(wanted) + 2 + bool(options.llama_cpp))
    with tqdm(total=steps, unit="section", file=sys.stderr) as progress:

        def step(name: str) -> None:
            progress.set_description(name)
            progress.update()

        for size in options.size:
            step(f"{size}: building")
            bench = Bench(*subject(options, size), plan, tqdm.write, options.compile_layers)
            bench.build()
            step(f"{size}: limits of the machine")
            bench.measure_limits()
            if "agreement" in wanted:
                step(f"{size}: agreement")
                agree = bench.check_outputs() and agree
            if options.llama_cpp:
                step(f"{size}: llama.cpp")
                measure_llama(bench, Path(options.llama_cpp).expanduser(), torch.get_num_threads())
            for name in wanted:
                if name == "agreement":
                    continue
                step(f"{size}: {name}")
                if name in ("memory", "compile"):
                    # Those run in processes of their own, and the models here would only take their room.
                    bench.models = {key: model.to("meta") for key, model in bench.models.items()}
                getattr(bench, f"measure_{name}")()
            result["rows"] += bench.rows
            result["limits"][size] = bench.limits
            del bench
    output = options.output or RESULTS / f"{options.device}_{'quick' if options.quick else 'full'}"
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("written:", path, *draw(result, output))
    if not agree:
        print("the outputs of some variant do not agree with the reference; see above", file=sys.stderr)
    return 0 if agree else 1


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plot is not None:
        print("written:", *draw(json.loads(options.plot.read_text(encoding="utf-8")), options.plot.with_suffix("")))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak or options.first_compiled:
        model = subject(options, options.size[0])
        if options.peak:
            variant, task, tokens = options.peak
            print(json.dumps(peak_memory(variant, task, int(tokens), *model)))
        else:
            print(json.dumps(first_compiled_token(options.first_compiled, *model)))
        return 0
    return measure(options)


__all__ = ["COMPILED", "LIBRARY", "OPTIMIZED", "OURS", "main"]


if __name__ == "__main__":
    sys.exit(main())
