"""The wheels for Kaggle's Pythons: whole together with its image, and what the notebook picks."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile

import jupytext
import pytest
from conftest import ROOT
from kaggle_cases import DATASET, OUTSIDE
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kaggle_upload import stage, wheels
from kaggle_upload.handles import UploadError

IMAGE = ROOT / "tests" / "kaggle_upload" / "kaggle_image.txt"
# in every Kaggle image, of versions that the list does not have
UNLISTED = set(
    "filelock fsspec matplotlib packaging psutil pyyaml scikit-learn scipy tensorboard tqdm".split()
)


def resolved(python):
    """What pip would take from PyPI for that Python and Kaggle's machines: name -> metadata."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--report", "-", "--target", "unused", *wheels.target(python)]
    done = subprocess.run(
        [*command, *wheels.requirements()], capture_output=True, text=True, env=OUTSIDE
    )
    assert done.returncode == 0, done.stderr
    found = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    return {canonicalize_name(each["name"]): each for each in found}


def unmet(found, python):
    """What the wheels and ours want and neither they nor the image have."""
    lines = [line.split("#")[0].strip() for line in IMAGE.read_text().splitlines()]
    have = dict(line.split("==") for line in lines if "==" in line)
    have = {canonicalize_name(name): version for name, version in have.items()}
    have |= {name: metadata["version"] for name, metadata in found.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wants = {name: metadata.get("requires_dist", []) for name, metadata in found.items()}
    wants["prompt-recovery"] = project["dependencies"]
    environment = {
        **{"python_version": python, "python_full_version": f"{python}.0", "extra": ""},
        **{"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    }
    open_ends = []
    for name, texts in wants.items():
        for wanted in map(Requirement, texts):
            if wanted.marker and not wanted.marker.evaluate(environment):
                continue
            version = have.get(key := canonicalize_name(wanted.name))
            if version is None and key in UNLISTED:
                continue
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                open_ends.append(f"{name} wants {wanted}, there is {version}")
    return open_ends


@pytest.mark.parametrize("python", wheels.PYTHONS)
def test_wheels_and_image_have_all_that_the_wheels_want(python):
    """With PyPI. The image's versions are those of its Python 3.12; for 3.13 no list is known yet,
    so that this shows its tags and what the wheels want of a 3.12 image."""
    found = resolved(python)
    assert len(found) == len(wheels.requirements())
    assert unmet(found, python) == []
    # without the two that only others want, the ends are seen to be open
    for name in ("click", "typing-extensions"):
        del found[name]
    assert sorted(line.split(" wants ")[0] for line in unmet(found, python)) == [
        "anyio",
        "huggingface-hub",
    ]


def test_our_own_wheel_installs_on_both(tmp_path, sources):
    wheel = wheels.build_library(tmp_path)
    wheels.check_wheel(wheel, wheels.PYTHONS)
    metadata = zipfile.ZipFile(wheel)
    text = next(metadata.read(name) for name in metadata.namelist() if name.endswith("METADATA"))
    line = next(x for x in text.decode().splitlines() if x.startswith("Requires-Python: "))
    wanted = Requirement("python " + line.partition(": ")[2]).specifier
    assert all(f"{python}.1" in wanted for python in wheels.PYTHONS)


@pytest.mark.parametrize("python", wheels.PYTHONS)
def test_a_wheel_serves_the_pythons_of_its_tags(tmp_path, python):
    other = next(each for each in wheels.PYTHONS if each != python)
    tag = f"cp{python.replace('.', '')}"
    path = tmp_path / f"a-1.0-{tag}-{tag}-manylinux_2_28_x86_64.whl"
    zipfile.ZipFile(path, "w").writestr("a.py", "")
    wheels.check_wheel(path, [python])
    wheels.check_wheel(path, wheels.PYTHONS)
    with pytest.raises(UploadError, match=f"does not install on Kaggle's Python {other}"):
        wheels.check_wheel(path, [other])


@pytest.mark.parametrize(
    ("more", "tags"), [([], {"cp312", "cp313"}), (["--python", "3.13"], {"cp313"})]
)
def test_wheels_of_both_pythons_go_into_one_dataset(
    case, sources, tmp_path, monkeypatch, more, tags
):  # fmt: skip
    """With PyPI; regex has a wheel for each Python, h11 one for all."""
    (tmp_path / "wheels.txt").write_text("h11==0.16.0\nregex==2026.11.15\n")
    (tmp_path / "dataset-metadata.json").write_bytes(
        (stage.HERE / "dataset-metadata.json").read_bytes()
    )
    for module in (wheels, stage):
        monkeypatch.setattr(module, "HERE", tmp_path)
    code, out, err = case.run("wheels", "--to", DATASET, "--dry-run", *more)
    assert code == 0, err
    names = [line.split()[-1] for line in out.splitlines() if line.endswith(".whl")]
    assert {name.split("-")[2] for name in names if name.startswith("regex")} == tags
    assert len(names) == len(tags) + 2


# what the notebook does with them

HERE = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def write_wheel(folder, name, tag):
    info = f"{name}-1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"TAG = {tag!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def install(tmp_path, before=""):
    """Run the notebook's cell that installs, into a folder of its own."""
    cells = jupytext.read(ROOT / "notebooks" / "submission.py").cells
    (cell,) = [each.source for each in cells if "pip" in each.source and each.cell_type == "code"]
    program = f"input_dir = {str(tmp_path / 'input')!r}\n{before}\n{cell}"
    env = os.environ | {"PIP_TARGET": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


def test_the_notebook_picks_the_wheels_of_its_python(tmp_path):
    folder = tmp_path / "input" / "datasets" / "me" / "wheels"
    for name, tag in (("prompt_recovery", "py3"), ("a_b", HERE), ("a_b", "cp399")):
        write_wheel(folder, name, tag)
    code, out, err = install(tmp_path)
    assert code == 0 and "installing 3 wheels" in out, err
    assert HERE in (tmp_path / "installed" / "a_b.py").read_text()


def test_wheels_of_another_python_are_one_line(tmp_path):
    folder = tmp_path / "input" / "wheels"
    for name, tag in (("prompt_recovery", "py3"), ("a_b", "cp399")):
        write_wheel(folder, name, tag)
    code, _, err = install(tmp_path)
    version = sys.version.split()[0]
    assert code == 1 and err[-1].startswith(
        f"ImportError: The wheels in {folder} can't be installed"
    )
    assert version in err[-1] and "a_b==1.0" in err[-1]


def test_where_no_wheels_are_attached_the_notebook_says_which(tmp_path):
    (tmp_path / "input").mkdir()
    code, _, err = install(tmp_path, "import sys; sys.modules['prompt_recovery'] = None")
    assert (
        code == 1
        and "attach your dataset of wheels, such as OWNER/prompt-recovery-wheels" in err[-1]
    )
    code, _, err = install(tmp_path)
    assert code == 0, err
