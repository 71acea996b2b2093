"""Benchmarks of fewer bits: divergence, llama.cpp's files, joined results, tables, and speculative decoding."""

from __future__ import annotations

import json
import stat
import struct
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import assistant, compare, quality, speculation
from benchmarks.llama import LlamaCpp, checksum, divergence_printed
from benchmarks.measure import Figure, joined
from benchmarks.models import SIZES, build_ours, config_of
from benchmarks.tables import figure, main, tables

from .tiny import ROOT, tiny_model


RESULTS = ROOT / "benchmarks/results"


@pytest.fixture(scope="module")
def nano():
    return AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()


# ---- divergence -------------------------------------------------------------------------------------------------


def test_a_widened_model_computes_the_same(nano):
    wide = quality.widened(nano, 256)
    assert wide.config.hidden_size == 256 and wide.config.num_attention_heads == 8 and wide.config.head_dim == 32
    ids = quality.question_rows(2)
    types = (torch.arange(quality.ROW) < 20).long().expand(2, -1)
    with torch.no_grad():
        for kind in (types, torch.zeros_like(types)):
            wanted, got = (model(ids, token_type_ids=kind).logits for model in (nano, wide))
            assert wanted.std() > 1
            assert torch.allclose(wanted, got, atol=2e-3)


@pytest.mark.parametrize("width", [128, 200])
def test_a_width_that_does_not_fit_is_refused(nano, width):
    with pytest.raises(ValueError, match=f"width={width}"):
        quality.widened(nano, width)


def test_rows_of_questions_are_prompts_with_answers():
    ids = quality.question_rows(5)
    assert ids.shape == (5, quality.ROW)
    assert (ids[:, 0] == 6).all() and (ids == 7).any(1).all()
    assert torch.equal(ids, quality.question_rows(5))


def test_divergence_is_zero_from_itself_and_that_of_its_definition():
    model, other = tiny_model(0), tiny_model(1)
    ids = torch.randint(12, 60, (2, quality.ROW))
    reference = quality.Reference(ids, quality.log_probabilities(model, ids))
    assert reference.divergence(model) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        ours, theirs = (
            each(ids, token_type_ids=torch.zeros_like(ids)).logits[:, 32:63].softmax(-1) for each in (model, other)
        )
    wanted = (ours * (ours / theirs).log()).sum(-1).mean()
    assert reference.divergence(other) == pytest.approx(float(wanted), rel=1e-3)


def test_the_file_of_probabilities_holds_them(tmp_path):
    """Read back as `llama-perplexity` reads it: a header, the tokens, and 16-bit steps with their scale and start."""
    ids = torch.randint(12, 60, (2, quality.ROW))
    # An odd vocabulary is padded by one; one value lies further below the others than the format reaches.
    values = torch.randn(2, 31, 61) * 2
    values[0, 0, 0] = -40
    values = values.log_softmax(-1)
    quality.write_base(quality.Reference(ids, values), tmp_path / "base")
    data = (tmp_path / "base").read_bytes()
    assert data[:8] == b"_logits_" and struct.unpack("<Iii", data[8:20]) == (quality.ROW, 61, 2)
    tokens = torch.frombuffer(bytearray(data[20 : 20 + 4 * 128]), dtype=torch.int32)
    assert tokens.tolist() == ids.flatten().tolist()
    a_position = 2 * (62 + 4)
    rest = data[20 + 4 * 128 :]
    assert len(rest) == 2 * 31 * a_position
    for index, wanted in enumerate(values.flatten(0, 1)):
        part = rest[index * a_position : (index + 1) * a_position]
        scale, least = struct.unpack("<ff", part[:8])
        steps = torch.frombuffer(bytearray(part[8 : 8 + 2 * 61]), dtype=torch.uint16).float()
        got = least + scale * steps
        assert torch.allclose(got, wanted.clamp(min=float(wanted.max()) - 16), atol=3e-4)


# ---- llama.cpp --------------------------------------------------------------------------------------------------

STAND_INS = {
    "llama-bench": (
        "runs = int(sys.argv[sys.argv.index('-r') + 1])\n"
        "print(json.dumps([{'avg_ts': 4.0, 'samples_ns': [250_000_000 * 8] * runs}]))"
    ),
    "llama-quantize": "open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read() + sys.argv[3].encode())",
    "llama-perplexity": (
        "base = sys.argv[sys.argv.index('--kl-divergence-base') + 1]\n"
        "assert open(base, 'rb').read(8) == b'_logits_'\n"
        "print('Mean    KLD:   0.012500 \\u00b1   0.000100')"
    ),
}
CONVERTER = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(sys.argv[3].encode() * 100)"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with programs that answer as llama.cpp's do, since a build of it takes a quarter of an hour."""
    folder = tmp_path / "build/bin"
    folder.mkdir(parents=True)
    for name, code in STAND_INS.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport json, sys\n{code}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER, encoding="utf-8")
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion/__init__.py").touch()
    (tmp_path / "conversion/base.py").write_text("class TextModel: ...\n", encoding="utf-8")
    return folder


def test_files_are_made_once(llama, tmp_path):
    programs = LlamaCpp(llama, tmp_path / "kept", ("BF16", "Q8_0"), threads=1)
    model = build_ours(config_of("nano"), torch.bfloat16, "cpu")
    files = programs.files(model, "nano")
    assert files["BF16"].read_bytes() == b"bf16" * 100
    assert files["Q8_0"].read_bytes() == b"bf16" * 100 + b"Q8_0"
    times = {kind: file.stat().st_mtime_ns for kind, file in files.items()}
    assert {kind: file.stat().st_mtime_ns for kind, file in programs.files(model, "nano").items()} == times
    # Other weights are not taken for these.
    other = build_ours(config_of("nano"), torch.bfloat16, "cpu", seed=1)
    assert checksum(other) != checksum(model)
    assert set(programs.files(other, "nano").values()).isdisjoint(files.values())


def test_a_run_beside_llama_cpp(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "nano", {**SIZES["nano"], "hidden_size": 40, "vocab_size": 128})
    arguments = ["--size", "nano", "--layers", "1", "--rounds", "2", "--context", "8", "--prompt", "16"]
    arguments += ["--variants", "optimized", "8 bits", "--llama-cpp", str(llama), "--llama-types", "BF16", "Q4_0"]
    arguments += ["--batch", "1", "--output", str(tmp_path / "run"), "--threads", str(torch.get_num_threads())]
    assert compare.main([*arguments, "--only", "llama.cpp"]) == 0
    assert compare.main([*arguments, "--only", "drafts", "quality", "--merge"]) == 0
    result = json.loads((tmp_path / "run.json").read_text())
    rows, runs = result["rows"], result["runs"]
    assert [str(tmp_path) in run["command"] for run in runs] == [False, False]
    assert runs[1]["command"].endswith("--only drafts quality --merge")
    found = {(row["section"], row["case"], row["variant"]): row["median"] for row in rows}
    assert found["llama.cpp", "step at context 8", "llama.cpp Q4_0"] == 0.25
    assert found["llama.cpp", "prompt of 16", "llama.cpp BF16"] == 2.0
    assert 0 < found["llama.cpp", "step at context 8", "optimized"] < 1
    assert found["quality", "trained Nano, its questions", "llama.cpp Q4_0"] == 0.0125
    assert found["bytes", "weights", "llama.cpp Q4_0"] == 304
    assert found["drafts", "8 tokens at once, context 1024", "8 bits"] > 0
    assert 1e-6 < found["quality", "trained Nano, its questions", "8 bits"] < 2e-3
    # Weights of the optimized model are those of float32, so what is left is rounding.
    assert abs(found["quality", "trained Nano, its questions", "optimized"]) < 1e-5
    capsys.readouterr()
    assert main([str(tmp_path / "run.json")]) == 0
    printed = capsys.readouterr().out
    assert "| llama.cpp Q4_0 | 0.250 | 2.00 |" in printed and f"{0.0125:.1e}" in printed


def test_the_divergence_is_read_from_what_is_printed():
    assert divergence_printed("Mean PPL(Q): 3\nMean    KLD:   0.000123 ±   0.000001\nMaximum KLD: 1.0") == 0.000123
    with pytest.raises(ValueError, match="no mean KLD"):
        divergence_printed("failed to load")


# ---- results ----------------------------------------------------------------------------------------------------

MACHINE = {"device": "cpu", "processor": "a", "cores": 2, "threads": 2, "torch": "2", "transformers": "5"}


def test_turns_of_several_runs_add_up():
    about = {"size": "1b", "section": "decode", "case": "a", "variant": "ours"}
    old = [about | Figure((1.0, 3.0), (0.5, 0.5)).row(), {**about, "case": "b"} | Figure((1.0,)).row()]
    new = [about | {"times_library": 2} | Figure((2.0,), (0.6,)).row(), {**about, "section": "bytes", "median": 7}]
    first, second, third = joined(joined(old, new), [{**new[1], "median": 8}])
    assert first == about | Figure((1.0, 3.0, 2.0), (0.5, 0.5, 0.6)).row()
    assert second == old[1] and third["median"] == 8


@pytest.mark.parametrize(("name", "value"), [("processor", "b"), ("threads", 1), ("torch", "3")])
def test_a_result_of_another_machine_is_not_added_to(tmp_path, name, value):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"rows": [], "machine": {**MACHINE, name: value}}), encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        compare.earlier(path, MACHINE, None)
    with pytest.raises(ValueError, match="layers"):
        compare.earlier(path, {**MACHINE, name: value}, 4)
    assert compare.earlier(path, {**MACHINE, name: value}, None)["runs"] == []


def test_another_machine_is_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"rows": [], "machine": MACHINE}), encoding="utf-8")
    assert compare.main(["--merge", "--output", str(tmp_path / "run"), "--only", "decode"]) == 2
    assert "--merge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "llama.cpp"], "--llama-cpp"),
        (["--llama-cpp", "missing"], "llama-bench"),
        (["--variants", "3 bits"], "--variants"),
        (["--llama-types", "Q5_0"], "--llama-types"),
    ],
)
def test_wrong_arguments_are_refused(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.parse(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_figures_have_three_digits():
    assert [figure(value) for value in (0.2268, 1.354, 61.04)] == ["0.227", "1.35", "61.0"]


@pytest.mark.parametrize("name", ["cpu_bits.json", "speculation.json"])
def test_the_page_has_the_tables_of_the_results(name):
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for each in tables(json.loads((RESULTS / name).read_text(encoding="utf-8"))):
        assert each in page, f"python -m benchmarks.tables benchmarks/results/{name} prints another table:\n{each}"


def test_tables_of_no_file_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["missing.json"])
    assert stopped.value.code == 2 and "missing.json" in capsys.readouterr().err


# ---- speculation ------------------------------------------------------------------------------------------------


def test_speculation_writes_what_greedy_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speculation, "TASKS", ("addition", "reversal"))
    assert assistant.main(["--output", str(tmp_path / "assistant"), "--steps", "1"]) == 0
    drafter = speculation.load(tmp_path / "assistant")
    assert drafter.config.num_hidden_layers == 2
    arguments = ["--assistant", str(tmp_path / "assistant"), "--questions", "1", "--rounds", "1", "--drafts", "3"]
    assert speculation.main([*arguments, "--output", str(tmp_path / "speculation.json")]) == 0
    rows = json.loads((tmp_path / "speculation.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["plain greedy", "prompt lookup, 3 drafts", "assistant, 3 drafts"]
    assert all(row["same"] == row["answers"] == 2 for row in rows)
    greedy, lookup, assisted = rows
    assert greedy["tokens_a_step"] == 1 and greedy["accepted"] is None
    # A reversal spells its word, so that some drafts are right; an untrained assistant's hardly ever are.
    assert lookup["tokens_a_step"] > 1 and lookup["accepted"] > 0 and 0 <= assisted["accepted"] < 0.2
    assert {row["tokens"] for row in rows} == {greedy["tokens"]}


def test_an_answer_that_differs_is_told(monkeypatch, capsys):
    monkeypatch.setattr(speculation, "TASKS", ("addition",))
    monkeypatch.setattr(speculation, "ways", lambda *_: {speculation.GREEDY: {}, "shorter": {"max_new_tokens": 2}})
    assert speculation.main(["--questions", "1", "--rounds", "1"]) == 1
    assert "not those of plain greedy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--questions", "0"], "--questions"),
        (["--drafts", "0"], "--drafts"),
        (["--assistant", "missing"], "--assistant"),
    ],
)
def test_wrong_arguments_of_speculation_are_refused(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        speculation.main(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("module", [speculation, assistant])
def test_help_names_examples(module, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "exit status" in printed and f"python -m {module.__name__}" in printed
