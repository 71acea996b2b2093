"""The version matrix and the look-up of newer releases: with the real pip, on wheels and an index made here."""

from __future__ import annotations

import os
import socket
import sys
import zipfile
from pathlib import Path

import pytest

from .matrix import newest as newest_releases
from .matrix.__main__ import ROWS, cell, table
from .matrix.__main__ import main as run_matrix
from .matrix.environments import THIS_PYTHON, THIS_TORCH, LeftOutError, Row, find_interpreter, make_environment
from .matrix.runs import AREAS, ROOT, test_files
from .processes import run_within


def make_wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all that pip knows of, with two releases of transformers and torch each."""
    for name in ("PIP_CONSTRAINT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for version in ("9.8.0", "9.9.0"):
        make_wheel(tmp_path / "wheels", "transformers", version)
        make_wheel(tmp_path / "wheels", "torch", version)
    return tmp_path / "wheels"


@pytest.fixture
def pins(tmp_path):
    def write(transformers: str, torch: str) -> list[str]:
        path = tmp_path / "constraints.txt"
        path.write_text(f"# pinned\ntorch=={torch}\ntransformers=={transformers}\n")
        return ["--constraints", str(path), "--home", str(tmp_path / "home"), "--jobs", "1"]

    return write


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("5.24.0", Row("5.24.0", THIS_TORCH, THIS_PYTHON)),
        ("5.24.0/2.15.0", Row("5.24.0", "2.15.0", THIS_PYTHON)),
        ("5.24.0rc1/2.15.0/3.13", Row("5.24.0rc1", "2.15.0", "3.13")),
    ],
)
def test_a_row_is_read_as_it_is_written(text, row):
    assert Row.parse(text) == row and Row.parse(str(row)) == row


@pytest.mark.parametrize(
    "text", ["", "newest", "5.24.0/", "5.24.0/2.15.0/3", "5.24.0/2.15.0/3.13/x", "../5.24.0", "5/-r"]
)
def test_what_is_no_row_is_refused(text, capsys):
    with pytest.raises(ValueError, match="is no row"):
        Row.parse(text)
    with pytest.raises(SystemExit) as stopped:
        run_matrix([text])
    assert stopped.value.code == 2 and "TRANSFORMERS[/TORCH[/PYTHON]]" in capsys.readouterr().err


def test_an_interpreter_is_one_that_runs(tmp_path, monkeypatch):
    """The first of the name may be the placeholder of a version manager."""
    assert find_interpreter(THIS_PYTHON) == sys.executable
    for folder, script in (("a", "exit 127"), ("b", "echo 3.97"), ("c", "echo 3.98"), ("d", "echo 3.98")):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "python3.98"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / folder) for folder in "abcd"))
    assert find_interpreter("3.98") == str(tmp_path / "c" / "python3.98")
    with pytest.raises(LeftOutError, match=r"no python3\.99 on PATH"):
        find_interpreter("3.99")


def test_a_row_that_pip_may_not_install_is_left_out_with_the_reason(wheels, tmp_path, monkeypatch):
    home = tmp_path / "home"
    with pytest.raises(LeftOutError, match=rf"no torch 9\.7\.0 for Python {THIS_PYTHON} on this machine"):
        make_environment(Row("9.9.0", "9.7.0"), home)
    (tmp_path / "cap.txt").write_text("torch<=9.8.0\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "cap.txt"))
    with pytest.raises(LeftOutError, match=r"pip is set to torch<=9\.8\.0"):
        make_environment(Row("9.9.0", "9.9.0"), home)
    assert not any(home.iterdir())


def test_rows_that_are_left_out_are_told_and_named_rows_must_run(wheels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.matrix.__main__.ROWS", (Row("9.9.0", "9.7.0"), Row("9.9.0", python="3.99")))
    assert run_matrix(["--home", str(tmp_path / "home")]) == 2
    assert "9.9.0/9.7.0" in (said := capsys.readouterr()).out and "no python3.99 on PATH" in said.out
    assert said.err == ""
    assert run_matrix([f"9.9.0/{THIS_TORCH}/3.99", "--home", str(tmp_path / "home")]) == 2
    assert "did not run: no python3.99 on PATH" in capsys.readouterr().err


def test_the_table_shows_what_failed_and_what_was_skipped():
    counts = {"passed": 7, "failed": 0, "skipped": 2}
    assert cell(counts) == "7 (2 skipped)" and cell({**counts, "failed": 3, "skipped": 0}) == "3 of 10 fail"
    packages = {"huggingface_hub": "2.4.0", "tokenizers": "0.23.3", "accelerate": "1.15.0"}
    printed = table({"5.24.0/2.15.0/3.13": {"packages": packages, "areas": {"parity": counts}}})
    assert printed.splitlines()[2] == "| 5.24.0 | 2.15.0 | 3.13 | 2.4.0 | 0.23.3 | 1.15.0 | 7 (2 skipped) |"


def test_every_area_has_tests_and_the_rows_hold_the_ends_of_the_range():
    assert set(test_files(list(AREAS)).values()) == set(AREAS)
    code = (ROOT / "versions_hrm_text.py").read_text()
    assert f'OLDEST, NEWEST = "{ROWS[0].transformers}", "{ROWS[-1].transformers}"' in code
    ends = [".".join(row.torch.split(".")[:2]) for row in (ROWS[0], ROWS[-1])]
    assert 'OLDEST_TORCH, NEWEST_TORCH = "{}", "{}"'.format(*ends) in code


def test_newer_releases_are_those_that_pip_would_install(wheels, pins, tmp_path, monkeypatch, capsys):
    assert newest_releases.main(pins("9.9.0", "9.9.0")) == 0
    assert (
        capsys.readouterr().out == "test-newest: nothing is newer than the pinned transformers 9.9.0 and torch 9.9.0\n"
    )
    # A pinned release that pip may no longer install is not older than what it may.
    (tmp_path / "cap.txt").write_text("torch<9.9\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "cap.txt"))
    assert str(newest_releases.newest("torch")) == "9.8.0"
    assert newest_releases.main(pins("9.9.0", "9.9.0")) == 0
    capsys.readouterr()
    # It came out, and its requirements are not to be had: told, and no traceback.
    assert newest_releases.main(pins("9.8.0", THIS_TORCH)) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "test-newest: transformers 9.9.0 and torch 9.8.0 came out, and the core tests could not run"
    )


def test_an_index_that_is_silent_costs_one_line(pins, monkeypatch, capsys):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.setattr(newest_releases, "LOOK_UP_SECONDS", 5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        assert newest_releases.main(pins("9.9.0", "9.9.0")) == 0
    said = capsys.readouterr().out
    assert said.startswith("test-newest: could not look up") and said.count("\n") == 1


def test_constraints_that_pin_nothing_are_refused(tmp_path, capsys):
    (tmp_path / "constraints.txt").write_text("torch>=2\n")
    assert newest_releases.main(["--constraints", str(tmp_path / "constraints.txt")]) == 2
    assert "do not pin transformers and torch" in capsys.readouterr().err
    assert newest_releases.main(["--constraints", str(tmp_path / "absent.txt")]) == 2


@pytest.mark.parametrize("module", ["tests.matrix", "tests.matrix.newest", "tests.transformers_suite"])
def test_the_programs_explain_themselves(module):
    done = run_within([sys.executable, "-m", module, "--help"], 120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "exit status:" in done.stdout
