"""The compare notebook and what it calls: cells, one split, results that are kept, a table that is
right."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, TINY

from prompt_recovery import adapter, files, metric, templates, tokenizer
from prompt_recovery import comparison as c
from prompt_recovery import comparison_table as ct
from prompt_recovery.comparison_grid import ComparisonError, make_cells
from prompt_recovery.engine import loading
from prompt_recovery.prompt_groups import prompt_groups
from prompt_recovery.recipe import Cell, Joined
from prompt_recovery.settings import SettingError

FEW = dict(max_steps=2, batch_size=2, gradient_accumulation=1, max_tokens=256, max_new_tokens=8)


@pytest.fixture
def small_csv(tmp_path):
    path = tmp_path / "small.csv"
    pd.read_csv(ROOT / "demo" / "rows.csv", dtype=str).groupby("rewrite_prompt").head(1).head(
        24
    ).to_csv(path, index=False)
    return path


def test_cells_are_every_combination_or_one_by_one():
    cells = make_cells({"style": ["plain", "json"], "lora_r": [1, 16]}, epochs=2)
    assert [(cell.style, cell.lora_r) for cell in cells] == [
        ("plain", 1), ("plain", 16), ("json", 1), ("json", 16),
    ]  # fmt: skip
    assert all(cell.epochs == 2 for cell in cells)
    assert make_cells([{"lora_r": 1}, {}])[1] == Cell()
    for grid, message in [
        ({"rank": [1]}, "rank is no setting"),
        ([{}, {}], "twice"),
        ([], "0 cells"),
    ]:
        with pytest.raises(ComparisonError, match=message):
            make_cells(grid)


def test_one_split_for_files_and_filters(tmp_path, small_csv):
    rows = pd.read_csv(small_csv, dtype=str)
    files = [tmp_path / "a.csv", tmp_path / "other" / "a.csv"]
    files[1].parent.mkdir()
    rows.drop(columns="id").head(12).to_csv(files[0], index=False)
    rows.drop(columns="id").tail(12).to_csv(files[1], index=False)
    cells = make_cells(
        [
            {"train_csv": str(files[1])},
            {"row_filter": "rewrite_prompt.str.len() < 40"},
            {"train_rows": 5},
        ]
    )
    train, held = c.read_split(cells, [str(file) for file in files], 0.25, 0)
    groups = prompt_groups([*train["rewrite_prompt"], *held["rewrite_prompt"]])
    assert len(held) and not set(groups[: len(train)]) & set(groups[len(train) :])
    second, short, five = (c.rows_of(cell, train) for cell in cells)
    assert 0 < len(second) < len(train) and set(second["rewritten_text"]) <= set(
        rows["rewritten_text"].tail(12)
    )
    assert 0 < len(short) < len(train) and (short["rewrite_prompt"].str.len() < 40).all()
    assert len(five) == 5
    more = c.rows_of(replace(cells[2], train_rows=9), train)
    assert set(five["id"]) < set(more["id"])
    for bad in ({"row_filter": "rewrite_prompt == ''"}, {"train_rows": 1000}):
        with pytest.raises(ComparisonError, match="leave"):
            c.rows_of(replace(cells[0], **bad), train)
    with pytest.raises(SettingError, match="train_rows=0"):
        replace(cells[0], train_rows=0)


def test_what_any_cell_can_not_do_is_refused_before_the_first_is_run(small_csv):
    cells = make_cells(
        [
            {},
            {"style": "reason_json"},  # there are no reasons in these rows
            {"row_filter": "no such column > 5"},
            {"few_shot": 64},
            {"target_modules": ["q_proj", "query"]},
            {"max_tokens": 40},
            {"target_modules": "all-linear"},
        ],
        **FEW | {"max_tokens": 200},
    )
    train, held = c.read_split(cells, small_csv, 0.2, 0)
    tok = tokenizer.load_tokenizer(TINY, pad="unk")
    with pytest.raises(ComparisonError) as caught:
        c.check_cells(cells, tok, train, held, TINY)
    lines = str(caught.value).splitlines()
    assert [line[:8] for line in lines] == [f"cell {n}: " for n in (1, 2, 3, 4, 5)]
    for line, what in zip(
        lines,
        ("reason_json", "row_filter", "few_shot=64", "called query; there are", "max_tokens"),
        strict=True,
    ):
        assert what in line
    c.check_cells([cells[0], cells[6]], tok, train, held, TINY)


def test_a_finished_cell_is_read_and_another_trained(tmp_path, small_csv):
    torch.manual_seed(0)
    cells = make_cells(
        [{"max_steps": 0}, {}, {"answers_per_row": 3}, {"combine": "join"}, {"lora_r": 1}], **FEW
    )
    train, held = c.read_split(cells, small_csv, 0.2, 0)
    tok, base = tokenizer.load_tokenizer(TINY, pad="unk"), loading.load_base(TINY, four_bit=False)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def run(cell, rows=train, **others):
        return c.run_cell(cell, base, tok, rows, held, tmp_path, model_dir=TINY, **others)

    first = [run(cell) for cell in cells]
    files = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.is_file() and path != small_csv
    }
    # join needs no run of its own
    assert len([path for path in files if path.name.startswith("answers-")]) == 4
    assert len({path.parent for path in files if path.name == "adapter_model.safetensors"}) == 2
    assert not list(tmp_path.rglob("checkpoint-*"))
    for again, before in zip([run(cell) for cell in cells], first, strict=True):
        pd.testing.assert_frame_equal(again, before)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    # an adapter that is there gives the answers that it gave when it was trained
    assert first[1]["answer"].to_list() == first[2].loc[first[2]["number"] == 0, "answer"].to_list()
    assert first[2].groupby("id").size().eq(3).all()
    after = base.state_dict()
    assert after.keys() == weights.keys() and all(
        torch.equal(after[name], weights[name]) for name in weights
    )
    changed = train.assign(rewritten_text=train["rewritten_text"] + "!")
    run(cells[1], changed)
    run(cells[0], changed)  # the base answers without training rows
    assert len(list(tmp_path.glob("answers-*.csv"))) == 5
    with pytest.raises(SettingError, match="supervise"):
        replace(cells[1], supervise="all")


def test_an_interrupted_cell_leaves_the_base_as_it_was(tmp_path, small_csv):
    """Its LoRA stayed on the base, and "the base as it is" answered with it, which was kept."""
    cells = make_cells([{"max_steps": 0}, {}], **FEW)
    train, held = c.read_split(cells, small_csv, 0.2, 0)
    tok, base = tokenizer.load_tokenizer(TINY, pad="unk"), loading.load_base(TINY, four_bit=False)
    clean = c.run_cell(cells[0], base, tok, train, held, tmp_path / "clean", model_dir=TINY)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = base.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        c.run_cell(cells[1], base, tok, train, held, tmp_path, model_dir=TINY)
    hook.remove()
    assert not any("lora" in name for name, _ in base.named_parameters()) and base.config.use_cache
    after = c.run_cell(cells[0], base, tok, train, held, tmp_path, model_dir=TINY)
    assert after["answer"].to_list() == clean["answer"].to_list()
    adapter.add_lora(base, base="tiny-mixtral")  # put on by hand
    with pytest.raises(ComparisonError, match="holds a LoRA"):
        c.run_cell(cells[0], base, tok, train, held, tmp_path / "other", model_dir=TINY)


def test_kept_answers_are_of_the_same_base_tokenizer_and_templates(
    tmp_path, small_csv, monkeypatch
):
    cell = make_cells([{"max_steps": 0}], **FEW)[0]
    train, held = c.read_split([cell], small_csv, 0.2, 0)
    tok, base = tokenizer.load_tokenizer(TINY, pad="unk"), loading.load_base(TINY, four_bit=False)

    def kept():
        c.run_cell(cell, base, tok, train, held, tmp_path, model_dir=TINY)
        return len(list(tmp_path.glob("answers-*.csv")))

    assert kept() == kept() == 1
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1  # another base of the same config
    assert kept() == 2
    monkeypatch.setitem(templates.SYSTEM_PROMPTS, "plain", "Say the prompt.")
    assert kept() == 3
    held = held.assign(original_text=held["original_text"] + ".")
    assert kept() == 4
    numeric = files.read_csv(next(tmp_path.glob("answers-*.csv")), ("number", "tokens", "seconds"))
    files.write_csv(numeric.assign(answer="007", how="as\ris"), tmp_path / "numeric.csv")
    again = files.read_csv(tmp_path / "numeric.csv", ("number", "tokens", "seconds"))
    assert (
        set(again["answer"]) == {"007"}
        and set(again["how"]) == {"as\ris"}
        and again["tokens"].sum() > 0
    )


def test_a_prompt_too_long_for_a_cell_is_left_out_and_said(tmp_path, small_csv, capsys):
    rows = pd.read_csv(small_csv, dtype=str)
    rows.loc[0, "rewrite_prompt"] = "very " * 1250 + "formal"
    rows.to_csv(small_csv, index=False)
    cells = make_cells([{}], **FEW)
    train, held = c.read_split(cells, small_csv, 0.2, 0)
    c.check_cells(
        cells, tokenizer.load_tokenizer(TINY, pad="unk"), pd.concat([train, held]), held, TINY
    )
    assert "cell 0: 1 of 24 rows can't be taught and are left out" in capsys.readouterr().out


def test_examples_stand_before_the_row_and_text_is_supervised(tmp_path, small_csv):
    cells = make_cells(
        [{"max_steps": 0}, {"max_steps": 0, "few_shot": 2}, {"supervise": "text"}],
        **FEW | {"max_tokens": 900},
    )
    train, held = c.read_split(cells, small_csv, 0.2, 0)
    tok, base = tokenizer.load_tokenizer(TINY, pad="unk"), loading.load_base(TINY, four_bit=False)
    found = [c.run_cell(cell, base, tok, train, held, tmp_path, model_dir=TINY) for cell in cells]
    assert found[0]["answer"].to_list() != found[1]["answer"].to_list()
    logs = [pd.read_csv(path) for path in tmp_path.glob("training-*/training_log.csv")]
    assert len(logs) == 1 and len(logs[0]) == 2


def test_table_is_by_hand(tmp_path):
    held = pd.DataFrame({"id": ["a", "b"], "rewrite_prompt": ["Make it a poem", "Make it formal"]})
    encoder = metric.load_encoder(metric.minilm_dir(), device="cpu")
    cells = make_cells([{}, {"answers_per_row": 2, "combine": "join"}])
    one = pd.DataFrame(
        dict(
            adapter="",
            id=["a", "b"],
            number=0,
            answer=["Make it a poem", "x"],
            how=["plain", "fallback"],
            stopped=["eos", "length"],
            tokens=[4, 8],
            seconds=6.0,
        )
    )
    two = pd.DataFrame(
        dict(
            adapter="adapter-1",
            id=["a", "a", "b", "b"],
            number=[0, 1, 0, 1],
            how="plain",
            answer=["Write a poem", "poem", *["Make it formal"] * 2],
            stopped="eos",
            tokens=5,
            seconds=9.0,
        )
    )
    table = ct.result_table(cells, [one, two], held, encoder, mean_prompt="Improve it")
    wrong = metric.sharpened_cosine(["x"], ["Make it formal"], encoder)[0]
    joined = metric.sharpened_cosine(
        ["Write a poem. poem", "Make it formal"], held["rewrite_prompt"].to_list(), encoder
    )
    assert table["scs"].to_list() == pytest.approx([(1 + wrong) / 2, joined.mean()])
    # row b of the first cell: no prompt
    assert table["scs_recovered"].to_list() == pytest.approx([0.5, joined.mean()])
    assert table["gain"].to_list() == pytest.approx([0, joined.mean() - (1 + wrong) / 2])
    assert (
        table["gain_low"][0] == table["gain_high"][0] == 0
        and table["low"][1] <= table["scs"][1] <= table["high"][1]
    )
    assert table["exact_match"].to_list() == [0.5, 0.5] and table["parsed"].to_list() == [0.5, 1]
    assert table["seconds_a_row"].to_list() == [3, 4.5] and table["tokens_a_row"].to_list() == [
        6,
        10,
    ]
    assert table["stopped_by_eos"].to_list() == [0.5, 1] and table["answers_per_row"].to_list() == [
        "1",
        "2",
    ]
    behind = metric.sharpened_cosine(
        ["Make it a poem. Improve it", "x. Improve it"], held["rewrite_prompt"].to_list(), encoder
    )
    assert table["scs_with_mean"][0] == pytest.approx(behind.mean())
    # row a would do better with this mean prompt alone, row b, whose answers agree, would not
    picked = ct.result_table(cells, [one, two], held, encoder, mean_prompt="Make it a poem")
    low = metric.sharpened_cosine(["Write a poem"], ["poem"], encoder)[0]
    assert np.isnan(picked["threshold"][0]) and picked["threshold"][1] == pytest.approx(
        (low + 1) / 2
    )
    alone = metric.sharpened_cosine(
        ["Make it a poem"] * 2, held["rewrite_prompt"].to_list(), encoder
    )
    behind = metric.sharpened_cosine(
        ["Make it formal. Make it a poem"], ["Make it formal"], encoder
    )[0]
    assert picked["scs_mean_alone"].to_list() == pytest.approx([alone.mean()] * 2)
    assert picked["scs_with_threshold"][1] == pytest.approx((1 + behind) / 2)
    assert table["adapter"].to_list() == ["", "adapter-1"]
    # an answer in which no prompt was found is not joined behind one
    two["how"] = ["plain", "fallback", "fallback", "fallback"]
    assert ct.answer_groups(two) == [["Write a poem"], ["Make it formal"]]
    with pytest.raises(ComparisonError, match="eval_rows"):
        ct.result_table(cells, [one, two.iloc[:2]], held, encoder)
    ct.plot_results(table, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_notebook_runs_and_goes_on_where_it_was(tmp_path, small_csv):
    parameters = dict(
        model_dir=str(TINY),
        train_csv=str(small_csv),
        output_dir=str(tmp_path / "out"),
        shared=FEW,
        eval_fraction=0.2,
        grid={"style": ["plain", "json"]},
    )

    def run():
        papermill.execute_notebook(
            ROOT / "notebooks" / "compare.ipynb",
            tmp_path / "compare.ipynb",
            parameters=parameters,
            cwd=ROOT,
            kernel_name="python3",
            progress_bar=False,
        )
        return pd.read_csv(tmp_path / "out" / "comparison.csv")

    table = run()
    assert table["style"].to_list() == ["plain", "json"] and table["gain"][0] == 0
    assert np.isfinite(table.drop(columns=["style", "adapter"]).to_numpy(float)).all()
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    kept = [*(tmp_path / "out").glob("answers-*.csv")]
    assert len(kept) == 2
    for path in kept:
        os.utime(path, (1, 1))
    pd.testing.assert_frame_equal(run(), table)
    assert (
        all(path.stat().st_mtime == 1 for path in kept)
        and len([*(tmp_path / "out").glob("answers-*.csv")]) == 2
    )


def test_the_language_model_s_curves_average_seeds_row_by_row():
    import llm  # demo/llm.py

    cells = llm.curve_cells(["rows", "rank"], 120, 30)
    assert list(cells) == [
        "all 120 rows, rank 16, plain",
        "25 rows",
        "50 rows",
        "100 rows",
        "rank 1",
        "rank 4",
    ]
    assert all(cell["max_steps"] == 30 for cell in cells.values())
    # names and values that exist
    make_cells(list(llm.curve_cells(llm.CURVES, 250, 30).values()), **llm.SETTINGS)
    encoder, truths = (
        metric.load_encoder(metric.minilm_dir(), device="cpu"),
        ["Make it a poem", "Make it formal"],
    )
    table = llm.score_lines(
        {"one": [truths], "two": [truths, ["x", "Make it formal"]]}, truths, encoder
    )
    wrong = metric.sharpened_cosine(["x"], truths[:1], encoder)[0]
    assert table["scs"].to_list() == pytest.approx([1, ((1 + wrong) / 2 + 1) / 2])
    assert table["exact_match"].to_list() == [1, 0.75] and table["gain_high"][1] == pytest.approx(0)


def test_joined_cells_are_their_members_answers_and_compared_with_the_best_of_them():
    held = pd.DataFrame({"id": ["a", "b"], "rewrite_prompt": ["Make it a poem", "Make it formal"]})
    encoder = metric.load_encoder(metric.minilm_dir(), device="cpu")
    cells = make_cells(
        [{"adapters": [1, 2]}, {}, {"style": "json"}, {"adapters": [2, 1], "combine": "agree"}]
    )
    assert cells[0] == Joined(adapters=(1, 2), combine="join")
    kept = {
        cell: pd.DataFrame(
            dict(
                id=["a", "b"], number=0, answer=answers, how="plain", stopped="eos", tokens=5,
                seconds=seconds, adapter=name,
            )
        )
        for cell, answers, seconds, name in (
            (cells[1], ["Make it a poem", "x"], 2.0, "adapter-1"),
            (cells[2], ["Use rhymes", "Make it formal"], 4.0, "adapter-2"),
        )
    }  # fmt: skip
    kept[cells[2]].loc[0, "how"] = "fallback"
    both = c.joined([kept[cells[1]], kept[cells[2]]])
    assert ct.answer_groups(both) == [["Make it a poem"], ["x", "Make it formal"]]
    tables = [both, kept[cells[1]], kept[cells[2]], c.joined([kept[cells[2]], kept[cells[1]]])]
    table = ct.result_table(cells, tables, held, encoder, mean_prompt="Improve it")
    truths = held["rewrite_prompt"].to_list()
    by_hand = metric.sharpened_cosine(["Make it a poem", "x. Make it formal"], truths, encoder)
    first = metric.sharpened_cosine(["Make it a poem", "x"], truths, encoder)
    second = metric.sharpened_cosine(["Use rhymes", "Make it formal"], truths, encoder)
    best = max((1, first), (2, second), key=lambda each: each[1].mean())
    assert table["scs"][0] == pytest.approx(by_hand.mean())
    assert table["adapters"].to_list()[0::3] == ["1 + 2", "2 + 1"]
    assert table["best"][0] == best[0] == table["best"][3]
    difference = metric.paired_difference(by_hand, best[1])
    columns = ["gain_over_best", "gain_over_best_low", "gain_over_best_high"]
    assert table.loc[0, columns].to_list() == pytest.approx(list(difference))
    assert table["seconds_a_row"][0] == 3 and table["tokens_a_row"][0] == 10
    assert table["adapter"][0] == "adapter-1 + adapter-2" and np.isnan(table["best"][1])
    for low, high, verdict in ((0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "apart")):
        table.loc[0, columns[1:]] = low, high
        assert verdict in ct.recommend(table).splitlines()[0]
    assert ct.recommend(table[1:3]) == ct.recommend(table[["scs"]]) == ""


@pytest.mark.parametrize(
    "joined",
    [[0, 1], [1], [1, 1], [1, 9], [1, 2], "12", [1, -1], [1, "3"], [1.5, 3], [True, 3]],
)
def test_joined_cells_name_cells_with_adapters_of_their_own(joined):
    grid = [{"max_steps": 0}, {}, {"adapters": joined}, {"style": "json"}]
    with pytest.raises(ComparisonError, match="cell 2: adapters="):
        make_cells(grid)


def test_joined_cells_are_run_once_as_their_members(tmp_path, small_csv):
    cells = make_cells([{}, {"adapters": [0, 2]}, {"lora_r": 1}], **FEW)
    train, held = c.read_split(cells, small_csv, 0.2, 0)
    tok, base = tokenizer.load_tokenizer(TINY, pad="unk"), loading.load_base(TINY, four_bit=False)
    c.check_cells(cells, tok, train, held, TINY)
    first, both, second = c.run_cells(
        cells, base, tok, train, held, output_dir=tmp_path, model_dir=TINY
    )
    assert len(list(tmp_path.glob("answers-*.csv"))) == 2
    pd.testing.assert_frame_equal(both, c.joined([first, second]))
