"""The code blocks of a page, in order, with what a comment before each says about running it.

`<!-- readme: MARK -->` on the line before a block is read as:

| mark | how the block is run |
| --- | --- |
| none | Python: one program, in the fast tests. Shell: in a copy of the repository, in the slow tests |
| `hub` | as above, with the stand-in of the Hub in place of the Hub |
| `needs PACKAGE` | as above; the package is an extra |
| `fresh environment` | in a new virtual environment, in the slow tests |
| `run by FILE` | by that file of tests; here only its options are checked. A comma and how may follow |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


MARKS = ("hub", "needs ", "fresh environment", "run by ")
_BLOCK = re.compile(r"^(?:<!-- readme: (?P<mark>.*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One code block: its language, its text and its mark ("" where it has none)."""

    language: str
    text: str
    mark: str

    @property
    def commands(self) -> list[str]:
        """Its command lines without comments; a line that ends with a backslash goes on."""
        lines = (line.split("  #")[0].strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a Markdown file.

    Raises:
        ValueError: a mark that nobody reads, or one that stands before no block.
    """
    text = page.read_text()
    blocks = [Block(match["language"], match["text"], match["mark"] or "") for match in _BLOCK.finditer(text)]
    for block in blocks:
        if block.mark and not block.mark.startswith(MARKS):
            raise ValueError(f"{page.name}: unknown mark {block.mark!r}")
    if text.count("<!-- readme:") != sum(bool(block.mark) for block in blocks):
        raise ValueError(f"{page.name}: a mark stands before no block")
    return blocks


def tables_of(page: Path) -> list[list[list[str]]]:
    """All tables of a Markdown file: rows of cells, without the rule under the heading."""
    tables: list[list[list[str]]] = [[]]
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not all(set(cell) <= set("-: ") for cell in cells):
                tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]
