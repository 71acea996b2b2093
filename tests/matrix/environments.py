"""An environment for each version of transformers, on top of the one that runs this program.

An environment holds its own transformers and whatever that version wants in another release (huggingface_hub,
tokenizers, accelerate); everything else, torch above all, is found in the base environment through a .pth file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


# pip may wait long for an index that does not answer.
INSTALL_SECONDS = 900
SHOWN = ("transformers", "huggingface_hub", "tokenizers", "accelerate", "torch")


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


def _run(command: list[str], seconds: float | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)} did not end within {seconds:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")
    return done.stdout


def _releases(python: Path) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN!r}}}))"
    return json.loads(_run([str(python), "-c", code]))


def make_environment(wanted: str, home: Path) -> Environment:
    """Makes the environment of transformers `wanted` in `home`, or returns the one that is there.

    Raises:
        RuntimeError: pip could not install it.
    """
    folder = home / f"transformers-{wanted}-python{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    ready = (folder / "ready").is_file()
    if not ready:
        venv.EnvBuilder(with_pip=False, clear=True).create(folder)
    # Entries of a .pth come after the environment's own folder, so what is installed there wins. Written every time:
    # another checkout, with a base environment of its own, may have made the folder.
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    shared = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    if not ready:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch is named so that no version of transformers can bring another one, and datasets so that its release
        # fits the huggingface_hub that the version wants: the library's Trainer imports it.
        torch = f"torch=={version('torch').split('+')[0]}"
        try:
            _run([*pip, f"transformers=={wanted}", "accelerate", "datasets", torch], INSTALL_SECONDS)
        except RuntimeError as error:
            raise RuntimeError(
                f"the environment of transformers {wanted} could not be made in {folder}; is the package index within "
                f"reach?\n{error}"
            ) from error
        (folder / "ready").touch()
    packages = _releases(python)
    if packages["transformers"] != wanted:
        raise RuntimeError(f"{folder} holds transformers {packages['transformers']}, not {wanted}: remove the folder")
    return Environment(python, packages)
