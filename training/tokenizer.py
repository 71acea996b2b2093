"""A byte-level BPE tokenizer with the special tokens of HRM-Text, trained on the texts that a model will read.

Text is brought to NFC, split as Qwen2 splits it (contractions, words with the space before them, digits one by one,
runs of punctuation, white space) and merged over bytes, so that any text has an encoding and there is no unknown
token. The first 31 ids are those of the published tokenizer: an HRM-Text of any vocabulary size shares them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)


# Position in this list = token id. Ids 1 to 4 spell the conditions out but no checkpoint was trained on them: a prompt
# names its conditions by ids 8, 9, 12 and 13 (see tokenization_hrm_text.py).
SPECIAL_TOKENS = (
    "<|PAD|>",
    "<|direct|>",
    "<|cot|>",
    "<|noisy|>",
    "<|synth|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

BYTES = 256
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + BYTES

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word and the one sign (mostly a space) before it
    r"|\p{N}"  # digits one by one, so that a number's places line up
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation, symbols
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"  # white space, its last sign left to the word that follows
    r"|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` tokens.

    The same texts in the same order give the same tokenizer.

    Args:
        texts: the corpus, read once. Special tokens in it are text like any other.
        vocab_size: number of tokens, the 31 special ones (ids 0 to 30) and the 256 bytes included; at least 287.

    Returns:
        The tokenizer, without truncation, padding or an automatic bos. `tokenizer.save("tokenizer.json")` writes the
        file that `AutoTokenizer` reads.

    Raises:
        ValueError: `vocab_size` is below 287, or the texts do not hold enough distinct pieces to reach it.
        TypeError: `texts` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string, which would be read letter by letter: pass a list of strings")
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and {BYTES} bytes need "
            f"{SMALLEST_VOCABULARY}; pass at least that"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    # Offsets only: a token's span keeps the space that belongs to it.
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(
            f"the texts support a vocabulary of {reached} tokens, not vocab_size={vocab_size}: pass more texts, or "
            f"vocab_size={reached}"
        )
    return tokenizer


def read_texts(paths: Iterable[str | Path]) -> Iterator[str]:
    """Texts of a corpus: every string in the rows of a JSON Lines file, every line that is not empty of any other.

    Raises:
        ValueError: a line of a `.jsonl` file is not JSON; the message names file and line.
    """
    for path in map(Path, paths):
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if path.suffix != ".jsonl":
                    if line := line.rstrip("\r\n"):
                        yield line
                elif line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
                    yield from _strings(row)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 done, 1 a file or value that cannot be used, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.tokenizer",
        description="Train a byte-level BPE tokenizer with the special tokens of HRM-Text.",
        epilog="example: python -m training.tokenizer rows.jsonl --vocab-size 1024 --output tokenizer.json",
    )
    parser.add_argument(
        "texts", nargs="+", type=Path, help="corpus: .jsonl (every string of a row) or plain text (a text per line)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=1024,
        help="tokens, special ones and bytes included (default 1024, least 287)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tokenizer.json"), help="file to write (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        tokenizer = train_tokenizer(read_texts(options.texts), options.vocab_size)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(options.output))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {tokenizer.get_vocab_size()} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
