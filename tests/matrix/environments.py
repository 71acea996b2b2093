"""An environment for each row of the matrix: a transformers, a torch and a Python.

An environment holds its own transformers and what that release wants in another version (huggingface_hub, tokenizers,
accelerate). A torch other than that of the base environment, which runs this program, lies in a folder of its own that
all rows with this torch share: a CUDA build takes gigabytes. Everything else is found in the base environment. Both
are reached through a .pth file. A row on another Python shares nothing with the base environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.processes import run_within


# A CUDA build of torch and its libraries are three gigabytes.
INSTALL_SECONDS = 1800
SHOWN = ("transformers", "huggingface_hub", "tokenizers", "accelerate", "torch")
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
THIS_TORCH = version("torch").split("+")[0]
# What the core tests import besides torch and transformers.
TEST_TOOLS = ("pytest>=9", "pytest-xdist>=3.5", "hypothesis>=6", "pyyaml>=6", "tqdm>=4.60", "numpy", "setuptools")


class LeftOutError(RuntimeError):
    """The row cannot run on this machine, for a reason that is not its own: no such Python, or no such torch."""


@dataclass(frozen=True)
class Row:
    """One row of the matrix. `torch` and `python` are those that run this program unless given."""

    transformers: str
    torch: str = THIS_TORCH
    python: str = THIS_PYTHON

    @classmethod
    def parse(cls, text: str) -> Row:
        """Reads "5.24.0", "5.24.0/2.15.0" or "5.24.0/2.15.0/3.13".

        Raises:
            ValueError: the text has another form.
        """
        release = r"\d+(\.\d+)*(\.?[a-z]+\d+)?"
        if not re.fullmatch(rf"{release}(/{release}(/\d+\.\d+)?)?", text):
            raise ValueError(
                f"{text!r} is no row: write TRANSFORMERS, TRANSFORMERS/TORCH or TRANSFORMERS/TORCH/PYTHON"
            )
        return cls(*text.split("/"))

    def __str__(self) -> str:
        return f"{self.transformers}/{self.torch}/{self.python}"


@dataclass(frozen=True)
class Environment:
    """A ready environment: its interpreter and the releases of the packages that matter."""

    python: Path
    packages: dict[str, str]


def default_home() -> Path:
    """Folder of the environments: `$HRM_TEXT_MATRIX_HOME`, else below the user's cache folder."""
    if home := os.environ.get("HRM_TEXT_MATRIX_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).expanduser() / "hrm-text" / "matrix"


def run_command(command: list[str], seconds: float) -> str:
    """Returns what a command prints.

    Raises:
        RuntimeError: it failed, or did not end in time; the message holds the end of what it printed.
    """
    try:
        done = run_within(command, seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)} did not end within {seconds:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout


def find_interpreter(python: str) -> str:
    """The interpreter of a Python ("3.13"): this one, or the first `python3.13` on PATH that runs.

    Raises:
        LeftOutError: there is none.
    """
    if python == THIS_PYTHON:
        return sys.executable
    code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for folder in os.get_exec_path():
        found = shutil.which(f"python{python}", path=folder)
        try:
            # Version managers put a program of this name on PATH also where the version is not switched on.
            if found and run_command([found, "-c", code], 60).strip() == python:
                return found
        except RuntimeError:
            continue
    raise LeftOutError(f"no python{python} on PATH")


def _pip_install(python: Path, *packages: str) -> None:
    """Installs packages into the environment of an interpreter, which needs no pip of its own."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    # Not --quiet: only then does pip say which constraint stopped it.
    run_command([*command, "--progress-bar=off", "--disable-pip-version-check", *packages], INSTALL_SECONDS)


def _site_packages(python: Path) -> str:
    return run_command([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], 60).strip()


def _make_venv(folder: Path, interpreter: str) -> Path:
    run_command([interpreter, "-m", "venv", "--clear", "--without-pip", str(folder)], 300)
    return folder / "bin" / "python"


def why_left_out(torch: str, python: str, said: str) -> str | None:
    """Why pip cannot install this torch, from what it said; None where the cause is another."""
    if cap := re.search(r"\(constraint\) (torch\S*)", said):
        return f"pip is set to {cap[1]}"
    if "No matching distribution found for torch==" in said and "Retrying" not in said:
        return f"the package index has no torch {torch} for Python {python} on this machine"
    return None


def _torch_layer(row: Row, home: Path) -> str:
    """The folder from which a row gets its torch, installed where it is not there yet.

    Raises:
        LeftOutError: pip may not install this torch, or finds none for this Python.
    """
    folder = home / f"torch-{row.torch}-python{row.python}"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        python = _make_venv(folder, find_interpreter(row.python))
        try:
            _pip_install(python, f"torch=={row.torch}", "numpy")
        except RuntimeError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if reason := why_left_out(row.torch, row.python, str(error)):
                raise LeftOutError(reason) from error
            raise
        (folder / "ready").touch()
    return _site_packages(python)


def _releases(python: Path) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN!r}}}))"
    return json.loads(run_command([str(python), "-c", code], 60))


def make_environment(row: Row, home: Path) -> Environment:
    """Makes the environment of a row in `home`, or returns the one that is there.

    Raises:
        LeftOutError: this machine has no such Python, or pip may not install this torch.
        RuntimeError: pip could not install it.
    """
    interpreter = find_interpreter(row.python)
    folder = home / f"transformers-{row.transformers}-torch-{row.torch}-python{row.python}"
    python = folder / "bin" / "python"
    ready = (folder / "ready").is_file()
    own_python, own_torch = row.python != THIS_PYTHON, (row.torch, row.python) != (THIS_TORCH, THIS_PYTHON)
    try:
        shared = [_torch_layer(row, home)] if own_torch else []
        if not own_python:
            shared += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        if not ready:
            python = _make_venv(folder, interpreter)
        # Entries of a .pth come after the environment's own folder, so what is installed there wins. Written every
        # time: another checkout, with a base environment of its own, may have made the folder.
        text = "\n".join(dict.fromkeys(shared)) + "\n"
        Path(_site_packages(python), "shared.pth").write_text(text, encoding="utf-8")
        if not ready:
            # torch is named so that no version of transformers can bring another one, and datasets so that its release
            # fits the huggingface_hub that the version wants: the library's Trainer imports it.
            packages = [f"transformers=={row.transformers}", "accelerate", "datasets", f"torch=={row.torch}"]
            _pip_install(python, *packages, *(TEST_TOOLS if own_python else ()))
            (folder / "ready").touch()
    except LeftOutError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the environment of {row} could not be made in {folder}; is the package index within reach?\n{error}"
        ) from error
    packages = _releases(python)
    found = (packages["transformers"], packages["torch"].split("+")[0])
    if found != (row.transformers, row.torch):
        raise RuntimeError(
            f"{folder} holds transformers {found[0]} and torch {found[1]}, not {row}: remove the folder"
        )
    return Environment(python, packages)
