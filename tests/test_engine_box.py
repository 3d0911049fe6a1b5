"""The engine is a box: outside code uses the names it offers, it uses nothing outside, and the
wheel holds it whole."""

import ast
import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from kaggle_upload import wheels
from prompt_recovery import engine

LIBRARY, INSIDE = ROOT / "prompt_recovery", ROOT / "prompt_recovery" / "engine"
BOX = "prompt_recovery.engine"


def imported(tree, package):
    """(module, name or None, name it is bound to) of every import in a file of the package, inside
    functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, alias.asname
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module]).rstrip(".")
            for alias in node.names:
                yield module, alias.name, alias.asname or alias.name


def dotted(node):
    """The text of a chain of attributes that begins with a name, else ""."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def reaches_into_the_box(source, package, offered):
    """What a file outside the engine uses of it beyond the names offered."""
    tree, found, boxes = ast.parse(source), set(), {BOX}
    for module, name, bound in imported(tree, package):
        whole = module if name is None else f"{module}.{name}"
        if module.startswith(f"{BOX}.") or (module == BOX and name not in (None, *offered)):
            found.add(whole)
        elif whole == BOX and bound:
            boxes.add(bound)
    chains = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for box in boxes:
        used = {chain for chain in chains if chain.startswith(f"{box}.")}
        found |= {chain for chain in used if chain[len(box) + 1 :].split(".")[0] not in offered}
    return found


def reaches_out_of_the_box(source, package):
    """What a file of the engine imports of prompt_recovery outside of the engine."""
    tree = ast.parse(source)
    pairs = [(m, m if name is None else f"{m}.{name}") for m, name, _ in imported(tree, package)]
    ours = [pair for pair in pairs if pair[0].split(".")[0] == "prompt_recovery"]
    return {whole for _, whole in ours if not f"{whole}.".startswith(f"{BOX}.")}


def package_of(path):
    return ".".join(path.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from prompt_recovery.engine import generate, Meter as M", set()),
        ("from prompt_recovery import engine\nengine.generate(engine.Meter().rows)", set()),
        ("import prompt_recovery.engine\nprompt_recovery.engine.generate", set()),
        ("from prompt_recovery import engineering", set()),
        ("from prompt_recovery.engine import forward", {f"{BOX}.forward"}),
        ("from prompt_recovery.engine import *", {f"{BOX}.*"}),
        (
            "def f():\n    from prompt_recovery.engine.storage import expert_weights",
            {f"{BOX}.storage.expert_weights"},
        ),
        ("import prompt_recovery.engine.kernels.dispatch as d", {f"{BOX}.kernels.dispatch"}),
        ("from .engine import storage", {f"{BOX}.storage"}),
        (
            "from . import engine as box\nbox.storage.expert_weights()",
            {"box.storage", "box.storage.expert_weights"},
        ),
        ("import prompt_recovery.engine\nprompt_recovery.engine.storage", {f"{BOX}.storage"}),
    ],
)
def test_a_look_into_the_box_is_seen_and_use_of_its_names_is_none(source, found):
    assert reaches_into_the_box(source, "prompt_recovery", {"generate", "Meter"}) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\nfrom prompt_recovery.engine.kernels import dispatch", set()),
        (
            "from prompt_recovery import engine\nfrom . import dispatch\nfrom .. import storage",
            set(),
        ),
        ("from prompt_recovery import tokenizer", {"prompt_recovery.tokenizer"}),
        ("import prompt_recovery", {"prompt_recovery"}),
        ("import prompt_recovery.data as d", {"prompt_recovery.data"}),
        ("def f():\n    from ... import metric", {"prompt_recovery.metric"}),
        ("from ...engineering import x", {"prompt_recovery.engineering.x"}),
    ],
)
def test_a_look_out_of_the_box_is_seen(source, found):
    assert reaches_out_of_the_box(source, f"{BOX}.kernels") == found


def test_nothing_outside_the_engine_uses_more_of_it_than_it_offers():
    places = [LIBRARY, *(ROOT / name for name in ("kaggle_upload", "demo", "notebooks"))]
    files = [path for place in places for path in sorted(place.glob("*.py"))]
    assert len(files) > 25 and {path.parent for path in files} == {*places}
    assert len(engine.__all__) == len(set(engine.__all__)) > 10
    assert all(hasattr(engine, name) for name in engine.__all__)
    found, users = {}, 0
    for path in files:
        text = path.read_text()
        if "engine" in text:
            users += BOX in text or "import engine" in text or ", engine" in text
        reached = reaches_into_the_box(text, package_of(path), set(engine.__all__))
        found |= {str(path.relative_to(ROOT)): reached} if reached else {}
    assert users > 8 and found == {}


def test_the_engine_uses_nothing_outside_of_itself():
    files = sorted(INSIDE.rglob("*.py"))
    assert len(files) > 12 and {"forward.py", "sm75.py", "__init__.py"} <= {p.name for p in files}
    found = {
        path.name: reaches_out_of_the_box(path.read_text(), package_of(path)) for path in files
    }
    assert {name: reached for name, reached in found.items() if reached} == {}


MODULES = ["submission", "training", "inputs", "engine"]
MODULES += [f"engine.kernels.{name}" for name in ("dispatch", "sm75", "experts_training")]
IMPORTS = """
import importlib, json, sys
sys.path[1:1] = json.loads(sys.argv[2])
sys.path.insert(0, sys.argv[1])
names = ["prompt_recovery", *(f"prompt_recovery.{name}" for name in json.loads(sys.argv[3]))]
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""


def test_the_wheel_holds_every_module_and_imports_without_the_repository(tmp_path):
    """-I and -S: no PYTHONPATH, no working folder, and no .pth file, by which the repository is
    installed here."""
    unpacked, elsewhere = tmp_path / "unpacked", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheels.build_library(tmp_path)) as wheel:
        wheel.extractall(unpacked)
        names = set(wheel.namelist())
    sources = {str(path.relative_to(ROOT)) for path in LIBRARY.rglob("*.py")}
    assert len(sources) > 25 and sources <= names
    held = {name for name in names if name.endswith(".py")}
    assert held == sources  # and nothing else: no tests, no publisher
    elsewhere.mkdir()
    modules = [*MODULES]
    try:
        import triton  # noqa: F401
    except ImportError:
        modules.remove("engine.kernels.experts_training")
    else:
        modules += ["engine.kernels.experts_decode", "engine.kernels.decode_step"]
    paths = sysconfig.get_paths()
    passed = json.dumps(sorted({paths["purelib"], paths["platlib"]}))
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        IMPORTS,
        str(unpacked),
        passed,
        json.dumps(modules),
    ]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [Path(name) for name in json.loads(done.stdout.splitlines()[-1])]
    assert len(files) == 1 + len(modules)
    assert all(path.is_relative_to(unpacked / "prompt_recovery") for path in files)
