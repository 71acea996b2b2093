"""The README is true: its code runs, its commands exist, its tables are what was measured, its claims are held."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .hub_server import TOKEN, Hub
from .readme import Block, blocks_of, tables_of
from .tiny import ROOT


PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/claims.md",
        "evaluation/README.md",
        "benchmarks/README.md",
    )
]
README = PAGES[0].read_text()
# As one line, for sentences that may be wrapped anywhere.
SENTENCES = " ".join(README.split())
BLOCKS = blocks_of(PAGES[0])
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [
    command for page in PAGES for block in blocks_of(page) if block.language == "bash" for command in block.commands
]
# What a copy of the repository for the slow tests leaves out.
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "runs", "__pycache__", "results", "nano_run")
ANSWER = "75"


def clean_environment(**more: str) -> dict[str, str]:
    """Without what this process inherited for Python, so that the copy's own files are found."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more}


# ---- form ------------------------------------------------------------------------------------------------------


def test_front_matter():
    card = yaml.safe_load(README.split("---")[1])
    assert card["library_name"] == "transformers" and card["pipeline_tag"] == "text-generation"
    assert card["license"] == "apache-2.0" and "custom_code" in card["tags"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        linked = (page.parent / target).read_text() if target else text
        headings = {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in linked.splitlines()
            if line.startswith("#")
        }
        assert anchor in headings, (target, anchor)


def test_the_first_screen_has_everything_a_newcomer_needs():
    """What it is, a picture, an installation, the two commands and the 1B, in this order and before all else."""
    start = README.index("# HRM-Text for Transformers")
    parts = ["![", "pip install torch transformers", "generate.py", "make run", "make test", "sapientinc/HRM-Text-1B"]
    places = [README.index(part, start) for part in parts]
    assert places == sorted(places)
    assert README[start : places[-1]].count("\n") < 60


# ---- code ------------------------------------------------------------------------------------------------------


def test_python_blocks_run_one_after_the_other(tmp_path):
    """They share a namespace, as they do for a reader who types them."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(block.text for block in BLOCKS if block.language == "python"))
    result = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300, env=clean_environment()
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines()[0] == ANSWER
    assert "'7', '5', '<|box_end|>'" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", sorted({line for line in COMMANDS if line.startswith("make ")}))
def test_make_targets_exist(command):
    targets = [word for word in shlex.split(command)[1:] if "=" not in word]
    subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *targets], cwd=ROOT, check=True, capture_output=True, timeout=300
    )


@pytest.mark.parametrize(
    "command",
    sorted({line for line in COMMANDS if line.startswith(("python ", "torchrun ")) and " -m vllm" not in line}),
)
def test_options_of_commands_exist(command):
    """Each option that a page writes is one that the program's `--help` lists."""
    words = shlex.split(command)
    words = words[words.index("-m") - 1 :] if words[0] == "torchrun" else words
    program = words[1:3] if words[1] == "-m" else words[1:2]
    result = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option.split("=")[0] in result.stdout, option


@pytest.mark.parametrize("mark", sorted({block.mark for block in SHELL if block.mark.startswith("run by ")}))
def test_what_runs_a_block_elsewhere_exists(mark):
    assert (ROOT / mark.removeprefix("run by ").split(",")[0]).is_file()


def test_extras_exist():
    extras = (ROOT / "pyproject.toml").read_text()
    for command in (line for line in COMMANDS if line.startswith("pip install")):
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert f"\n{extra} = [" in extras, command


# ---- the same, run to the end ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository, whose `runs/` stays for the blocks that follow."""
    folder = tmp_path_factory.mktemp("readme") / "repository"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    programs = folder.parent / "bin"
    programs.mkdir()
    # The `python` of a reader is that of the environment that runs the tests.
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    return folder


def run_block(block: Block, folder: Path, text: str | None = None, **environment: str) -> str:
    """Runs a block in the shell, which stops at the first error. Returns what it prints."""
    path = f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text if text is None else text],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
        env=clean_environment(PATH=path, **environment),
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [block for block in SHELL if block.mark == "" or block.mark.startswith("needs ")],
    ids=lambda block: block.commands[0][:60],
)
def test_shell_blocks_run(block, copy):
    printed = run_block(block, copy)
    if any("48 + 27" in command for command in block.commands):
        assert printed.splitlines()[0] == ANSWER


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in SHELL if block.mark == "hub"], ids=lambda block: block.commands[0][:60]
)
def test_hub_blocks_run_against_a_stand_in(block, copy, tmp_path):
    """The published repository is Nano here: its weights, a config without our additions, its tokenizer."""
    with Hub() as hub:
        published = {
            name: (ROOT / name).read_bytes()
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
        }
        config = json.loads((ROOT / "config.json").read_text())
        published["config.json"] = json.dumps(
            {key: value for key, value in config.items() if key not in ("auto_map", "prefix_end_token_id")}
        ).encode()
        tokenizer_config = json.loads(published["tokenizer_config.json"])
        del tokenizer_config["auto_map"], tokenizer_config["default_condition"]
        published["tokenizer_config.json"] = json.dumps(tokenizer_config).encode()
        hub.publish("sapientinc/HRM-Text-1B", published)
        # The text for a reader says USER/NAME; the question is one that Nano can answer.
        text = block.text.replace("USER/NAME", "me/mine")
        text = re.sub(r'"A train .*?"', '"What is 48 + 27?"', text)
        printed = run_block(
            block,
            copy,
            text,
            HF_ENDPOINT=hub.url,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN=TOKEN,
        )
        if "sapientinc" in text:
            assert "48 + 27" in text and printed.rstrip().endswith("75.")
            config = json.loads((copy / "hrm-text-1b" / "config.json").read_text())
            assert config["prefix_end_token_id"] == 7 and "auto_map" in config
        else:
            assert "model.safetensors" in hub.repositories["me/mine"].branches["main"]


@pytest.mark.slow
def test_the_first_screen_in_a_fresh_environment(copy, tmp_path):
    """With nothing but Python and pip: each command of the first screen is one line, and they lead to an answer."""
    (block,) = (block for block in SHELL if block.mark == "fresh environment")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=300)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def run(command: str) -> subprocess.CompletedProcess:
        variables = clean_environment(PATH=path, VIRTUAL_ENV=str(environment))
        return subprocess.run(
            command, shell=True, cwd=copy, capture_output=True, text=True, timeout=1500, env=variables
        )

    try:
        install, generate = block.commands
        if run(f"{install} --dry-run --no-deps --timeout 5 --retries 0").returncode:
            pytest.skip("pip reaches no package index")
        done = run(install)
        assert done.returncode == 0, done.stderr[-4000:]
        done = run(generate)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.splitlines() == [ANSWER]
        assert "Traceback" not in done.stderr and "error" not in done.stderr.lower()
        # The first command of the 1B needs no more than that either.
        done = run("python convert_weights.py tests/fixtures/reference/checkpoint --output runs/fresh")
        assert done.returncode == 0, done.stderr[-4000:]
    finally:
        shutil.rmtree(environment)  # gigabytes


# ---- tables ----------------------------------------------------------------------------------------------------


def test_the_table_of_speed_is_the_file_of_results():
    rows = json.loads((ROOT / "benchmarks/results/cpu_full.json").read_text())["rows"]
    (table,) = (table for table in tables_of(PAGES[0]) if table[0][0] == "seconds")
    cases = [
        ("decode", "batch 1, context 128"),
        ("decode", "batch 1, context 1024"),
        ("decode", "batch 1, context 3072"),
        ("prefill", "512 tokens"),
    ]
    variants = {"transformers' class": "library", "as loaded": "ours", "`optimize_for_inference()`": "optimized"}
    assert [cells[0] for cells in table[1:]] == list(variants)
    for name, *cells in table[1:]:
        for (section, case), cell in zip(cases, cells):
            (found,) = (
                row["median"]
                for row in rows
                if (row["section"], row.get("case"), row.get("variant")) == (section, case, variants[name])
            )
            assert float(cell) == pytest.approx(found, abs=0.0051), (name, case)


def test_the_table_beside_llama_cpp_is_the_file_of_results():
    rows = json.loads((ROOT / "benchmarks/results/cpu_bits.json").read_text())["rows"]
    (table,) = (table for table in tables_of(PAGES[0]) if table[0][0] == "on this EPYC, seconds")
    cases = [*(f"step at context {context}" for context in (128, 1024, 3072)), "prompt of 128"]
    variants = {
        "transformers' class": "library",
        "`optimize_for_inference()`": "optimized",
        "`(compile_layers=True)`": "optimized + compiled layer",
        '`(compile_layers=True, weights="int8")`': "8 bits + compiled layer",
        '`(compile_layers=True, weights="int4")`': "4 bits + compiled layer",
    }
    assert [cells[0] for cells in table[1:6]] == list(variants) and len(table) == 10
    for name, *cells in table[1:]:
        for case, cell in zip(cases, cells, strict=True):
            (found,) = (
                row["median"]
                for row in rows
                if (row["section"], row["case"], row["variant"]) == ("llama.cpp", case, variants.get(name, name))
            )
            assert float(cell) == pytest.approx(found, abs=0.0051 if case.startswith("prompt") else 0.00051)


@pytest.mark.slow
def test_the_table_of_modes_is_what_its_command_prints():
    """Outcomes are the same, and differences of logits within a factor of three."""
    import transformers

    (table,) = (table for table in tables_of(PAGES[0]) if table[0][0] == "mode")
    done = subprocess.run(
        [sys.executable, "-m", "tests.mode_table", "--summary"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    printed = [cells for cells in printed if not cells[0].startswith("---")]
    assert [cells[:2] for cells in printed] == [cells[:2] for cells in table]
    if transformers.__version__ not in table[0][2]:
        return  # the other column is that of the release that the heading names
    for (mode, _, there), (_, _, found) in zip(table[1:], printed[1:]):
        number = re.compile(r"[\d.]+(?=\))")
        assert number.sub("", there) == number.sub("", found), mode
        for stated, measured in zip(number.findall(there), number.findall(found)):
            assert 1 / 3 < float(stated) / float(measured) < 3, mode


def test_memory_of_the_1b_follows_from_its_config():
    """2 bytes for each of 1,182,795,264 parameters, and keys and values of 128 layer calls for each token."""
    weights = 2 * 1_182_795_264
    token = 2 * 2 * 1536 * 128
    assert token == 786_432 and f"{token:,} bytes" in SENTENCES
    assert f"{weights / 1e9:.1f} GB for the weights" in SENTENCES
    assert f"{4096 * token / 1e9:.1f} GB at the full" in SENTENCES
    stacks = 32 * (5 * 1536 * 1536 + 3 * 1536 * 4096)
    assert f"{stacks / 1e6:.0f} M of the 1,183 M" in SENTENCES
    table = 65536 * 1536  # of the embeddings, and of the output head
    assert f"`--quantize w8a8` writes a folder with {(stacks + 3 * table) / 1e9:.2f} GB" in SENTENCES
    # 2 bytes of a scale for 32 columns of half a byte.
    assert f"`--quantize w4a16` one with {((stacks + table) * 9 / 16 + table) / 1e9:.2f} GB" in SENTENCES


# ---- claims ----------------------------------------------------------------------------------------------------


def test_every_claim_names_tests_that_exist():
    """`docs/claims.md`: a claim, and `file.py::test` (a test function or class there) or a file of tests."""
    (table,) = tables_of(ROOT / "docs/claims.md")
    assert table[0] == ["claim", "held by"] and len(table) > 20
    for claim, held_by in table[1:]:
        names = re.findall(r"`([^`]+)`", held_by)
        assert names, claim
        for name in names:
            file, _, test = name.partition("::")
            path = ROOT / file
            assert path.is_file(), (claim, file)
            defined = {
                node.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            }
            assert (test in defined) if test else any(name.startswith("test_") for name in defined), (claim, name)


def test_documents_that_code_names_exist():
    """No code, test or page cites a document that is not there."""
    for path in (*ROOT.rglob("*.py"), *ROOT.rglob("*.md")):
        if any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts):
            continue
        text = path.read_text()
        for page in re.findall(r"\b(docs/[\w-]+\.md)\b", text):
            assert (ROOT / page).exists(), (path, page)
        assert path == Path(__file__) or "DESIGN" not in text, path


def test_without_trust_remote_code_another_class_answers_otherwise():
    """What the page warns of: the same folder, without a word, gives transformers' class and a wrong answer."""
    pytest.importorskip("transformers.models.hrm_text", reason="this transformers has no HRM-Text of its own")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(ROOT), AutoModelForCausalLM.from_pretrained(ROOT)
    assert not type(model).__module__.startswith("transformers_modules.")
    chat = [{"role": "user", "content": "What is 48 + 27?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=10)[0, prompt["input_ids"].shape[1] :]
    assert f"Nano then answers {tokenizer.decode(answer, skip_special_tokens=True)} to 48 + 27" in README.replace(
        "\n", " "
    )
