"""What installing the package brings: every library that it imports, in versions that the pins
satisfy."""

import ast
import sys
import tomllib

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OPTIONAL = {"triton"}  # comes with torch's builds for NVIDIA cards; elsewhere plain torch computes


def wanted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        canonicalize_name(each.name): each for each in map(Requirement, project["dependencies"])
    }


def test_every_library_that_is_imported_is_a_dependency():
    imported = set()
    for path in (ROOT / "prompt_recovery").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    libraries = imported - set(sys.stdlib_module_names) - {"prompt_recovery"} - OPTIONAL
    assert libraries > {"torch", "sentence_transformers"}
    assert {canonicalize_name(name) for name in libraries} <= set(wanted())


def test_the_pins_satisfy_the_dependencies():
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    pins = {canonicalize_name(each.name): each for each in map(Requirement, filter(None, lines))}
    for name, requirement in wanted().items():
        if name in pins:  # others come with these
            (pin,) = pins[name].specifier
            assert requirement.specifier.contains(pin.version), (str(requirement), str(pins[name]))
    assert set(wanted()) - set(pins) == {"numpy", "tqdm"}
