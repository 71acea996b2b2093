"""The reload in a new process: what it compares, and that it sees what is wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import convert_weights
from conversion import output
from conversion.errors import ConversionError
from conversion.verify import _findings, verify
from conversion.writer import same_bits
from convert_weights import convert, main

from .checkpoints import REFERENCE, older_config, published_tensors, save_published, save_training, split_tensors
from .test_convert_output import small_tokenizer, snapshot


ROOT = Path(__file__).resolve().parent.parent
in_library = pytest.mark.skipif(
    not hasattr(transformers, "HrmTextForCausalLM"), reason="this transformers has no hrm_text class of its own"
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A verified conversion with a tokenizer, its source, and what the reload found."""
    folder = tmp_path_factory.mktemp("verified")
    source = save_published(folder / "source")
    done = convert(source, folder / "out", tokenizer=small_tokenizer(folder / "tokenizer"), progress=False)
    return source, folder / "out", done


def check(converted, folder, **config):
    """Verifies `folder` against the conversion's source, as `convert` does before it puts a folder in place."""
    source, _, done = converted
    opening = {"path": str(source), "epoch": None, "weights": "ema", "tokenizer": None}
    return verify(folder, {"source": opening, "config": {**done.plan.config, **config}, "remote_code": True})


def copy_of(converted, folder):
    folder.mkdir()
    for name, content in snapshot(converted[1]).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_good_folder(converted):
    found = converted[2].verification
    assert found.differences == []
    assert found.loaded_as == f"HrmTextForCausalLM, transformers {transformers.__version__}"
    assert found.tensors == 19
    assert found.logits.startswith("(24, 65) finite, within 0 ")
    assert found.tokenizer == "HrmTextTokenizer, 40 tokens"


def test_every_kind_of_difference_is_seen(converted, tmp_path):
    """One changed number, a changed rotary base, and a tokenizer that ends elsewhere."""
    folder = copy_of(converted, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.L_module.layers.1.attn.o_proj.weight"][3, 3] += 1e-7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 99.0
    (folder / "config.json").write_text(json.dumps(config))
    weights, logits, tokenizer = check(converted, folder, eos_token_id=12).differences
    assert weights == "model.L_module.layers.1.attn.o_proj.weight differs from the source"
    assert logits.startswith("the logits differ from the in-memory model's by")
    assert tokenizer == "eos_token_id is 12 in the config and 11 in the tokenizer"


def test_a_folder_that_does_not_load_is_not_put_in_place(converted, tmp_path, monkeypatch):
    monkeypatch.setitem(output.AUTO_CLASSES, "AutoModelForCausalLM", "modeling_hrm_text.NothingLikeThis")
    with pytest.raises(ConversionError, match=r"does not load .*NothingLikeThis"):
        convert(converted[0], tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_differences_give_exit_code_1_and_the_old_output(converted, tmp_path, monkeypatch, capsys):
    """The converter is made to write other weights than it read."""
    target = copy_of(converted, tmp_path / "out")
    before = snapshot(target)
    honest = output.ShardWriter.add
    monkeypatch.setattr(output.ShardWriter, "add", lambda writer, name, tensor: honest(writer, name, tensor + 1))
    assert main([str(converted[0]), "--output", str(target), "--force"]) == 1
    assert "is not the source (20 differences, first: model.embed_tokens.weight differs" in capsys.readouterr().err
    assert snapshot(target) == before


@pytest.mark.parametrize(
    ("value", "why"),
    [(float("nan"), "lm_head.weight holds NaN"), (3e38, r"source: its weights are so large .*--no-verify")],
)
def test_a_source_without_finite_logits(tmp_path, value, why):
    tensors = published_tensors()
    tensors["lm_head.weight"][5] = value
    source = save_published(tmp_path / "source", tensors)
    with pytest.raises(ConversionError, match=why):
        convert(source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_that_does_not_load(tmp_path):
    source = save_published(tmp_path / "source")
    for file in small_tokenizer(tmp_path / "tokenizer", bos_token="<|im_start|>").iterdir():
        shutil.copy(file, source)
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"][3]["special"] = 1
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConversionError, match=r"source: its tokenizer does not load .*--tokenizer"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_reference_verifies_in_bfloat16(tmp_path):
    done = convert(REFERENCE / "checkpoint", tmp_path / "out", dtype="bfloat16", progress=False)
    assert done.verification.differences == []


@in_library
@pytest.mark.parametrize(("layout", "bp_max_steps"), [("fused", 2), ("split", 5)])
def test_the_output_loads_in_the_librarys_class_with_equal_logits(tmp_path, layout, bp_max_steps):
    raw = published_tensors(seed=1)
    source = save_training(tmp_path / "run", {1: (raw, raw)}, bp_max_steps=bp_max_steps, rope_theta=777.0)
    # The reload of a split folder goes through the library's class.
    done = convert(source, tmp_path / "out", layout=layout, progress=False, verification=layout == "split")
    assert done.verification is None or done.verification.differences == []
    theirs, info = transformers.HrmTextForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    state = theirs.state_dict()
    expected = split_tensors({**raw, "model.z_L_init": raw["model.z_L_init"].bfloat16().float()})
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    if layout == "split":
        convert(tmp_path / "out", tmp_path / "fused", verification=False, progress=False)
    fused = tmp_path / ("fused" if layout == "split" else "out")
    ours = AutoModelForCausalLM.from_pretrained(fused, trust_remote_code=True)
    assert "transformers_modules" in type(ours).__module__
    ids = torch.randint(0, 65, (2, 20), generator=torch.Generator().manual_seed(0))
    types = (torch.arange(20) < 9).long().expand(2, 20)
    with torch.no_grad():
        logits = [model.eval()(ids, token_type_ids=types).logits for model in (ours, theirs)]
    assert logits[0].abs().max() > 1
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@in_library
def test_what_the_librarys_class_saves_is_a_source(tmp_path):
    """Its config names no prefix end; its file has whatever layout it saves in."""
    config = transformers.HrmTextConfig(
        vocab_size=65,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=12,
        H_cycles=1,
        L_cycles=4,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )
    theirs = transformers.HrmTextForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "out", verification=False, progress=False)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert ours.config.prefix_end_token_id == 7
    ids = torch.arange(2 * 9).view(2, 9) + 20
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*counts both stacks")
def test_the_exporters_dialect_loads(tmp_path):
    source = save_published(tmp_path / "source", published_tensors(dtype=torch.bfloat16), older_config())
    convert(source, tmp_path / "out", verification=False, progress=False)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.num_layers_per_stack == 2 and config.num_hidden_layers == 16 and config.rope_theta == 5000.0


def test_a_tensor_that_is_wider_than_the_model_is_compared_in_its_own_width(tmp_path, monkeypatch):
    """Loading rounds it, and the rounded one is right here."""
    tensors = published_tensors(dtype=torch.bfloat16)
    tensors["model.z_L_init"] = tensors["model.z_L_init"].float()
    source = save_published(tmp_path / "source", tensors)
    assert convert(source, tmp_path / "good", progress=False).verification.differences == []
    honest = output.ShardWriter.add

    def slightly_off(writer, name, tensor):
        honest(writer, name, torch.nextafter(tensor, 2 * tensor) if tensor.dtype == torch.float32 else tensor)

    monkeypatch.setattr(output.ShardWriter, "add", slightly_off)
    with pytest.raises(ConversionError, match=r"\(1 differences, first: model\.z_L_init differs from the source"):
        convert(source, tmp_path / "out", progress=False)


def test_the_sign_of_a_zero_counts():
    assert same_bits(torch.zeros(3), torch.zeros(3)) and not same_bits(torch.zeros(3), -torch.zeros(3))
    assert not same_bits(torch.zeros(3), torch.zeros(3, 1)) and not same_bits(torch.zeros(2), torch.zeros(2).double())
    assert same_bits(torch.arange(6.0).view(2, 3).T, torch.tensor([[0.0, 3], [1, 4], [2, 5]]))


@pytest.mark.parametrize("has_class", [pytest.param(True, marks=in_library), False])
def test_a_split_folder_is_compared_with_and_without_a_class_for_it(tmp_path, monkeypatch, has_class):
    """Where transformers has no class for the layout, the files are compared."""
    if not has_class:
        monkeypatch.setattr(sys.modules["conversion.verify"], "library_class", lambda: None)
    source = save_published(tmp_path / "source")
    done = convert(source, tmp_path / "out", layout="split", verification=False, progress=False, max_shard_size="40KB")
    opening = {"path": str(source), "epoch": None, "weights": "ema", "tokenizer": None}
    request = {"folder": str(tmp_path / "out"), "source": opening, "config": done.plan.config, "remote_code": False}
    found = _findings(request)
    assert found["differences"] == [] and ("plain files" in found["loaded_as"]) is not has_class
    assert found["tensors"] == (len(done.plan.specs) if has_class else len(done.plan.source.specs))
    tensors = published_tensors()
    tensors["lm_head.weight"][3, 3] += 1e-7
    save_published(source, tensors)
    name = "lm_head.weight"
    assert _findings(request)["differences"] == [f"{name} differs from the source"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "convert_weights.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_line(tmp_path):
    done = command(REFERENCE / "checkpoint", "--output", tmp_path / "out", "--weights", "raw")
    assert done.returncode == 0, done.stderr
    assert "tensors    19 equal to the source" in done.stdout
    assert "none was found: pass --tokenizer" in done.stdout
    assert "weights: 100%" in done.stderr
    again = command(REFERENCE / "checkpoint", "--output", tmp_path / "out")
    assert again.returncode == 1 and len(again.stderr.strip().splitlines()) == 1
    assert "pass --force" in again.stderr


def test_help_and_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--max-shard-size",
        "--push-to-hub",
        "--revision",
        "--format",
        "--dry-run",
        "examples:",
        "exit code",
    ):
        assert option in text
    for wrong in (["--dtype", "int8"], ["--private"], ["--revision", "next"], ["--epoch", "last"]):
        with pytest.raises(SystemExit) as stop:
            main(["x", *wrong])
        assert stop.value.code == 2
    assert main(["/nothing/here"]) == 1
    assert "--output is missing" in capsys.readouterr().err
    assert main(["/nothing/here", "--output", "x"]) == 1
    assert "/nothing/here does not exist" in capsys.readouterr().err


def test_dry_run_prints_a_table(capsys):
    assert main([str(REFERENCE / "checkpoint"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "19 tensors, 135,200 parameters, 540,800 bytes" in printed


def test_interruption_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_weights, "write", interrupted)
    assert main([str(REFERENCE / "checkpoint"), "--output", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "end"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_what_a_signal_finds_half_made_does_not_complain(monkeypatch, capsys, name, end):
    """As an archive does that was interrupted before its first attribute was set."""

    class HalfMade:
        def __del__(self):
            raise AttributeError("half made")

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(end):
        convert_weights._end_at_signal(signal.Signals[name], None)
    HalfMade()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "end"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit)])
def test_a_signal_that_a_destructor_swallows_comes_again(monkeypatch, name, end):
    class Interrupted:
        def __del__(self):
            convert_weights._end_at_signal(number, None)

    number = signal.Signals[name]
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.signal(number, convert_weights._end_at_signal)
    try:
        with pytest.raises(end):
            Interrupted()
            time.sleep(20)
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_cleanly(tmp_path, name, code):
    """While it works: nothing is left behind, and the exit code says why it ended."""
    arguments = [sys.executable, ROOT / "convert_weights.py", REFERENCE / "checkpoint", "--output", tmp_path / "out"]
    # What runs in the background of a shell, as these tests may, is told to ignore SIGINT, and hands that on.
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
