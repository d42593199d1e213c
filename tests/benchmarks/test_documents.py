"""The documents against the repository: tables from the CSVs, links, commands and Python blocks."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.record import ROOT

DOCUMENTS = [*tables.documents(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README_LINES = 150
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@every_document
def test_tables_are_those_of_the_csvs(path: Path) -> None:
    assert tables.text_of(path) == path.read_text()


@every_document
def test_links_and_pictures_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = path if not file else (path.parent / file).resolve()
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@every_document
def test_commands_name_modules_that_exist(path: Path) -> None:
    for name in re.findall(r"python -m (benchmarks[\w.]*\w)", path.read_text()):
        assert find_spec(name) is not None, name


@every_document
def test_python_blocks_are_python(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        ast.parse(block)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_readme_compares_ilf_with_plain_steps_at_equal_cost() -> None:
    rows = [line.split(" | ") for line in tables.summary().splitlines()[2:]]
    costs = {row[0].strip("| *"): row[2] for row in rows}
    assert costs["ilf-trt, ILF"] == costs["ilf-trt, plain at the cost of ILF"]
    assert len(rows) <= 8


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings(text)}


def headings(text: str) -> Iterator[str]:
    yield from re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)
