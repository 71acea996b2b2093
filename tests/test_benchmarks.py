"""`python -m benchmarks.compare`: its costs, its weights, and a whole run on a small model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import compare
from benchmarks.measure import Figure, interleaved, merged
from benchmarks.models import (
    LIBRARY,
    OURS,
    SIZES,
    build_library,
    build_ours,
    config_of,
    filled_cache,
    library_is_there,
)
from benchmarks.quantized import cache_bytes, tensor_bytes
from benchmarks.sections import Bench, Plan

from .tiny import ROOT


needs_library = pytest.mark.skipif(not library_is_there(), reason="this transformers has no HRM-Text class")


def bench_of(size: str) -> Bench:
    bench = Bench(size, None, torch.bfloat16, "cpu", Plan(), print)

    class Shape:
        config = config_of(size)

    bench.models = {OURS: Shape}
    return bench


def test_costs_of_the_1b_are_those_of_the_design():
    bench = bench_of("1b")
    assert bench.calls == 8
    assert bench.decode_bytes(1, 0) == pytest.approx(8.05e9, rel=0.01)
    assert bench.decode_bytes(1, 1000) - bench.decode_bytes(1, 0) == 786_432_000
    assert bench.prefill_operations(1) == pytest.approx(7.86e9 + 2 * 65_536 * 1536, rel=0.01)


@needs_library
def test_both_classes_share_the_weights():
    ours = build_ours(config_of("nano"), torch.float32, "cpu")
    library = build_library(ours)
    ids = torch.randint(12, 600, (1, 24))
    types = (torch.arange(24) < 16).long()[None]
    with torch.no_grad():
        wanted = library(ids, token_type_ids=types).logits
        got = ours(ids, token_type_ids=types).logits
    assert wanted.std() > 0.1
    assert torch.allclose(wanted, got, atol=1e-4)
    storage = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in library.parameters()} == storage


@pytest.mark.parametrize("variant", [LIBRARY, OURS])
def test_a_filled_cache_decodes(variant):
    if variant == LIBRARY and not library_is_there():
        pytest.skip("this transformers has no HRM-Text class")
    model = build_ours(config_of("nano"), torch.float32, "cpu")
    model = build_library(model) if variant == LIBRARY else model
    cache = filled_cache(variant, model, 2, 9)
    assert cache.get_seq_length() == 9
    with torch.no_grad():
        logits = model(torch.tensor([[20], [21]]), past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == 10
    assert bool(logits.isfinite().all())


def test_bytes_of_quantized_tensors_are_counted():
    whole = torch.zeros(4, 8)
    assert tensor_bytes(whole) == 128
    assert tensor_bytes({"a": (whole, [torch.zeros(2, dtype=torch.uint8)]), "b": "text"}) == 130
    model = build_ours(config_of("nano"), torch.float32, "cpu")
    cache = filled_cache(OURS, model, 1, 64)
    exact = 64 * 2 * model.config.num_hidden_layers * 128 * 4
    assert exact <= cache_bytes(cache) <= 1.6 * exact


def test_runs_take_turns_in_an_order_that_changes():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    figures = interleaved("cpu", runs, 30)
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(turns) == 31 and set(turns) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert all(len(figure.seconds) == 30 for figure in figures.values())
    again, order = order, []
    interleaved("cpu", {name: lambda name=name: order.append(name) for name in "abc"}, 30)
    assert order == again


def test_ratios_are_taken_turn_by_turn():
    """So that a machine that slows down between turns, for both alike, does not matter."""
    ours, library = Figure((1.0, 1.0, 2.0, 2.0, 2.0)), Figure((3.0, 3.0, 6.0, 6.0, 2.0))
    assert ours.times(library) == 3.0
    assert ours.times(Figure((4.0,))) == 2.0
    assert merged([{"a": ours}, {"a": library}])["a"].seconds == ours.seconds + library.seconds


def test_the_limit_is_measured_around_each_run(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.clock", lambda device, run: run())
    allowed, order = iter((1.0, 3.0, 5.0, 1.0, 2.0, 6.0)), []

    def run(name: str) -> float:
        order.append(name)
        return {"a": 4.0, "b": 8.0}[name]

    runs = {name: lambda name=name: run(name) for name in "ab"}
    figures = interleaved("cpu", runs, 2, limit=lambda: next(allowed))
    expected = {"a": (), "b": ()}
    for name, limit in zip(order[2:], (2.0, 4.0, 1.5, 4.0)):  # the first turn is the warm-up
        expected[name] += (limit,)
    assert {name: figure.limits for name, figure in figures.items()} == expected
    figure = Figure((4.0, 4.0), (4.0, 1.0))
    assert figure.of_limit == (1.0 + 0.25) / 2
    assert figure.row()["limit"] == 2.5 and Figure((1.0,)).of_limit is None


def test_steps_of_a_run_are_counted(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.clock", lambda device, run: 6.0)
    assert interleaved("cpu", {"a": lambda: None}, 2, steps=3)["a"].seconds == (2.0, 2.0)


@needs_library
def test_a_run_writes_its_figures_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "nano", {**SIZES["nano"], "hidden_size": 40, "vocab_size": 128})
    arguments = ["--size", "nano", "--layers", "1", "--quick", "--rounds", "1"]
    arguments += ["--prompt", "16", "--batch", "1", "--context", "24"]
    threads = str(torch.get_num_threads())
    assert compare.main([*arguments, "--threads", threads, "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (tmp_path / "run_nano.png").stat().st_size > 10_000
    sections = {row["section"] for row in result["rows"]}
    assert sections == {"agreement", "bytes", "prefill", "decode"}
    for row in result["rows"]:
        if row["section"] == "agreement":
            assert row.get("fine", row["variant"].endswith("bits"))  # fewer bits are told, not judged
        elif row["section"] == "bytes":
            assert row["median"] > 0
        else:
            assert row["median"] > 0 and row["times_library"] > 0 and row["of_limit"] > 0
    assert result["layers_per_stack"] == 1
    assert result["limits"]["nano"]["read_bytes_per_s"] > 1e8
    assert {"processor", "threads", "torch", "transformers"} <= set(result["machine"])
    assert compare.main(["--plot", str(tmp_path / "run.json")]) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--layers", "0"], "--layers"),
        (["--context", "-1"], "--context"),
        (["--plot", "missing.json"], "--plot"),
        (["--size", "2b"], "--size"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "CUDA")]),
    ],
)
def test_wrong_arguments_are_refused(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.parse(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_help_names_examples():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "python -m benchmarks.compare --quick" in done.stdout
    assert "exit status" in done.stdout
