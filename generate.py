"""Answer one question on the command line, with the model in this folder or another HRM-Text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent
PICTURES = (".png", ".svg", ".pdf")

EPILOG = """examples:
  python generate.py "What is 48 + 27?"
  python generate.py "What is 48 + 27?" --condition synth,cot --stream
  python generate.py "What is 48 + 27?" --inside thinking.png
  python generate.py "Which planet is the largest?" --model path/to/HRM-Text-1B --device cuda --max-new-tokens 200

The answer goes to standard output, everything else to standard error. Exit status: 0 answered, 1 the model cannot be
loaded or run, 2 wrong arguments.
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", help="the prompt, as plain text; the envelope is written around it")
    parser.add_argument(
        "--condition",
        metavar="TAGS",
        help="comma-separated tags of direct, cot, noisy, synth, in order (default: the tokenizer's)",
    )
    parser.add_argument(
        "--model", default=str(ROOT), metavar="DIR", help="model folder or Hub id (default: this folder)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer (default: the model's generation config)"
    )
    parser.add_argument("--stream", action="store_true", help="print the answer as it grows")
    parser.add_argument(
        "--inside",
        type=Path,
        metavar="FILE",
        help="draw how the answer forms to this PNG, SVG or PDF (needs matplotlib)",
    )
    options = parser.parse_args(arguments)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if options.inside is not None and options.inside.suffix.lower() not in PICTURES:
        parser.error(f"--inside {options.inside}: end the file's name with {', '.join(PICTURES)}")
    return options


def answer(options: argparse.Namespace) -> str:
    """Loads the model and answers; with `stream`, the text has been printed when it returns.

    Raises:
        OSError: there is no model at `options.model`.
        ValueError: an unknown condition, or a model that does not load.
        ImportError: `inside` is set and matplotlib is missing.
        RuntimeError: the device does not exist or is out of memory.
    """
    # Imported late, so that --help and wrong arguments answer at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    if options.inside is not None:
        from inside import draw_inside, look_inside, require_matplotlib

        # Before the model answers, which may take minutes.
        require_matplotlib()
        if not options.inside.absolute().parent.is_dir():
            raise ValueError(f"--inside {options.inside}: the folder does not exist")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prompt = tokenizer.encode_prompt(options.question, options.condition, return_tensors="pt").to(device)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype="auto").to(device).eval()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if options.stream else None
    limit = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    output = model.generate(**prompt, **limit, streamer=streamer)
    length = prompt["input_ids"].shape[1]
    if options.inside is not None:
        draw_inside(look_inside(model, output, length), tokenizer, options.inside, title=options.question)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        text = answer(options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    if not options.stream:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
