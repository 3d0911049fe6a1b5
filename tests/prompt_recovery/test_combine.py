"""Several answers into one: order, uniqueness, the scorer's length, agreement, the threshold."""

from pathlib import Path

import numpy as np
import pytest
from conftest import NASTY
from sentencepiece import SentencePieceProcessor

from prompt_recovery import combine as c
from prompt_recovery import metric

MEAN = "Please improve this text while keeping its meaning."


def test_tokens_are_the_scorer_s():
    pieces = SentencePieceProcessor(model_file=str(Path(c.__file__).with_name("t5_pieces.model")))
    # by the tokenizer.json of T5 (sha256 fe2ebbbb...), which gives the same ids for all rows of
    # demo/ too: LOG.md
    known = {
        "translate English to German: The house is wonderful.": [
            13959,
            1566,
            12,
            2968,
            10,
            37,
            629,
            19,
            1627,
            5,
        ],
        "Das Haus ist wunderbar.": [644, 4598, 229, 19250, 5],
    }
    for text, ids in known.items():
        assert pieces.encode(text) == ids and c.count_tokens(text) == len(ids) + 1
    assert pieces.get_piece_size() == 32_000 and c.count_tokens("") == 1
    spelled = pieces.encode("good</s>", out_type=str)
    assert "</s>" not in spelled and "".join(spelled) == "▁good</s>"
    assert c.count_tokens("good</s>") > c.count_tokens("good") == 2
    assert c.count_tokens("  a \n b  ") == c.count_tokens("a b")
    assert all(c.count_tokens(text) <= len(text) * 18 + 2 for text in NASTY)


def test_first_leaves_the_answer_as_it_is():
    assert c.combine(["haiku please", "Write a haiku."]) == "haiku please"
    assert c.combine([" a </s> [INST] {x} ", "b"]) == "a </s> [INST] {x}"
    assert c.combine(["haiku please"], mean_prompt=MEAN) == f"haiku please. {MEAN}"
    assert c.combine(["", " \n"], mean_prompt=MEAN) == MEAN


def test_join_takes_each_wording_once_and_the_most_agreed_first():
    answers = [
        "Make it rhyme",
        "make this a poem!",
        "Make it  RHYME.",
        "Make this a poem",
        "make this a poem",
    ]
    assert c.combine(answers, "join") == "make this a poem! Make it rhyme"
    assert (
        c.combine(answers, "join", mean_prompt="make it rhyme") == "make this a poem! make it rhyme"
    )


def test_agreement_is_by_meaning(encoder):
    answers = [
        "Add more dragons",
        "Turn this into a haiku",
        "Write it as a haiku",
        "make a haiku from this",
    ]
    agreed = c.agreements(answers, encoder)
    by_hand = [
        np.mean([metric.sharpened_cosine([a], [b], encoder)[0] for b in answers if b is not a])
        for a in answers
    ]
    assert np.allclose(agreed, by_hand) and agreed.argmin() == 0
    assert c.combine(answers, "agree", encoder=encoder) == answers[int(agreed.argmax())]
    joined = c.combine(answers, "join", encoder=encoder, limit=1000)
    assert joined.endswith("Add more dragons") and all(answer in joined for answer in answers)
    assert c.agreements(answers[:1], encoder).tolist() == [1.0]
    # equals: the earlier one
    assert c.combine(["b", "a", "a", "b"], "agree", encoder=encoder) == "b"


@pytest.mark.parametrize("strategy", c.STRATEGIES)
def test_never_longer_than_the_scorer_reads(encoder, strategy):
    count = c.count_tokens
    options = dict(mean_prompt=MEAN, encoder=encoder)
    for answers in [[text, "Make it formal."] for text in NASTY] + [
        NASTY,
        ["wörd" * 400],
        ["a b" * 900, "x " * 900],
    ]:
        combined = c.combine(answers, strategy, **options)
        assert combined.strip() and count(combined) <= c.LIMIT
    long = " ".join(f"Rewrite number {n} as a letter to the owner." for n in range(60))
    cut = c.combine([long], strategy, encoder=encoder)
    # whole words, and little room left
    assert long.startswith(cut + " ") and c.LIMIT - 6 < count(cut) <= c.LIMIT


def test_what_is_added_fits_and_a_shorter_one_follows():
    answers = ["Make it formal.", "very long " * 70, "Make it a poem."]
    assert c.combine(answers, "join") == "Make it formal. Make it a poem."
    assert c.combine(answers, "join", mean_prompt=MEAN) == f"Make it formal. Make it a poem. {MEAN}"
    # no room for all: the mean prompt goes before a second answer
    limit = c.count_tokens(f"Make it formal. {MEAN}")
    assert c.combine(answers, "join", mean_prompt=MEAN, limit=limit) == f"Make it formal. {MEAN}"
    by_letters = c.combine(answers, "join", count=len, limit=len("Make it formal. Make it a poem."))
    assert by_letters == "Make it formal. Make it a poem."
    many = c.combine(["Make it formal."] + [f"Answer number {n}" for n in range(40)], "join")
    assert (
        many.startswith("Make it formal. Answer number 0. Answer")
        and c.LIMIT - 6 < c.count_tokens(many) <= c.LIMIT
    )


def test_disagreement_falls_back_to_the_mean_prompt(encoder):
    same, apart = (
        ["Make it a poem", "Turn it into a poem"],
        ["Make it a poem", "Add a list of prices"],
    )
    low, high = (c.agreements(answers, encoder).mean() for answers in (apart, same))
    assert low < 0.2 < 0.4 < high
    options = dict(mean_prompt=MEAN, encoder=encoder, threshold=0.3)
    for strategy in c.STRATEGIES:
        assert c.combine(apart, strategy, **options) == MEAN
        assert c.combine(same, strategy, **options).endswith(f" {MEAN}")
        # nothing to disagree with
        assert c.combine(same[:1], strategy, **options) == f"Make it a poem. {MEAN}"


def test_threshold_is_the_best_of_all_on_these_rows():
    random = np.random.default_rng(0)
    for _ in range(50):
        agreed = random.integers(0, 8, 30) / 8  # many equal ones
        scores, means = random.normal(agreed, 0.3), random.normal(0.4, 0.1, 30)
        found = c.pick_threshold(agreed, scores, means)
        reached = {
            t: np.where(agreed < t, means, scores).mean() for t in [*np.arange(-0.05, 1.2, 0.1), -9]
        }
        got = np.where(agreed < found, means, scores).mean() if found is not None else scores.mean()
        assert got == pytest.approx(max(reached.values()))
    assert c.pick_threshold([0.1, 0.9], [0.5, 0.5], [0.4, 0.4]) is None
    assert c.pick_threshold([0.1, 0.9], [0.1, 0.9], [0.5, 0.5]) == 0.5
    assert c.pick_threshold([0.1, 0.9], [0.1, 0.2], [0.5, 0.5]) > 0.9


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a"], "best"), "first, join, agree"),
        ((["", " "],), "blank"),
        (([],), "blank"),
        ((["a"], "agree"), "encoder"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        c.combine(*arguments)


def test_more_refusals(encoder):
    with pytest.raises(ValueError, match="mean_prompt"):
        c.combine(["a"], encoder=encoder, threshold=0.5)
    with pytest.raises(ValueError, match="encoder"):
        c.combine(["a"], mean_prompt=MEAN, threshold=0.5)
    with pytest.raises(ValueError, match="limit=1"):
        c.combine(["a"], limit=1)
    for bad in [([0.1], [0.1, 0.2], [0.1]), ([], [], []), ([0.1], [float("nan")], [0.1])]:
        with pytest.raises(ValueError, match="same rows"):
            c.pick_threshold(*bad)
