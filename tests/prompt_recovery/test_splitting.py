"""Prompt groups and the split: one task on one side, variety on both, kept in a file."""

import os
import random
import time

import numpy as np
import pandas as pd
import pytest
from conftest import table
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_recovery.data import DataError, clean_rows, normalise, read_rows
from prompt_recovery.files import read_csv
from prompt_recovery.prompt_groups import embedding_threshold, prompt_groups
from prompt_recovery.splitting import (
    SPLIT_COLUMNS,
    describe_split,
    hold_back,
    read_or_split,
)

# 1,000 row files are a run of some minutes:
# SPLIT_EXAMPLES=1000 pytest tests/prompt_recovery/test_splitting.py
EXAMPLES = int(os.environ.get("SPLIT_EXAMPLES", "50"))


def rows_of(prompts):
    return table([(f"o{i}", f"n{i}", prompt) for i, prompt in enumerate(prompts)])


def test_near_duplicates_share_a_group():
    prompts = [
        "Rewrite this text as a pirate.",
        "rewrite this TEXT, as a pirate",
        "Rewrite this text as a poet.",
        "Summarise it.",
        "Summarize it!",
        "Make it formal and short",
        "Make it short and formal.",
        "Please rewrite the following text so that it sounds like a news report from today",
        "Please rewrite the following text so that it sounds like a news report from now on today",
        "改写这段文字，使其更正式一些",
        "改写这段文字,使其更正式一点",
        "Use 50 words",
        "Use 900 words",
        "",
    ]
    assert prompt_groups(prompts) == [0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8]


def test_groups_join_transitively_and_only_as_far_as_asked():
    words = [f"word{'abcdefghijklmnopqrstuvwxyz'[i] * 4}" for i in range(22)]
    # neighbours share 19 of 21, the ends 18 of 22
    chain = [" ".join(words[i : i + 20]) for i in range(3)]
    assert 18 / 22 < 0.85 < 19 / 21
    assert prompt_groups([chain[0], chain[2]]) == [0, 1]
    assert prompt_groups(chain) == [0, 0, 0]
    assert prompt_groups(chain, similarity=1.0) == [0, 1, 2]
    assert prompt_groups([]) == []
    with pytest.raises(DataError, match="similarity=85"):
        prompt_groups(chain, similarity=85)


def test_five_thousand_prompts_are_grouped_in_seconds():
    dice = random.Random(0)
    who = ["".join(dice.choices("abcdefgh", k=7)) for _ in range(5000)]
    start = time.perf_counter()
    groups = prompt_groups([f"Rewrite this text as a {name} would say it" for name in who])
    # 4 s measured on one core; the worst of four kinds of prompts tried
    assert time.perf_counter() - start < 30
    assert 1000 < len(set(groups)) < 5000


def test_split_leaks_no_group_and_depends_on_the_seed():
    dice = random.Random(1)
    kinds = [
        f"Turn it into a {noun}"
        for noun in ("poem", "song", "letter", "joke", "memo", "haiku", "play", "diary")
    ]
    prompts = [dice.choice(kinds) + dice.choice(["", ".", "!", " "]) for _ in range(400)]
    rows = table([(f"o{i}", f"r{i}", prompt) for i, prompt in enumerate(prompts)])
    train, held_out = read_or_split(rows, None, 0.25, seed=3)
    assert sorted([*train["id"], *held_out["id"]]) == sorted(rows["id"])
    assert not set(train["rewrite_prompt"].map(normalise)) & set(
        held_out["rewrite_prompt"].map(normalise)
    )
    assert 0.15 < len(held_out) / 400 < 0.35
    again = read_or_split(rows, None, 0.25, seed=3)
    pd.testing.assert_frame_equal(again[1], held_out)
    assert (
        len({tuple(read_or_split(rows, None, 0.25, seed=seed)[1]["id"]) for seed in range(8)}) > 1
    )


def test_split_passes_over_a_group_too_large_for_eval():
    prompts = ["Make it rhyme"] * 80 + [
        f"Say it in {word}" for word in ("Dutch", "Greek", "Farsi", "Welsh") for _ in range(5)
    ]
    rows = table([(f"o{i}", f"r{i}", prompt) for i, prompt in enumerate(prompts)])
    for seed in range(10):
        train, held_out = read_or_split(rows, None, 0.1, seed)
        assert len(held_out) == 10 and len(train) == 90


def test_split_sides_are_never_empty_unless_asked():
    with pytest.raises(DataError, match="no rows"):
        read_or_split(table([]), None, 0.1, 0)
    rows = table(
        [
            (f"o{i}", f"r{i}", prompt)
            for i, prompt in enumerate(["Make it rhyme"] * 5 + ["Be brief"] * 5)
        ]
    )
    for fraction in (0.01, 0.5, 0.99):
        assert [len(part) for part in read_or_split(rows, None, fraction, 0)] == [5, 5]
    train, held_out = read_or_split(rows, None, 0, 0)
    assert len(train) == 10 and len(held_out) == 0 and [*held_out] == [*rows, "group"]
    with pytest.raises(DataError, match="eval_fraction=0"):
        read_or_split(rows.head(5), None, 0.2, 0)
    for fraction in (1, -0.1, float("nan")):
        with pytest.raises(DataError, match="eval_fraction="):
            read_or_split(rows, None, fraction, 0)


WHO = "pirate poet doctor teacher robot child king chef lawyer farmer".split()
CHINESE = (
    "海盗 诗人 医生 学生 老师 老人 机器人 国王 厨师 律师 "
    "农民 记者 侦探 孩子 祖母 将军 船长 法官 演员 歌手".split()
)
JAPANESE = "海賊 詩人 医者 先生 学生 ロボット 子供 王様 シェフ 弁護士".split()
THAI = "โจรสลัด กวี หมอ ครู หุ่นยนต์ เด็ก กษัตริย์ ทนาย ชาวนา นักข่าว".split()
TEMPLATES = {
    "Rewrite this text as a {} would say it, keep the meaning and the length the same.": WHO,
    "Rewrite as a {}": WHO,
    "Please rewrite the passage below, which I found in an old book, so that it reads as if a {} "
    "had written "
    "it for a friend, without changing what happens or in which order it is told": WHO,
    "请以{}的口吻改写这段文字，保持意思和长度不变。": CHINESE,
    "この文章を{}のように書き直してください。": JAPANESE,
    "เขียนข้อความนี้ใหม่ในแบบของ{}": THAI,
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_template_with_other_words_is_as_many_tasks_as_words(template, embedded, encoder):
    prompts = [template.format(word) for word in TEMPLATES[template]]
    groups = prompt_groups(prompts, encoder=encoder if embedded else None)
    assert len(set(groups)) == len(prompts)
    train, held_out = read_or_split(rows_of(prompts * 20), None, 0.2, 0)
    assert train["rewrite_prompt"].nunique() >= 5 and held_out["rewrite_prompt"].nunique() >= 2


@pytest.mark.parametrize(
    "one, other",
    [
        ("Make it formal.", "Make it informal."),
        ("Use 100 words.", "Use 1000 words."),
        ("Use contractions.", "Don't use contractions."),
        ("Make it rhyme.", "Make it not rhyme."),
        ("Rewrite this text in C", "Rewrite this text in C#"),
        ('End it with "?"', 'End it with "!"'),
        ("Answer with 😀", "Answer with 😢"),
        ("Austrian German", "Australian German"),
    ],
)
def test_a_word_that_carries_the_task_makes_two(one, other, encoder):
    assert prompt_groups([one, other]) == [0, 1] == prompt_groups([one, other], encoder=encoder)


@pytest.mark.parametrize(
    "one, other",
    [
        ("Rewrite this text in the passive voice", "Rewrite the text using the passive voice"),
        ("Turn this text into a poem.", "Rewrite the following text as a poem"),
        ("改写 这段 文字,使其正式", "请改写这段文字，使其正式"),
        ("Write it in sci-fi style", "Write it in scifi style"),
        ("Use colourful words", "use  colorful WORDS"),
        ("Make it\u200b rhyme", "Make it rhyme"),
        ("이 글을 해적처럼 써 주세요", "이 글을 해적 처럼 써주세요"),
    ],
)
def test_other_spacing_spelling_or_lead_words_are_one_task(one, other):
    assert prompt_groups([one, other]) == [0, 0]


def test_with_an_encoder_paraphrases_share_a_group_and_unlike_tasks_do_not(encoder):
    from make_rows import family_of  # demo/: six wordings of each of 22 tasks

    assert 0.8 < embedding_threshold(encoder) < 0.9
    prompts = pd.read_csv("demo/rows.csv", dtype=str)["rewrite_prompt"].drop_duplicates().to_list()
    tasks = np.array([family_of(prompt) for prompt in prompts])
    pairs = np.triu_indices(len(prompts), 1)
    same = tasks[pairs[0]] == tasks[pairs[1]]
    shares = []
    for used in (None, encoder):
        groups = np.array(prompt_groups(prompts, encoder=used))
        joined = groups[pairs[0]] == groups[pairs[1]]
        assert not (joined & ~same).any()
        shares.append((joined & same).sum() / same.sum())
    assert shares[0] < 0.05 and shares[1] > 0.1


def test_paraphrases_far_apart_in_a_chain_do_not_end_in_one_group():
    class Circle:
        """Texts as points on a circle, a degree apart: each is near its neighbours, the ends are
        opposite."""

        def encode(self, texts, **options):
            degrees = [
                float(text.split()[1]) if text.startswith("angle") else 47.0 * n
                for n, text in enumerate(texts)
            ]
            return np.array(
                [(np.cos(np.radians(d)), np.sin(np.radians(d))) for d in degrees], dtype=np.float32
            )

    words = "".join(chr(ord("a") + n % 26) for n in range(200))
    prompts = [f"angle {d} {words[d : d + 9]}" for d in range(180)]
    assert len(set(prompt_groups(prompts, encoder=Circle()))) > 3


def test_a_hundred_thousand_prompts_are_grouped_within_a_minute(encoder):
    dice = random.Random(0)
    names = ["".join(dice.choices("abcdefghijklmnop", k=8)) for _ in range(60_000)]
    prompts = [f"Rewrite this text as a {name} would say it" for name in names]
    prompts += [" ".join(dice.choices(names, k=25)) for _ in range(20_000)]
    prompts += ["".join(dice.choices("改写这段文字海盗诗人医生学生", k=14)) for _ in range(20_000)]
    start = time.perf_counter()
    groups = prompt_groups(prompts)
    assert time.perf_counter() - start < 60  # 6 s on one core
    assert len(set(groups)) > 50_000


def test_one_prompt_of_nearly_all_rows_leaves_variety_on_both_sides():
    prompts = ["Improve this text."] * 190 + [f"Say it in {word}" for word in WHO]
    for seed in range(10):
        train, held_out = read_or_split(rows_of(prompts), None, 0.1, seed)
        assert train["rewrite_prompt"].nunique() >= 6 and held_out["rewrite_prompt"].nunique() >= 4
        assert len(train) > 190
    report = describe_split(*read_or_split(rows_of(prompts), None, 0.1, 0))
    assert (
        "195 rows to train on, 6 distinct prompts in 6 groups, 97% of the rows in the largest"
        in report
    )
    assert "5 rows held out, 5 distinct prompts in 5 groups, 20%" in report
    assert (
        report.count("WARNING") == 1
        and "97% of the rows to train on have the prompt 'Improve this text.'" in report
    )
    even = describe_split(
        *read_or_split(rows_of([f"Say it in {word}" for word in WHO * 4]), None, 0.2, 0)
    )
    assert "WARNING" not in even


PHRASES = st.one_of(
    st.sampled_from(
        [template.format(word) for template, words in TEMPLATES.items() for word in words]
    ),
    st.sampled_from(
        [
            f"Make it {word}{end}"
            for word in ("formal", "sad", "short", "funny")
            for end in ("", ".", "!!")
        ]
    ),
    st.text(min_size=1, max_size=30).filter(lambda text: text.strip()),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(
        st.tuples(PHRASES, st.sampled_from([1, 1, 1, 2, 5, 40, 300])), min_size=1, max_size=80
    ),
    st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5, 0.9]),
    st.integers(0, 3),
)
def test_any_row_file_is_split_with_variety_on_both_sides(parts, fraction, seed):
    prompts = [prompt for prompt, times in parts for _ in range(times)]
    groups = prompt_groups(prompts)
    if len(set(groups)) < 2:
        with pytest.raises(DataError, match="nearly the same prompt"):
            read_or_split(rows_of(prompts), None, fraction, seed)
        return
    train, held_out = read_or_split(rows_of(prompts), None, fraction, seed)
    assert len(train) and len(held_out) and len(train) + len(held_out) == len(prompts)
    group_of = dict(zip(prompts, groups, strict=True))
    sides = [set(side["rewrite_prompt"].map(group_of)) for side in (train, held_out)]
    assert not sides[0] & sides[1]
    least = min(5, len(set(groups)) / 10)
    assert all(len(side) >= least for side in sides)
    wordings = [side["rewrite_prompt"].map(normalise).nunique() for side in (train, held_out)]
    # a group of many wordings stands on one side: the other can only have what is left
    in_group = (
        pd.Series(groups).groupby([normalise(prompt) for prompt in prompts]).first().value_counts()
    )
    possible = in_group.sum() - in_group.max() - len(in_group) // 2
    assert min(wordings) >= min(5, sum(wordings) / 10, max(1, possible))


def test_the_split_is_kept_and_read_back_without_the_encoder(tmp_path, encoder, capsys):
    prompts = [
        f"Say it {how}"
        for how in ("in few words", "briefly", 'like a "king"', "as\ra pirate", "N/A", "007")
    ] * 4
    rows, path = rows_of(prompts), tmp_path / "split.csv"
    first = read_or_split(rows, path, 0.3, 1, encoder)
    assert "0.85 of their embeddings" in capsys.readouterr().out
    kept = read_csv(path)
    assert list(kept.columns) == list(SPLIT_COLUMNS) and kept["rewrite_prompt"].to_list() == prompts
    assert kept["split"].eq("held_out").sum() == len(first[1]) > 0
    flipped = kept.assign(split=kept["split"].map({"train": "held_out", "held_out": "train"}))
    flipped.to_csv(path, index=False, quoting=1)  # a split that nothing installed would make
    train, held_out = read_or_split(rows, path, 0.3, 1, None, again=True)
    pd.testing.assert_frame_equal(train, first[1])
    pd.testing.assert_frame_equal(held_out, first[0])
    with pytest.raises(DataError, match="24 rows there, 20 now"):
        read_or_split(rows.head(20), path, 0.3, 1, again=True)
    with pytest.raises(DataError, match="column rewrite_prompt differs"):
        read_or_split(rows.assign(rewrite_prompt=prompts[::-1]), path, 0.3, 1, again=True)
    with pytest.raises(
        DataError, match="eval_fraction=0.3 seed=1, now it is eval_fraction=0.3 seed=2"
    ):
        read_or_split(rows, path, 0.3, 2, again=True)
    # anew, the file replaced
    pd.testing.assert_frame_equal(read_or_split(rows, path, 0.3, 1, encoder)[0], first[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("held_out", "test"), r"has the split \['test'\].*train or held"),
        (lambda text: text.replace("train", "held_out", 1), "group '0' has the split .*held_out"),
        (lambda text: "", "is damaged .*remove it"),
        (lambda text: text + '"', "is damaged .*remove it"),
    ],
)
def test_a_split_edited_by_hand_is_read_as_it_says_or_refused(tmp_path, change, said):
    rows, path = (
        rows_of([f"Say it as a {who}" for who in WHO for _ in range(3)]),
        tmp_path / "s.csv",
    )
    read_or_split(rows, path, 0.3, 1)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=said):
        read_or_split(rows, path, 0.3, 1, again=True)


def test_a_part_of_the_held_out_rows_is_held_back_for_the_report(capsys):
    prompts = [f"Say it in {word}" for word in WHO + CHINESE for _ in range(4)]
    rows = rows_of(prompts).assign(group=prompt_groups(prompts))
    chooses, reported = hold_back(rows, 0)
    assert len(chooses) + len(reported) == 120 and 50 <= len(chooses) <= 64
    assert not set(chooses["group"]) & set(reported["group"])
    assert "of the same prompts" not in capsys.readouterr().out
    few, others = hold_back(rows.head(40), 0)  # too few groups to choose by half of them
    assert len(few) == len(others) == 20 and not set(few["id"]) & set(others["id"])
    assert few["group"].nunique() > 5 and others["group"].nunique() > 5
    assert "choose the checkpoint, 20 are for the report, of the same" in capsys.readouterr().out
    one = rows_of(["Say it"] * 200).assign(group=0)
    chooses, reported = hold_back(one, 0)
    assert (
        len(chooses) == 64 and not set(chooses["id"]) & set(reported["id"]) and len(reported) == 136
    )
    chooses, reported = hold_back(rows.head(39), 0)
    assert chooses["id"].to_list() == reported["id"].to_list() == rows["id"].head(39).to_list()
    assert "39 held-out rows, fewer than 40: the same rows choose" in capsys.readouterr().out
    assert len(hold_back(rows.head(0), 0)[1]) == 0 and not capsys.readouterr().out


def test_no_one_group_is_most_of_what_is_held_out_where_smaller_ones_are_enough():
    prompts = [f"Say it in {word}" for word in WHO for _ in range(30)] + [
        f"Use {n} words" for n in range(200)
    ]
    for seed in range(10):
        _, held_out = read_or_split(rows_of(prompts), None, 0.1, seed)
        assert (
            held_out["rewrite_prompt"].value_counts(normalize=True).iloc[0] < 0.25
            and len(held_out) == 50
        )


def own_split(tmp_path, *sides):
    """Rows of two prompts, with a column split where sides are given."""
    path = tmp_path / "own.csv"
    pd.DataFrame(
        {
            "original_text": [f"text {n}" for n in range(len(sides))],
            "rewritten_text": [f"rewritten {n}" for n in range(len(sides))],
            "rewrite_prompt": [
                ["Make it rhyme.", "Turn it into a letter."][n % 2] for n in range(len(sides))
            ],
            "split": sides,
        }
    ).to_csv(path, index=False)
    return clean_rows(read_rows(path))[0]


def test_the_rows_own_split_is_taken_as_it_is(tmp_path, capsys):
    rows = own_split(tmp_path, "train", "held_out", "train", "held_out", "train", "train")
    file = tmp_path / "split.csv"
    train, held_out = read_or_split(rows, file, 0.5, 3)
    assert [list(side["original_text"].str[-1]) for side in (train, held_out)] == [
        ["0", "2", "4", "5"],
        ["1", "3"],
    ]
    assert "the rows' own; 1 of 2 tasks stand on both sides: the score" in capsys.readouterr().out
    again = read_or_split(rows, file, 0.1, 7, again=True)
    pd.testing.assert_frame_equal(again[1], held_out)
    other = own_split(tmp_path, "held_out", "train", "train", "held_out", "train", "train")
    with pytest.raises(DataError, match="another split than that of the rows' own column"):
        read_or_split(other, file, 0.5, 3, again=True)


def test_a_split_column_that_can_not_be_taken_is_refused_and_a_blank_one_is_none(tmp_path):
    for sides, said in (
        (["train", "test"], r"holds 'test' in own\.csv:2: write train or held_out"),
        (["train", ""], "holds ''"),
        (["held_out", "held_out"], "none is left to train on"),
    ):
        with pytest.raises(DataError, match=said):
            read_or_split(own_split(tmp_path, *sides), None, 0.5, 0)
    train, held_out = read_or_split(own_split(tmp_path, "", ""), None, 0.5, 0)
    assert len(train) == len(held_out) == 1 and "split" not in train
