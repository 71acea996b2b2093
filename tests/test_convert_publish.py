"""To the Hub and back, against a stand-in of its HTTP interface; and folders saved after fine-tuning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from conversion.errors import ConversionError
from conversion.hub import check_repo_id
from convert_weights import convert

from .checkpoints import save_published
from .hub_server import TOKEN, Hub
from .test_convert_output import small_tokenizer, snapshot


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python with the stand-in as its Hub; returns the finished process."""

    def run(*arguments, **environment):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hub-home"),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
        )

    return run


@pytest.fixture
def source(tmp_path):
    return save_published(tmp_path / "source")


def as_files(folder):
    return {str(path): content for path, content in snapshot(folder).items()}


def test_publish_and_convert_what_was_published(run, hub, source, tmp_path):
    program = ROOT / "convert_weights.py"

    def push(output, *options):
        arguments = [source, "--output", tmp_path / output, "--no-verify", "--push-to-hub", "me/mine", *options]
        done = run(program, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    assert push("shards", "--private", "--max-shard-size", "100KB").startswith(f"{hub.url}/me/mine/commit/")
    repository = hub.repositories["me/mine"]
    assert repository.private and repository.commits == 1
    assert repository.branches["main"] == as_files(tmp_path / "shards")
    assert len(hub.objects) == len(list((tmp_path / "shards").glob("*.safetensors"))) > 2

    # Another branch of the same repository; the shards that it began with are gone.
    push("half", "--dtype", "bfloat16", "--revision", "half")
    assert repository.branches["main"] == as_files(tmp_path / "shards")
    assert repository.branches["half"] == as_files(tmp_path / "half")

    # Weights of others stay, also such as look like ours; only what an earlier push listed goes, and it is said.
    others = {"adapter.safetensors": b"a", "sub/model.safetensors": b"b", "model-00007-of-00009.safetensors": b"c"}
    repository.branches["main"].update(others)
    done = run(program, source, "--output", tmp_path / "whole", "--no-verify", "--push-to-hub", "me/mine")
    assert done.returncode == 0, done.stderr
    assert repository.branches["main"] == {**as_files(tmp_path / "whole"), **others}
    gone = sorted(as_files(tmp_path / "shards").keys() - as_files(tmp_path / "whole").keys())
    said = [line.split()[3].rstrip(",") for line in done.stdout.splitlines() if line.startswith("deleted from")]
    assert said == gone and "model.safetensors.index.json" in gone

    # Weights of unknown origin that would be loaded in place of the new ones.
    repository.branches["main"]["README.md"] = b"my own card"
    arguments = ["--output", tmp_path / "again", "--no-verify", "--push-to-hub", "me/mine"]
    before = dict(repository.branches["main"])
    done = run(program, source, *arguments, "--max-shard-size", "100KB")
    assert done.returncode == 1 and "model.safetensors that no push of a converted folder listed" in done.stderr
    assert repository.branches["main"] == before

    # And from the Hub to a folder again.
    back = run(program, "me/mine@half", "--output", tmp_path / "back", "--no-verify")
    assert back.returncode == 0, back.stderr
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("back", "half")]
    assert all(torch.equal(files[0][name], tensor) for name, tensor in files[1].items())
    assert "| source | me/mine@half |" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.parametrize("problem", ["token", "network"])
def test_a_refused_upload_keeps_the_folder(run, hub, source, tmp_path, problem):
    wrong = {"HF_TOKEN": "hf_wrong"} if problem == "token" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    options = ["--output", tmp_path / "out", "--no-verify", "--push-to-hub", "me/mine"]
    done = run(ROOT / "convert_weights.py", source, *options, **wrong)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("convert_weights.py:")]
    assert "--push-to-hub me/mine: the Hub refused" in line and "hf upload me/mine" in line
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["mine", "me/mine/again", "../mine", "me/mine@main", "http://x/y"])
def test_no_repository(name):
    with pytest.raises(ConversionError, match="USER/NAME"):
        check_repo_id(name)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine-tune")
    tokenizer = small_tokenizer(folder / "tokenizer")
    convert(save_published(folder / "source"), folder / "out", tokenizer=tokenizer, verification=False, progress=False)
    return folder / "out"


def test_a_folder_saved_after_fine_tuning_is_as_complete(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(20, 32)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")

    saved, original = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "tuned", converted))
    assert original - saved == {"README.md"}
    for name in original:
        if name.endswith((".py", ".jinja")):
            assert (tmp_path / "tuned" / name).read_bytes() == (converted / name).read_bytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "tuned", converted)]
    for field, value in configs[1].items():
        assert configs[0][field] == value, field

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    heads = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    assert torch.equal(heads.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned", trust_remote_code=True)("ab").input_ids == [14, 15]
    # It is a source like any other, and what comes out has the tuned weights.
    convert(tmp_path / "tuned", tmp_path / "ready", verification=False, progress=False)
    assert torch.equal(
        load_file(tmp_path / "ready" / "model.safetensors")["lm_head.weight"], model.lm_head.weight.data
    )
    assert {path.name for path in (tmp_path / "ready").iterdir()} == original


def test_what_a_trainer_saves_is_as_complete(converted, tmp_path):
    """Its model, and its checkpoints, which hold the state of the training besides."""
    model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=True)
    ids = list(range(20, 32))
    settings = TrainingArguments(
        output_dir=tmp_path / "run", max_steps=1, save_steps=1, learning_rate=0.1, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": ids, "labels": ids}] * 8
    trainer = Trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    wanted = {path.name for path in converted.iterdir()} - {"README.md"}
    for number, folder in enumerate((tmp_path / "saved", tmp_path / "run" / "checkpoint-1")):
        assert wanted <= {path.name for path in folder.iterdir()}
        done = convert(folder, tmp_path / f"ready-{number}", progress=False)
        assert done.verification.differences == [] and done.verification.tokenizer.startswith("HrmTextTokenizer")
        tensors = load_file(tmp_path / f"ready-{number}" / "model.safetensors")
        assert torch.equal(tensors["lm_head.weight"], model.lm_head.weight.data)
        assert not torch.equal(tensors["lm_head.weight"], load_file(converted / "model.safetensors")["lm_head.weight"])


PUSH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="me/tuned")
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("me/tuned")
"""
PULL = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/tuned", trust_remote_code=True)
print(type(model).__module__, type(AutoTokenizer.from_pretrained("me/tuned", trust_remote_code=True)).__name__)
"""


def test_pushing_a_remote_code_model_carries_its_modules(converted, run, hub, tmp_path):
    done = run("-c", PUSH, converted, tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/tuned"].branches["main"]
    assert {path.name for path in converted.iterdir()} <= files.keys()
    for path in converted.glob("*.py"):
        assert files[path.name] == path.read_bytes()
    pulled = run("-c", PULL)
    assert pulled.returncode == 0, pulled.stderr
    module, tokenizer = pulled.stdout.split()
    assert module.startswith("transformers_modules.me.tuned.") and tokenizer == "HrmTextTokenizer"
