"""The recipes on TRL's trainers: what they reach on held-out questions, a kill, and two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .tiny import ROOT


pytest.importorskip("trl")
pytest.importorskip("datasets")

from training.recipes import dpo, grpo, sft


RECIPES = {"sft": sft, "dpo": dpo, "grpo": grpo}


def log(output: Path, *names: str) -> list[list[float]]:
    entries = json.loads((output / "training" / "log.json").read_text())
    return [[entry[name] for name in names] for entry in entries if names[0] in entry]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path()}


def path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def checked(output: Path, summary: dict) -> None:
    """The prompt's mask was held against plain forwards inside the run, and everything lies where it should."""
    assert summary["checked_tokens"] > 50 and summary["largest_difference"] <= 1e-4
    assert json.loads((output / "training" / "summary.json").read_text()) == summary
    assert (output / "training" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "config.json").read_text())["architectures"] == ["HrmTextForCausalLM"]


@pytest.mark.parametrize("more", [(), ("--chats",)])
def test_sft_teaches_to_double(tmp_path, more):
    summary = sft.main(["--output", str(tmp_path), "--steps", "15", *more])
    checked(tmp_path, summary)
    assert summary["before"] < 0.1 and summary["after"] > 0.6


@pytest.mark.slow
def test_dpo_raises_what_is_answered_right(tmp_path):
    summary = dpo.main(["--output", str(tmp_path)])
    checked(tmp_path, summary)
    assert log(tmp_path, "loss")[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert summary["after"] > summary["before"] + 0.15


@pytest.mark.slow
def test_grpo_learns_from_its_own_samples(tmp_path):
    summary = grpo.main(["--output", str(tmp_path)])
    checked(tmp_path, summary)
    rewards = [reward for (reward,) in log(tmp_path, "reward")]
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 2
    assert summary["after"] > summary["before"] + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on_to_the_same_losses(name, tmp_path):
    options = ["--steps", "6", "--save-steps", "2", "--batch-size", "16"]
    RECIPES[name].main(["--output", str(tmp_path / "whole"), *options])
    arguments = [sys.executable, "-m", f"training.recipes.{name}", "--output", str(tmp_path / "cut"), *options]
    process = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (tmp_path / "cut" / "training" / "checkpoint-2" / "average_0.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "training" / "summary.json").exists()
    subprocess.run(arguments, env=environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=600)
    names = ("loss", "reward") if name == "grpo" else ("loss",)
    cut, whole = log(tmp_path / "cut", *names), log(tmp_path / "whole", *names)
    assert len(whole) == 6
    for mine, theirs in zip(cut, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert log(tmp_path / "cut", "exact match") == log(tmp_path / "whole", "exact match")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_two_processes_have_the_losses_of_one(name, tmp_path):
    options = ["--steps", "4"]
    RECIPES[name].main(["--output", str(tmp_path / "one"), *options, "--batch-size", "8"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    launch += ["-m", f"training.recipes.{name}", "--output", str(tmp_path / "two"), *options, "--batch-size", "4"]
    subprocess.run(launch, env=environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=900)
    one, two = ([loss for (loss,) in log(tmp_path / run, "loss")] for run in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-3, abs=1e-5)
