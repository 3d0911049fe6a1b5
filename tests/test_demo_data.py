"""The demo's rows, the text that its model was pre-trained on, and the model's folder."""

import csv
import json
import random
from pathlib import Path

import pytest
from conftest import ROOT

DEMO = ROOT / "demo"

import make_rows
from make_rows import FAMILIES, REWRITES, family_of, normalise

TRAIN = {normalise(w) for train, _ in FAMILIES.values() for w in train}
HELD_OUT = {normalise(w) for _, held_out in FAMILIES.values() for w in held_out}


def read(name: str) -> list[dict[str, str]]:
    with (DEMO / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_script_makes_the_committed_bytes(tmp_path: Path) -> None:
    make_rows.main(tmp_path)
    for name in ("rows.csv", "test.csv", "test_truths.csv"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), (
            f"{name}: run python demo/make_rows.py"
        )


def test_size_and_columns() -> None:
    rows, tests, truths = read("rows.csv"), read("test.csv"), read("test_truths.csv")
    assert len(rows) >= 800 and len(tests) >= 100
    assert list(rows[0]) == ["id", "original_text", "rewritten_text", "rewrite_prompt"]
    assert list(tests[0]) == ["id", "original_text", "rewritten_text"]
    assert list(truths[0]) == ["id", "rewrite_prompt", "family"]
    assert [t["id"] for t in tests] == [t["id"] for t in truths]
    ids = [row["id"] for row in rows + tests]
    assert len(set(ids)) == len(ids)


def test_texts_are_distinct_and_of_20_to_80_words() -> None:
    rows = read("rows.csv") + read("test.csv")
    for row in rows:
        assert 20 <= len(row["original_text"].split()) <= 80, row
        assert row["rewritten_text"].strip() and row["rewritten_text"] != row["original_text"], row
        assert "{" not in row["original_text"] + row["rewritten_text"], row
    assert len({row["original_text"] for row in rows}) == len(rows)


def test_families_and_their_wordings() -> None:
    assert len(FAMILIES) >= 15 and set(FAMILIES) == set(REWRITES)
    assert all(len(train) >= 5 and len(held_out) >= 2 for train, held_out in FAMILIES.values())
    wordings = [w for train, held_out in FAMILIES.values() for w in train + held_out]
    assert len({normalise(w) for w in wordings}) == len(wordings)
    used = {
        (family_of(prompt), prompt)
        for prompt in {row["rewrite_prompt"] for row in read("rows.csv")}
    }
    assert used == {
        (family, wording) for family, (train, _) in FAMILIES.items() for wording in train
    }


def test_held_out_wordings_are_only_in_the_test_file() -> None:
    assert not TRAIN & HELD_OUT
    assert {normalise(row["rewrite_prompt"]) for row in read("rows.csv")} <= TRAIN
    truths = read("test_truths.csv")
    assert {normalise(row["rewrite_prompt"]) for row in truths} <= HELD_OUT
    assert all(family_of(row["rewrite_prompt"]) == row["family"] for row in truths)
    assert {row["family"] for row in truths} == set(FAMILIES)


@pytest.mark.parametrize(
    ("prompt", "family"),
    [
        ("Turn this text into pirate speech.", "pirate"),
        ("  turn this TEXT into\npirate speech ", "pirate"),
        ("Make the text sound sad!", "sad"),
        ("Make the text sound bad.", None),
        ("pirate", None),
        ("", None),
        ("😂 [INST]", None),
    ],
)
def test_family_of(prompt: str, family: str | None) -> None:
    assert family_of(prompt) == family


def test_rewrites_change_the_text_in_their_own_way() -> None:
    """One story through every style gives as many different texts, and the telling marks are
    there."""
    marks = {
        "pirate": "th'",
        "questions": "?",
        "bullets": "\n",
        "shouting": "!",
        "first_person": "I",
        "future": "will",
        "letter": "Yours sincerely",
        "robot": "BEEP",
        "steps": "Step 2",
        "fairy_tale": "happily ever after",
        "dialogue": '"',
    }
    for seed in range(20):
        story = make_rows.draw_story(random.Random(seed))
        texts = {
            family: rewrite(story, random.Random(seed)) for family, rewrite in REWRITES.items()
        }
        assert len(set(texts.values())) == len(REWRITES)
        for family, mark in marks.items():
            assert mark in texts[family], (family, texts[family])
        assert texts["shouting"] == texts["shouting"].upper()
        original = make_rows.original(story, random.Random(seed))
        assert len(texts["headline"].split()) < len(original.split()) / 2
        assert len(texts["one_sentence"].split()) < len(original.split())


# ---------------------------------------------------------------------- what the model learned from
def test_pretraining_never_shows_the_inverse_task() -> None:
    """No document answers with a prompt where a text was given, and no held-out wording occurs."""
    import pretrain

    rng = random.Random(0)
    kinds = set()
    for _ in range(1500):
        document = pretrain.draw_document(rng)
        kinds.add(document.kind)
        whole = normalise(pretrain.as_text(document))
        assert not any(wording in whole for wording in HELD_OUT), document
        if not any(wording in normalise(document.answer) for wording in TRAIN):
            continue
        # the answer holds a prompt: then the user gave a prompt, and besides it only a short
        # request to repeat or rephrase it; that the request is no text of ours is the next test
        assert document.kind in ("rephrase", "repeat"), document
        request, given = document.user.split("\n\n")
        assert normalise(given) in TRAIN and len(request.split()) <= 16, document
        assert family_of(given) == family_of(document.answer), document
    assert kinds == {"text", "pairs", "forward", "rephrase", "repeat", "copy"}


def test_pretraining_requests_are_fixed_sentences() -> None:
    """What stands above the prompt in "repeat" and "rephrase" is one of a few sentences, never a
    story."""
    import pretrain

    rng = random.Random(1)
    for draw in (pretrain.draw_repeat, pretrain.draw_rephrase):
        assert len({draw(rng).user.split("\n\n")[0] for _ in range(300)}) == 3


# ------------------------------------------------------------------------------- the model's folder
MODEL = DEMO / "tiny-mixtral"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(MODEL)


def test_model_folder_is_small_and_a_mixtral() -> None:
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 10_000_000
    assert {f.name for f in MODEL.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["num_local_experts"] >= 4 and config["num_experts_per_tok"] == 2
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)


def test_special_ids(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [
        0,
        1,
        2,
        3,
        258,
    ]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None and len(tokenizer) == 2400
    assert set(tokenizer.get_added_vocab()) == {"<unk>", "<s>", "</s>"}
    assert tokenizer.encode("hello")[0] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "tab\tand\nnew\n\nlines\r\n",
        "😂 👨‍👩‍👧 🙈",
        "日本語のテキスト",
        "नमस्ते привет",
        "“q” 's' {x} {{y}}",
        "é é ½ ①",
        "[INST] hi [/INST]",
        "</s><s> <unk> <0x41>",
        "x" * 5000,
        "\x00",
    ],
)
def test_tokenizer_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2}


def test_model_follows_a_prompt_and_stops(tokenizer) -> None:  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    text, _ = make_rows.draw_pair("shouting", random.Random(3))
    prompt = FAMILIES["shouting"][0][0]
    ids = [1, *tokenizer.encode(f"[INST] {prompt}\n\n{text} [/INST]", add_special_tokens=False)]
    out = model.generate(torch.tensor([ids]), max_new_tokens=150, do_sample=False, pad_token_id=0)[
        0, len(ids) :
    ].tolist()
    answer = tokenizer.decode(out[:-1])
    assert out[-1] == 2
    assert answer == answer.upper() and answer.count("!") >= 3


def test_natural_rows_have_reasons_that_do_not_give_the_prompt_away() -> None:
    rows = read("natural_rows.csv")
    assert len(rows) == 300 and len({row["response"] for row in rows}) == 300
    for row in rows:
        words, told = normalise(row["response"]).split(), normalise(row["rewrite_prompt"]).split()
        assert 12 <= len(words) <= 40 and "{" not in row["response"], row["id"]
        if len(told) > 3:
            assert " ".join(told) not in " ".join(words), row["id"]
