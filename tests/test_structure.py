"""The plan of the house, held against the code: who imports whom, in which form, and in which syntax."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .tiny import ROOT


MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*_hrm_text.py"))}
RUNTIME = {"torch", "transformers", "safetensors", "tokenizers", "accelerate"}
SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
]


def relative_imports(tree: ast.AST, late: bool = True) -> set[str]:
    """Modules that a file imports from beside itself; `late` counts those in functions, which the copier sees too."""
    nodes = ast.walk(tree) if late else ast.iter_child_nodes(tree)
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}


def reached(start: str, late: bool = True, seen: set[str] | None = None) -> set[str]:
    seen = set() if seen is None else seen
    for module in relative_imports(MODULES[start], late) - seen:
        seen.add(module)
        reached(module, late, seen)
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_no_circles(module):
    assert module not in reached(module, late=False)


def test_the_network_is_at_the_top():
    """Only task heads import the network; the config imports nothing but the differences between versions."""
    importers = {name for name, tree in MODULES.items() if "modeling_hrm_text" in relative_imports(tree)}
    assert importers <= {"heads_hrm_text"}
    assert relative_imports(MODULES["configuration_hrm_text"]) <= {"versions_hrm_text"}


@pytest.mark.parametrize("module", MODULES)
def test_what_the_copier_of_remote_code_sees(module):
    """`from .module import name` for our own modules, and at the top only packages that every user has."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in MODULES, ast.unparse(node)
    for node in MODULES[module].body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            assert package in RUNTIME or package in __import__("sys").stdlib_module_names, name


def test_the_entry_modules_name_everything_they_reach():
    """transformers before 5.10 copies only what an entry module imports itself."""
    for entry in ("modeling_hrm_text", "heads_hrm_text"):
        if entry in MODULES:
            assert reached(entry) - {entry} == relative_imports(MODULES[entry]), entry


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_3_10_reads_it(path: Path):
    ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))
