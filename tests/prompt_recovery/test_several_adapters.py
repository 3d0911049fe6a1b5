"""A submission by several adapters: each answers as it does alone, a restart answers only what is
missing, and what there is no time or memory for is said and counted."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, TINY, prepared, tiny_tokenizer
from safetensors.torch import load_file, save_file

from prompt_recovery import (
    adapter,
    adapter_files,
    answers,
    inputs,
    submission,
    submission_answers,
    submission_file,
    submission_job,
    submission_members,
)
from prompt_recovery.engine import decoding, generation, loading
from prompt_recovery.engine.planning import AnswerPlan
from prompt_recovery.recipe import Format, SubmissionSettings
from prompt_recovery.settings import SettingError

FALLBACK = "Fall, back"
FORMATS = {
    "plain": Format(),
    "json": Format(style="json", system_placement="before"),
    "third": Format(system_placement="turn"),
}
OPTIONS = dict(
    fallback_prompt=FALLBACK,
    time_budget_hours=1,
    max_tokens=400,
    max_new_tokens=12,
    model_dir=TINY,
    combine="join",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name: an adapter that moves most answers, trained for a format of its own."""
    made = {}
    for seed, (name, format) in enumerate(FORMATS.items()):
        torch.manual_seed(seed)
        lora = adapter.add_lora(loading.load_base(TINY), base="tiny-mixtral", r=4, seed=seed)
        for key, weight in lora.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, 0, 0.1)
        folder = tmp_path_factory.mktemp("adapters") / name
        made[name] = adapter.save_adapter(lora, folder, format)
    return made


@pytest.fixture(scope="module")
def base():
    return loading.load_base(TINY)


def rows(count):
    texts = [f"{n} cats and dogs went out" for n in range(10, 10 + count)]
    return pd.DataFrame(
        {"id": [f"0{n}" for n in range(count)], "original_text": texts, "rewritten_text": texts},
        dtype=str,
    )


def answered(base, test, path, folders, **options):
    """A submission's job, answered, and its report."""
    options = OPTIONS | dict(adapter_dir=folders) | options
    job = prepared(test, path, **options | (dict(combine="first") if len(folders) == 1 else {}))
    submission.answer(job, base, tiny_tokenizer())
    return job, submission.report(job)


def lines(path):
    journal = path.with_name(path.name + ".journal")
    return [json.loads(line) for line in journal.read_text().splitlines()]


def spelled(text, style, at_limit=False):
    """The whole answer as its prompt: adapters that were moved at random write no JSON."""
    return SimpleNamespace(prompt=text.strip() or None, parsed_as=style)


def test_each_adapter_answers_row_by_row_as_it_does_alone_merged_and_unmerged(
    base, folders, tmp_path, monkeypatch
):
    monkeypatch.setattr(answers, "find_prompt", spelled)
    test, chosen, found = rows(9), [folders["plain"], folders["json"]], []
    for merged in (True, False):
        plan = AnswerPlan((5,), merged, 8192, 16_384)
        monkeypatch.setattr(generation, "plan_of", lambda _, plan=plan: plan)
        place = tmp_path / str(merged)
        job, report = answered(base, test, place / "both.csv", chosen)
        assert [member.format for member in job.members] == [FORMATS["plain"], FORMATS["json"]]
        for member, folder in zip(job.members, chosen, strict=True):
            single, _ = answered(
                loading.load_base(TINY), test, place / f"{folder.name}.csv", [folder]
            )
            assert member.found == single.members[0].found and len(member.found) == len(test)
        found.append([member.found for member in job.members])
        assert all(found[-1][0][n] != found[-1][1][n] for n in range(len(test)))
        # both stand in each answer, and are named
        plain, json_ = (member.name for member in job.members)
        assert set(report["adapters"]) == {f"{plain}, {json_}"} and plain.endswith("plain")
        for n, answer in enumerate(report["answer"]):
            first = submission_file.clean_answer(found[-1][0][n][0].prompt)
            second = submission_file.clean_answer(found[-1][1][n][0].prompt)
            assert answer.startswith(first) and answer.endswith(second)
    assert found[0] == found[1]


def test_another_adapter_later_answers_its_rows_alone(base, folders, tmp_path, capsys):
    test, path = rows(7), tmp_path / "s.csv"
    answered(base, test, path, [folders["plain"]])
    answered(base, test, path, [folders["plain"], folders["json"]])
    before = lines(path)
    job, _ = answered(base, test, path, list(folders.values()))
    added = lines(path)[len(before) :]
    third = job.members[2]
    assert {(each["adapter"], each["key"]) for each in added} == {(third.name, third.key)}
    assert sorted(n for each in added for n, _ in each["rows"]) == list(range(7))
    together = path.read_bytes()
    answered(base, test, tmp_path / "fresh.csv", list(folders.values()))
    assert (tmp_path / "fresh.csv").read_bytes() == together
    # in another order nothing is answered again; one that is taken away is not asked for
    again = len(lines(path))
    answered(base, test, path, [folders["third"], folders["plain"]])
    assert len(lines(path)) == again
    assert "7 rows by" in capsys.readouterr().out


def test_an_adapter_that_can_not_be_put_on_costs_the_others_nothing(
    base, folders, tmp_path, monkeypatch, capsys
):
    test, real = rows(5), adapter.attach

    def full(model, config):
        if config.r == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, config)

    bad = tmp_path / "bad"
    lora = adapter.add_lora(loading.load_base(TINY), base="tiny-mixtral", r=3)
    for key, weight in lora.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, 0, 0.1)
    adapter.save_adapter(lora, bad, Format())
    calm, _ = answered(base, test, tmp_path / "calm.csv", [folders["plain"], folders["third"]])
    monkeypatch.setattr(adapter, "attach", full)
    chosen = [folders["plain"], bad, folders["third"]]
    job, report = answered(base, test, tmp_path / "s.csv", chosen)
    assert [m.found for m in job.members if m.adapter_dir != bad] == [m.found for m in calm.members]
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "calm.csv").read_bytes()
    said = capsys.readouterr().out
    assert "bad is left out: CUDA out of memory" in said
    assert "bad: in 0 of 5 rows, 5 raised OutOfMemoryError" in said
    with pytest.raises(torch.OutOfMemoryError):
        answered(base, test, tmp_path / "alone.csv", [bad])


# --- settings -------------------------------------------------------------------------------------


def test_adapters_of_one_size_answer_in_the_batches_of_the_first(
    base, folders, tmp_path, monkeypatch
):
    left = iter((700, 350))  # the card holds more once the first adapter has answered

    planned = generation.plan_of
    monkeypatch.setattr(
        generation, "plan_of", lambda model: planned(model)._replace(cache_tokens=next(left))
    )
    chosen = [folders["plain"], folders["third"]]
    job = prepared(rows(9), tmp_path / "s.csv", **OPTIONS | dict(adapter_dir=chosen))
    submission.answer(job, base, tiny_tokenizer())
    batches = [[meter.batches for meter in member.meters.values()] for member in job.members]
    assert batches[0] == batches[1] and batches[0][0] > 1
    assert next(left) == 350


def test_several_adapters_whose_answers_nothing_combines_are_refused(folders, tmp_path):
    chosen = [folders["plain"], folders["json"]]
    with pytest.raises(SettingError, match="Set answers_per_row"):
        prepared(rows(1), tmp_path / "s.csv", **OPTIONS | dict(combine="first", adapter_dir=chosen))
    with pytest.raises(SettingError, match="Set answers_per_row"):  # no adapter was found
        prepared(rows(1), tmp_path / "s.csv", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_inputs_are_completed_for_all_adapters_and_none_counts_twice(folders, tmp_path, capsys):
    root = tmp_path / "input"
    shutil.copytree(TINY, root / "base")
    rows(2).to_csv(root / "test.csv", index=False)
    for place, name in (("b/2", "plain"), ("b/10", "json")):
        shutil.copytree(folders[name], root / place)
    settings = SubmissionSettings(input_dir=root, combine="join")
    found = inputs.complete(settings).adapter_dir
    assert [Path(each) for each in found] == [root / "b/2", root / "b/10"]
    with pytest.raises(SettingError, match="b/10.*Set answers_per_row"):
        inputs.complete(replace(settings, combine="first"))
    with pytest.raises(inputs.InputError, match="style='plain'.*b/10.*trained with 'json'"):
        inputs.complete(replace(settings, style="plain"))
    shutil.copytree(folders["plain"], root / "copy")
    with pytest.raises(inputs.InputError, match="b/2 and .*copy are the same adapter"):
        inputs.complete(settings)
    (root / "copy" / "adapter_model.safetensors").write_bytes(b"")
    capsys.readouterr()
    with pytest.raises(inputs.InputError, match=r"copy(.|\n)*allow_base"):
        inputs.complete(settings)
    # what allow_base leaves out is said
    assert len(inputs.complete(replace(settings, allow_base=True)).adapter_dir) == 2
    assert "answering with the other adapters" in capsys.readouterr().out


def test_a_stranger_is_left_out_at_last_and_the_base_answers_under_its_own_key(
    base, folders, tmp_path
):
    """An adapter of another base, which no file tells: allow_base goes on with the others, or with
    the base alone."""
    stranger = shutil.copytree(folders["third"], tmp_path / "stranger")
    tensors = load_file(stranger / "adapter_model.safetensors")
    header = adapter_files.read_header(stranger)
    wrong = json.dumps([-value for value in json.loads(header["base_fingerprint"])])
    save_file(tensors, stranger / "adapter_model.safetensors", header | {"base_fingerprint": wrong})
    options = dict(allow_base=True, adapter_dir=[folders["plain"], stranger])
    job = prepared(rows(3), tmp_path / "s.csv", **OPTIONS | options)
    submission.answer(job, base, tiny_tokenizer())
    assert [member.adapter_dir for member in job.members] == [folders["plain"]]
    options |= dict(adapter_dir=[stranger], combine="first")
    job = prepared(rows(3), tmp_path / "s.csv", **OPTIONS | options)
    submission.answer(job, base, tiny_tokenizer())
    (member,) = job.members
    assert member.adapter_dir is None and len(member.found) == 3
    assert lines(tmp_path / "s.csv")[-1]["adapter"] == "the base"


# --- time -----------------------------------------------------------------------------------------


PARTS = submission_answers, submission_job, submission_members


@pytest.fixture
def slow(base, monkeypatch):
    """A clock of ours by which each step of the model takes half a second."""
    clock = SimpleNamespace(now=1000.0)
    for module in (generation, decoding, submission, *PARTS):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def tick(*_):
        clock.now += 0.5

    hook = base.register_forward_pre_hook(tick)
    yield clock
    hook.remove()


def test_adapters_are_dropped_from_the_end_where_time_is_short(
    base, folders, slow, tmp_path, capsys
):
    test, chosen = rows(40), list(folders.values())
    options = dict(batch_tokens=1200, slice_rows=20)

    def run(share, name):
        begun = slow.now
        hours = share * whole / 3600 if share else 1
        job, report = answered(
            base, test, tmp_path / name, chosen, time_budget_hours=hours, started=begun, **options
        )
        return job, report, slow.now - begun, capsys.readouterr().out

    whole = 0.0
    job, report, whole, said = run(0, "all.csv")
    assert [len(member.found) for member in job.members] == [40, 40, 40]
    assert "without" not in said
    first, second, third = (member.name for member in job.members)
    full = [member.found for member in job.members]
    job, report, spent, said = run(0.55, "short.csv")
    # the first answers every row as it does with time, the second some, the third none
    assert job.members[0].found == full[0] and job.members[2].found == {}
    assert 0 < len(job.members[1].found) < 40
    assert job.members[1].found.items() <= full[1].items()
    assert f"rows go without {second}, {third} as far as" in said
    assert f"go without {second}" in said and f"{third}: in 0 of 40 rows, 40 out of time" in said
    assert re.search(rf"{second}: in \d+ of 40 rows, .*\d+ out of time", said)
    assert spent <= 0.55 * whole + 12
    job, report, spent, said = run(0.2, "shorter.csv")
    assert not job.members[1].found and not job.members[2].found
    # a restart with time answers what was left out
    job, report, _, _ = run(9, "short.csv")
    assert [member.found for member in job.members] == full
    assert (tmp_path / "short.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()


# --- the notebook ---------------------------------------------------------------------------------


def test_the_notebook_takes_the_adapters_that_it_finds(folders, tmp_path):
    root, out = tmp_path / "input", tmp_path / "s.csv"
    shutil.copytree(TINY, root / "base")
    rows(3).to_csv(root / "test.csv", index=False)
    for name in ("plain", "json"):
        shutil.copytree(folders[name], root / name)
    papermill.execute_notebook(
        str(ROOT / "notebooks" / "submission.ipynb"),
        str(tmp_path / "out.ipynb"),
        parameters=dict(
            input_dir=str(root),
            submission_csv=str(out),
            combine="join",
            fallback_prompt=FALLBACK,
            max_new_tokens=16,
        ),
        cwd=ROOT,
        kernel_name="python3",
        progress_bar=False,
    )
    assert pd.read_csv(out)["rewrite_prompt"].notna().all()
    said = (tmp_path / "out.ipynb").read_text()
    assert "answering with json" in said and "answering with plain" in said
    assert [each["adapter"] for each in lines(out)] == ["json", "plain"]
