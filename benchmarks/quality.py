"""What fewer bits cost: the KL divergence from float32, of ours and of llama.cpp's files on the same tokens.

llama.cpp reads prompts causally, so ours is compared run causally too: float32 is our own class with all
`token_type_ids` zero. Its probabilities go to `llama-perplexity --kl-divergence` as the file that a run of its own
would have written, so that tool's divergence is from the same reference, at the same positions: the second half of
each row.
"""

from __future__ import annotations

import copy
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import free_memory
from benchmarks.models import LIBRARY, OURS, ROOT, WITH_COMPILED_LAYER, build_ours, build_variant, config_of, our_class
from training.nano_tasks import CONDITIONS, TASKS, draw


# The format of `llama-perplexity`: log-probabilities of a position as 16-bit steps from its least up, which lies at
# most this far below its greatest.
_REACH, _LEVELS = 16.0, 65535
# Of a row: half are context, and all but the last of the others are scored.
ROW = 64
# Rows of the trained model, and of a larger one with random weights.
QUESTION_ROWS, RANDOM_ROWS = 64, 4
# llama.cpp's types with a K take rows of so many values; others are left in larger types.
SUPER_BLOCK = 256


@dataclass
class Reference:
    """Rows of tokens and what float32 says of their second halves.

    Attributes:
        ids: int64 [rows, ROW].
        log_probabilities: float32 [rows, ROW - 1 - ROW // 2, vocab].
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor

    def divergence(self, model: Any) -> float:
        """Mean KL divergence of a model from it, in nats."""
        exact = self.log_probabilities
        theirs = log_probabilities(model, self.ids)
        return float((exact.exp() * (exact - theirs)).sum(-1).mean())


@torch.inference_mode()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [rows, scored, vocab] of the second half of each row, read causally and one row at a time."""
    scored = slice(ROW // 2, ROW - 1)
    rows = [model(row[None], token_type_ids=torch.zeros_like(row[None])).logits[0, scored] for row in ids]
    return torch.stack(rows).float().log_softmax(-1)


def write_base(reference: Reference, path: Path) -> None:
    """Writes a reference as `llama-perplexity --kl-divergence-base` reads it."""
    values = reference.log_probabilities
    rows, _, vocab = values.shape
    least = torch.maximum(values.amin(-1), values.amax(-1) - _REACH)
    scale = (values.amax(-1) - least) / _LEVELS
    steps = ((values - least[..., None]) / scale[..., None]).round().clamp(0, _LEVELS)
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", ROW, vocab, rows))
        file.write(reference.ids.to(torch.int32).numpy().tobytes())
        header = torch.stack([scale, least], dim=-1).numpy()
        for row, heads in zip(steps.to(torch.int32).numpy().astype("<u2"), header):
            for position, head in zip(row, heads):
                # An even number of values.
                file.write(head.tobytes() + position.tobytes() + b"\0\0" * (vocab % 2))


# ---- subjects ----------------------------------------------------------------------------------------------------


def random_rows(vocab: int, rows: int) -> torch.Tensor:
    return torch.randint(12, vocab, (rows, ROW), generator=torch.Generator().manual_seed(5))


def question_rows(rows: int) -> torch.Tensor:
    """Held-out questions of Nano with their right answers, cut where a row ends; shorter ones are passed over."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    rng, found = Random("quality"), []
    while len(found) < rows:
        question, condition = draw(rng.choice(TASKS), rng, held_out=True), rng.choice(CONDITIONS)
        ids = tokenizer.encode_prompt([question.instruction], condition)["input_ids"][0]
        ids = [*ids, *tokenizer(question.response(condition))["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= ROW:
            found.append(ids[:ROW])
    return torch.tensor(found)


def trained_nano() -> Any:
    """HRM-Text-Nano in float32, widened so that all of llama.cpp's types take its rows."""
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()
    return widened(model, SUPER_BLOCK)


@torch.no_grad()
def widened(model: Any, width: int) -> Any:
    """A model of a larger hidden size that computes the same: what is new is zero everywhere.

    A norm over more values, most of them zero, is larger by `gain`; so is every state here, which norms undo, and the
    output head divides by it.

    Raises:
        ValueError: the width is none that the hidden size divides, or not larger.
    """
    config = model.config
    old, times = config.hidden_size, width // config.hidden_size
    if width % old or times < 2:
        raise ValueError(f"width={width}: give a multiple of the hidden size {old}, at least twice")
    gain = times**0.5
    fields = config.to_dict()
    fields.update(
        hidden_size=width,
        num_attention_heads=times * config.num_attention_heads,
        num_key_value_heads=times * config.num_attention_heads,
        embedding_scale=gain * config.embedding_scale,
        head_dim=config.head_dim,
    )
    fields.pop("auto_map", None)
    wide = our_class("modeling_hrm_text.HrmTextForCausalLM")(
        our_class("configuration_hrm_text.HrmTextConfig")(**fields)
    )
    wide = wide.to(model.dtype).eval()
    source = model.state_dict()
    for name, target in wide.state_dict().items():
        target.zero_()
        values = source[name]
        if name.endswith("gqkv_proj.weight"):
            # New heads follow the old ones within each of gate, q, k and v.
            target.unflatten(0, (4, -1))[:, : values.shape[0] // 4, :old] = values.unflatten(0, (4, -1)) / gain
        elif name.endswith(("gate_up_proj.weight", "lm_head.weight")):
            target[:, :old] = values / gain
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            target[:old, : values.shape[1]] = values * gain
        elif name.endswith("z_L_init"):
            target[:old] = values * gain
        else:
            target[:, :old] = values
    return wide


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure_quality(bench: Any) -> None:
    """KL divergence from float32 of our variants and, where it is built, of llama.cpp's files.

    Of the size "nano" the trained model is judged, on its questions; of others random weights, on random tokens.

    Args:
        bench: a `Bench`; rows are appended to it. Its models have been let go: one at a time is built here.
    """
    trained = bench.size == "nano"
    if trained:
        model, ids = trained_nano(), question_rows(QUESTION_ROWS)
        exact = model
        case = "trained Nano, its questions"
    else:
        model = build_ours(config_of(bench.size, bench.layers), bench.dtype, bench.device)
        ids = random_rows(model.config.vocab_size, RANDOM_ROWS)
        exact = copy.deepcopy(model).float()
        case = "random weights and tokens"
    ids = ids.to(bench.device)
    reference = Reference(ids, log_probabilities(exact, ids))
    del exact
    free_memory(bench.device)
    found: dict[str, float] = {}
    for name in bench.variants:
        # A compiled layer changes nothing of a whole forward pass.
        if name == LIBRARY or name in WITH_COMPILED_LAYER or (name == OURS and trained):
            continue
        variant = build_variant(name, model)
        found[name] = reference.divergence(variant)
        del variant
        free_memory(bench.device)
    if bench.llama is not None:
        files = bench.llama.files(model, "trained-nano" if trained else bench.file_label())
        with tempfile.TemporaryDirectory() as work:
            base = Path(work) / "base"
            write_base(reference, base)
            for kind, file in files.items():
                found[f"llama.cpp {kind}"] = bench.llama.divergence(file, base, ROW)
    for name, value in found.items():
        row = bench.row("quality", case, name, "nats") | {"median": value}
        bench.rows.append(row)
        bench.say(f"{bench.size:5} quality   {case:26} {name:26} KL {value:.2e}")
