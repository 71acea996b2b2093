"""What is measured: agreement of the outputs, prefill, decoding, training, memory, and the first compiled token."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama import LlamaCpp, measure_llama
from benchmarks.measure import Figure, Limits, free_memory, held_memory, interleaved, merged
from benchmarks.models import (
    INT4,
    INT4_COMPILED,
    INT8,
    INT8_COMPILED,
    LIBRARY,
    OPTIMIZED,
    OURS,
    QUANTIZED,
    VARIANTS,
    WITH_COMPILED_LAYER,
    build_ours,
    build_variant,
    config_of,
    filled_cache,
)
from benchmarks.quality import measure_quality
from benchmarks.quantized import measure_quantized


# Norm of the difference from the logits of float32, over their norm: at most this far, or at most so many times as far
# as the library's class is, which rounds at other places. What is quantized is judged by its divergence instead.
AGREEMENT, AGREEMENT_TIMES = 1e-4, 1.25
# Bytes of one weight of the stacks and of one of the output head, at the least: no scales. "int4" keeps the last of
# a layer's four matrices, a fifth of it, in 8 bits.
_WEIGHT_BYTES = {INT8: (1.0, 1.0), INT8_COMPILED: (1.0, 1.0), INT4: (0.6, 1.0), INT4_COMPILED: (0.6, 1.0)}


@dataclass
class Plan:
    """How much is measured.

    Attributes:
        prefill: prompt lengths.
        decode: pairs of batch size and context.
        rounds: how often each run is timed after its warm-up.
        steps: tokens in one timed run of decoding.
        training: rows and tokens of the training step.
        drafts: context, and how many tokens one step checks at once, as in speculative decoding.
    """

    prefill: tuple[int, ...] = (128, 512, 1024, 2048)
    decode: tuple[tuple[int, int], ...] = tuple(
        (batch, context) for batch in (1, 4, 16) for context in (128, 1024, 3072)
    )
    rounds: int = 5
    steps: int = 2
    training: tuple[int, int] = (2, 512)
    drafts: tuple[int, tuple[int, ...]] = (1024, (1, 2, 4, 8))


QUICK = Plan(prefill=(128,), decode=((1, 128), (1, 1024)), rounds=2)


@dataclass
class Bench:
    """The models of one size, the limits of the machine, and the rows measured so far.

    The limits are those at the start of the run; each figure comes with what it was just then. `layers`, where set, is
    the number of layers of a stack in place of the size's own.
    """

    size: str
    layers: int | None
    dtype: torch.dtype
    device: str
    plan: Plan
    say: Callable[[str], None]
    variants: tuple[str, ...] = (LIBRARY, OURS, OPTIMIZED)
    llama: LlamaCpp | None = None
    machine: Limits | None = None
    llama_files: dict[str, Path] = field(default_factory=dict)
    ours: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)

    def build(self) -> None:
        """Builds every variant on the same weights."""
        config = config_of(self.size, self.layers)
        self.machine = Limits(self.device, self.dtype)
        self.ours = build_ours(config, self.dtype, self.device)
        if self.llama is not None:
            self.llama_files = self.llama.files(self.ours, self.file_label())
        plain = sum(parameter.numel() for parameter in self.ours.parameters()) * self.dtype.itemsize
        sizes: dict[str, dict[str, float]] = {}
        # From few bits to many; the last takes the weights themselves where nothing else needs them.
        order = sorted(self.variants, key=VARIANTS.index, reverse=True)
        for name in order:
            free_memory(self.device)
            before = held_memory()
            alone = name == order[-1] and not {LIBRARY, OURS} & set(order)
            self.models[name] = build_variant(name, self.ours, in_place=alone)
            free_memory(self.device)
            # The library's class views the weights of ours, as an optimized model does on CUDA.
            if name not in QUANTIZED:
                sizes[name] = {"median": float(plain)}
            elif before is not None:
                sizes[name] = {"median": held_memory() - before + (plain if alone else 0)}
        self.models = {name: self.models[name] for name in self.variants}
        # What a compiler holds is no weight.
        self.note_bytes("bytes", "weights", {name: sizes[name] for name in sizes if name not in WITH_COMPILED_LAYER})

    def let_go(self) -> None:
        """Frees the models, for what runs in processes of its own or builds its own."""
        self.models.clear()
        self.ours = None
        free_memory(self.device)

    @functools.cached_property
    def config(self) -> Any:
        return config_of(self.size, self.layers)

    def file_label(self) -> str:
        """Opens the names of files made of these weights."""
        return f"{self.size}-{str(self.dtype).removeprefix('torch.')}-{self.layers or 'all'}"

    # ---- costs ---------------------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        """Module calls of one forward pass."""
        config = self.config
        return config.H_cycles * (config.L_cycles + 1)

    @property
    def weights_of_a_stack(self) -> int:
        """Elements of the matrices of one stack."""
        config = self.config
        width = config.num_attention_heads * config.head_dim
        layer = 5 * width * config.hidden_size + 3 * config.intermediate_size * config.hidden_size
        return layer * config.num_layers_per_stack

    def decode_bytes(self, batch: int, context: int, variant: str = OURS) -> int:
        """Bytes that one decoding step has to read: every weight once a call, the head, and the cache."""
        config, size = self.config, self.dtype.itemsize
        a_weight, a_head_weight = _WEIGHT_BYTES.get(variant, (size, size))
        weights = self.weights_of_a_stack * self.calls * a_weight
        head = config.vocab_size * config.hidden_size * a_head_weight
        cached = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * batch * context
        return int(weights + head + cached * size)

    def prefill_operations(self, tokens: int) -> int:
        """Floating point operations of a prompt that is one block, with the logits of its last position."""
        config = self.config
        attention = 4 * tokens * tokens * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        head = 2 * config.vocab_size * config.hidden_size
        return 2 * self.weights_of_a_stack * self.calls * tokens + attention + head

    def prefill_limit(self, tokens: int) -> float:
        """Seconds for those operations, at the rate of this machine's own matrix product now."""
        return self.prefill_operations(tokens) / self.machine.operations(1024 if tokens >= 1024 else 512)

    # ---- rows ----------------------------------------------------------------------------------------------------

    def note(self, section: str, case: str, figures: dict[str, Figure]) -> None:
        """Appends and prints one row of seconds for each variant, with its ratio to the library."""
        for variant, figure in figures.items():
            row = self.row(section, case, variant, "s") | figure.row()
            if LIBRARY in figures:
                row["times_library"] = figure.times(figures[LIBRARY])
            self._keep(row)

    def note_bytes(self, section: str, case: str, sizes: dict[str, dict[str, float]]) -> None:
        """The same for bytes: `median` and whatever else is known of them."""
        for variant, size in sizes.items():
            row = self.row(section, case, variant, "bytes") | size
            if LIBRARY in sizes:
                row["times_library"] = sizes[LIBRARY]["median"] / size["median"]
            self._keep(row)

    def row(self, section: str, case: str, variant: str, unit: str) -> dict[str, Any]:
        """What says of which figure a row is."""
        return {"size": self.size, "section": section, "case": case, "variant": variant, "unit": unit}

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.say(format_row(row))

    # ---- sections ------------------------------------------------------------------------------------------------

    def measure_limits(self) -> None:
        """Bytes read and operations done a second by this machine, now."""
        self.limits["read_bytes_per_s"] = self.machine.bytes_read()
        for rows in (512, 1024):
            self.limits[f"matmul_{rows}_per_s"] = self.machine.operations(rows)
        self.say(
            f"limits: reads {self.limits['read_bytes_per_s'] / 1e9:.1f} GB/s, {str(self.dtype)[6:]} matrix product "
            f"{self.limits['matmul_512_per_s'] / 1e9:.0f} GFLOP/s (512 rows), "
            f"{self.limits['matmul_1024_per_s'] / 1e9:.0f} (1024 rows)"
        )

    @torch.inference_mode()
    def check_outputs(self) -> bool:
        """Whether the logits of a prefix of 128 tokens and a response of 64 agree between all variants.

        Each is compared with float32: the library's class where that is the dtype that is measured, else our model,
        which the tests hold to the library's. Quantized variants are told, not judged.
        """
        config = self.config
        ids = torch.randint(12, config.vocab_size, (1, 192), generator=torch.Generator().manual_seed(2)).to(
            self.device
        )
        types = (torch.arange(192, device=self.device) < 128).long()[None]
        logits = {name: model(ids, token_type_ids=types).logits.float() for name, model in self.models.items()}
        if self.dtype is torch.float32:
            exact = logits.get(LIBRARY)
            exact = self.ours(ids, token_type_ids=types).logits if exact is None else exact
        else:
            exact = copy.deepcopy(self.ours).float()(ids, token_type_ids=types).logits
        errors = {name: float((values - exact).norm() / exact.norm()) for name, values in logits.items()}
        rounded = [errors[name] for name in (LIBRARY, OURS) if name in errors]
        bound = max(AGREEMENT, AGREEMENT_TIMES * rounded[0] if rounded else 0.0)
        agree = True
        for name, error in errors.items():
            same = float((logits[name].argmax(-1) == exact.argmax(-1)).float().mean())
            row = self.row("agreement", "logits", name, "relative error") | {"median": error, "same_argmax": same}
            if name not in QUANTIZED:
                row["fine"] = error <= bound
                agree = agree and row["fine"]
            self.rows.append(row)
            self.say(
                f"{self.size:5} agreement of {name} with float32: relative error {error:.1e}, "
                f"same best token {same:.0%}"
            )
        return agree

    def measure_prefill(self) -> None:
        """A prompt that is one prefix block, into a new cache, with the logits of its last position."""
        for tokens in self.plan.prefill:
            self.note("prefill", f"{tokens} tokens", self.time_prefill(tokens, self.plan.rounds))

    @torch.inference_mode()
    def time_prefill(self, tokens: int, rounds: int) -> dict[str, Figure]:
        """Seconds of each variant for one prompt, taking turns."""
        ids = torch.randint(12, self.config.vocab_size, (1, tokens)).to(self.device)
        arguments = {
            "input_ids": ids,
            "token_type_ids": torch.ones_like(ids),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        runs = {name: functools.partial(model, **arguments) for name, model in self.models.items()}
        return interleaved(self.device, runs, rounds, limit=functools.partial(self.prefill_limit, tokens))

    def measure_decode(self) -> None:
        """Steps of decoding on a cache of the given context."""
        for batch, context in self.plan.decode:
            case = f"batch {batch}, context {context}"
            one = self._cache_bytes(batch, context)
            if one > self._room():
                self.say(f"{self.size:5} decode {case}: left out, its cache of {one / 1e9:.1f} GB does not fit")
                self.rows.append({"size": self.size, "section": "decode", "case": case, "left_out": "memory"})
                continue
            self.note("decode", case, self.time_decode(batch, context))

    def _cache_bytes(self, batch: int, context: int) -> float:
        """With room for a quarter of slack, and for the copies that a cache without storage of its own makes."""
        config = self.config
        a_token = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * self.dtype.itemsize
        return a_token * batch * (context * 1.05 + 64) + 64e6

    def _room(self) -> float:
        return free_memory(self.device) * 0.9

    @torch.inference_mode()
    def time_decode(self, batch: int, context: int, rounds: int | None = None, tokens: int = 1) -> dict[str, Figure]:
        """Seconds of each variant for one step of so many new tokens a row, taking turns."""
        token = torch.randint(12, self.config.vocab_size, (batch, tokens)).to(self.device)
        rounds = rounds or self.plan.rounds
        caches: dict[str, Any] = {}
        # Our model is called as `generate` calls it.
        rooms = type(self.ours).__module__.rpartition(".")[0]
        step = importlib.import_module(f"{rooms}.layout_hrm_text").StepLayout(padded=False)

        def run(name: str) -> None:
            more = {} if name == LIBRARY else {"layout": step}
            for _ in range(self.plan.steps):
                self.models[name](token, past_key_values=caches[name], use_cache=True, **more)

        def each(names: Iterable[str], rounds: int) -> dict[str, Figure]:
            runs = {name: lambda name=name: run(name) for name in names}
            figures = interleaved(
                self.device,
                runs,
                rounds,
                after=crop,
                steps=self.plan.steps,
                limit=lambda: 1 / self.machine.bytes_read(),
            )
            return {
                name: figure.with_limits_times(self.decode_bytes(batch, context, name))
                for name, figure in figures.items()
            }

        def crop() -> None:
            for cache in caches.values():
                extra = int(cache.get_seq_length()) - context
                if extra > 0:
                    cache.crop(-extra)

        if self._cache_bytes(batch, context) * len(self.models) <= self._room():
            caches.update({name: filled_cache(name, model, batch, context) for name, model in self.models.items()})
            return each(self.models, rounds)
        # The caches do not fit side by side: each is built anew in every round, so that the runs still take turns.
        parts: list[dict[str, Figure]] = []
        for _ in range(2):
            parts.append({})
            for name, model in self.models.items():
                caches[name] = filled_cache(name, model, batch, context)
                parts[-1].update(each([name], 2))
                caches.clear()
                free_memory(self.device)
        return merged(parts)

    def measure_drafts(self) -> None:
        """Steps that check several tokens of one row at once, as speculative decoding takes them."""
        context, counts = self.plan.drafts
        for count in counts:
            case = f"{count} tokens at once, context {context}"
            self.note("drafts", case, self.time_decode(1, context, tokens=count))

    def measure_quality(self) -> None:
        """KL divergence from float32, beside llama.cpp's files."""
        measure_quality(self)

    def measure_llama(self) -> None:
        """llama.cpp's files between turns of our variants."""
        measure_llama(self)

    def measure_training(self) -> None:
        """Forward and backward of rows whose first half is prefix, gradient checkpointing off."""
        rows, tokens = self.plan.training
        names = [name for name in (LIBRARY, OURS) if name in self.models]
        ids = torch.randint(12, self.config.vocab_size, (rows, tokens)).to(self.device)
        half = torch.arange(tokens, device=self.device) < tokens // 2
        types = half.long().expand(rows, -1)
        labels = torch.where(half, -100, ids)

        def run(model: Any) -> None:
            model.train()
            model(ids, token_type_ids=types, labels=labels, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)
            model.eval()

        runs = {name: lambda name=name: run(self.models[name]) for name in names}
        self.note("training", f"{rows} rows of {tokens}", interleaved(self.device, runs, self.plan.rounds))

    def measure_cache(self) -> None:
        """transformers' quantized caches beside our own."""
        measure_quantized(self)

    def measure_memory(self) -> None:
        """Peak memory above the weights, each case in a process of its own."""
        cases = [("prefill", 2048), ("prefill with response", 2048), ("training", 512)]
        for task, tokens in cases:
            figures = {}
            for name in self.variants:
                if task == "training" and name not in (LIBRARY, OURS):
                    continue
                answer = _child(["--peak", name, task, str(tokens)], self, timeout=1800)
                if answer is not None:
                    figures[name] = {"median": answer["above_weights"], "peak": answer["peak"]}
            if figures:
                self.note_bytes("memory", f"{task}, {tokens} tokens", figures)

    def measure_compile(self) -> None:
        """Seconds to the first compiled token, at the depth of this size and a small width, nothing in any cache."""
        figures = {}
        for name in (LIBRARY, OURS):
            if name in self.variants:
                answer = _child(["--first-compiled", name], self, timeout=1800)
                if answer is not None:
                    figures[name] = Figure((answer["seconds"],))
        self.note("compile", "first compiled token", figures)


def format_row(row: dict[str, Any]) -> str:
    """One line of the table that is printed."""
    value = f"{row['median'] / 1e6:10.1f} MB" if row["unit"] == "bytes" else f"{row['median']:10.4f} s "
    text = f"{row['size']:5} {row['section']:9} {row['case']:26} {row['variant']:26} {value}"
    if "times_library" in row:
        text += f"  {row['times_library']:5.2f} x library"
    if "of_limit" in row:
        text += f"  {row['of_limit']:5.0%} of the limit"
    return text


# ---- what needs a process of its own -----------------------------------------------------------------------------


def _child(arguments: list[str], bench: Bench, timeout: float) -> dict[str, Any] | None:
    dtype = str(bench.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.compare", "--size", bench.size, "--dtype", dtype]
    command += ["--layers", str(bench.layers)] if bench.layers else []
    command += ["--device", bench.device, "--threads", str(torch.get_num_threads()), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            bench.say(f"{' '.join(arguments)}: stopped after {timeout:.0f} s")
            return None
    if done.returncode:
        bench.say(f"{' '.join(arguments)}: failed\n{done.stderr[-2000:]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _one_variant(
    variant: str, size: str, layers: int | None, dtype: torch.dtype, device: str, **overrides: Any
) -> Any:
    return build_variant(variant, build_ours(config_of(size, layers, **overrides), dtype, device))


def peak_memory(
    variant: str, task: str, tokens: int, size: str, layers: int | None, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Bytes at the peak of a task, and how many of them are above what the loaded model takes."""
    model = _one_variant(variant, size, layers, dtype, device)
    rows = 2 if task == "training" else 1
    ids = torch.randint(12, model.config.vocab_size, (rows, tokens)).to(device)
    types = torch.ones_like(ids)
    if task != "prefill":
        types[:, tokens // 2 :] = 0
    before = _memory_now(device, reset=True)
    if task == "training":
        model.train()
        labels = ids.masked_fill(types == 1, -100)
        model(ids, token_type_ids=types, labels=labels, use_cache=False).loss.backward()
    else:
        with torch.inference_mode():
            model(ids, token_type_ids=types, use_cache=True, logits_to_keep=1)
    peak = _memory_now(device, reset=False)
    return {"peak": peak, "above_weights": peak - before}


def _memory_now(device: str, reset: bool) -> float:
    """Bytes in use after a reset of the peak, or else the peak since then."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return float(torch.cuda.memory_allocated())
        return float(torch.cuda.max_memory_allocated())
    if reset:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    wanted = "VmRSS:" if reset else "VmHWM:"
    with open("/proc/self/status", encoding="ascii") as file:
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith(wanted))


def first_compiled_token(
    variant: str, size: str, layers: int | None, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Seconds until `generate` with a static cache and compilation has given its first compiled token."""
    from transformers import CompileConfig

    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 128}
    model = _one_variant(variant, size, layers, dtype, device, **narrow)
    ids = torch.randint(12, 128, (1, 16)).to(device)
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    start = time.perf_counter()
    # The prefill gives the first new token, the first compiled call the second.
    model.generate(
        ids,
        token_type_ids=torch.ones_like(ids),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
    )
    return {"seconds": time.perf_counter() - start}
