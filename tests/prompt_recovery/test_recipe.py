"""Settings: read as what they plainly are, or refused with value, rule and remedy before anything
loads."""

import ast
import dataclasses

import jupytext
import numpy as np
import papermill
import pytest
from conftest import ROOT, TINY

from prompt_recovery.comparison_grid import ComparisonError, make_cells
from prompt_recovery.recipe import Cell, Format, Grid, Recipe, SubmissionSettings
from prompt_recovery.settings import SettingError

NOTEBOOKS = {"train": Recipe, "submission": SubmissionSettings, "compare": Grid}
SEVERAL = dict(answers_per_row=2, combine="join")
NAN, INF = float("nan"), float("inf")


def parameters(name):
    """The parameter cell of a notebook as names and values."""
    cells = jupytext.read(ROOT / "notebooks" / f"{name}.py").cells
    source = next(cell.source for cell in cells if cell.metadata.get("tags") == ["parameters"])
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_s_parameters_are_all_checked_and_its_defaults_are_the_recipe_s(name):
    kind, given = NOTEBOOKS[name], parameters(name)
    assert given.keys() <= {field.name for field in dataclasses.fields(kind)}
    read = kind.of(given | {"other": "names", "of": "the notebook"})
    for each in given.keys() - {"grid", "shared", "mean_prompt"}:  # the comparison's own example
        assert getattr(read, each) == getattr(kind(), each), each
    make_cells(*[given["grid"]] if name == "compare" else [[{}]], **given.get("shared", {}))


READ = [
    (Recipe, "learning_rate", "2e-5", 2e-5),
    (Recipe, "learning_rate", "0.00002", 2e-5),
    (Recipe, "batch_size", "8", 8),
    (Recipe, "batch_size", 8.0, 8),
    (Recipe, "batch_size", np.int64(8), 8),
    (Recipe, "epochs", 5, 5.0),
    (Recipe, "epochs", "2.5", 2.5),
    (Recipe, "max_steps", "-1", -1),
    (Recipe, "max_steps", 100.0, 100),
    (Recipe, "lora_dropout", 0, 0.0),
    (Recipe, "resume", "True", True),
    (Recipe, "resume", None, None),
    (Recipe, "model_dir", None, None),
    (Recipe, "train_csv", "", None),
    (Recipe, "time_budget_hours", "11.5", 11.5),
    (Recipe, "four_bit", "false", False),
    (Recipe, "four_bit", None, None),
    (Recipe, "train_csv", "rows.csv", ("rows.csv",)),
    (Recipe, "train_csv", "['a.csv','b.csv']", ("a.csv", "b.csv")),
    (Recipe, "train_csv", '["a.csv"]', ("a.csv",)),
    (Recipe, "train_csv", ROOT / "demo" / "rows.csv", (str(ROOT / "demo" / "rows.csv"),)),
    (Recipe, "train_csv", np.array(["a.csv", "b.csv"]), ("a.csv", "b.csv")),
    (Recipe, "train_csv", "None", None),
    (Recipe, "four_bit", "None", None),
    (Recipe, "resume", "null", None),
    (Recipe, "batch_size", np.array(8), 8),
    (Cell, "target_modules", "q_proj", ("q_proj",)),
    (Cell, "max_steps", 0, 0),
    (Cell, "row_filter", "", None),
    (SubmissionSettings, "max_new_tokens", 64.0, 64),
    (SubmissionSettings, "max_new_tokens", "64", 64),
    (SubmissionSettings, "time_budget_hours", "8.5", 8.5),
    (SubmissionSettings, "time_budget_hours", np.float32(8.5), 8.5),
    (SubmissionSettings, "temperature", 0, 0.0),  # greedy, and one answer is
    (SubmissionSettings, "mean_prompt", "", None),
    (SubmissionSettings, "style", None, None),
    (SubmissionSettings, "allow_base", "true", True),
]


@pytest.mark.parametrize(("kind", "name", "value", "meant"), READ)
def test_what_is_plainly_a_value_is_read(kind, name, value, meant):
    read = getattr(kind.of({name: value}), name)
    assert read == meant and type(read) is type(meant)


def test_several_answers_are_read_too():
    read = SubmissionSettings(answers_per_row=2.0, combine="join", temperature="0.8")
    assert (read.answers_per_row, read.temperature) == (2, 0.8)


REFUSED = [
    (Recipe, name, value)
    for name, values in dict(
        model_dir=[5, " ", ["a"]],
        output_dir=[None, ""],
        train_csv=[[], 5, "['a.csv', b]", [["a.csv"]], [""]],
        style=["xml", None, "", "Plain", 1, "reason"],
        system_placement=["after", None, "system"],
        max_tokens=[0, -1, 640.5, NAN, "many", None, True, 10**6, INF],
        max_steps=[0, -2, 1.5, "all", None, "0", True],
        epochs=[0, -1, NAN, INF, "0", None, 1e6, "five"],
        learning_rate=[0, -2e-5, NAN, INF, "2e", "", None, 20, 1e-50, True, "0", [2e-5]],
        lora_r=[0, -1, 2.5, None, "r16", 10**6],
        lora_alpha=[0, -64, NAN, None],
        lora_dropout=[-0.1, 1, 1.0, 10, NAN, None, "10%"],
        batch_size=[0, -8, 0.5, "eight", None, True, 10**9],
        gradient_accumulation=[0, -1, 1.5, None],
        warmup_steps=[-1, 0.5],
        eval_fraction=[1, -0.1, 10, NAN, None, "10%"],
        four_bit=["no", 4, 1, "4bit"],
        pad=["eos", "</s>", None, "<unk>"],
        seed=[-1, 0.5, None, 2**32, "x"],
        resume=["yes", 1, "checkpoint-8"],
        time_budget_hours=[0, -1, NAN, "all", 169, True],
        patience=[0, -1, None],
        evaluations=[0, -1, 2.5],
        report_to=["mlflow", None, "all", ["wandb"]],
    ).items()
    for value in values
] + [
    (SubmissionSettings, name, value)
    for name, values in dict(
        answers_per_row=[0, -1, 2.5, NAN, None, "two", True, 1000],
        max_new_tokens=[0, -64, 64.5, 100000, "100000", 4096, NAN, None, "64 tokens", True],
        temperature=[-0.8, NAN, 1e-50, INF, 80, None, "hot", 0],
        top_p=[95, 0, -0.5, 1.1, NAN, None, 1e-50, "95"],
        time_budget_hours=[0, NAN, -1, INF, None, "all", 30600, "0"],
        mean_prompt=[5, ["a"], " "],
        fallback_prompt=[None, "", "  ", 5],
        combine=["all", None, "mean", 1],
        threshold=["high", NAN, 50],
        style=["xml", 5],
        system_placement=["after"],
        submission_csv=[None, ""],
        input_dir=[None],
        adapter_dir=[5],
        encoder_dir=[5],
        allow_base=["maybe", None],
        answer_public_test=[1],
        four_bit=[4],
    ).items()
    for value in values
] + [
    (Grid, "eval_fraction", 0),
    (Grid, "mean_prompt", 5),
    (Grid, "shared", 5),
    (Grid, "seed", -1),
    (Grid, "train_csv", []),
    (Cell, "max_steps", -2),
    (Cell, "few_shot", -1),
    (Cell, "supervise", "all"),
    (Cell, "row_filter", 5),
    (Cell, "train_rows", 0),
    (Cell, "max_new_tokens", 640),  # of the 640 tokens that prompt and answer have together
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value"), REFUSED)
def test_what_can_not_work_is_refused_with_value_rule_and_remedy(kind, name, value):
    others = SEVERAL if name == "temperature" else {}
    with pytest.raises(SettingError) as caught:
        kind.of(others | {name: value})
    said = str(caught.value)
    assert said.startswith(f"{name}={value!r}") and "\n" not in said
    assert any(word in said for word in ("give", "choose")), said


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(answers_per_row=4), "Set answers_per_row"),
        (dict(combine="join", adapter_dir="a"), "Set answers_per_row"),
        (dict(adapter_dir=["a", "b"]), "Set answers_per_row"),
        (dict(threshold=0.5), "Set answers_per_row"),
        (dict(answers_per_row=2, combine="agree"), "encoder_dir=None: .* need an encoder"),
        (dict(answers_per_row=2, threshold=0.5, encoder_dir="x"), "no mean_prompt"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, why):
    with pytest.raises(SettingError, match=why):
        SubmissionSettings(**given)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(SettingError) as caught:
        Recipe(batch_size=0, learning_rate=0, pad="eos")
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "learning_rate",
        "batch_size",
        "pad",
    ]


def test_a_grid_is_refused_whole_before_a_cell_is_run():
    for grid, shared, why in (
        ({"style": "json"}, {}, r"grid has style='json': give a list"),
        ([{}, {"learning_rate": 0}], {}, "cell 1: learning_rate=0"),
        (
            [{"batch_size": 0}, {"style": "xml"}],
            {},
            r"cell 0: batch_size=0(.|\n)*cell 1: style='xml'",
        ),
        ([{}], {"lora_dropout": 1}, "cell 0: lora_dropout=1"),
        ([{}, {"batch_size": 8.0}], {}, "twice"),  # the same value, written otherwise
        ([{"resume": True}], {}, "resume is no setting"),
        ("plain", {}, "give a list of mappings"),
        (["plain"], {}, "give a list of mappings"),
    ):
        with pytest.raises(ComparisonError, match=why):
            make_cells(grid, **shared)


def test_keys_are_made_of_the_fields_that_matter():
    adapter = Recipe().values("adapter")
    assert {"style", "learning_rate", "seed", "max_tokens"} <= adapter.keys()
    assert not {"output_dir", "resume", "report_to", "patience", "train_csv"} & adapter.keys()
    assert Recipe().values("adapter", "run").keys() - adapter.keys() == {
        "four_bit",
        "patience",
        "evaluations",
    }
    answering = SubmissionSettings().values("answers")
    assert answering.keys() == {
        "max_new_tokens", "answers_per_row", "temperature", "top_p", "style", "system_placement",
    }  # fmt: skip
    besides = {"few_shot", "max_tokens", "seed"}
    assert answering.keys() | besides == Cell().values("answers").keys()
    # one value, one key, however it is written
    assert Cell(epochs="5", batch_size=8.0).values("adapter") == Cell(
        epochs=5, batch_size="8"
    ).values("adapter")


def test_a_format_is_checked():
    assert Recipe(style="json", system_placement="turn").format == Format(
        style="json", system_placement="turn"
    )
    with pytest.raises(SettingError, match="style='xml': choose one of plain, json, reason_json"):
        Format(style="xml")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        (
            "train",
            dict(
                learning_rate=0,
                model_dir="/nowhere",
                train_csv="/nowhere.csv",
                encoder_dir="/nowhere",
            ),
        ),
        ("compare", dict(grid={"style": "json"}, model_dir="/nowhere", train_csv="/nowhere.csv")),
        ("submission", dict(time_budget_hours=float("nan"), input_dir="/nowhere")),
        (
            "submission",
            dict(answers_per_row=2, combine="agree", model_dir=str(TINY), input_dir="/nowhere"),
        ),
    ],
)
def test_a_notebook_stops_at_a_bad_setting_before_it_looks_at_a_file(name, bad, tmp_path):
    with pytest.raises(
        papermill.PapermillExecutionError, match="SettingError|ComparisonError"
    ) as caught:
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb",
            tmp_path / "out.ipynb",
            parameters=bad,
            cwd=tmp_path,
            kernel_name="python3",
            progress_bar=False,
        )
    assert "nowhere" not in caught.value.evalue
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]
