"""Where transformers' tests come from: the official source distribution, or a checkout of the repository.

Neither is committed. A source distribution holds the mixins (`tests/test_*_common.py`, `tests/test_*_mixin.py`) but
not the folders that they import from (`generation/`, `exporters/`, `pipelines/`, ...); a module that is absent is
replaced by a stand-in, and every stand-in is listed in the report.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path


# The mixins refer to one another with relative imports, so they need a package; `tests` itself is ours.
PACKAGE = "transformers_tests"
_IMPORTS_TESTS = re.compile(r"^(\s*(?:from|import) )tests(?=[. ])", re.MULTILINE)
STANDINS = Path(__file__).parent / "standins"


@dataclass(frozen=True)
class Standin:
    """A file that the source lacks: its path inside `tests`, what is asked of it, and whether ours does the work."""

    module: str
    names: tuple[str, ...]
    functional: bool

    def __str__(self) -> str:
        kind = "ours, functional" if self.functional else "empty"
        shown = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        return f"tests/{self.module} ({kind}): {shown}"


def default_cache() -> Path:
    """Folder for downloaded sources: `$HRM_TEXT_TEST_CACHE`, else below the user's cache folder."""
    root = os.environ.get("HRM_TEXT_TEST_CACHE")
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).expanduser() / "hrm-text" / "transformers"


def _download(version: str, destination: Path) -> Path:
    """Downloads the source distribution of `version` with pip and returns the archive."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(destination), f"transformers=={version}"]
    # pip builds the metadata of what it downloads. Where the isolated build environment cannot be made, the
    # setuptools of this environment serve as well.
    for extra in ([], ["--no-build-isolation"]):
        try:
            done = subprocess.run(command + extra, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"pip did not get the source distribution of transformers {version} within 10 minutes; is the package "
                "index within reach? A checkout of the transformers repository serves as well: --transformers-src."
            ) from error
        archives = sorted(destination.glob("transformers-*.tar.gz"))
        if done.returncode == 0 and archives:
            return archives[0]
    raise RuntimeError(
        f"pip could not download the source distribution of transformers {version}; give a checkout of the "
        f"transformers repository with --transformers-src instead. pip said:\n{done.stderr.strip()[-2000:]}"
    )


def fetch_tests(version: str, cache: Path | None = None) -> Path:
    """Returns the `tests` folder of the source distribution of transformers `version`, downloading it once.

    Args:
        version: a released version, as in `transformers.__version__`.
        cache: folder that keeps the downloaded tests of every version.

    Raises:
        RuntimeError: pip cannot download it, or the archive holds no tests.
    """
    home = (cache or default_cache()) / version
    tests = home / "tests"
    if (tests / "test_modeling_common.py").is_file():
        return tests
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch_name:
        scratch = Path(scratch_name)
        archive = _download(version, scratch)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = Path(member.name).parts
                # Regular files below <root>/tests only: nothing in an archive may write elsewhere.
                if not member.isfile() or len(parts) < 3 or parts[1] != "tests" or ".." in parts:
                    continue
                target = scratch.joinpath("unpacked", *parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)
        if not (scratch / "unpacked" / "test_modeling_common.py").is_file():
            raise RuntimeError(f"the source distribution of transformers {version} holds no tests: {archive.name}")
        shutil.rmtree(tests, ignore_errors=True)
        (scratch / "unpacked").rename(tests)
    return tests


def checkout_tests(checkout: Path) -> Path:
    """The `tests` folder of a checkout of the transformers repository (or that folder itself).

    Raises:
        FileNotFoundError: there are no model tests in it.
    """
    for candidate in (checkout / "tests", checkout):
        if (candidate / "test_modeling_common.py").is_file():
            if (candidate / "utils" / "test_configuration_utils.py").is_file() and not (
                candidate.parent / "utils"
            ).is_dir():
                raise FileNotFoundError(
                    f"{candidate} wants the folder `utils` of the repository beside it: give it whole"
                )
            return candidate
    raise FileNotFoundError(
        f"{checkout} is no checkout of the transformers repository: tests/test_modeling_common.py is not in it"
    )


def _relative_imports(path: Path) -> list[tuple[str, str]]:
    """Every name that a file of the tests folder imports from beside itself, as (module, name)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


def _standin_text(names: list[str]) -> str:
    """Source of an empty stand-in: an empty class for every class asked for, an empty mapping for everything else."""
    lines = ['"""Stand-in for a module that the source distribution of transformers does not hold."""', ""]
    for name in names:
        lines.append(f"class {name}:\n    pass\n" if name[:1].isupper() and not name.isupper() else f"{name} = {{}}\n")
    return "\n".join(lines)


def _place(source: Path, target: Path) -> None:
    """Links a file, or those of a folder; one that imports `tests` by name is copied, and imports the package."""
    if source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            if entry.name not in ("__pycache__", "conftest.py"):
                _place(entry, target / entry.name)
        return
    if source.suffix == ".py":
        text = source.read_text(encoding="utf-8")
        renamed = _IMPORTS_TESTS.sub(rf"\1{PACKAGE}", text)
        if renamed != text:
            target.write_text(renamed, encoding="utf-8")
            return
    target.symlink_to(source.resolve())


def assemble(tests: Path, destination: Path) -> list[Standin]:
    """Makes an importable package `transformers_tests` in `destination` out of a `tests` folder.

    The files are linked, not copied, unless they import `tests` by that name, which here is ours; what they import and
    the folder lacks is filled with stand-ins. `utils`, which in a checkout lies beside `tests`, lies beside the
    package.

    Returns:
        The stand-ins, for the report.
    """
    package = destination / PACKAGE
    destination.mkdir(parents=True, exist_ok=True)
    _place(tests, package)
    (package / "__init__.py").unlink(missing_ok=True)
    (package / "__init__.py").touch()
    if (tests.parent / "utils").is_dir():
        (destination / "utils").symlink_to((tests.parent / "utils").resolve(), target_is_directory=True)

    wanted: dict[str, list[str]] = {}
    for path in sorted(tests.glob("test_*.py")):
        for module, name in _relative_imports(path):
            parts = module.split(".")
            if not tests.joinpath(*parts[:-1], parts[-1] + ".py").is_file():
                names = wanted.setdefault(module, [])
                if name not in names:
                    names.append(name)

    standins = []
    for module, names in sorted(wanted.items()):
        parts = module.split(".")
        folder = package
        for part in parts[:-1]:
            folder = folder / part
            if (tests / folder.relative_to(package)).is_dir():
                raise RuntimeError(f"{tests / part} exists but lacks {module}: mix of two versions of transformers?")
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        ours = STANDINS / f"{parts[-1]}.py"
        text = ours.read_text(encoding="utf-8") if ours.is_file() else _standin_text(names)
        (folder / f"{parts[-1]}.py").write_text(text, encoding="utf-8")
        standins.append(Standin("/".join(parts) + ".py", tuple(names), ours.is_file()))

    # The pipeline mixin reads the list of tiny checkpoints on the Hub from this path beside its package.
    summary = tests / "utils" / "tiny_model_summary.json"
    beside = destination / "tests" / "utils" / summary.name
    beside.parent.mkdir(parents=True)
    if summary.is_file():
        beside.symlink_to(summary.resolve())
    else:
        beside.write_text("{}", encoding="utf-8")
        standins.append(Standin(f"utils/{summary.name}", ("tiny checkpoints for the pipeline tests",), False))
    return standins
