"""What goes in (inputs under both layouts, odd files), what comes out, what breaks on the way, and
the time budget."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import jupytext
import pandas as pd
import papermill
import pytest
import torch
from conftest import NASTY, ROOT, TINY, answer_test, full_disk, prepared
from safetensors.torch import load_file, save_file
from tiny_submission import FALLBACK, OPTIONS, make_adapter, read, rows

from prompt_recovery import (
    combine,
    data,
    inputs,
    metric,
    submission,
    submission_answers,
    submission_file,
    submission_job,
    submission_members,
)  # fmt: skip
from prompt_recovery.adapter_files import read_header
from prompt_recovery.engine import decoding, generation, loading
from prompt_recovery.recipe import Format
from prompt_recovery.settings import SettingError
from prompt_recovery.submission import SubmissionError, clean_answer
from prompt_recovery.tokenizer import TokenizerError, encode_row, encode_text


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory):
    """A sound adapter of the tiny model."""
    torch.manual_seed(0)
    return make_adapter(tmp_path_factory.mktemp("lora") / "adapter")


# --- inputs ---------------------------------------------------------------------------------------

NEW = dict(
    base="models/mistral-ai/mixtral/transformers/8x7b-instruct/1",
    lora="models/me/adapter/transformers/r16/3",
    test="competitions/llm-prompt-recovery",
    t5="datasets/me/sentence-t5",
)
OLD = dict(
    base="mixtral/Transformers/8x7b-instruct/1",
    lora="adapter/Transformers/r16/3",
    test="llm-prompt-recovery",
    t5="sentence-t5",
)


@pytest.mark.parametrize("layout", [NEW, OLD], ids=["new", "old"])
def test_inputs_are_found_under_both_layouts(layout, lora_dir, tmp_path):
    real, root = tmp_path / "mounts", tmp_path / "input"
    for place in layout.values():
        (real / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(TINY, real / layout["base"])
    shutil.copytree(lora_dir, real / layout["lora"])
    for place, name, text in (
        (layout["test"], "test.csv", "id,original_text,rewritten_text\n1,a,b\n"),
        (layout["t5"], "config.json", '{"architectures": ["T5EncoderModel"], "model_type": "t5"}'),
        ("odd", "config.json", "[1, 2"),  # another program's
    ):
        (real / place).mkdir()
        (real / place / name).write_text(text)
    root.mkdir()
    for place in real.iterdir():  # mounts may be links
        (root / place.name).symlink_to(place)
    (root / "loop").symlink_to(root)
    base, (lora,), test = inputs.find_inputs(None, None, None, root)
    assert (base, lora) == (root / layout["base"], root / layout["lora"])
    assert test == root / layout["test"] / "test.csv"
    assert inputs.usable_adapter(lora, base) == lora
    # --with-library puts one there
    (lora / "prompt_recovery-0.1.0-py3-none-any.whl").write_text("")
    assert inputs.usable_adapter(lora, base) == lora
    # others: in the order of their paths, numbers by value
    ninth, tenth = root / "zmore" / "9", root / "zmore" / "10"
    checkpoint = root / "a" / "checkpoint-8"
    for folder in (tenth, ninth, checkpoint):
        folder.mkdir(parents=True)
        shutil.copy(lora_dir / "adapter_config.json", folder)
    (checkpoint / "trainer_state.json").write_text("{}")
    assert inputs.find_inputs(None, None, None, root)[1] == (lora, ninth, tenth)
    given = inputs.find_inputs(None, ["b", "a"], None, root)[1]
    assert [path.name for path in given] == ["b", "a"]
    assert [path.name for path in inputs.find_inputs(None, "given", None, root)[1]] == ["given"]
    # a second base, and no test.csv
    shutil.copytree(TINY, root / "zbase")
    with pytest.raises(inputs.InputError, match=r"2 places(.|\n)*zbase(.|\n)*set model_dir"):
        inputs.find_inputs(None, None, None, root)
    shutil.rmtree(root / "zbase")
    test.unlink()
    with pytest.raises(inputs.InputError, match=r"test_csv is None and 0 places(.|\n)*nothing"):
        inputs.find_inputs(None, "given", None, root)


def test_checkpoints_are_no_adapters_where_there_are_several_or_a_finished_one(tmp_path):
    for name in ("out/checkpoint-8", "out/checkpoint-16"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("adapter_config.json", "trainer_state.json"):
            (tmp_path / name / file).write_text("{}")
    with pytest.raises(inputs.InputError, match=r"checkpoint-16(.|\n)*set adapter_dir"):
        inputs.find_inputs("base", None, "test.csv", tmp_path)
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")  # one that was published as it is
    found = tmp_path / "out" / "checkpoint-16"
    assert inputs.find_inputs("base", None, "test.csv", tmp_path)[1] == (found,)


def test_a_missing_or_broken_adapter_is_an_error_with_its_remedy_unless_base_is_allowed(
    lora_dir, tmp_path, capsys
):
    root = tmp_path / "input"
    shutil.copytree(TINY, root / "base")
    (root / "test.csv").write_text("id,original_text,rewritten_text\n1,a,b\n")
    with pytest.raises(inputs.InputError, match=r"0 places(.|\n)*allow_base=True"):
        inputs.find_inputs(None, None, None, root)
    assert inputs.find_inputs(None, None, None, root, allow_base=True)[1] == ()
    assert inputs.usable_adapter(None, TINY, allow_base=True) is None
    capsys.readouterr()
    broken = tmp_path / "broken"
    shutil.copytree(lora_dir, broken)
    (broken / "adapter_model.safetensors").write_bytes(
        (lora_dir / "adapter_model.safetensors").read_bytes()[:-9]
    )
    for folder in (broken, tmp_path / "nowhere"):
        with pytest.raises(inputs.InputError, match="allow_base=True"):
            inputs.usable_adapter(folder, TINY)
        assert inputs.usable_adapter(folder, TINY, allow_base=True) is None
        assert "base model alone" in capsys.readouterr().out
    # of another base of the same shape: seen once the base is loaded
    other = loading.load_base(TINY)
    other.get_output_embeddings().weight.data.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / "other")
    with pytest.raises(inputs.InputError, match=r"another base(.|\n)*allow_base=True"):
        inputs.load(tmp_path / "other", lora_dir)
    assert not hasattr(inputs.load(tmp_path / "other", lora_dir, allow_base=True)[0], "peft_config")


def test_the_first_cell_that_runs_installs_the_wheels_offline_or_does_nothing(tmp_path):
    folder = tmp_path / "input"
    for place, names in (
        ("datasets/me/wheels", ("prompt_recovery", "other")),
        ("models/me/adapter/1", ("prompt_recovery",)),
    ):
        (folder / place).mkdir(parents=True)
        for name in names:
            info = f"{name}-7.0.dist-info"
            with zipfile.ZipFile(folder / place / f"{name}-7.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", f"place = {place!r}")
                wheel.writestr(
                    f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 7.0\n"
                )
                wheel.writestr(
                    f"{info}/WHEEL",
                    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                )
                wheel.writestr(f"{info}/RECORD", "")
    cells = [
        each
        for each in jupytext.read(ROOT / "notebooks" / "submission.py").cells
        if each.cell_type == "code"
    ]
    code = next(each.source for each in cells if each.metadata.get("tags") != ["parameters"])
    code = "\n".join(line for line in code.splitlines() if not line.startswith("%"))
    target = tmp_path / "installed"
    env = os.environ | dict(PIP_TARGET=str(target), PIP_INDEX_URL="http://127.0.0.1:9/")
    for root, said in ((tmp_path / "nowhere", ""), (folder, "installing 2 wheels")):
        script = f"input_dir = {str(root)!r}\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0 and said in done.stdout and target.exists() == bool(said), done
    assert {"prompt_recovery", "other"} <= {path.name for path in target.iterdir()}
    assert "datasets" in (target / "prompt_recovery" / "__init__.py").read_text()


def test_a_public_run_answers_with_the_fallback_and_loads_nothing(lora_dir, tmp_path, monkeypatch):
    test = rows(1)
    monkeypatch.setenv(inputs.RERUN, "1")
    assert not inputs.is_public_run(test)
    monkeypatch.delenv(inputs.RERUN)
    assert inputs.is_public_run(test) and not inputs.is_public_run(rows(2))
    # one expert has another shape, of as many numbers: whoever loads it fails
    base = tmp_path / "input" / "base"
    shutil.copytree(TINY, base)
    shutil.copytree(lora_dir, tmp_path / "input" / "lora")
    test.to_csv(tmp_path / "input" / "test.csv", index=False)
    state = load_file(base / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    state[name] = state[name].T.contiguous()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out" / "submission.csv"
    parameters = dict(
        input_dir=str(tmp_path / "input"), submission_csv=str(out), fallback_prompt=FALLBACK
    )

    def run(**more):
        papermill.execute_notebook(
            str(ROOT / "notebooks" / "submission.ipynb"),
            str(tmp_path / "out.ipynb"),
            parameters=parameters | more,
            cwd=ROOT,
            kernel_name="python3",
            progress_bar=False,
        )

    run()
    assert read(out).to_numpy().tolist() == [["00", FALLBACK]]
    said = (tmp_path / "out.ipynb").read_text()
    assert "public test.csv" in said and str(base) in said and "1 by the fallback" in said
    with pytest.raises(papermill.PapermillExecutionError, match="RuntimeError"):
        run(answer_public_test=True)
    assert read(out).to_numpy().tolist() == [["00", FALLBACK]]


# --- files and answers ----------------------------------------------------------------------------


def test_nasty_rows_and_ids(loaded, tmp_path):
    texts = ["", *NASTY, "a" * 1_000_000, "nan", "word " * 40_000]
    ids = [
        "007",
        "-1",
        "x,y",
        'q"',
        "NA",
        "nan",
        "1e3",
        "+5",
        "000",
        "é",
        "10",
        "9",
        "8.0",
        "' '",
        "TRUE",
        "id",
    ]
    test = pd.DataFrame({"id": ids, "original_text": texts, "rewritten_text": texts[::-1]})
    test.loc[3, "original_text"] = None  # a NaN cell
    test.to_csv(tmp_path / "test.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    test = data.read_test(tmp_path / "test.csv")
    started = time.monotonic()
    report = answer_test(*loaded, test, tmp_path / "new" / "s.csv", **OPTIONS)
    assert time.monotonic() - started < 100
    frame = read(tmp_path / "new" / "s.csv")
    assert frame.columns.to_list() == ["id", "rewrite_prompt"] and frame["id"].to_list() == ids
    assert frame["rewrite_prompt"].to_list() == report["answer"].to_list()
    assert (frame["rewrite_prompt"].str.strip() != "").all()
    assert (report["source"] == "model").sum() > len(texts) / 2
    assert report["tokens"].between(1, 4).all() and set(report["stopped"]) <= {"eos", "length"}


def test_no_rows_at_all(loaded, tmp_path):
    (tmp_path / "test.csv").write_text(
        "\ufeffid,original_text,rewritten_text\r\n", encoding="utf-8", newline=""
    )
    report = answer_test(
        *loaded, data.read_test(tmp_path / "test.csv"), tmp_path / "s.csv", **OPTIONS
    )
    assert len(report) == 0 and (tmp_path / "s.csv").read_text() == "id,rewrite_prompt\n"


def test_without_a_model_the_file_holds_what_is_known(loaded, lora_dir, tmp_path):
    out = tmp_path / "s.csv"
    report = answer_test(None, None, rows(5), out, **OPTIONS)
    assert set(report["how"]) == {"no model"} and set(read(out)["rewrite_prompt"]) == {FALLBACK}
    whole = answer_test(*loaded, rows(5), out, **OPTIONS)
    assert set(whole["source"]) == {"model"}
    written = out.read_bytes()
    out.unlink()
    again = answer_test(None, None, rows(5), out, **OPTIONS)
    assert out.read_bytes() == written and again.equals(whole)
    # with a mean prompt the answers stand, and are joined anew; other rows, settings, adapters know
    # nothing of them
    joined = answer_test(None, None, rows(5), out, **OPTIONS | dict(mean_prompt="Improve it."))
    assert all(answer.endswith("Improve it.") for answer in joined["answer"]) and set(
        joined["source"]
    ) == {"model"}
    for changed in (dict(max_new_tokens=5), dict(style="json"), dict(adapter_dir=lora_dir)):
        assert set(answer_test(None, None, rows(5), out, **OPTIONS | changed)["how"]) == {
            "no model"
        }
    assert set(answer_test(None, None, rows(6), out, **OPTIONS)["how"]) == {"no model"}


def test_bad_settings_raise_before_a_row_is_answered(loaded, tmp_path):
    with pytest.raises(SubmissionError, match="blank"):
        answer_test(
            None, None, rows(2), tmp_path / "s.csv", **OPTIONS | dict(fallback_prompt=" \u200b</s>")
        )
    with pytest.raises(ValueError, match="need an encoder"):
        answer_test(
            None,
            None,
            rows(2),
            tmp_path / "s.csv",
            **OPTIONS | dict(combine="agree", answers_per_row=2),
        )
    assert not list(tmp_path.iterdir())
    with pytest.raises(TokenizerError, match="max_tokens is 6"):
        answer_test(*loaded, rows(2), tmp_path / "s.csv", **OPTIONS | dict(max_tokens=10))
    assert set(read(tmp_path / "s.csv")["rewrite_prompt"]) == {FALLBACK}


def test_a_limit_that_cuts_most_answers_short_is_said(tmp_path, capsys):
    answer_test(
        None,
        None,
        rows(2),
        tmp_path / "s.csv",
        **OPTIONS | dict(style="reason_json", max_new_tokens=64),
    )
    assert (
        "max_new_tokens=64: a reason_json answer takes 128 tokens or more"
        in capsys.readouterr().out
    )
    answer_test(None, None, rows(2), tmp_path / "s.csv", **OPTIONS | dict(max_new_tokens=64))
    assert "max_new_tokens" not in capsys.readouterr().out


def test_how_to_draw_is_said_to_do_nothing_where_nothing_is_drawn(tmp_path, capsys):
    for more, said in (
        (dict(temperature=1.2), "temperature=1.2: the one answer"),
        (dict(temperature=0, top_p=0.5), "top_p=0.5: the one answer"),
        (dict(temperature=0.8), ""),
        (dict(temperature=1.2, answers_per_row=2, combine="join"), ""),
    ):
        answer_test(None, None, rows(1), tmp_path / "s.csv", **OPTIONS | more)
        found = capsys.readouterr().out
        assert said in found if said else "none is drawn" not in found


def test_a_mean_prompt_that_fits_behind_no_answer_is_refused(tmp_path):
    long = "Improve this text and keep its meaning. " * 20
    with pytest.raises(
        SubmissionError, match="mean_prompt=.*would stand in no row.*Give a shorter one"
    ):
        answer_test(None, None, rows(2), tmp_path / "s.csv", **OPTIONS | dict(mean_prompt=long))
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_says_nothing_or_is_longer_than_the_scorer_reads_is_refused(tmp_path):
    for name, wrong, message in (
        ("mean_prompt", "N/A", "mean_prompt='N/A' says nothing"),
        ("mean_prompt", "</s>", "says nothing"),
        ("fallback_prompt", "Improve this text. " * 40, "fallback_prompt=.*the scorer reads 128"),
    ):
        with pytest.raises(SubmissionError, match=message):
            answer_test(None, None, rows(2), tmp_path / "s.csv", **OPTIONS | {name: wrong})
    assert not list(tmp_path.iterdir())


def test_texts_whose_room_max_new_tokens_takes_are_counted(loaded, tmp_path, capsys):
    """119 of 120 rows were cut at 400 of 512, unsaid."""
    test = pd.concat([rows(1), rows(3, words=40).tail(2)], ignore_index=True)
    options = OPTIONS | dict(max_new_tokens=100, max_tokens=220)
    report = answer_test(*loaded, test, tmp_path / "s.csv", **options)
    said = capsys.readouterr().out
    assert "2 of 3 rows lose the middle of their texts" in said
    assert "has 220 tokens, of which max_new_tokens=100 are the answer's" in said
    assert "; 2 lack the middle of their texts" in said.splitlines()[-1]
    found = report["lacks"].str.contains("middle").to_list()
    assert found == [False, True, True]
    # exactly as many tokens as there is room for
    length = len(encode_row(loaded[1], test.loc[1].to_dict(), max_tokens=4000)[0])
    for room, cut in ((length, 0), (length - 1, 1)):
        answer_test(
            None, None, test.iloc[[1]].reset_index(drop=True), tmp_path / "t.csv",
            **options | dict(max_tokens=room + 100),
        )  # fmt: skip
        assert ("1 of 1 rows lose" in capsys.readouterr().out) == cut


def test_what_the_settings_ask_for_and_an_answer_lacks_is_counted(loaded, tmp_path, capsys):
    mean = "Improve this text. " * 28  # stands behind short answers alone
    assert combine.LIMIT - 20 < combine.count_tokens(mean) < combine.LIMIT - 4
    short, long = (
        "Shorten it.",
        "Turn this letter into a poem of four lines, as a pirate would say.",
    )
    many = [
        f"Make it rhyme with number {n} and keep all of the names in it as they are"
        for n in range(9)
    ]
    cases = (
        (dict(), [short], "eos", ""),
        (dict(), [short], "length", "an answer's end, at max_new_tokens"),
        (dict(mean_prompt=mean), [short], "eos", ""),
        (dict(mean_prompt=mean), [long], "eos", "mean_prompt, at 128 tokens"),
        (dict(), [long * 12], "eos", "a part of what was found, at 128 tokens"),
        (
            dict(combine="join", answers_per_row=9),
            many,
            "eos",
            "a part of what was found, at 128 tokens",
        ),
        (dict(combine="join", answers_per_row=2), [short, long], "eos", ""),
        (
            dict(combine="join", answers_per_row=2),
            [short, None],
            "eos",
            "a prompt in some of their answers",
        ),
    )
    for n, (more, prompts, stopped, lacks) in enumerate(cases):
        out = tmp_path / f"{n}.csv"
        options = OPTIONS | more
        answer_test(*loaded, rows(1), out, **options)
        journal = tmp_path / f"{n}.csv.journal"
        found = [[0, [[prompt, "plain", stopped, 9] for prompt in prompts]]]
        journal.write_text(json.dumps(json.loads(journal.read_text()) | {"rows": found}))
        capsys.readouterr()
        report = answer_test(None, None, rows(1), out, **options)
        assert report["source"][0] == "model" and report["lacks"][0] == lacks, (n, report["answer"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert (f"; 1 lack {lacks}" in last) if lacks else ("lack" not in last)


def test_answers_of_the_base_alone_are_never_taken_for_an_adapter_s(
    loaded, lora_dir, tmp_path, capsys
):
    allowed = OPTIONS | dict(allow_base=True)
    answer_test(*loaded, rows(2), tmp_path / "s.csv", **allowed)
    assert "; by the base alone, without an adapter" in capsys.readouterr().out
    # refused only when the base was loaded: of another one, which no file tells
    stranger = shutil.copytree(lora_dir, tmp_path / "stranger")
    weights = stranger / "adapter_model.safetensors"
    other = json.dumps([1.0] * 64)
    save_file(
        load_file(weights), weights, read_header(weights.parent) | {"base_fingerprint": other}
    )
    with_one = allowed | dict(adapter_dir=stranger)
    answer_test(*loaded, rows(2), tmp_path / "s.csv", **with_one)
    assert "; by the base alone, without an adapter" in capsys.readouterr().out
    report = answer_test(None, None, rows(2), tmp_path / "s.csv", **with_one)
    assert set(report["how"]) == {"no model"}


def test_answers_are_cleaned():
    for text, clean in (
        ("a</s>", "a"),
        ("<</s>s>[INST] x [/INST]\n y\x00\x07z\u2028w", "x y z w"),
        ("[IN[INST]ST]<pad><unk>", ""),
        ("\u200b\ufeff \x85", ""),
        ("\ud83d half \ufffe", "half"),
        ("👩‍👩‍👧 می‌خواهم {x} <b>", "👩‍👩‍👧 می‌خواهم {x} <b>"),
    ):
        assert clean_answer(text) == clean == clean_answer(clean)


def test_wrong_files_are_refused(tmp_path):
    test = pd.DataFrame({"id": ["1", "2"]})
    path = tmp_path / "s.csv"
    with pytest.raises(SubmissionError, match="no submission"):
        submission_file.check_submission(test, path)
    for text, message in (
        ("", "no submission"),
        ("id,prompt\n1,a\n2,b\n", "columns"),
        ("id,rewrite_prompt\n2,a\n1,b\n", "order"),
        ("id,rewrite_prompt\n1,a\n", "order"),
        ("id,rewrite_prompt\n1,a\n2,  \n", r"rows \[1\] are blank"),
        ("id,rewrite_prompt\n1,a</s>\n2,b\n", r"rows \[0\] hold"),
        ('id,rewrite_prompt\n1,a\n2,"b\nc"\n', r"rows \[1\] hold"),
        (f"id,rewrite_prompt\n1,a\n2,{'word ' * 199}word\n", r"rows \[1\] are longer"),
    ):
        path.write_text(text)
        with pytest.raises(SubmissionError, match=message):
            submission_file.check_submission(test, path)


def test_long_answers_lose_their_end_at_a_word(loaded, tmp_path):
    answer_test(*loaded, rows(2), tmp_path / "s.csv", **OPTIONS)
    (journal,) = tmp_path.glob("*.journal")
    found = [[n, [["Rewrite it as a pirate. " * 60 + "</s>", "plain", "eos", 9]]] for n in range(2)]
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"rows": found}))
    report = answer_test(*loaded, rows(2), tmp_path / "s.csv", **OPTIONS)
    for answer in report["answer"]:
        assert 100 < combine.count_tokens(answer) <= combine.LIMIT and re.search(
            r" (Rewrite|it|as|a|pirate\.)$", answer
        )


def test_rows_whose_answers_disagree_get_the_mean_prompt_alone(loaded, tmp_path):
    options = OPTIONS | dict(answers_per_row=2, combine="join", mean_prompt="Improve it.")
    answer_test(*loaded, rows(2), tmp_path / "s.csv", **options)
    (journal,) = tmp_path.glob("*.journal")
    prompts = [
        ["Make it a poem", "Turn it into a poem"],
        ["Make it a poem", "Add a list of prices"],
    ]
    found = [
        [n, [[prompt, "plain", "eos", 9] for prompt in each]] for n, each in enumerate(prompts)
    ]
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"rows": found}))
    encoder = metric.load_encoder(metric.minilm_dir(), device="cpu")
    options |= dict(combine="first", encoder=encoder, threshold=0.3)
    assert answer_test(*loaded, rows(2), tmp_path / "s.csv", **options)["answer"].to_list() == [
        "Make it a poem. Improve it.", "Improve it.",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="need an encoder"):  # before anything is computed
        answer_test(*loaded, rows(2), tmp_path / "other.csv", **options | dict(encoder=None))
    encoder[0].auto_model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite embedding"):
        answer_test(*loaded, rows(2), tmp_path / "other.csv", **options)
    assert not (tmp_path / "other.csv").exists()


def test_answers_that_nothing_combines_are_refused(loaded, tmp_path):
    for wrong in (dict(answers_per_row=4), dict(combine="join"), dict(threshold=0.5)):
        with pytest.raises(SettingError, match="Set answers_per_row"):
            answer_test(*loaded, rows(2), tmp_path / "s.csv", **OPTIONS | wrong)
    assert not list(tmp_path.iterdir())


def test_style_and_placement_are_the_adapter_s(lora_dir, tmp_path):
    assert inputs.answer_format(None, None, "turn") == Format(system_placement="turn")
    assert inputs.answer_format(lora_dir, None, None) == Format(
        style="plain", system_placement="user"
    )  # it does not say
    trained = Format(style="json", system_placement="before")
    folder = make_adapter(tmp_path / "adapter", trained)
    assert inputs.answer_format(folder, None, "before") == trained
    for wrong in (("plain", None), (None, "user")):
        with pytest.raises(inputs.InputError, match="was trained with '(json|before)'"):
            inputs.answer_format(folder, *wrong)


# --- faults ---------------------------------------------------------------------------------------


def test_rows_that_raise_keep_the_fallback_and_cost_the_others_nothing(
    loaded, faulty, tmp_path, capsys
):
    test = rows(20)
    calm = answer_test(*loaded, test, tmp_path / "calm.csv", **OPTIONS)
    bad = {3, 11, 12}
    ids = [encode_row(loaded[1], row, max_tokens=400)[0] for row in test.to_dict("records")]
    test.loc[list(bad), "original_text"] += " 漢"
    changed = [
        set(encode_row(loaded[1], row, max_tokens=400)[0]) for row in test.to_dict("records")
    ]
    mark = next(iter(changed[3] - set().union(*ids)))
    for error, reason in (
        (KeyError("z"), "raised KeyError"),
        (torch.OutOfMemoryError("CUDA"), "out of memory"),
    ):

        def fault(ids, error=error):
            if ids.shape[1] > 1 and (ids == mark).any():
                raise error

        report = answer_test(*faulty(fault), test, tmp_path / f"{reason}.csv", **OPTIONS)
        assert set(report.index[report["how"] == reason]) == bad
        assert set(report.loc[list(bad), "source"]) == {"fallback"}
        assert set(report.loc[list(bad), "answer"]) == {FALLBACK}
        kept = [n for n in range(20) if n not in bad]
        assert report.loc[kept, "answer"].to_list() == calm.loc[kept, "answer"].to_list()
        assert f"(3 {reason}" in capsys.readouterr().out


def test_out_of_memory_makes_batches_smaller(loaded, faulty, tmp_path):
    test = rows(24)
    calm = answer_test(*loaded, test, tmp_path / "calm.csv", **OPTIONS)

    def fault(ids):
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    report = answer_test(*faulty(fault), test, tmp_path / "s.csv", **OPTIONS)
    assert report.equals(calm)


def test_a_broken_device_is_given_up(faulty, tmp_path):
    calls = []

    def fault(ids):
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    report = answer_test(*faulty(fault), rows(60), tmp_path / "s.csv", slice_rows=8, **OPTIONS)
    assert set(report["source"]) == {"fallback"} and len(calls) < 100
    counts = report["how"].value_counts()
    assert counts["raised RuntimeError"] == submission_answers.GIVE_UP
    assert (
        counts[f"given up after {submission_answers.GIVE_UP} rows in a row raised"]
        == 60 - submission_answers.GIVE_UP
    )
    submission_file.check_submission(rows(60), tmp_path / "s.csv")


def test_a_full_disk_leaves_the_last_whole_file(loaded, tmp_path, capsys):
    test = rows(40, words=3)
    out = tmp_path / "s.csv"
    calm = answer_test(*loaded, test, tmp_path / "calm.csv", **OPTIONS)
    options = OPTIONS | dict(batch_tokens=400, write_seconds=0)
    answer_test(None, None, test, out, **options)
    capsys.readouterr()
    # the file is whole, and not what was found: that is said last
    with (
        pytest.raises(SubmissionError, match="does not hold what was found for"),
        full_disk(out.stat().st_size + 50),
    ):
        answer_test(*loaded, test, out, **options)
    said = capsys.readouterr().out
    assert "40 by the model" not in said
    assert f"{out} can't be written" in said and "Free some space" in said
    assert re.search(r"journal can't be written", said)
    submission_file.check_submission(test, out)
    assert not list(tmp_path.glob("*.partial"))
    # there is room again: the rows of the journal, cut off as it is, and the others
    report = answer_test(*loaded, test, out, **OPTIONS)
    assert (
        report["answer"].to_list()
        == calm["answer"].to_list()
        == read(out)["rewrite_prompt"].to_list()
    )
    # not even the first file can be written
    (tmp_path / "full.csv.partial").symlink_to("/dev/full")
    with pytest.raises(SubmissionError, match="no submission"):
        answer_test(None, None, test, tmp_path / "full.csv", **OPTIONS)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, pages):
    """All of the disk but so many pages."""
    about = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes((about.f_bavail - pages) * about.f_frsize))


def test_the_last_write_takes_the_journal_s_room_or_the_run_fails(loaded, tmp_path, small_disk):
    """600 rows "by the model", and the file held 472 fallbacks."""
    test = rows(40)
    test["id"] = [f"{n}-" + "x" * 500 for n in range(40)]
    options = OPTIONS | dict(write_seconds=1e9)
    calm = answer_test(*loaded, test, tmp_path / "calm.csv", **options)
    expected, out = (tmp_path / "calm.csv").read_bytes(), small_disk / "s.csv"
    pages = -(-len(expected) // os.statvfs(small_disk).f_frsize)

    def run(room, model):
        (small_disk / "filler").unlink(missing_ok=True)
        job = prepared(test, out, **options)
        fill(small_disk, room)
        if model:
            submission.answer(job, *model)
        return submission.report(job)

    # the journal's one page is the last that the file needs; there is none for the journal then,
    # until the old file is gone
    assert run(pages, loaded).equals(calm) and out.read_bytes() == expected
    assert run(0, None).equals(calm)
    # too little even so: the run fails, and what was found stands in the journal
    for path in small_disk.iterdir():
        path.unlink()
    with pytest.raises(
        SubmissionError, match=r"for \d+ of 40 rows, the first is row \d+: its last"
    ):
        run(pages - 1, loaded)
    submission_file.check_submission(test, out)
    assert set(read(out)["rewrite_prompt"]) == {FALLBACK}
    assert run(pages, None).equals(calm) and out.read_bytes() == expected


def test_a_place_that_cannot_be_written_is_not_called_full(tmp_path, capsys):
    (tmp_path / "s.csv.partial").mkdir()
    with pytest.raises(SubmissionError, match="no submission"):
        answer_test(None, None, rows(2), tmp_path / "s.csv", **OPTIONS)
    said = capsys.readouterr().out
    assert "Give another submission_csv." in said and "Free some space" not in said


def test_a_second_notebook_on_the_same_file_is_refused_by_name(loaded, tmp_path):
    out = tmp_path / "s.csv"
    program = f"""
import sys, time
sys.path.insert(0, "tests")
from conftest import prepared
from tiny_submission import OPTIONS, rows
prepared(rows(3), {str(out)!r}, **OPTIONS)
print("holds it", flush=True)
time.sleep(100)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert any("holds it" in line for line in other.stdout)
        before = out.read_bytes()
        with pytest.raises(
            SubmissionError,
            match=rf"s\.csv belongs to a run of process {other.pid} on .* since .*another "
            r"submission_csv\. If that host is gone, remove .*s\.csv\.lock",
        ):
            answer_test(*loaded, rows(5), out, **OPTIONS)
        assert out.read_bytes() == before
        answer_test(*loaded, rows(5), tmp_path / "other.csv", **OPTIONS)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    # a dead one holds nothing, and one that has reported has given it back
    report = answer_test(*loaded, rows(5), out, **OPTIONS)
    assert set(report["source"]) == {"model"} and not list(tmp_path.glob("*.lock"))


# --- time -----------------------------------------------------------------------------------------


PARTS = submission_answers, submission_job, submission_members


@pytest.fixture
def slow(faulty, monkeypatch):
    """A model that takes its time by a clock of ours: so many seconds a step and a token of a
    row."""

    def make(per_step, per_token):
        clock = SimpleNamespace(now=1000.0)
        for module in (generation, decoding, submission, *PARTS):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

        def tick(ids):
            clock.now += per_step + per_token * ids.numel()

        return *faulty(tick), clock

    return make


DONE = {"plain", "no prompt in the answer"}
LONGEST_BATCH = 24 * 0.5 + 3  # seconds at most, of the slow model below


def budgeted(slow, folder, capsys, seconds, per_step=0.5, per_token=0.001, count=60, **more):
    base, tok, clock = slow(per_step, per_token)
    started = clock.now
    # a budget of nothing is refused: one that is spent before the first row
    budget = dict(
        time_budget_hours=max(seconds, 1) / 3600, started=started if seconds else started - 1
    )
    options = OPTIONS | budget | dict(max_new_tokens=24, batch_tokens=1200) | more
    report = answer_test(base, tok, rows(count), folder / f"{seconds}.csv", **options)
    return report, clock.now - started, capsys.readouterr().out


def test_time_is_kept_by_fewer_answers_then_shorter_ones_then_fallbacks(slow, tmp_path, capsys):
    several = dict(answers_per_row=3, combine="join", seed=1)
    report, full, said = budgeted(slow, tmp_path, capsys, 10_000, **several)
    assert set(report["how"]) <= DONE and "from here" not in said and (report["tokens"] > 24).any()
    taken = [full]
    for share, step in (
        (0.6, "a single answer"),
        (0.26, "answers end after"),
        (0.08, "will keep the fallback"),
    ):
        report, spent, said = budgeted(slow, tmp_path, capsys, full * share, **several)
        assert step in said, (share, said)
        assert spent <= full * share + LONGEST_BATCH
        taken.append(spent)
        if share < 0.1:
            assert set(report["source"]) == {"model", "fallback"} and "out of time)" in said
        else:
            assert set(report["how"]) <= DONE and spent > full * share * 0.3, (
                spent,
                full * share,
                said,
            )
    assert taken == sorted(taken, reverse=True)


def test_never_later_than_the_budget_by_more_than_a_batch(slow, tmp_path, capsys):
    for seconds in (0, 1, 7, 20, 33):
        report, spent, _ = budgeted(slow, tmp_path, capsys, seconds, slice_rows=7)
        assert spent <= seconds + LONGEST_BATCH
        assert len(report) == 60 and (seconds > 0 or set(report["how"]) == {"out of time"})


def test_what_earlier_runs_took_counts(slow, tmp_path, capsys):
    base, tok, clock = slow(0.5, 0.001)
    options = OPTIONS | dict(max_new_tokens=24, batch_tokens=1200, time_budget_hours=30 / 3600)
    first = answer_test(base, tok, rows(60), tmp_path / "s.csv", **options)
    assert set(first["source"]) == {"model", "fallback"}
    before = clock.now
    again = answer_test(base, tok, rows(60), tmp_path / "s.csv", **options)
    assert clock.now - before <= LONGEST_BATCH and (again["how"] == "out of time").any()
    report = answer_test(
        base, tok, rows(60), tmp_path / "s.csv", **options | dict(time_budget_hours=1)
    )
    assert set(report["how"]) <= DONE


def test_rows_with_less_than_was_asked_are_answered_as_asked_once_there_is_time(
    slow, tmp_path, capsys
):
    """391 of 720 rows kept one answer of four, "by the model", with all the time in the world."""
    base, tok, clock = slow(0.5, 0.001)
    options = OPTIONS | dict(
        max_new_tokens=12, batch_tokens=400, answers_per_row=3, combine="join", seed=1
    )
    test = rows(24)
    plain = {id for text in test["original_text"] for id in encode_text(tok, text)}
    test.loc[2, "original_text"] += " 漢"
    (mark, *_) = set(encode_text(tok, test["original_text"][2])) - plain
    started = clock.now
    calm = answer_test(base, tok, test, tmp_path / "calm.csv", **options)
    took, out = clock.now - started, tmp_path / "s.csv"
    assert "want of time" not in capsys.readouterr().out and set(calm["less"]) == {""}
    # too little for three answers, too much for one: what is over goes to rows that got one
    started = clock.now
    first = answer_test(base, tok, test, out, **options | dict(time_budget_hours=0.5 * took / 3600))
    said, spent = capsys.readouterr().out, clock.now - started
    less = first.index[first["less"] == "1 of 3 answers"]
    assert 2 in less and 0 < len(less) < 24 and set(first["less"]) == {"", "1 of 3 answers"}
    assert f"; {len(less)} with 1 of 3 answers only, for want of time" in said
    assert "again as asked" in said and "the others keep what they have" in said
    assert took * 0.3 < spent <= took * 0.5 + 3 * LONGEST_BATCH
    whole = first["less"] == ""
    assert first.loc[whole, "answer"].to_list() == calm.loc[whole, "answer"].to_list()
    # no more time: it is counted again, and the time that is gone is said beside the budget
    again = answer_test(
        base, tok, test, out, **options | dict(time_budget_hours=0.9 * spent / 3600)
    )
    said = capsys.readouterr().out
    assert again.equals(first) and f"; {len(less)} with 1 of 3" in said
    assert re.search(
        rf"24 rows stand in s.csv.journal, which took {spent:.0f} s of time_budget_hours=0.0\d+, "
        rf"{0.9 * spent:.0f} s: 0 s are left",
        said,
    )
    # a row that raises keeps what it has

    def fault(ids):
        if ids.shape[1] > 1 and (ids == mark).any():
            raise KeyError("z")

    hook = base.register_forward_pre_hook(
        lambda _, args, kwargs: fault(kwargs["input_ids"]), with_kwargs=True
    )
    report = answer_test(base, tok, test, out, **options)
    hook.remove()
    said = capsys.readouterr().out
    assert "row 2 (id 02) keeps its shorter answer" in said
    assert report.index[report["less"] != ""].to_list() == [2]
    assert report["answer"][2] == first["answer"][2] and "; 1 with 1 of 3 answers" in said
    report = answer_test(base, tok, test, out, **options)
    said = capsys.readouterr().out
    assert "1 rows have less than was asked: again as asked" in said and "want of" not in said
    assert out.read_bytes() == (tmp_path / "calm.csv").read_bytes() and report.equals(calm)
    # all as asked: nothing is asked again
    assert answer_test("no model", None, test, out, **options).equals(calm)


def test_a_shorter_limit_is_less_only_for_answers_that_it_cut(loaded, tmp_path, capsys):
    options = OPTIONS | dict(max_new_tokens=24)
    calm = answer_test(*loaded, rows(8), tmp_path / "s.csv", **options)
    (journal,) = tmp_path.glob("*.journal")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    found = [row for line in lines for row in line["rows"]]
    for position, answers in found:
        answers[0][0], answers[0][2] = "Shorter.", "length" if position % 2 else "eos"
    journal.write_text(json.dumps(lines[0] | {"rows": found, "plan": [1, 16]}))
    capsys.readouterr()
    report = answer_test(None, None, rows(8), tmp_path / "s.csv", **options)
    assert report["less"].to_list() == ["", "16 of 24 tokens"] * 4
    assert "; 4 with 16 of 24 tokens only" in capsys.readouterr().out
    report = answer_test(*loaded, rows(8), tmp_path / "s.csv", **options)
    assert report["answer"].to_list() == [
        calm["answer"][n] if n % 2 else "Shorter." for n in range(8)
    ]


def test_the_rate_is_printed_as_it_goes(slow, tmp_path, capsys):
    _, spent, said = budgeted(slow, tmp_path, capsys, 10_000, per_step=3)
    lines = re.findall(
        r"\[ *(\d+) s\] (\d+) of 60 rows, ([\d.]+) tokens/s, about (\d+) s to go, (\d+) s left",
        said,
    )
    assert len(lines) >= 3 and float(lines[-1][2]) > 0
    assert abs(int(lines[2][0]) + int(lines[2][3]) - spent) < spent / 4
    assert re.search(
        r"60 rows: \d+ by the model, \d by the fallback.*; 60 of 60 rows, [\d.]+ tokens/s", said
    )
