"""Converts an HRM-Text checkpoint of any form to a folder ready for the Hub.

As a program: `python convert_weights.py SOURCE --output DIR` (`--help` tells the rest). As a function: `convert()`.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conversion.adapters import AdapterConversion, convert_adapter, is_adapter
from conversion.calibrate import calibrate, check_rows
from conversion.errors import ConversionError
from conversion.hub import check_repo_id, locate, publish
from conversion.output import DTYPES, LAYOUTS, Plan, make_plan, write, write_card
from conversion.quantize import SCHEMES, Scheme, make_scheme
from conversion.sources import open_source
from conversion.verify import Verification, verify
from conversion.writer import check_output, staged


EPILOG = """examples:
  python convert_weights.py runs/hrm-text-1b --output HRM-Text-1B --dtype bfloat16 --tokenizer runs/tokenizer
  python convert_weights.py runs/hrm-text-1b --epoch 3 --weights raw --output epoch-3
  python convert_weights.py sapientinc/HRM-Text-1B --output HRM-Text-1B --dry-run
  python convert_weights.py HRM-Text-1B --format split --max-shard-size 1GB --output HRM-Text-1B-split
  python convert_weights.py adapter-of-the-split-layout --output adapter
  python convert_weights.py HRM-Text-1B --output HRM-Text-1B-W8A8 --quantize w8a8
  python convert_weights.py HRM-Text-1B --output HRM-Text-1B-W4A16 --quantize w4a16 --calibration rows.jsonl
  python convert_weights.py my-fine-tune --output ready --push-to-hub me/my-model --private

exit code: 0 done, 1 refused or failed (the output is then unchanged), 2 wrong usage, 130 interrupted,
143 ended
"""

# After a signal that a destructor swallowed.
_AGAIN_SECONDS = 0.05


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the plan, and what the reload found (None where it was not asked)."""

    plan: Plan
    verification: Verification | None


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    epoch: int | None = None,
    weights: str = "ema",
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    layout: str = "fused",
    max_shard_size: str | int = "5GB",
    force: bool = False,
    dry_run: bool = False,
    verification: bool = True,
    progress: bool = True,
    quantize: str | None = None,
    group_size: int | None = None,
    calibration: str | Path | None = None,
) -> Conversion | AdapterConversion:
    """Converts a checkpoint to a complete model folder, or a LoRA adapter to the other layout of projections.

    Args:
        source: a training checkpoint, a Hugging Face folder in any dialect or layout, a folder with an adapter, or a
            Hub id (`user/name`, `user/name@revision`).
        output: the folder to write; may be left out with `dry_run`.
        epoch: which epoch of a training checkpoint; None is the latest.
        weights: of a training checkpoint, `ema` (the averages, which are the published ones) or `raw`.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the source's.
        tokenizer: a tokenizer folder or `tokenizer.json`, in place of the one beside the weights.
        layout: `fused`, the published one, or `split`, the one of transformers' own class.
        max_shard_size: largest weight file, in bytes or like "500MB".
        force: replace the output of an earlier conversion. It stays until the new one is complete and verified.
        dry_run: write nothing.
        verification: reload the result in a new process, and compare its tensors and logits with the source's.
        progress: show a progress bar.
        quantize: `w8a8` or `w4a16`, in the format of compressed-tensors; None keeps the weights whole.
        group_size: columns that share a scale in w4a16; None is 32.
        calibration: rows of questions and answers (`training/formats.py` has the forms) on which the rounding of the
            weights is chosen, by GPTQ; None rounds to nearest.

    Raises:
        ConversionError: something is wrong with an argument, the source, the disk or the result. The message is one
            line that names it and the remedy, and `output` is unchanged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"--dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise ConversionError(f"--format {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    shard_bytes = parse_size(max_shard_size)
    scheme = _scheme(quantize, group_size, layout, calibration, verification and not dry_run)
    if not dry_run and output is None:
        raise ConversionError("--output is missing: name the folder to write")
    opening = {"epoch": epoch, "weights": weights, "tokenizer": Path(tokenizer).absolute() if tokenizer else None}
    try:
        folder, label = locate(source)
        opening["path"] = folder.absolute()
        if not dry_run:
            check_output(Path(output), folder, force)
        if is_adapter(folder):
            _refuse_for_adapters(folder, opening, dtype, dry_run, quantize)
            return convert_adapter(folder, Path(output), layout)
        plan = make_plan(open_source(**opening, label=label), dtype, layout, shard_bytes, scheme)
    except OSError as error:  # a folder on the way to a file may be closed to this user, too
        raise ConversionError(
            f"{error.filename or source} cannot be read ({error.strerror}): check the disk and permissions"
        ) from None
    if calibration is not None and plan.source.tokenizer is None:
        raise ConversionError(
            f"--calibration: {source} has no tokenizer, which turns rows into tokens: pass --tokenizer"
        )
    for warning in plan.warnings:
        warnings.warn(warning, stacklevel=2)
    if dry_run:
        return Conversion(plan, None)

    needed = plan.nbytes + sum(len(content) for content in plan.files.values()) + 2**20
    needed += 0 if calibration is None else plan.elements  # a byte for each number, until they are packed
    found = None
    with staged(Path(output), needed) as (temporary, put_in_place):
        readable = {key: str(value) if isinstance(value, Path) else value for key, value in opening.items()}
        request = {"source": readable, "config": plan.config, "remote_code": "auto_map" in plan.config}
        if scheme is not None:
            request["quantization"] = {
                "name": scheme.name,
                "group_size": group_size,
                "calibration": calibration and str(Path(calibration).absolute()),
            }
        method = "rounded to nearest"
        if calibration is None:
            files = write(plan, temporary, progress)
        else:
            work = temporary / "calibration"
            solved, method = calibrate(work, plan.files, {**request, "progress": progress})
            files = write(plan, temporary, progress, solved)
            shutil.rmtree(work)
        if verification:
            found = verify(temporary, request)
            if found.damage:
                raise ConversionError(f"{folder}: {found.damage}; --no-verify converts it all the same")
            if found.differences:
                raise ConversionError(
                    f"{output}: the reloaded folder is not the source ({len(found.differences)} differences, first: "
                    f"{found.differences[0]}): nothing was put in place; report this"
                )
        write_card(plan, temporary, files, [] if scheme is None else scheme.lines(method, found and found.quality))
        # The time since the first check is long enough for another run.
        check_output(Path(output), folder, force)
        put_in_place()
    return Conversion(plan, found)


def _scheme(
    name: str | None, group_size: int | None, layout: str, calibration: str | Path | None, verified: bool
) -> Scheme | None:
    if name is None:
        for option, value in (("--group-size", group_size), ("--calibration", calibration)):
            if value is not None:
                raise ConversionError(f"{option} is for --quantize, which is missing")
        return None
    scheme = make_scheme(name, group_size, layout)
    if verified and find_spec("compressed_tensors") is None:
        raise ConversionError(
            "--quantize: the result is reloaded through compressed-tensors, which is not installed: pip install "
            "compressed-tensors, or pass --no-verify"
        )
    if calibration is not None:
        check_rows(Path(calibration))
    return scheme


def _refuse_for_adapters(
    folder: Path, opening: dict[str, Any], dtype: str | None, dry_run: bool, quantize: str | None
) -> None:
    chosen = [f"--{name}" for name in ("epoch", "tokenizer") if opening[name] is not None]
    chosen += ["--weights"] * (opening["weights"] != "ema") + ["--dtype"] * (dtype is not None)
    chosen += ["--quantize"] * (quantize is not None)
    if chosen or dry_run:
        raise ConversionError(f"{folder} is an adapter, to which {(chosen or ['--dry-run'])[0]} does not apply")


def parse_size(text: str | int) -> int:
    """Bytes in a size like "500MB", "5GB" (powers of 1000) or "2GiB" (of 1024), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise ConversionError(f"--max-shard-size {text!r} is not a size: write it like 500MB or 5GB")
    return int(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.private or options.revision) and not options.push_to_hub:
        parser.error("--private and --revision are for --push-to-hub USER/NAME, which is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return _run(options)
    except ConversionError as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("convert_weights.py: interrupted; the output is unchanged", file=sys.stderr)
        return 130


def _end_at_signal(number: int, frame: object) -> None:
    """Ends the program on its way out through every `finally`, with the exit status that shells expect."""

    def unraisable(caught: Any) -> None:
        # What is raised in a destructor ends that alone, so the signal comes again; what else a file complains of that
        # is thrown away half made is nobody's concern now.
        if isinstance(caught.exc_value, (KeyboardInterrupt, SystemExit)):
            again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()

    sys.unraisablehook = unraisable
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _run(options: argparse.Namespace) -> int:
    if options.push_to_hub:
        check_repo_id(options.push_to_hub)
    done = convert(
        options.source,
        options.output,
        epoch=options.epoch,
        weights=options.weights,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        layout=options.format,
        max_shard_size=options.max_shard_size,
        force=options.force,
        dry_run=options.dry_run,
        verification=options.verify,
        quantize=options.quantize,
        group_size=options.group_size,
        calibration=options.calibration,
    )
    if isinstance(done, AdapterConversion):
        print("\n".join([f"{options.output}:", *(f"  {line}" for line in done.lines())]))
        if options.push_to_hub:
            raise ConversionError(
                f"--push-to-hub is for models; `hf upload {options.push_to_hub} {options.output}` sends the adapter"
            )
        return 0
    if options.dry_run:
        print("\n".join(done.plan.table()))
        return 0
    print(f"{options.output}: {len(done.plan.specs)} tensors, {done.plan.nbytes:,} bytes")
    print(f"  prompts    {done.plan.prompts}")
    if done.verification:
        print("\n".join(f"  {line}" for line in done.verification.lines()))
    if options.push_to_hub:
        published = publish(options.output, options.push_to_hub, options.private, options.revision)
        for name in published.deleted:
            print(f"deleted from {options.push_to_hub}: {name}, of an earlier push")
        print(published.commit_url)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_weights.py",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help="a training checkpoint, a Hugging Face folder of any dialect or layout, a folder with a LoRA adapter, or "
        "a Hub id (user/name, user/name@revision)",
    )
    parser.add_argument("--output", type=Path, help="the folder to write")
    parser.add_argument("--epoch", type=int, help="epoch of a training checkpoint (default: the latest)")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="averages or raw weights of a training checkpoint"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="dtype of the output (default: the source's)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or tokenizer.json (default: the source's)")
    parser.add_argument(
        "--format",
        choices=LAYOUTS,
        default="fused",
        help="fused: the published layout, with this project's code; split: the layout of transformers' own class",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file, like 500MB (default: 5GB)")
    parser.add_argument(
        "--quantize",
        choices=SCHEMES,
        help="store weights as compressed-tensors does: w8a8, 8 bits, inputs too; w4a16, 4 bits in groups",
    )
    parser.add_argument("--group-size", type=int, help="columns that share a scale in w4a16 (default: 32)")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="questions and answers, in any form of training/formats.py, on which GPTQ chooses how to round "
        "(default: to nearest)",
    )
    parser.add_argument("--force", action="store_true", help="replace the output of an earlier conversion")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, write nothing")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not reload the result and compare it"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="USER/NAME",
        help="upload the result to this repository; of the files there, only weight files that an earlier upload "
        "listed in its card and this one does not have are deleted",
    )
    parser.add_argument("--private", action="store_true", help="make the repository private if it is made now")
    parser.add_argument("--revision", help="branch to upload to (default: the main one)")
    return parser


if __name__ == "__main__":
    # A polite request to end removes the temporary folder, as an interruption does.
    signal.signal(signal.SIGTERM, _end_at_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background ignores it
        signal.signal(signal.SIGINT, _end_at_signal)
    sys.exit(main())
