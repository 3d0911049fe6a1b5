"""Base, wheels, notebook and submission against the stand-in server; what is checked before
anything is sent."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from kaggle_cases import BASE, DATASET, HANDLE, publish_base, push, submit
from kaggle_stand_in import USER, cut_after, error_200, lost_reply, status

from kaggle_upload import cli, stage, wheels
from kaggle_upload.handles import UploadError
from kaggle_upload.publish import Publish
from kaggle_upload.remote import RemoteDataset


def test_base_goes_on_where_it_was_cut(case, base, monkeypatch):
    expected = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "README.md"}
    monkeypatch.setattr(cli, "transfer_timeout", lambda timeout, size: timeout)
    before = sorted(case.tmp.rglob("*"))
    code, out, _ = case.run("base", base, "--to", BASE, "--dry-run")
    assert code == 0 and all(name in out for name in expected) and case.server.requests == []
    assert sorted(case.tmp.rglob("*")) == before and base.is_relative_to(case.tmp)
    # every upload until one breaks for good: files come in the folder's order, whichever that is
    case.server.fail("PUT", cut_after(3, dead=True))
    code, _, err = publish_base(case, base)
    assert code == 1 and "error: " in err and case.server.models[f"{USER}/recovery"] == {}
    staged = next((base.parent / ".kaggle_upload").glob("*/files"))
    assert {path.name for path in staged.iterdir()} >= expected.keys()
    shard = "model-00001-of-00002.safetensors"
    assert (staged / shard).samefile(base / shard)  # no second copy of 24 GB
    case.server.dead = False
    case.server.requests.clear()
    code, out, _ = publish_base(case, base)
    assert code == 0 and out.splitlines()[-1] == f"{BASE}/1" and "not sent: README.md" in out
    assert case.server.models[f"{USER}/recovery"]["base"] == [expected]
    spans = [span for name, span in case.server.requests if name == "PUT"]
    assert any(span.startswith("bytes 3-") for span in spans), spans
    assert case.server.asked("StartBlobUpload") == len(expected) - 1
    assert case.server.asked("DownloadModelInstanceVersion") == 0
    assert pd.read_csv(case.tmp / "versions.csv")["base"].to_list() == ["org/base"]
    code, out, _ = publish_base(case, base)
    assert code == 0 and "Unchanged" in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "lacks ['model-00002"),
        (
            lambda d: shutil.copy(d / "model-00001-of-00002.safetensors", d / "model.safetensors"),
            "has besides",
        ),
        (
            lambda d: (d / "model-00001-of-00002.safetensors").write_bytes(
                b"\x08\0\0\0\0\0\0\0notjson!"
            ),
            "not a whole safetensors",
        ),
        (
            lambda d: (d / "model-00001-of-00002.safetensors").open("ab").write(b"x"),
            "not a whole safetensors",
        ),
        (lambda d: (d / "tokenizer.model").unlink(), "neither tokenizer.json"),
        (lambda d: (d / "config.json").write_text('{"model_type": "mixtral"}'), "not in 4 bits"),
        (
            lambda d: (d / "config.json").write_text(
                '{"quantization_config": {"quant_method": "gptq"}}'
            ),
            "gptq",
        ),
        (lambda d: (d / "config.json").write_text("{"), "error"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "access_token").write_text("x"), "may hold credentials"),
        (lambda d: (d / "link").symlink_to("/etc/hostname"), "is a symlink"),
    ],
)
def test_base_that_is_not_whole_is_refused(case, base, damage, message):
    damage(base)
    code, _, err = publish_base(case, base)
    assert code == 1 and message in err and case.server.requests == []


def test_dataset_first_next_unchanged_lost(case, tmp_path):
    """What `wheels` does once the wheels are collected: the same path as for models, on a
    dataset."""

    def publish(text: bytes, verify: str = "list") -> int:
        wheel = tmp_path / "source" / "a-1-py3-none-any.whl"
        wheel.parent.mkdir(exist_ok=True)
        wheel.write_bytes(text)
        handle = wheels_handle()
        remote, metadata = RemoteDataset(handle, 30), stage.dataset_metadata(handle)
        content = stage.read([wheel])
        return Publish(
            remote, content, metadata, "n", tmp_path / "work", tmp_path / "v.csv", verify
        ).run()

    name = "a-1-py3-none-any.whl"
    assert publish(b"one") == 1 and publish(b"two", "download") == 2 and publish(b"two") == 2
    assert (
        case.server.datasets == {DATASET: [{name: b"one"}, {name: b"two"}]}
        and not case.server.public
    )
    case.server.fail("CreateDatasetVersion", lost_reply)
    assert publish(b"six") == 3 and case.server.datasets[DATASET][2:] == [{name: b"six"}] * 2
    case.server.fail("CreateDatasetVersion", status(500))
    with pytest.raises(UploadError, match="failed"):
        publish(b"ten")
    assert len(case.server.datasets[DATASET]) == 4 and publish(b"ten") == 5
    case.server.public.add(DATASET)
    with pytest.raises(UploadError, match="is public"):
        publish(b"new")


def wheels_handle():
    from kaggle_upload.handles import Page

    return Page.parse(DATASET, "dataset")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a-1.0-cp312-cp312-manylinux_2_28_x86_64.whl", None),
        ("a-1.0-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", None),
        ("a-1.0-cp39-abi3-manylinux_2_34_x86_64.whl", None),
        ("a-1.0-py3-none-any.whl", None),
        ("a-1.0-py3-none-manylinux_2_24_x86_64.whl", None),
        ("a-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", "does not install"),
        ("a-1.0-cp313-cp313-manylinux_2_28_x86_64.whl", "does not install"),
        ("a-1.0-cp312-cp312-manylinux_2_28_aarch64.whl", "does not install"),
        ("a-1.0-cp312-cp312-manylinux_2_39_x86_64.whl", "does not install"),
        ("a-1.0-cp312-cp312-musllinux_1_2_x86_64.whl", "does not install"),
        ("a-1.0-cp312-cp312-win_amd64.whl", "does not install"),
        ("torch-2.13.0-py3-none-any.whl", "must not be sent"),
        ("nvidia_cublas_cu12-12.1-py3-none-manylinux1_x86_64.whl", "must not be sent"),
        ("nonsense.whl", "not a wheel"),
    ],
)
def test_wheel_tags(tmp_path, name, message):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("a.py", "")
    if message is None:
        return wheels.check_wheel(tmp_path / name)
    with pytest.raises(UploadError, match=message):
        wheels.check_wheel(tmp_path / name)


def test_damaged_wheel_and_the_list(tmp_path, monkeypatch):
    path = tmp_path / "a-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", "x" * 500)
    path.write_bytes(path.read_bytes().replace(b"xxxx", b"xxxy", 1))
    with pytest.raises(UploadError, match="damaged"):
        wheels.check_wheel(path)
    path.write_bytes(b"short")
    with pytest.raises(UploadError, match="not a wheel"):
        wheels.check_wheel(path)
    pins = wheels.requirements()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {"transformers", "peft", "bitsandbytes", "tokenizers", "sentencepiece"} <= {
        pin.split("==")[0] for pin in pins
    }
    assert all("==" in pin for pin in pins) and not any(
        pin.startswith(("torch", "nvidia")) for pin in pins
    )
    assert all(pin in lines for pin in pins if pin.split("==")[0] in "transformers peft accelerate")
    for line, message in (("unpinned", "does not pin"), ("torch", "Kaggle's own")):
        (tmp_path / "wheels.txt").write_text(line)
        monkeypatch.setattr(wheels, "HERE", tmp_path)
        with pytest.raises(UploadError, match=message):
            wheels.requirements()


def test_wheels_are_collected_with_ours(case, sources, tmp_path, monkeypatch):
    """With PyPI, as everything is installed from there."""
    (tmp_path / "wheels.txt").write_text("h11==0.16.0  # small\n")
    shutil.copy(ROOT / "kaggle_upload" / "dataset-metadata.json", tmp_path)
    for module in (wheels, stage):
        monkeypatch.setattr(module, "HERE", tmp_path)
    before = sorted(case.tmp.rglob("*"))
    code, out, err = case.run("wheels", "--to", DATASET, "--dry-run")
    assert code == 0, err
    assert "h11-0.16.0-py3-none-any.whl" in out and "prompt_recovery-" in out
    assert case.server.requests == [] and sorted(case.tmp.rglob("*")) == before
    (tmp_path / "wheels.txt").write_text("h11==0.0.999\n")
    code, _, err = case.run("wheels", "--to", DATASET, "--dry-run")
    assert code == 1 and "`pip download` failed" in err and "h11" in err


def test_sources_in_the_template_stay(case, tmp_path, monkeypatch):
    template = json.loads((ROOT / "kaggle_upload" / "kernel-metadata.json").read_text())
    (tmp_path / "kernel-metadata.json").write_text(
        json.dumps(template | {"dataset_sources": [f"{USER}/encoder"]})
    )
    monkeypatch.setattr(stage, "HERE", tmp_path)
    assert push(case)[0] == 0
    assert case.server.kernels[f"{USER}/recover-prompts"][0]["datasetDataSources"] == [
        DATASET,
        f"{USER}/encoder",
    ]


def test_notebook_is_pushed_pinned_and_read_back(case, tmp_path):
    code, out, _ = push(case, "--dry-run")
    assert code == 0 and '"enable_internet": false' in out and case.server.requests == []
    code, out, _ = push(case)
    assert code == 0 and out.splitlines()[-1] == f"{USER}/recover-prompts/1"
    held = case.server.kernels[f"{USER}/recover-prompts"][0]
    assert (
        held["isPrivate"] is True
        and held["enableInternet"] is False
        and held["machineShape"] == "NvidiaTeslaT4"
    )
    assert held["modelDataSources"] == [f"{HANDLE}/3", f"{BASE}/1"]
    assert held["datasetDataSources"] == [DATASET] and held["competitionDataSources"] == [
        "llm-prompts"
    ]
    assert "kaggle_upload" not in held["text"] and len(json.loads(held["text"])["cells"]) > 5
    case.server.refused_sources = {f"{HANDLE}/3", "llm-prompts"}
    code, _, err = push(case)
    assert (
        code == 1
        and f"model {HANDLE}/3 was not attached" in err
        and "competition llm-prompts was not" in err
    )
    assert f"{USER}/recover-prompts/2 was pushed" in err and BASE not in err
    for fault in (status(403, "Permission denied"), error_200("Notebook not found"), lost_reply):
        case.server.fail("SaveKernel", fault)
        code, _, err = push(case)
        assert code == 1 and "look at" in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--adapter", HANDLE], "N the version number"),
        (["--adapter", f"{HANDLE}/latest"], "N the version number"),
        (["--base", f"{BASE}/0"], "N the version number"),
        (["--wheels", "someone"], "must have the form"),
        (["--wheels", "someone/short"], "needs 6 to 50"),
        (["--competition", "a/b"], "is not a slug"),
        (["--to", f"{USER}/abc"], "needs 5 to 50"),
        (["--file", "missing.ipynb"], "missing.ipynb"),
    ],
)
def test_notebook_that_is_refused(case, wrong, message):
    code, _, err = push(case, *wrong)
    assert code == 1 and message in err and case.server.requests == []


def test_submit(case):
    assert submit(case, "--dry-run")[0] == 0 and case.server.requests == []
    code, out, _ = submit(case)
    assert (
        code == 0
        and out.startswith("5 submissions to llm-prompts remain")
        and "submission 100" in out
    )
    assert (
        case.server.submissions[0]["version"] == 2
        and case.server.submissions[0]["fileName"] == "submission.csv"
    )
    for fault in (status(404, "Not found"), status(500)):
        case.server.fail("CreateCodeSubmission", fault)
        code, _, err = submit(case)
        assert code == 1 and "No new submission" in err and len(case.server.submissions) == 1
    case.server.fail("CreateCodeSubmission", lost_reply)
    code, out, _ = submit(case)
    assert code == 0 and "submission 101" in out and len(case.server.submissions) == 2
    for state in ("RUNNING", "ERROR"):
        case.server.kernel_status = state
        code, _, err = submit(case)
        assert code == 1 and state in err
    case.server.allowed_submissions = 0
    code, _, err = submit(case)
    assert (
        code == 1
        and "No submission to llm-prompts remains" in err
        and len(case.server.submissions) == 2
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model-metadata.json", {"description": "ranks r<16"}, "garbles"),
        ("model-metadata.json", {"isPrivate": False}, "isPrivate must be true"),
        ("model-metadata.json", {"isPrivate": "true"}, "isPrivate must be true"),
        ("model-instance-metadata.json", {"licenseName": "Apache"}, "is not one of Kaggle's"),
        ("model-instance-metadata.json", {"usage": "a & b"}, "garbles"),
        ("dataset-metadata.json", {"subtitle": "short"}, "it needs 20 to 80"),
        ("dataset-metadata.json", {"title": "x" * 51}, "it needs 6 to 50"),
        ("dataset-metadata.json", {"licenses": []}, "exactly one"),
        ("dataset-metadata.json", {"licenses": [{"name": "Apache 2.0"}]}, "is not one of Kaggle's"),
        ("kernel-metadata.json", {"title": "Another title"}, "must give the slug"),
    ],
)
def test_templates_are_checked(case, tmp_path, monkeypatch, file, change, message):
    for path in stage.HERE.glob("*-metadata.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | change))
    monkeypatch.setattr(stage, "HERE", tmp_path)
    if file == "kernel-metadata.json":
        code, _, err = push(case)
    elif file == "dataset-metadata.json":
        code, _, err = case.run("wheels", "--to", DATASET)
    else:
        case.write(1)
        code, _, err = case.publish()
    assert code == 1 and message in err and file in err and case.server.requests == []


def test_nothing_to_send_is_refused(tmp_path):
    """The program would publish an empty version."""
    with pytest.raises(UploadError, match="nothing to send"):
        stage.read([])
    with pytest.raises(UploadError, match="is not a folder"):
        stage.pick(tmp_path / "missing", ["*"])


def test_templates_pass_the_program_s_html_cleaner(case):
    """The texts arrive as they stand in the templates."""
    case.write(1)
    assert case.publish("--verify", "list")[0] == 0
    sent = dict(case.server.requests)
    wanted = json.loads((stage.HERE / "model-metadata.json").read_text())["description"]
    assert (
        sent["CreateModel"]["description"] == wanted and sent["CreateModel"]["title"] == "recovery"
    )
    body, template = (
        sent["CreateModelInstance"]["body"],
        json.loads((stage.HERE / "model-instance-metadata.json").read_text()),
    )
    assert body["usage"] == template["usage"] and body["overview"] == template["overview"]
    assert (
        body["licenseName"] == "Apache 2.0" and body["framework"] == "MODEL_FRAMEWORK_TRANSFORMERS"
    )


def test_adapter_with_library(case, sources, tmp_path):
    """The wheel travels along, built without a trace in the repository; the same sources again are
    unchanged content."""
    before, files = sorted(sources.rglob("*")), case.write(1)
    code, out, _ = case.publish("--with-library")
    assert code == 0 and len(case.versions[0]) == 3 and sorted(sources.rglob("*")) == before
    wheel = next(name for name in case.versions[0] if name.endswith(".whl"))
    assert {name: data for name, data in case.versions[0].items() if name != wheel} == files
    (tmp_path / wheel).write_bytes(case.versions[0][wheel])
    wheels.check_wheel(tmp_path / wheel)
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    data = ["prompt_recovery/refusals.toml", "prompt_recovery/t5_pieces.model"]
    assert {"prompt_recovery/adapter.py", *data} <= set(names)
    assert not any(name.startswith("kaggle_upload") for name in names)
    code, out, _ = case.publish("--with-library")
    assert code == 0 and "Unchanged" in out


def test_command_line():
    run = subprocess.run(
        [sys.executable, "-m", "kaggle_upload", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and all(
        name in run.stdout for name in ("adapter", "base", "wheels", "notebook", "submit")
    )
    run = subprocess.run(
        [sys.executable, "-m", "kaggle_upload", "adapter", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "--to" in run.stderr


def test_the_library_does_not_import_the_publisher():
    for path in (ROOT / "prompt_recovery").glob("*.py"):
        assert not re.search(r"^\s*(from|import) kaggle_upload", path.read_text(), re.M)
    for path in Path(stage.HERE).glob("*.py"):
        assert not re.search(r"^\s*(from|import) kaggle(sdk)?\b(?!_)", path.read_text(), re.M)
