"""The repository's measures (CONTRIBUTING.md): short lines, functions and files, explained
parameters, a first page of one screen."""

import ast
import re
import subprocess

from conftest import ROOT

COLUMNS, FUNCTION, FILE, README = 100, 80, 330, 900  # at most, lines but for README's words
DATA = {"test_refusals.py", "test_dispatch.py"}  # a text a line; PTX
KERNELS = "experts_decode.py"


def tracked(*endings):
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    return [ROOT / name for name in names if name.endswith(endings)]


def test_no_line_is_longer_than_a_hundred_columns_but_a_row_of_a_table():
    texts = tracked(".py", ".md", ".toml", "Makefile", ".ci/run", ".yml")
    assert len(texts) > 150
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        if path.name not in DATA
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if len(line) > COLUMNS and not (path.suffix == ".md" and line.startswith("|"))
    ]
    assert not long


def test_functions_and_files_are_short():
    long = []
    for path in tracked(".py"):
        text = path.read_text(encoding="utf-8")
        if path.name == KERNELS:
            continue
        lines = text.count("\n")
        if path.is_relative_to(ROOT / "prompt_recovery") and lines > FILE:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}, {lines} lines")
    assert not long


def test_parameters_of_public_functions_with_more_than_four_are_explained():
    unsaid, seen = [], 0
    for path in (ROOT / "prompt_recovery").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            names = {each.arg for each in [*node.args.args, *node.args.kwonlyargs]}
            if len(names) > 4 and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                seen += 1
                said = set(re.findall(r"\w+", ast.get_docstring(node) or ""))
                unsaid += [f"{path.name}: {node.name}, {name}" for name in names - said]
    assert seen > 25 and not unsaid


def test_the_first_page_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README
