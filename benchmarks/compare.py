"""Measures this port beside transformers' own HRM-Text class: same weights, same machine, one run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.llama import TYPES, LlamaCpp
from benchmarks.measure import describe_machine, joined
from benchmarks.models import LIBRARY, QUANTIZED, SIZES, VARIANTS, WITH_COMPILED_LAYER, library_is_there
from benchmarks.plots import draw
from benchmarks.sections import QUICK, Bench, Plan, first_compiled_token, peak_memory


LLAMA = "llama.cpp"
SECTIONS = ("agreement", LLAMA, "prefill", "decode", "drafts", "training", "cache", "quality", "memory", "compile")
QUICK_SECTIONS = ("agreement", LLAMA, "prefill", "decode")
# These build models of their own, and those of the other sections would only take their room.
WITHOUT_MODELS = ("quality", "memory", "compile")
# What must be the same in a file for more rows to go into it.
SAME_MACHINE = ("device", "processor", "cores", "threads", "torch", "transformers")
RESULTS = Path(__file__).resolve().parent / "results"

EPILOG = """examples:
  python -m benchmarks.compare --quick
  python -m benchmarks.compare --output benchmarks/results/my_machine
  python -m benchmarks.compare --size 1b --only decode --batch 1 4 --context 1024
  python -m benchmarks.compare --size 1b --layers 4 --only prefill training --rounds 21
  python -m benchmarks.compare --device cuda --compile-layers
  python -m benchmarks.compare --llama-cpp ~/llama.cpp/build/bin --quick
  python -m benchmarks.compare --size 1b --variants optimized "8 bits" "4 bits" --only llama.cpp --context 3072 \
      --llama-cpp ~/llama.cpp/build/bin --llama-files /tmp/gguf --output benchmarks/results/my_machine --merge
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
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="what is measured; default: all that fits")
    parser.add_argument("--compile-layers", action="store_true", help="add the optimized model with a compiled layer")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="folder of llama-bench, to be measured too")
    parser.add_argument("--llama-types", nargs="+", choices=TYPES, default=TYPES, help="of its files; default: all")
    parser.add_argument("--llama-files", type=Path, metavar="DIR", help="keep its files here for later runs")
    parser.add_argument("--output", type=Path, help="path of the JSON and PNG files, without suffix")
    parser.add_argument("--merge", action="store_true", help="add turns and rows to an earlier JSON file")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plots of an earlier run")
    # For the processes that the program starts itself.
    parser.add_argument("--peak", nargs=3, metavar=("VARIANT", "TASK", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--first-compiled", metavar="VARIANT", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.command = command_of(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    for name in ("batch", "context", "prompt"):
        if any(value < 1 for value in getattr(options, name) or []):
            parser.error(f"--{name}: give numbers above zero")
    for name in ("layers", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: give a number above zero")
    if LLAMA in (options.only or ()) and options.llama_cpp is None:
        parser.error("--only llama.cpp: give --llama-cpp, the folder of llama-bench")
    if options.llama_cpp is not None:
        try:
            options.llama = LlamaCpp(
                options.llama_cpp.expanduser(),
                options.llama_files,
                tuple(options.llama_types),
                options.threads or torch.get_num_threads(),
                0 if options.device == "cpu" else 99,
            )
        except FileNotFoundError as error:
            parser.error(str(error))
    else:
        options.llama = None
    if options.plot is not None and not options.plot.is_file():
        parser.error(f"--plot: there is no file {options.plot}")
    return options


def command_of(arguments: Sequence[str]) -> str:
    """The command as others may give it: with a word in place of each path of this machine."""
    words = ["python", "-m", "benchmarks.compare"]
    for before, word in zip(["", *arguments], arguments):
        words.append("PATH" if before in ("--llama-cpp", "--llama-files", "--output") else word)
    return shlex.join(words)


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


def variants_of(options: argparse.Namespace) -> tuple[str, ...]:
    """What is measured, in the order of `VARIANTS`."""
    chosen = options.variants
    if chosen is None:
        chosen = [name for name in VARIANTS if name not in WITH_COMPILED_LAYER or options.compile_layers]
        if options.device != "cpu":
            chosen = [name for name in chosen if name not in QUANTIZED]
    if not library_is_there():
        chosen = [name for name in chosen if name != LIBRARY]
    return tuple(name for name in VARIANTS if name in chosen)


def earlier(path: Path, machine: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The result in a file that is to be added to; a new one where there is none.

    Raises:
        ValueError: it is of another machine, other versions or another number of layers.
    """
    result: dict[str, Any] = {"rows": [], "runs": [], "machine": machine}
    if layers:
        result["layers_per_stack"] = layers
    if not path.is_file():
        return result
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in SAME_MACHINE:
        if found["machine"].get(name) != machine.get(name):
            raise ValueError(f"{name} is {found['machine'].get(name)!r} there and {machine.get(name)!r} now")
    if found.get("layers_per_stack") != layers:
        raise ValueError(f"--layers is {found.get('layers_per_stack')} there and {layers} now")
    found.setdefault("runs", [])
    return found


def measure(options: argparse.Namespace) -> int:
    """Runs the sections for each size; returns the exit status."""
    plan, agree, variants = plan_of(options), True, variants_of(options)
    machine = describe_machine(options.device, torch.get_num_threads())
    output = options.output or RESULTS / f"{options.device}_{'quick' if options.quick else 'full'}"
    path = output.with_suffix(".json")
    try:
        result = earlier(path if options.merge else Path(), machine, options.layers)
    except ValueError as error:
        print(f"--merge: {path} does not fit: {error}; give another --output", file=sys.stderr)
        return 2
    if not library_is_there():
        tqdm.write("this transformers has no HRM-Text class (it came with 5.9): only our own figures are measured")
    chosen = options.only or (QUICK_SECTIONS if options.quick else SECTIONS)
    wanted = [name for name in SECTIONS if name in chosen and (name != LLAMA or options.llama is not None)]
    rows: list[dict[str, Any]] = []
    limits: dict[str, dict[str, float]] = {}
    steps = len(options.size) * (len(wanted) + 2)
    with tqdm(total=steps, unit="section", file=sys.stderr) as progress:

        def step(name: str) -> None:
            progress.set_description(name)
            progress.update()

        for size in options.size:
            bench = Bench(*subject(options, size), plan, tqdm.write, variants, options.llama)
            if set(wanted) - set(WITHOUT_MODELS):
                step(f"{size}: building")
                bench.build()
                step(f"{size}: limits of the machine")
                bench.measure_limits()
            for name in wanted:
                step(f"{size}: {name}")
                if name in WITHOUT_MODELS:
                    bench.let_go()
                if name == "agreement":
                    agree = bench.check_outputs() and agree
                else:
                    getattr(bench, f"measure_{'llama' if name == LLAMA else name}")()
            rows += bench.rows
            limits[size] = bench.limits
            del bench
    result["rows"] = joined(result["rows"], rows)
    result["limits"] = {**result.get("limits", {}), **{size: found for size, found in limits.items() if found}}
    result["runs"].append({"command": options.command, "date": machine["date"], "limits": limits})
    output.parent.mkdir(parents=True, exist_ok=True)
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


if __name__ == "__main__":
    sys.exit(main())
