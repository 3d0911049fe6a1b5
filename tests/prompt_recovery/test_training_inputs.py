"""What a training finds under /kaggle/input: base, encoder, rows, and an earlier session's output,
which is copied and never written to."""

import gzip
import json
import os
import shutil

import jupytext
import pandas as pd
import pytest
from conftest import ROOT, TINY

from prompt_recovery import metric, run_folder, run_lock, tables, training_inputs
from prompt_recovery.inputs import InputError
from prompt_recovery.recipe import Recipe

ROWS = pd.DataFrame(
    [["a", "b", "c"], ["d", "e", "f"]],
    columns=["original_text", "rewritten_text", "rewrite_prompt"],
)


@pytest.fixture
def mounts(tmp_path):
    """As Kaggle mounts them: a model, two datasets, the wheels, a competition."""
    root = tmp_path / "input"
    for place, source in (
        ("models/me/recovery/transformers/base/1", TINY),
        ("datasets/me/encoder/all-MiniLM-L6-v2", metric.minilm_dir()),
    ):
        (root / place).parent.mkdir(parents=True)
        (root / place).symlink_to(source)
    (root / "datasets/me/rows/more").mkdir(parents=True)
    ROWS.to_csv(root / "datasets/me/rows/one.csv", index=False)
    ROWS.to_json(root / "datasets/me/rows/more/two.jsonl", orient="records", lines=True)
    (root / "datasets/me/rows/notes.csv").write_text("who,what\nme,that\n")
    (root / "datasets/me/rows/README.json").write_text('{\n "original_text": 1}')
    (root / "competitions/c").mkdir(parents=True)
    ROWS[["original_text", "rewritten_text"]].to_csv(root / "competitions/c/test.csv")
    (root / "datasets/me/wheels").mkdir()
    (root / "datasets/me/wheels/a-1-py3-none-any.whl").write_bytes(b"PK")
    return root


def session(root, slug="train-recover-prompts", step=8, whole=True):
    """An output as a session of the notebook leaves it."""
    folder = root / "notebooks/me" / slug / "outputs/train"
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (folder / "checkpoints/settings.json").write_text("{}")
    if whole:
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
            (checkpoint / name).write_text(name)
    ROWS.to_csv(folder / "split.csv", index=False)
    ROWS.to_csv(folder / "rows_of_mine.csv", index=False)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    return folder


def complete(root, **settings):
    recipe, earlier = training_inputs.complete(Recipe(input_dir=root, **settings))
    return training_inputs.with_encoder(recipe), earlier


def test_all_is_found_however_deep(mounts, capsys):
    recipe, earlier = complete(mounts)
    assert recipe.model_dir == str(mounts / "models/me/recovery/transformers/base/1")
    assert recipe.encoder_dir == str(mounts / "datasets/me/encoder/all-MiniLM-L6-v2")
    assert recipe.train_csv == tuple(
        str(mounts / "datasets/me/rows" / name) for name in ("more/two.jsonl", "one.csv")
    )
    assert earlier is None and recipe.resume is False and recipe.time_budget_hours == 11.5
    said = capsys.readouterr().out
    assert "one.csv" in said and "two.jsonl" in said and "11.5 h" in said


def test_what_is_given_is_taken_and_elsewhere_there_is_no_limit(mounts, tmp_path):
    given = dict(model_dir="m", train_csv="r.csv", encoder_dir="e", time_budget_hours=2)
    recipe, _ = complete(mounts, **given)
    assert (recipe.model_dir, recipe.train_csv, recipe.encoder_dir) == ("m", ("r.csv",), "e")
    assert recipe.time_budget_hours == 2
    recipe, earlier = complete(tmp_path / "none", **given | dict(time_budget_hours=None))
    assert recipe.time_budget_hours is None and earlier is None and recipe.resume is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: shutil.rmtree(m / "datasets/me/rows"), "no file under .* has the columns"),
        (lambda m: shutil.rmtree(m / "models"), r"model_dir is None and 0 places(.|\n)*nothing"),
        (
            lambda m: (m / "models/second").symlink_to(shutil.copytree(TINY, m.parent / "two")),
            r"model_dir is None and 2 places(.|\n)*second",
        ),
        (
            lambda m: (m / "datasets/me/encoder/all-MiniLM-L6-v2").unlink(),
            "encoder_dir is None and 0 places under .* hold a sentence encoder",
        ),
    ],
)
def test_nothing_or_several_is_an_error_that_says_so(mounts, change, message):
    change(mounts)
    with pytest.raises(InputError, match=message):
        complete(mounts)


def test_an_earlier_session_is_gone_on_from_and_gives_no_rows(mounts, capsys):
    folder = session(mounts)
    (folder / "earlier-1/checkpoints").mkdir(parents=True)
    (folder / "earlier-1/checkpoints/settings.json").write_text("{}")
    recipe, earlier = complete(mounts)
    assert earlier == folder and recipe.resume is True and len(recipe.train_csv) == 2
    assert "goes on from its checkpoint of step 8" in capsys.readouterr().out
    assert complete(mounts, resume=True)[1] == folder
    recipe, earlier = complete(mounts, resume=False)
    assert earlier is None and recipe.resume is False
    assert "not used, since resume=False" in capsys.readouterr().out
    other = session(mounts, "another")
    with pytest.raises(InputError, match=r"2 places(.|\n)*another(.|\n)*resume=False"):
        complete(mounts)
    shutil.rmtree(other)
    session(mounts, "killed-early", whole=False)
    assert complete(mounts)[1] == folder and "no whole checkpoint" in capsys.readouterr().out
    shutil.rmtree(folder)
    capsys.readouterr()
    assert complete(mounts, resume=True, output_dir=mounts / "none")[1] is None
    assert "holds a run: a new one" in capsys.readouterr().out
    assert complete(mounts) == (complete(mounts, resume=False)[0], None)


def test_the_copy_can_be_written_to_and_the_mount_stays_as_it_is(mounts, tmp_path, capsys):
    folder = session(mounts)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat() for path in folder.rglob("*")}
    output = tmp_path / "working"
    try:
        run_folder.begin(output, True, folder)
        assert {path: path.stat().st_mtime_ns for path in before} == {
            path: stat.st_mtime_ns for path, stat in before.items()
        }
    finally:
        run_lock.release(output)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
    assert "goes on from step 8" in capsys.readouterr().out
    copied = {path.relative_to(output): path for path in output.rglob("*")}
    assert {str(name) for name in copied} == {
        "split.csv",
        "checkpoints",
        "checkpoints/settings.json",
        "checkpoints/checkpoint-8",
        *(
            f"checkpoints/checkpoint-8/{name}"
            for name in (
                "trainer_state.json",
                "adapter_model.safetensors",
                "optimizer.pt",
                "scheduler.pt",
            )
        ),
    }
    assert all(path.stat().st_mode & 0o200 for path in copied.values())


def test_an_output_dir_that_is_further_is_kept_and_half_a_copy_is_none(mounts, tmp_path):
    folder, output = session(mounts), tmp_path / "working"
    partial = output / "checkpoints.partial"  # killed while it copied
    partial.mkdir(parents=True)
    (partial / "left").touch()
    (output / "checkpoints/mine").mkdir(parents=True)
    run_folder.begin(output, True, folder)
    run_lock.release(output)
    assert not partial.exists() and not (output / "checkpoints/left").exists()
    assert (output / "earlier-1/checkpoints/mine").is_dir()  # nobody's files are removed
    shutil.copytree(output / "checkpoints/checkpoint-8", output / "checkpoints/checkpoint-12")
    state = output / "checkpoints/checkpoint-12/trainer_state.json"
    state.write_text('{"global_step": 12}')
    run_folder.begin(output, True, folder)
    run_lock.release(output)
    assert run_folder.last_checkpoint(output / "checkpoints").name == "checkpoint-12"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", lambda p: ROWS.to_csv(p, index=False)),
        ("a.tsv", lambda p: ROWS.to_csv(p, index=False, sep="\t")),
        ("a.csv", lambda p: ROWS.to_csv(p, index=False, sep=";", encoding="utf-8-sig")),
        ("a.csv", lambda p: ROWS.rename(columns=str.upper).to_csv(p)),
        ("a.csv", lambda p: p.write_text("sep=;\n" + ROWS.to_csv(index=False, sep=";"))),
        ("a.csv.gz", lambda p: p.write_bytes(gzip.compress(ROWS.to_csv().encode()))),
        ("a.csv.zip", lambda p: ROWS.to_csv(p, compression="zip")),
        ("a.parquet", lambda p: ROWS.to_parquet(p)),
        ("a.jsonl", lambda p: ROWS.to_json(p, orient="records", lines=True)),
        ("a.json", lambda p: ROWS.to_json(p, orient="records", indent=1)),
        (
            "a.jsonl",  # a first row that is longer than what is read of a file
            lambda p: ROWS.assign(original_text="x" * 10**5).to_json(
                p, orient="records", lines=True
            ),
        ),
        # the header tells; what is wrong behind it is said when the file is read
        ("a.csv", lambda p: p.write_text(ROWS.to_csv(index=False) + 'x,"y\n')),
        ("a.csv", lambda p: p.write_bytes(ROWS.to_csv(index=False).encode() + b"\xff,\xfe,a\n")),
    ],
)
def test_rows_are_known_by_their_columns_in_every_form_that_is_read(tmp_path, name, write):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    write(tmp_path / name)
    assert set(ROWS.columns) <= set(tables.columns_of(tmp_path / name))


@pytest.mark.parametrize("text", ["", "{", "[", "[1, 2]", '"a', "a;b", "[]", "{}\n", "\x00"])
def test_what_is_no_table_has_no_columns_of_rows(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert not set(ROWS.columns) & set(tables.columns_of(tmp_path / "a.csv"))


def test_both_notebooks_install_the_wheels_by_the_same_cell():
    cells = {}
    for name in ("train", "submission"):
        found = jupytext.read(ROOT / "notebooks" / f"{name}.py").cells
        (cells[name],) = [cell.source for cell in found if "--find-links" in cell.source]
    assert cells["train"] == cells["submission"]


def test_nothing_under_input_dir_is_written_to(mounts):
    before = sorted(os.walk(mounts))
    complete(mounts)
    assert sorted(os.walk(mounts)) == before
