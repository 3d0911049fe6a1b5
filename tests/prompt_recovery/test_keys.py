"""What is kept is taken up again by a run of the same key alone: answers of a submission, cells of
a comparison, checkpoints of a training."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_submission import OPTIONS, make_adapter, read, rows

from prompt_recovery import adapter, base, comparison, keys, submission, templates, tokenizer
from prompt_recovery.engine import loading
from prompt_recovery.examples import TrainingError
from prompt_recovery.recipe import Cell, Recipe, SubmissionSettings
from prompt_recovery.templates import find_prompt
from prompt_recovery.training import train

WHOLE = 6


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny base in 16 bits (float32, on a CPU)."""
    return shutil.copytree(TINY, tmp_path / "base")


def submit(folder, out, adapter_dir=None, answer=True, **more):
    """How many rows stood in the journal before, and the file that a run of the notebook's steps
    leaves."""
    names = set(SubmissionSettings.names("answers")) | {"fallback_prompt", "time_budget_hours"}
    options = {name: value for name, value in OPTIONS.items() if name in names} | more
    settings = SubmissionSettings(
        model_dir=folder, adapter_dir=adapter_dir, submission_csv=out, **options
    )
    tok = tokenizer.load_tokenizer(folder, pad="unk", side="left")
    job = submission.prepare(rows(WHOLE), settings, tok, max_tokens=400)
    before = len(job.found)
    if answer:
        model = loading.load_base(folder, four_bit=settings.four_bit)
        if adapter_dir is not None:
            model = adapter.load_adapter(model, adapter_dir, folder)
        submission.answer(job, model, tok)
    submission.report(job)
    return before, read(out)["rewrite_prompt"].to_list()


def break_tokenizer(folder):
    """Two pieces of the vocabulary change places, as in a file put together wrongly."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = "▁c", "▁t"
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def one_expert(state):
    state["model.layers.1.block_sparse_moe.experts.3.w1.weight"].mul_(-1)


def as_a_merged_lora(state):
    for name in state:
        if "v_proj" in name:  # its head is the same
            state[name].mul_(1.5)


def test_a_wrong_tokenizer_json_that_is_mended_leaves_no_answer(folder, tmp_path):
    right = submit(folder, tmp_path / "right.csv")
    good = (folder / "tokenizer.json").read_text()
    break_tokenizer(folder)
    assert submit(folder, tmp_path / "s.csv")[1] != right[1]
    (folder / "tokenizer.json").write_text(good)
    assert submit(folder, tmp_path / "s.csv") == (0, right[1])
    assert submit(folder, tmp_path / "s.csv", answer=False) == (WHOLE, right[1])


def test_a_vocabulary_that_only_answers_meet_counts(folder):
    """The rows' ids are the same, what is made of the answer's is not."""
    other = shutil.copytree(folder, folder.with_name("other"))
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    first, second = list(content["model"]["vocab"])[-2:]
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    made = [
        keys.answers_key("", None, tokenizer.load_tokenizer(each), ["1"], [[1, 2]], {})
        for each in (folder, other)
    ]
    assert made[0] != made[1]


@pytest.mark.parametrize("change", [one_expert, as_a_merged_lora])
def test_answers_of_another_base_of_the_same_names_are_not_taken(change, folder, tmp_path):
    first = submit(folder, tmp_path / "s.csv")
    change_weights(folder, change)
    calm = submit(folder, tmp_path / "calm.csv")
    assert submit(folder, tmp_path / "s.csv") == calm and calm[0] == 0
    assert calm[1] != first[1]


def test_answers_in_another_precision_are_not_taken(folder, tmp_path):
    assert submit(folder, tmp_path / "s.csv", four_bit=False)[0] == 0
    assert submit(folder, tmp_path / "s.csv", four_bit=True)[0] == 0
    # both stand in the one journal
    for four_bit in (False, None, True):
        before, _ = submit(folder, tmp_path / "s.csv", answer=False, four_bit=four_bit)
        assert before == WHOLE
    assert [path.name for path in tmp_path.glob("*.journal")] == ["s.csv.journal"]


def test_a_base_and_an_adapter_that_lie_elsewhere_go_on_and_other_bytes_do_not(folder, tmp_path):
    lora = make_adapter(tmp_path / "lora")
    first = submit(folder, tmp_path / "s.csv", lora)
    elsewhere = shutil.copytree(folder, tmp_path / "mount" / "8x7b" / "1")
    moved = shutil.copytree(lora, tmp_path / "mount" / "r16" / "3")
    assert submit(elsewhere, tmp_path / "s.csv", moved, answer=False) == (WHOLE, first[1])
    weights = load_file(moved / "adapter_model.safetensors")
    weights[next(iter(weights))][0, 0] += 1
    with safe_open(lora / "adapter_model.safetensors", "pt") as file:
        save_file(weights, moved / "adapter_model.safetensors", file.metadata())
    assert submit(elsewhere, tmp_path / "s.csv", moved, answer=False)[0] == 0
    assert submit(folder, tmp_path / "s.csv", answer=False)[0] == 0


def test_a_reworded_instruction_is_another_question(folder, tmp_path, monkeypatch):
    submit(folder, tmp_path / "s.csv")
    monkeypatch.setitem(templates.SYSTEM_PROMPTS, "plain", "Say the prompt.")
    assert submit(folder, tmp_path / "s.csv", answer=False)[0] == 0


def test_rows_that_are_cut_or_named_otherwise_are_other_rows():
    tok = tiny_tokenizer()
    made = {
        keys.answers_key("base", None, tok, ids, prompts, settings)
        for ids, prompts, settings in (
            (["1", "2"], [[1], [2]], {"top_p": 1}),
            (["2", "1"], [[1], [2]], {"top_p": 1}),
            (["1", "2"], [[1], None], {"top_p": 1}),
            (["1", "2"], [[1], [2]], {"top_p": 0.9}),
        )
    }
    assert len(made) == 4


def test_a_fingerprint_is_of_the_weights_and_not_of_files_and_places(folder, tmp_path):
    made = base.base_digest(folder)
    # in two files, as a hub has it, and with other things said in the config
    state, index = load_file(folder / "model.safetensors"), {}
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "_name_or_path": "/elsewhere"})
    )
    assert base.base_digest(folder) == made
    assert base.base_digest(folder, four_bit=True) != made
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert base.base_digest(folder) != made


def test_a_loaded_base_is_told_by_any_of_its_weights_and_its_precision():
    loaded = loading.load_base(TINY, four_bit=False)
    made = base.base_digest(loaded)
    assert made.startswith("float32, config ")
    lora = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"]))
    lora.config.use_cache = False
    assert base.base_digest(lora.get_base_model()) == base.base_digest(lora.get_base_model())
    assert base.base_digest(loading.load_base(TINY, four_bit=True)) != made
    assert base.base_digest(loading.load_base(TINY, torch.bfloat16, four_bit=False)) != made
    lora.unload()
    assert base.base_digest(loaded) == made
    loaded.model.layers[1].mlp.experts.down_proj.data.mul_(1.01)
    assert base.base_digest(loaded) != made


def test_a_cell_s_answers_are_of_its_adapter_s_bytes_its_fallback_and_its_decoding(tmp_path):
    cell = Cell(
        max_steps=1, batch_size=2, gradient_accumulation=1, max_tokens=256, max_new_tokens=4
    )
    table = rows(4).assign(rewrite_prompt="Make it rhyme", response="", origin="", file="t.csv")
    tok, model = tokenizer.load_tokenizer(TINY, pad="unk"), loading.load_base(TINY, four_bit=False)
    where = dict(output_dir=tmp_path, model_dir=TINY)

    def kept(**more):
        comparison.run_cell(cell, model, tok, table, table, **where | more)
        return len(list(tmp_path.glob("answers-*.csv")))

    assert kept() == kept() == 1
    assert kept(fallback_prompt="Another one.") == 2
    (path,) = tmp_path.glob("adapter-*/adapter_model.safetensors")
    weights = load_file(path)
    weights[next(iter(weights))][0, 0] += 1
    with safe_open(path, "pt") as file:
        save_file(weights, path, file.metadata())
    assert kept() == 3
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_training_does_not_go_on_with_another_base_or_precision(tmp_path):
    recipe = Recipe(
        output_dir=tmp_path, max_steps=1, batch_size=2, gradient_accumulation=1, warmup_steps=0
    )
    examples = [{"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2]}] * 2
    tok = tiny_tokenizer()

    def run(model, resume):
        lora = adapter.add_lora(model, base="tiny", r=2, target_modules=["q_proj"])
        train(lora, tok, examples, [], replace(recipe, resume=resume))

    run(loading.load_base(TINY, four_bit=False), False)
    run(loading.load_base(TINY, four_bit=False), True)  # it is over: nothing is left to do
    other = loading.load_base(TINY, four_bit=False)
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)  # its head is the same
    for model in (other, loading.load_base(TINY, four_bit=True)):
        with pytest.raises(TrainingError, match="base was float32, config .*, now "):
            run(model, True)


# --- the parser's number --------------------------------------------------------------------------

ANSWERS = [
    "Make it rhyme.", '"Make it rhyme."', "**Prompt:** Make it rhyme.", "The prompt was: Make it.",
    "Make it rhyme.\n\nOriginal text: a", "[/INST] Make it rhyme", "N/A", "-", "...", "",
    '{"prompt": "Make it rhyme."}', '1. why\n2. {"prompt": "Make it rhyme."}', '{"prompt": "Make',
    '{"rewrite\\_prompt": "Make it rhyme."}', '{"prompt": ["Make it", "rhyme"]}', "{}", "[]",
    '{"prompt": {"text": "Make it rhyme."}}', "Make it. " * 30, 'Sure! {"text_prompt": "Do it."}',
    "```json\n{\"prompt\": \"Do it.\"}\n```", "prompt: 'Do it'", "null", "Rewrite this: \ufffd",
]  # fmt: skip


def test_the_parser_s_number_is_raised_where_it_reads_otherwise():
    found = [
        list(find_prompt(text, style, at_limit))
        for text in ANSWERS
        for style in templates.STYLES
        for at_limit in (False, True)
    ]
    assert {keys.PARSER: keys.key(found)} == {4: "629ff1fa3bc84526"}, (
        "answers are read otherwise than under this number: raise keys.PARSER, and put the new key "
        "here, so that answers kept before are not taken for what is read now"
    )
