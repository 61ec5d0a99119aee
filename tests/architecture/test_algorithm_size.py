# SPDX-License-Identifier: Apache-2.0
"""What an algorithm has to itself stays small, and docs/adding-an-algorithm.md says how much it is."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/adding-an-algorithm.md"
PACKAGE = ROOT / "nemo_aligner"
FOLDERS = (ROOT / "examples/nlp/gpt", PACKAGE / "objectives", PACKAGE / "data", PACKAGE)
NAMED = r"`([\w./]+)`"
MOST_LINES, MOST_FILES = 150, 3
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.COMMENT,
}
ROWS = re.findall(r"^\| ([^|`]+) \| (`train_gpt_[^|]+) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
ALONE = re.findall(r"^\| ([^|`]+) \| (`[^|]+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)


def code_lines(text: str) -> int:
    """Lines with a token that is neither a comment nor a docstring."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


def source(name: str) -> str:
    """A whole file, or one function or class of a file: ``credit.best_of_n``."""
    stem, _, part = name.rpartition(".")
    (path,) = [path for folder in FOLDERS if (path := folder / f"{stem}.py").exists()]
    text = path.read_text()
    if part == "py":
        return text
    (node,) = [
        one
        for one in ast.parse(text).body
        if isinstance(one, ast.FunctionDef | ast.ClassDef) and one.name == part
    ]
    return ast.get_source_segment(text, node) + "\n"


def test_all_algorithms_are_there():
    scripts = {path.name for path in FOLDERS[0].glob("train_gpt_*.py")}
    named = {re.findall(NAMED, files)[0] for _, files, _ in ROWS}
    assert scripts - named == {"train_gpt_sft.py", "train_gpt_ppo_actor.py"}, "those are the house itself"


@pytest.mark.parametrize(("files", "lines"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_an_algorithm_is_as_small_as_the_page_says(files: str, lines: str):
    names = re.findall(NAMED, files)
    assert sum(code_lines(source(name)) for name in names) == int(lines) <= MOST_LINES
    assert len({name.rpartition(".")[0] for name in names}) <= MOST_FILES


@pytest.mark.parametrize(("parts", "lines"), [row[1:] for row in ALONE], ids=[row[0] for row in ALONE])
def test_what_one_algorithm_alone_uses_of_the_house_is_on_record(parts: str, lines: str):
    assert sum(code_lines(source(name)) for name in re.findall(NAMED, parts)) == int(lines)
