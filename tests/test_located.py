"""A notebook's relative paths: the same from the repository's root and from an editor in
notebooks/."""

import papermill
import pytest
from conftest import ROOT

from prompt_recovery.data import DataError, read_rows
from prompt_recovery.files import located
from prompt_recovery.metric import load_encoder
from prompt_recovery.recipe import Recipe, SubmissionSettings


@pytest.fixture
def repository(tmp_path):
    for name in ("notebooks", "demo", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo" / "rows.csv").write_text("x")
    (tmp_path / "notebooks" / "own.csv").write_text("x")
    return tmp_path


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_settings_mean_the_same_from_both_folders(repository, monkeypatch, folder):
    monkeypatch.chdir(repository / folder)
    rows = ["demo/rows.csv", "demo/none.csv"]
    recipe = Recipe(train_csv=rows, output_dir="outputs/train", model_dir="/data/mixtral")
    for path, wanted in zip(
        (*recipe.train_csv, recipe.output_dir), (*rows, "outputs/train"), strict=True
    ):
        assert (repository / folder / path).resolve() == repository / wanted
    assert recipe.model_dir == "/data/mixtral"
    settings = SubmissionSettings(test_csv="demo/rows.csv")
    assert (repository / folder / settings.test_csv).resolve() == repository / "demo" / "rows.csv"
    assert settings.adapter_dir is None and settings.input_dir == "/kaggle/input"
    assert Recipe(**{"train_csv": recipe.train_csv}).train_csv == recipe.train_csv


def test_what_lies_beside_the_notebook_or_is_given_from_there_stays(repository, monkeypatch):
    monkeypatch.chdir(repository / "notebooks")
    for path in ("own.csv", "../demo/rows.csv", "../data/new"):
        assert located(path) == path
    monkeypatch.setenv("HOME", str(repository))
    assert located("~/demo/rows.csv") == str(repository / "demo" / "rows.csv")


def test_what_exists_nowhere_is_shown_absolute(repository, monkeypatch):
    monkeypatch.chdir(repository)
    for found, error in ((read_rows, DataError), (load_encoder, FileNotFoundError)):
        with pytest.raises(error, match=f"{repository}/data/none"):
            found("data/none")


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_the_notebook_that_compares_finds_its_defaults_from_both_folders(tmp_path, folder):
    """The base and the rows of the repository; train names neither, submission finds its inputs."""
    papermill.execute_notebook(
        ROOT / "notebooks" / "compare.ipynb",
        tmp_path / "out.ipynb",
        parameters=dict(
            output_dir=str(tmp_path / "out"),
            grid=[{"max_steps": 0, "train_csv": "demo/rows.csv"}],
            shared={"max_new_tokens": 2},
            eval_fraction=0.02,
        ),
        cwd=ROOT / folder,
        kernel_name="python3",
        progress_bar=False,
    )
    assert (tmp_path / "out" / "comparison.csv").is_file()
