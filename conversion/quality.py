"""Reloads a quantized folder as a user would, and holds it against plain formulas and against its source.

Runs in the process of `verify`. Three models follow one another in memory: the source's; the same network with weights
that are dequantized by `quantize.dequantize` and inputs that are rounded by `round_inputs`, in which no file of the
folder but its weights has part; and what `from_pretrained` makes of the folder.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from .layout import TensorSpec, split_names
from .quantize import EMBEDDING, Precision, Scheme, dequantize, requested_scheme, restore, round_to_nearest
from .sources import Source, read_header, read_place
from .verify import (
    OVERFLOW,
    ROUGH_TOLERANCE,
    checked_tokenizer,
    compare_logits,
    fixed_prompt,
    give_memory_back,
    library_class,
    load_folder,
    logits_of,
    model_in_memory,
    open_requested,
    tensors_of,
    tolerance,
)
from .writer import same_bits


# A weight's error over that of rounding to nearest. GPTQ trades it for a smaller error of the product.
_MOST_ERROR = 10.0


class Stored:
    """The tensors of a written folder, read one at a time."""

    def __init__(self, folder: Path, scheme: Scheme, layout: str):
        self._places: dict[str, tuple[Path, TensorSpec, int]] = {}
        self._scheme, self._layout = scheme, layout
        for file in sorted(folder.glob("*.safetensors")):
            self._places |= {name: (file, spec, start) for name, (spec, start) in read_header(file).items()}

    def parts(self, name: str) -> tuple[str, ...]:
        """The names in the folder for a published one."""
        return split_names(name) if self._layout == "split" else (name,)

    def names(self, published: Collection[str]) -> set[str]:
        """Every tensor that the folder should hold."""
        return {stored for name in published for part in self.parts(name) for stored in self._suffixed(part)}

    def _suffixed(self, part: str) -> list[str]:
        precision = self._scheme.of(part)
        if precision is None:
            return [part]
        whole = ["_packed", "_scale", "_shape"] if precision.packed else ["", "_scale"]
        return [part + suffix for suffix in whole]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def value(self, part: str) -> torch.Tensor:
        """A weight by its name in the folder, dequantized where it is quantized."""
        values = {name: read_place(*self._places[name]) for name in self._suffixed(part)}
        precision = self._scheme.of(part)
        return values[part] if precision is None else dequantize(*restore(part, values, precision))


def quantized_findings(request: dict[str, Any]) -> dict[str, Any]:
    """The findings of `verify` for a folder with quantized weights."""
    import transformers

    folder, config = Path(request["folder"]), request["config"]
    wanted = request["quantization"]
    scheme = requested_scheme(request)
    source = open_requested(request)
    stored = Stored(folder, scheme, "fused" if request["remote_code"] else "split")
    exact = wanted["calibration"] is None
    differences, equal, errors = _compare(source, stored, scheme, getattr(torch, config["dtype"]), exact)
    quality = [_errors_line(kind, values) for kind, values in errors.items()]
    tokenizer, faults, damage = checked_tokenizer(folder, request)
    if differences or (not request["remote_code"] and library_class() is None):
        loaded_as = "plain files" + ("" if differences else ": transformers has no hrm_text class before 5.9")
        return _found(loaded_as, equal, "not computed", tokenizer, differences + faults, quality, damage)

    prompt, dtype = fixed_prompt(config), getattr(torch, config["dtype"])
    rows = _held_back(request)
    if rows:
        model = model_in_memory(request, lambda names: tensors_of(source, names, dtype))
        answers = log_probabilities(model, rows)
        del model
        give_memory_back()
    model = model_in_memory(request, lambda names: ((name, stored.value(name)) for name in names))
    round_inputs(model, scheme)
    plain = logits_of(model, prompt)
    if rows:
        quality.append(_divergence_line(answers, log_probabilities(model, rows), len(rows)))
    del model
    give_memory_back()
    model, misfits = load_folder(folder, request["remote_code"])
    # A rounding of an input may fall to the other side where two ways of summing meet a tie; of weights there is none.
    allowed = ROUGH_TOLERANCE if scheme.layers.activations else tolerance(config)
    logits = logits_of(model, prompt)
    difference, unlike = compare_logits(logits, plain, allowed, "those of the plain formulas")
    differences += misfits + unlike
    said = f"{tuple(logits.shape[1:])} finite, within {difference:.2g} of the plain formulas"
    loaded_as = f"{type(model).__name__}, transformers {transformers.__version__}"
    damage = damage or (None if plain.isfinite().all() else OVERFLOW)
    return _found(loaded_as, equal, said, tokenizer, differences + faults, quality, damage)


def _found(
    loaded_as: str,
    equal: int,
    logits: str,
    tokenizer: str,
    differences: list[str],
    quality: list[str],
    damage: str | None,
) -> dict[str, Any]:
    return {
        "loaded_as": loaded_as,
        "tensors": equal,
        "logits": logits,
        "tokenizer": tokenizer,
        "differences": differences,
        "quality": quality,
        "damage": damage,
    }


def _compare(
    source: Source, stored: Stored, scheme: Scheme, dtype: torch.dtype, exact: bool
) -> tuple[list[str], int, dict[str, list[float]]]:
    """Differences of the files, how many tensors are equal, and the relative errors of the others by their kind.

    Args:
        exact: whether quantized weights are the source's, rounded to nearest; else they are near it.
    """
    wanted, there = stored.names(source.specs), set(stored)
    differences = [f"{name} is missing" for name in sorted(wanted - there)]
    differences += [f"{name} is in the folder only" for name in sorted(there - wanted)]
    errors: dict[str, list[float]] = {}
    equal = 0
    for name in () if differences else source.specs:
        value, precision = source.read(name), scheme.of(name)
        written = torch.cat([stored.value(part) for part in stored.parts(name)])
        if precision is None:
            same = same_bits(written, value.to(written.dtype))
            equal += same
            differences += [] if same else [f"{name} differs from the source"]
            continue
        error = _relative_error(value, written)
        errors.setdefault(_kind(name, precision), []).append(error)
        nearest = dequantize(*round_to_nearest(value.to(dtype), precision))
        if exact or name == EMBEDDING:
            differences += [] if same_bits(written, nearest) else [f"{name} is not the source's, rounded"]
        elif not error <= _MOST_ERROR * _relative_error(value, nearest):
            differences.append(f"{name} is off by {error:.2%}: the calibration rows are too few, or of one kind")
    return differences, equal, errors


def _relative_error(value: torch.Tensor, written: torch.Tensor) -> float:
    return ((written.float() - value.float()).norm() / value.float().norm().clamp_min(1e-30)).item()


def _kind(name: str, precision: Precision) -> str:
    place = "layers" if ".layers." in name else "lm_head" if name.startswith("lm_head") else "embed_tokens"
    return f"{place} in {precision.bits} bits"


def _errors_line(kind: str, errors: list[float]) -> str:
    mean = sum(errors) / len(errors)
    return f"{kind}: relative error of the weights {mean:.2%} on average, {max(errors):.2%} at most"


def _divergence_line(source: torch.Tensor, ours: torch.Tensor, rows: int) -> str:
    divergence = (source.exp() * (source - ours)).sum(-1).mean().item()
    return (
        f"KL of the quantized model to the source {divergence:.1e} nats a token, over {len(source)} answer tokens of "
        f"{rows} calibration rows that were kept back"
    )


def _held_back(request: dict[str, Any]) -> list[Any]:
    path = request["quantization"].get("calibration")
    if path is None:
        return []
    from .calibrate import encode

    return encode(Path(path), Path(request["folder"]), request["config"]).kept_back


@torch.no_grad()
def log_probabilities(model: Any, examples: list[Any]) -> torch.Tensor:
    """Log-probabilities float32 [answer tokens, vocabulary] of the tokens of all answers."""
    rows = []
    for example in examples:
        ids, types = (torch.tensor([example[key]]) for key in ("input_ids", "token_type_ids"))
        asked = torch.tensor(example["labels"])[1:] != -100
        logits = model.eval()(input_ids=ids, token_type_ids=types, use_cache=False).logits[0, :-1][asked]
        rows.append(logits.float().log_softmax(-1))
    return torch.cat(rows)


def round_inputs(model: torch.nn.Module, scheme: Scheme) -> None:
    """Has the linear layers whose inputs are quantized round them: 8 bits, a scale for each token."""

    def rounded(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = arguments
        least, most = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = torch.maximum(least.abs(), most.abs()) / 127.5
        scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(x.dtype).eps), scale)
        return ((x / scale).round().clamp(-128, 127) * scale,)

    for name, module in model.named_modules():
        precision = scheme.of(f"{name}.weight") if isinstance(module, torch.nn.Linear) else None
        if precision is not None and precision.activations:
            module.register_forward_pre_hook(rounded)
