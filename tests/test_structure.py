"""The plan of the house, held against the code: who imports whom, in which form, and in which syntax."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .tiny import ROOT


TEXTS = {path.stem: path.read_text() for path in sorted(ROOT.glob("*_hrm_text.py"))}
MODULES = {name: ast.parse(text) for name, text in TEXTS.items()}
# Who imports whom, anywhere in its file. A new arrow is a decision: it is drawn here first.
ARROWS = {
    "versions": "",
    "kernels": "",
    "layout": "",
    "cache": "versions",
    "chat": "",
    "configuration": "versions",
    "tokenization": "chat versions",
    "quantized": "kernels",
    "packed": "kernels quantized",
    "folder": "quantized",
    "loading": "versions",
    "reading": "cache layout versions",
    "attention": "kernels layout versions",
    "compiled": "cache folder kernels packed quantized",
    "decoding": "attention cache compiled kernels packed",
    "generation": "cache layout reading versions",
    "inference": "cache compiled folder kernels packed versions",
    "modeling": "attention cache compiled configuration decoding folder generation inference kernels layout loading "
    "packed quantized reading versions",
}
MOST_LINES = 560
LONGER = {
    "modeling": (920, "the whole network, from a layer to the heads, is read in one file"),
    "reading": (730, "every refusal stands beside the question that it answers"),
    "tokenization": (600, "conditions, envelope, types, chats and tools are one tokenizer's"),
    "inference": (650, "an arena, its captured steps and what switches them on share their state"),
}
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


def short(modules: set[str]) -> set[str]:
    return {module.removesuffix("_hrm_text") for module in modules}


def test_every_room_has_its_arrows():
    assert {f"{room}_hrm_text" for room in ARROWS} == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module):
    """Exactly those of the table, which stays true that way."""
    assert short(relative_imports(MODULES[module])) == set(ARROWS[module.removesuffix("_hrm_text")].split())


@pytest.mark.parametrize("module", MODULES)
def test_no_circles(module):
    """Not even through an import in a function."""
    assert module not in reached(module)


def test_the_plan_of_the_house():
    """What no change of the table may give up."""
    imports = {room: short(relative_imports(MODULES[f"{room}_hrm_text"])) for room in ARROWS}
    below = {room: short(reached(f"{room}_hrm_text")) for room in ARROWS}
    assert not any("modeling" in imported for imported in imports.values())
    assert not imports["kernels"], "speed can be taken away without a trace"
    assert not (below["layout"] | below["cache"]) & {"attention", "generation", "reading", "inference"}
    assert imports["configuration"] <= {"versions"}
    assert not imports["versions"]
    # The model needs no tokenizer, nor the tokenizer the model.
    assert not below["modeling"] & {"tokenization", "chat"}
    assert below["tokenization"] <= {"chat", "versions"}


def called(tree: ast.AST, *names: str) -> set[str]:
    """String arguments of calls of functions with these names."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [node for node in calls if ast.unparse(node.func).split(".")[-1] in names]
    arguments = [argument for node in calls for argument in node.args]
    return {node.value for node in arguments if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("module", MODULES)
def test_the_model_needs_nothing_else_of_the_repository(module):
    """What `from_pretrained` loads imports no script and no package beside it, in whatever form."""
    others = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert {"convert_weights", "conversion", "training", "benchmarks"} <= others
    tree, imported = MODULES[module], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module)
    imported |= called(tree, "import_module", "__import__", "run_module", "find_spec")
    assert not {name.lstrip(".").split(".")[0] for name in imported} & others


def test_the_entries_reach_every_room():
    """A room that no entry of the repository needs would not be loaded at all."""
    config = json.loads((ROOT / "config.json").read_text())
    tokenizer = json.loads((ROOT / "tokenizer_config.json").read_text())
    entries: set[str] = set()
    for value in [*config["auto_map"].values(), *tokenizer["auto_map"].values()]:
        named = [value] if isinstance(value, str) else value
        entries |= {name.rpartition("--")[2].split(".")[0] for name in named if name}
    assert set().union(entries, *(reached(entry) for entry in entries)) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_lines_of_a_room(module):
    most, _ = LONGER.get(module.removesuffix("_hrm_text"), (MOST_LINES, ""))
    lines = len(TEXTS[module].splitlines())
    assert lines <= most, "split the room by subject, or name it above with the reason"
    assert most == MOST_LINES or lines > MOST_LINES, "no exception is needed any more"


# ---- the map of the house ------------------------------------------------------------------------------------------

MAP = ROOT / "docs" / "architecture.md"
PROGRAM = ROOT / "docs" / "draw_rooms.py"


def drawing_program():
    spec = importlib.util.spec_from_file_location("draw_rooms", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_map_names_every_room_and_no_other():
    named = set(re.findall(r"\b(\w+_hrm_text)\b", MAP.read_text()))
    assert named == set(MODULES)


def test_what_the_map_names_exists():
    """Each name in code marks stands somewhere in the rooms, or is a file of the repository."""
    marked = set(re.findall(r"`([^`]+)`", MAP.read_text()))
    known = set(re.findall(r"\w+", " ".join(TEXTS.values()))) | {"from_pretrained", "generate", *MODULES, *ARROWS}
    for text in marked:
        words = [word for word in text.replace("\n", " ").split() if word != "python"]
        for word in words:
            if re.fullmatch(r"[\w/*]+\.\w+", word) and "/" in word:
                assert (ROOT / word).is_file(), word
            elif "*" not in word:
                names = re.findall(r"[A-Za-z_]\w*", word.removesuffix(".py"))
                assert names and set(names) <= known, word


def test_links_of_the_map():
    for target in re.findall(r"\]\(([^)#]+)\)", MAP.read_text()):
        assert (MAP.parent / target).is_file(), target


def test_the_drawing_program_reads_what_is_there():
    rooms = drawing_program().read_rooms(ROOT)
    assert {name: set(room.imports) for name, room in rooms.items()} == {
        name: set(arrows.split()) for name, arrows in ARROWS.items()
    }
    assert {name: room.lines for name, room in rooms.items()} == {
        module.removesuffix("_hrm_text"): len(text.splitlines()) for module, text in TEXTS.items()
    }


def test_arrows_of_the_drawing_point_down():
    program = drawing_program()
    rooms = program.read_rooms(ROOT)
    layers = program.find_layers(rooms)
    arrows = program.find_arrows(rooms, layers)
    assert all(layers[name] > layers[other] for name, room in rooms.items() for other in room.imports)
    assert all(here.layer == there.layer + 1 for here, there in arrows)
    rows = program.order_places(layers, arrows)
    columns = program.place_columns(rows, arrows)
    width = program.BOX[0] / program.COLUMN
    for row in rows:
        for left, right in itertools.pairwise(row):
            boxes = (not left.is_bend) + (not right.is_bend)
            assert columns[right] - columns[left] > width * boxes / 2, (left, right)
    with pytest.raises(ValueError, match="a -> b -> a"):
        program.find_layers({"a": program.Room(1, frozenset("b")), "b": program.Room(1, frozenset("a"))})


def test_the_picture_is_of_this_house():
    """Arrows exactly, lines as nearly as a picture need not be drawn anew for each change."""
    from PIL import Image

    with Image.open(ROOT / "docs" / "rooms.png") as picture:
        drawn = json.loads(picture.text["Description"])
    again = "run `python docs/draw_rooms.py`"
    assert {name: set(imports) for name, (_, imports) in drawn.items()} == {
        name: set(arrows.split()) for name, arrows in ARROWS.items()
    }, again
    for name, (lines, _) in drawn.items():
        assert abs(lines - len(TEXTS[f"{name}_hrm_text"].splitlines())) <= 60, f"{name}: {again}"


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--help"], 0, "Exit codes"),
        (["--output", "{folder}/rooms.png"], 0, "rooms.png"),
        (["--output", "{folder}/missing/rooms.png"], 1, "there is no folder"),
        (["--output", "{folder}/rooms.txt"], 2, ".png"),
        (["--rooms"], 2, "unrecognized"),
    ],
)
def test_drawing_from_the_command_line(tmp_path, arguments, code, said):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    run = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == code and said in done.stdout + done.stderr, done.stderr
    if code == 0 and "--output" in arguments:
        assert Path(arguments[1]).stat().st_size > 1000


# ---- how rooms are written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_what_the_copier_of_remote_code_sees(module):
    """`from .module import name` for our own modules; of others, in functions too, only what every user has."""
    guarded = {id(part) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Try) for part in ast.walk(node)}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in MODULES, ast.unparse(node)
    for node in ast.walk(MODULES[module]):
        names = []
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            assert package in RUNTIME or package in sys.stdlib_module_names, name


def test_the_entry_modules_name_everything_they_reach():
    """transformers before 5.10 copies only what an entry module imports itself."""
    for entry in ("modeling_hrm_text",):
        if entry in MODULES:
            assert reached(entry) - {entry} == relative_imports(MODULES[entry]), entry


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_3_10_reads_it(path: Path):
    ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))
