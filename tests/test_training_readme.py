"""The commands under "Fine-tune" in the README, run as a reader would run them, in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .tiny import ROOT


SECTION = re.search(r"^## Fine-tune\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL).group(1)


@pytest.mark.slow
def test_the_commands_do_what_they_say(tmp_path):
    pytest.importorskip("peft")
    copy = tmp_path / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "tests", "benchmarks", "docs"))
    # `python` and `torchrun` are those of the environment that the tests run in.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    written = ""
    for commands in re.findall(r"^```bash\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL):
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        written += result.stdout
    summaries = {
        folder.name: json.loads((folder / "training" / "summary.json").read_text())
        for folder in (copy / "runs").iterdir()
        if folder.is_dir()
    }
    assert set(summaries) >= {"doubler", "two", "adapter"}
    for name, summary in summaries.items():
        if "rows" not in summary:  # of a recipe on a stock trainer
            assert summary["after"] > summary["before"] + 0.1, name
            assert (copy / "runs" / name / "training" / "curves.png").exists()
            continue
        assert summary["rows"]["kept"] == 990 and not any(summary["rows"]["left_out"].values()), name
        assert summary["held_out"] == 20 and (copy / "runs" / name / "training" / "loss.png").exists()
    assert summaries["doubler"]["exact_match"] >= 0.5
    assert summaries["adapter"]["loss"] < 3
    assert re.search(r"^874$", written, re.MULTILINE)
    adapter = load_file(copy / "runs" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in key for key in adapter)
