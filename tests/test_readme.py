"""The README is true: its code runs, its commands exist, its front matter is what the Hub reads."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import yaml

from .tiny import ROOT


README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]


def test_front_matter():
    card = yaml.safe_load(README.split("---")[1])
    assert card["library_name"] == "transformers" and card["pipeline_tag"] == "text-generation"
    assert card["license"] == "apache-2.0" and "custom_code" in card["tags"]


def test_python_blocks_run_one_after_the_other(tmp_path):
    """They share a namespace, as they do for a reader who types them."""
    program = "\n".join(text for language, text in BLOCKS if language == "python")
    script = tmp_path / "readme.py"
    script.write_text(program)
    result = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(command):
    targets = [word for word in shlex.split(command)[1:] if "=" not in word]
    subprocess.run(["make", "--dry-run", "--no-print-directory", *targets], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python ")])
def test_options_of_commands_exist(command):
    """Each option that the README writes is one that the program's `--help` lists."""
    words = shlex.split(command)
    program = words[1:3] if words[1] == "-m" else words[1:2]
    result = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option.split("=")[0] in result.stdout, option


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor
