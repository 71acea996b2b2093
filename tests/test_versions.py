"""What is promised about versions of transformers, and side by side with the library's own class."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .tiny import ROOT, load_class, tiny_config, tiny_model


check_version = load_class("versions_hrm_text.check_version")
HAS_LIBRARY_CLASS = hasattr(transformers, "HrmTextForCausalLM")
HAS_TENSOR_PARALLELISM = tiny_config().base_model_tp_plan is not None


def remote_folder(folder: Path, **overrides: Any) -> torch.nn.Module:
    """A folder as on the Hub, with its code and `auto_map`; returns the model in it."""
    model = tiny_model(**overrides)
    model.save_pretrained(folder)
    for module in ROOT.glob("*_hrm_text.py"):
        shutil.copy(module, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_hrm_text.HrmTextConfig",
        "AutoModel": "modeling_hrm_text.HrmTextModel",
        "AutoModelForCausalLM": "modeling_hrm_text.HrmTextForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("installed", ["4.46.0", "4.57.5", "4.57.0.dev0"])
def test_too_old_is_refused(installed):
    with pytest.raises(ImportError, match=r"needs transformers 4\.57\.6 or newer and .*pip install --upgrade"):
        check_version(installed)


@pytest.mark.parametrize("installed", ["2.6.0+cpu", "2.7.1", "1.13.0a0+git"])
def test_too_old_a_torch_is_refused(installed):
    check_torch = check_version.__globals__["check_torch"]
    with pytest.raises(ImportError, match=r"needs torch 2\.8 or newer and .*pip install --upgrade 'torch>=2\.8'"):
        check_torch(installed)
    for fine in ("2.8.0", "2.8.0a0+git1234", "2.13.0+cpu", "2.15.0", "3.0.0.dev1"):
        check_torch(fine)


@pytest.mark.parametrize("installed", ["4.57.6", "5.0.0", "5.9.0", "5.23.0", "5.24.0", "5.24.7"])
def test_what_was_tested_is_silent(installed, caplog):
    with caplog.at_level(logging.WARNING):
        check_version(installed)
    assert not caplog.records


def test_too_new_is_named_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            check_version("6.1.0.dev0")
    assert len(caplog.records) == 1
    assert "6.1.0.dev0" in caplog.text and "4.57.6 to 5.24.0" in caplog.text


def test_this_version_is_one_of_those_promised():
    oldest, newest = (Version(check_version.__globals__[name]) for name in ("OLDEST", "NEWEST"))
    assert oldest <= Version(transformers.__version__) <= newest


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("version", "said"), [("4.56.2", "refused"), ("5.99.0", "warned"), ("5.24.4", "nothing")])
def test_what_a_user_of_another_release_is_told(version, said):
    done = run_python(
        "import sys, transformers\n"
        "transformers.__version__ = sys.argv[1]\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)\n"
        "print('loaded')",
        version,
    )
    assert ("loaded" in done.stdout) == (said != "refused"), done.stderr
    if said == "refused":
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: HRM-Text needs transformers 4.57.6 or newer and 4.56.2 is installed")
    assert done.stderr.count("transformers 5.99.0 is installed, and this code was tested with") == (said == "warned")


# What a user does with a model, in a process that has warned of nothing yet.
EVERYTHING = """
import json, logging, sys, tempfile, warnings
import torch, transformers
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
    AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline,
)

said = []
class Listener(logging.Handler):
    def emit(self, record):
        said.append((record.name, record.getMessage()))
logging.getLogger("transformers").addHandler(Listener())

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
    config = AutoConfig.from_pretrained(".", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True, dtype=torch.float32)
    prompt = tokenizer.encode_prompt(["What is 1 + 1?", "What is 20 + 3?"], padding=True, return_tensors="pt")
    few = {"max_new_tokens": 3}
    model.generate(**prompt, **few)
    model.generate(**prompt, **few, do_sample=True)
    model.generate(**prompt, **few, num_beams=2)
    model.generate(**prompt, **few, cache_implementation="static")
    model.generate(**prompt, **few, prefill_chunk_size=64)
    one = {name: value[:1] for name, value in prompt.items()}
    model.generate(**one, **few, prompt_lookup_num_tokens=2)
    model.generate(**one, **few, assistant_model=model)
    turn = model.generate(**one, **few, return_dict_in_generate=True)
    live = turn["cache"] if "cache" in turn else turn.past_key_values
    model.generate(turn.sequences, past_key_values=live, **few)
    model(turn.sequences[:, -1:], past_key_values=live)
    model(turn.sequences[:, -1:], cache=live)
    model(**prompt, output_hidden_states=True, output_attentions=True)
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
    model.set_attn_implementation("sdpa")
    model.optimize_for_inference().generate(**one, **few)
    model.undo_inference_optimization()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        AutoModel.from_pretrained(folder, trust_remote_code=True)
        rows = [{"input_ids": ids.tolist()} for ids in prompt["input_ids"]]
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        arguments = TrainingArguments(folder, max_steps=2, report_to=[], use_cpu=True)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    for head in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        head.from_pretrained(".", trust_remote_code=True, num_labels=3)(**prompt)
    chat = pipeline("text-generation", model=".", trust_remote_code=True)
    chat([{"role": "user", "content": "What is 1 + 1?"}], **few)
    model.resize_token_embeddings(600)
ours = [w for w in caught if "transformers" in w.filename.replace("hrm-text-transformers", "")]
print(json.dumps([f"{w.category.__name__}: {w.message}" for w in ours] + [f"{n}: {m}" for n, m in said]))
"""


@pytest.mark.skipif(
    not transformers.__version__.startswith(check_version.__globals__["NEWEST"].rpartition(".")[0]),
    reason="what is deprecated is judged on the newest release",
)
def test_nothing_that_we_use_is_deprecated():
    done = run_python(EVERYTHING)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout.strip().splitlines()[-1])
    old = re.compile("deprecat|FutureWarning|will be removed|no longer|legacy", re.IGNORECASE)
    # The library's own: it passes both to an assistant, whatever the model.
    its_own = "Passing `generation_config` together with generation-related arguments="
    assert not [line for line in lines if old.search(line) and its_own not in line]


@torch.no_grad()
def test_remote_code_is_ours_and_the_library_keeps_its_own(tmp_path, monkeypatch):
    # What this test registers is forgotten at its end.
    monkeypatch.setattr(transformers.CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(transformers.MODEL_MAPPING, "_extra_content", {})
    model = remote_folder(tmp_path)
    ids = torch.randint(12, 96, (2, 9))
    block = torch.ones_like(ids)
    block[:, 5:] = 0
    expected = model(ids, token_type_ids=block).logits

    ours = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(ours).__module__.startswith("transformers_modules")
    torch.testing.assert_close(ours(ids, token_type_ids=block).logits, expected)
    assert AutoModelForCausalLM.from_config(ours.config, trust_remote_code=True).config.model_type == "hrm_text"

    # Registration by a user, also a second time, in the place of the library's class.
    config_class, base_class = type(ours.config), type(ours.model)
    for _ in range(2):
        AutoConfig.register("hrm_text", config_class, exist_ok=True)
        AutoModel.register(config_class, base_class, exist_ok=True)
    assert type(AutoModel.from_config(ours.config)) is base_class

    if HAS_LIBRARY_CLASS:
        library = transformers.HrmTextForCausalLM
        theirs = library.from_pretrained(tmp_path).eval()
        assert type(theirs) is library and type(theirs).__module__.startswith("transformers.models")
        assert hasattr(theirs.model.L_module.layers[0].self_attn, "q_proj")
        torch.testing.assert_close(theirs(ids, token_type_ids=block).logits, expected, atol=1e-4, rtol=0)
        fresh = AutoModelForCausalLM.from_config(transformers.HrmTextConfig(**theirs.config.to_dict()))
        assert type(fresh) is library


@pytest.mark.skipif(HAS_TENSOR_PARALLELISM, reason="this transformers can cut four packed parts")
@pytest.mark.parametrize("argument", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_tensor_parallelism_is_refused_where_it_would_cut_wrongly(argument, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use transformers 5\.16 or newer, or `device_map='auto'`"):
        type(model).from_pretrained(tmp_path, **argument)


def _rank_logits(rank: int, folder: str, out: str) -> None:
    """One of two ranks: loads its part of the model and writes the logits of a block followed by a response."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    from transformers.distributed import DistributedConfig

    cls = load_class("modeling_hrm_text.HrmTextForCausalLM")
    model = cls.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
    inputs = torch.load(f"{out}/inputs.pt", weights_only=True)
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    local = model.model.L_module.layers[0].attn.gqkv_proj.weight.to_local().shape
    torch.save({"logits": logits, "tokens": tokens, "local": tuple(local)}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TENSOR_PARALLELISM, reason="this transformers cannot cut four packed parts")
def test_two_ranks_answer_as_one_with_a_prefix_block(tmp_path):
    model = tiny_model(seed=2)
    model.save_pretrained(tmp_path)
    ids = torch.randint(12, 96, (2, 11))
    types = torch.zeros_like(ids)
    types[:, :7] = 1
    torch.save({"input_ids": ids, "token_type_ids": types}, tmp_path / "inputs.pt")
    multiprocessing.spawn(_rank_logits, args=(str(tmp_path), str(tmp_path)), nprocs=2)
    with torch.no_grad():
        logits = model(ids, token_type_ids=types).logits
        tokens = model.generate(ids, token_type_ids=types, max_new_tokens=4, do_sample=False)
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(part["logits"], logits, atol=1e-5, rtol=0)
        assert torch.equal(part["tokens"], tokens)
        whole = model.model.L_module.layers[0].attn.gqkv_proj.weight.shape
        assert part["local"] == (whole[0] // 2, whole[1])
