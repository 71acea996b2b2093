"""Defects made from the syntax of a file: small changes of one place each, found again after every rewrite of it."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path


@dataclass(frozen=True)
class Defect:
    """A change of one place of one file.

    Attributes:
        file: path from the root of the repository.
        old: text that is found exactly once, or, with `line`, anywhere on from that line and column.
        new: what takes its place.
        breaks: what goes wrong with it, in a few words.
        place: (line from 1, column in UTF-8 bytes from 0) of `old`, None where the text alone tells.
    """

    file: str
    old: str
    new: str
    breaks: str
    place: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        where = "" if self.place is None else f":{self.place[0]}:{self.place[1]}"
        return f"{self.file}{where} {self.breaks}"


class NotFoundOnce(ValueError):
    """The text of a defect is not found exactly once in its file."""


def planted(source: str, defect: Defect) -> str:
    """The source with the defect in it.

    Raises:
        NotFoundOnce: the old text is not where it should be, or there more than once; or nothing would change.
    """
    if defect.old == defect.new:
        raise NotFoundOnce(f"{defect.name}: the new text is the old one")
    if defect.place is None:
        count = source.count(defect.old)
        if not defect.old or count != 1:
            raise NotFoundOnce(f"{defect.name}: the old text is found {count} times, and not once: {defect.old!r}")
        changed = source.replace(defect.old, defect.new)
    else:
        data, old = source.encode(), defect.old.encode()
        at = _offset(data, defect.place)
        if not old or data[at : at + len(old)] != old:
            raise NotFoundOnce(f"{defect.name}: the old text is not there: {defect.old!r}")
        changed = (data[:at] + defect.new.encode() + data[at + len(old) :]).decode()
    try:
        ast.parse(changed)
    except SyntaxError as error:
        raise NotFoundOnce(f"{defect.name}: the file is no Python with it ({error})") from error
    return changed


def _offset(data: bytes, place: tuple[int, int]) -> int:
    lines = data.splitlines(keepends=True)
    return sum(len(line) for line in lines[: place[0] - 1]) + place[1]


# ---- one change for each kind of node -------------------------------------------------------------------------------


COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
SIGNS: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.BitAnd: "|", ast.BitOr: "&"}
PAIRS = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
PAIRS |= {"cummax": "cummin", "cummin": "cummax", "ones_like": "zeros_like", "zeros_like": "ones_like"}
PAIRS |= {"argmax": "argmin", "argmin": "argmax"}
MUTATORS = ("comparison", "not", "constant", "and-or", "raise", "pair", "where", "sign")


class _Finder(ast.NodeVisitor):
    """Collects (mutator, node, new text); code that only types, documents or exports is left alone."""

    def __init__(self, source: str):
        self.data = source.encode()
        self.offsets = [0, *accumulate(len(line) for line in self.data.splitlines(keepends=True))]
        self.found: list[tuple[str, ast.AST, str]] = []

    def text(self, node: ast.AST) -> str:
        if not hasattr(node, "lineno"):
            return ""
        start = self.offsets[node.lineno - 1] + node.col_offset
        return self.data[start : self.offsets[node.end_lineno - 1] + node.end_col_offset].decode()

    def add(self, mutator: str, node: ast.AST, new: str) -> None:
        if self.text(node) and self.text(node) != new:
            self.found.append((mutator, node, new))

    def visit_Assign(self, node: ast.Assign) -> None:
        exported = any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
        if not exported:
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *(value for value in node.args.kw_defaults if value is not None)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Messages are not answers."""

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            left, right = self.text(node.left), self.text(node.comparators[0])
            for sign in COMPARISONS.get(type(node.ops[0]), ()):
                self.add("comparison", node, f"({left} {sign} {right})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.Invert)):
            self.add("not", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is int and abs(node.value) < 1000:
            self.add("constant", node, str(node.value + 1))
            if node.value > 0:
                self.add("constant", node, str(node.value - 1))
        elif type(node.value) is bool:
            self.add("constant", node, str(not node.value))

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = " or " if isinstance(node.op, ast.And) else " and "
        self.add("and-or", node, f"({word.join(f'({self.text(value)})' for value in node.values)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        sign = SIGNS.get(type(node.op))
        if sign is not None:
            self.add("sign", node, f"({self.text(node.left)} {sign} {self.text(node.right)})")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("raise", node, "pass")

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in PAIRS:
            whole = self.text(called)
            arguments = self.text(node)[len(whole) :]
            self.add("pair", node, f"{whole[: len(whole) - len(name)]}{PAIRS[name]}{arguments}")
        if name == "where" and len(node.args) == 3 and not node.keywords:
            condition, left, right = (self.text(argument) for argument in node.args)
            self.add("where", node, f"{self.text(called)}({condition}, {right}, {left})")
        self.generic_visit(node)


def generic_defects(root: Path, file: str) -> list[Defect]:
    """Every defect that the mutators make in a file, in the order of the text; the same for the same text."""
    source = (root / file).read_text(encoding="utf-8")
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    defects, seen = [], set()
    for mutator, node, new in finder.found:
        old = finder.text(node)
        place = (node.lineno, node.col_offset)
        shown = " ".join(f"{old} -> {new}".split())
        defect = Defect(file, old, new, f"{mutator}: {shown[:90]}", place)
        if (place, old, new) in seen:
            continue
        seen.add((place, old, new))
        try:
            planted(source, defect)
        except NotFoundOnce:
            continue
        defects.append(defect)
    return sorted(defects, key=lambda defect: (defect.place or (0, 0), defect.new))


def drawn(root: Path, files: list[str], count: int, seed: int) -> list[Defect]:
    """`count` defects of the files, drawn by a seed; all where there are no more."""
    found = [defect for file in files for defect in generic_defects(root, file)]
    if count >= len(found):
        return found
    return sorted(random.Random(seed).sample(found, count), key=lambda defect: defect.name)
