# SPDX-License-Identifier: Apache-2.0
"""Rules about the source that neither ruff nor import-linter can express."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_aligner

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("nemo_aligner", "examples", "benchmarks", "tools", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "benchmarks/peers")  # the other side's scripts, as they are
)
PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "nemo_aligner")]
PRODUCT = [path for path in SOURCES if not path.is_relative_to(ROOT / "tests")]
MAX_FILE_LINES = 400
MAX_CLASS_LINES = 250
MAX_FUNCTION_LINES = 60


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def device_mentions(tree: ast.AST) -> list[str]:
    """Uses of torch.cuda, torch.distributed and the methods .cuda(), by line, however they were imported."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="cuda")):
                found.append(f"{node.lineno}: .cuda()")
            case ast.Attribute(value=ast.Name(id="torch"), attr="cuda" | "distributed" as attribute):
                found.append(f"{node.lineno}: torch.{attribute}")
            case ast.Import(names=names):
                found += [
                    f"{node.lineno}: import {alias.name}"
                    for alias in names
                    if alias.name.startswith(("torch.cuda", "torch.distributed"))
                ]
            case ast.ImportFrom(module=str(module), names=names):
                targets = [f"{module}.{alias.name}" for alias in names]
                found += [
                    f"{node.lineno}: {target}"
                    for target in targets
                    if target.startswith(("torch.cuda", "torch.distributed"))
                ]
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x.cuda()", 1),
        ("import torch.distributed as dist", 1),
        ("from torch import distributed", 1),
        ("from torch.cuda import empty_cache", 1),
        ("torch.cuda.synchronize()", 1),
        ("x.to(device()); launch.distributed()", 0),
    ],
)
def test_device_mentions_are_found(source: str, expected: int):
    assert len(device_mentions(ast.parse(source))) == expected


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.parent.name != "parallel"], ids=name)
def test_devices_and_process_groups_are_named_only_in_parallel(path: Path):
    found = device_mentions(ast.parse(path.read_text()))
    if path.parent.name == "checkpoint":
        # The classes of a file format, which need no process group.
        found = [mention for mention in found if " torch.distributed.checkpoint" not in mention]
    assert found == []


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "setup.py"], ids=name)
def test_first_line_names_the_licence(path: Path):
    assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_classes_and_functions_are_short(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for nodes, most in ((functions(tree), MAX_FUNCTION_LINES), (classes, MAX_CLASS_LINES)):
        lengths = {node.name: node.end_lineno - node.lineno + 1 for node in nodes}
        assert {name: lines for name, lines in lengths.items() if lines > most} == {}


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_no_drawer_for_odds_and_ends(path: Path):
    assert not {"utils", "helpers", "misc", "common"} & set(path.relative_to(ROOT).with_suffix("").parts)


def test_importing_the_package_is_quick_and_has_no_side_effects():
    code = (
        "import sys, time; began = time.perf_counter(); import nemo_aligner; "
        "print(time.perf_counter() - began, sorted({'torch', 'megatron', 'hydra'} & set(sys.modules)))"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    ]
    assert {line.partition(" ")[2] for line in lines} == {"[]\n"}
    assert min(float(line.split()[0]) for line in lines) < 0.1


def test_the_package_has_the_names_of_its_api():
    tree = ast.parse((ROOT / "nemo_aligner/api.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert set(names) == nemo_aligner.API
    assert not hasattr(nemo_aligner, "no_such_name")


def test_jobs_that_serve_nothing_load_no_server():
    servers = "{'pytriton', 'tritonclient', 'aiohttp'}"
    code = f"import sys, nemo_aligner.builders; print(sorted({servers} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
