import itertools
import json
import shutil
from pathlib import Path

import mistral_common
import pytest
from conftest import NASTY, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from prompt_recovery import templates, tokenizer
from prompt_recovery.recipe import Format
from prompt_recovery.templates import Conversation
from prompt_recovery.tokenizer import (
    TokenizerError,
    check_tokenizer,
    encode_conversation,
    encode_row,
    encode_text,
    load_tokenizer,
)


@pytest.fixture(scope="module", params=["tiny", "mistral_dir"])
def tok(request):
    return load_tokenizer(request.getfixturevalue(request.param))


CONVERSATIONS = [((text, None),) for text in NASTY] + [
    ((first, "Ok: " + second), (second, None))
    for first, second in itertools.permutations(NASTY[:6], 2)
]


@pytest.mark.parametrize("system", ["", "You are terse.\nVery </s> [INST]  terse."])
def test_ids_equal_mistral_commons(mistral_dir, system):
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    data = Path(mistral_common.__file__).parent / "data"
    oracle = MistralTokenizer.from_file(str(data / "tokenizer.model.v1"))
    ours = load_tokenizer(mistral_dir)
    assert len(CONVERSATIONS) >= 30
    for turns in CONVERSATIONS:
        messages = [SystemMessage(content=system)] if system else []
        for user, assistant in turns:
            messages.append(UserMessage(content=user))
            if assistant is not None:
                messages.append(AssistantMessage(content=assistant))
        expected = oracle.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        (user, assistant), *rest = turns
        placed = ((f"{system}\n\n{user}" if system else user, assistant), *rest)
        ids, supervised = encode_conversation(ours, Conversation("", placed))
        assert ids == expected, turns
        assert not any(supervised)


def test_stock_loading_would_give_other_ids(mistral_dir):
    """Why AutoTokenizer is not used: if this fails, the stock class is right and ours can go."""
    stock = LlamaTokenizer(vocab_file=str(mistral_dir / "tokenizer.model"))
    ours = load_tokenizer(mistral_dir)
    assert stock("a  b", add_special_tokens=False)["input_ids"] != encode_text(ours, "a  b")


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_and_gives_no_special_ids(tok, text):
    ids = encode_text(tok, text)
    assert min(ids) > 2 and max(ids) < len(tok) - 1  # neither <unk>, <s>, </s> nor <pad>
    assert tok.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_gives_no_special_ids(tok, text):
    ids = encode_text(tok, text)
    assert not set(ids) & {0, 1, 2, tok.pad_token_id}


def test_answer_and_eos_alone_are_supervised(tok):
    conversation = Conversation("", (("example", "shown"), ("Make it rhyme: </s>", None)))
    prompt, nothing = encode_conversation(tok, conversation)
    ids, supervised = encode_conversation(tok, conversation, "Rhyme this.")
    answer = encode_text(tok, "Rhyme this.")
    assert ids == prompt + answer + [2]
    assert supervised == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert not any(nothing)
    assert ids.count(1) == 1 and ids[0] == 1


@pytest.mark.parametrize("placement", templates.SYSTEM_PLACEMENTS)
@pytest.mark.parametrize("style", templates.STYLES)
def test_training_prefix_is_the_generation_prompt(tok, style, placement):
    row = {"original_text": "a {x}", "rewritten_text": "b\n\n"}
    options = dict(max_tokens=4000, format=Format(style=style, system_placement=placement))
    prompt, _ = encode_row(tok, row, **options)
    ids, supervised = encode_row(tok, row, answer="1. r\n2. x", **options)
    assert ids[: len(prompt)] == prompt
    assert supervised.index(True) == len(prompt)


@pytest.mark.parametrize("lengths", [(3000, 1000), (10, 5000), (5000, 0), (800, 800)])
def test_long_texts_lose_their_middle_in_proportion(tok, lengths):
    texts = [
        f"START{n} " + "some words 漢字 " * length + f"END{n}" for n, length in enumerate(lengths)
    ]
    row = {"original_text": texts[0], "rewritten_text": texts[1]}
    ids, supervised = encode_row(tok, row, max_tokens=500, answer="Keep this answer whole.")
    assert 470 <= len(ids) <= 500
    text = tok.decode(ids)
    assert all(
        word in text
        for word in ("START0", "END0", "START1", "END1", templates.SYSTEM_PROMPTS["plain"])
    )
    kept = [i for i, keep in zip(ids, supervised, strict=True) if keep]
    assert kept == encode_text(tok, "Keep this answer whole.") + [2]
    if lengths == (3000, 1000):
        original, rewritten = text.split("Rewritten text:")
        assert 2.2 < len(original.split("Original text:")[1]) / len(rewritten) < 3.8


def test_no_room_is_an_error(tok):
    with pytest.raises(TokenizerError, match="raise max_tokens to"):
        encode_row(tok, {"original_text": "a " * 99, "rewritten_text": "b"}, max_tokens=20)


def test_pads_and_sides(tiny):
    added, unk = load_tokenizer(tiny), load_tokenizer(tiny, pad="unk", side="left")
    assert (added.pad_token_id, added.padding_side) == (2400, "right")
    assert (unk.pad_token_id, unk.padding_side, len(unk)) == (0, "left", 2400)
    with pytest.raises(TokenizerError, match="'</s>'; it must be one of"):
        load_tokenizer(tiny, pad="</s>")
    with pytest.raises(TokenizerError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tiny.parent)


def test_cut_middle_keeps_both_ends(tiny):
    tok = load_tokenizer(tiny)
    long = {"original_text": "alpha " + "x y z " * 200 + "omega", "rewritten_text": "b"}
    whole = tok.decode(encode_row(tok, long, max_tokens=10_000)[0])
    ids, _ = encode_row(tok, long, max_tokens=160)
    before, after = tok.decode(ids).split(tokenizer.CUT)
    assert whole.startswith(before) and whole.endswith(after) and 150 < len(ids) <= 160
    assert before.count("x y") > 2 < after.count("x y") and "alpha" in before and "omega" in after


# --- files as other programs leave them ---------------------------------------------------------


def saved_by(mistral_dir, folder, way):
    """tokenizer.json of Mistral's vocabulary as three programs save it; no tokenizer.model."""
    if way == "ours":
        load_tokenizer(mistral_dir).save_pretrained(folder)
    else:
        {"auto": AutoTokenizer, "llama": LlamaTokenizer}[way].from_pretrained(
            mistral_dir
        ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", ["auto", "llama", "ours"])
def test_a_tokenizer_json_of_mistral_s_vocabulary_gives_mistral_s_ids_whoever_saved_it(
    mistral_dir, tmp_path, way
):
    right, found = (
        load_tokenizer(mistral_dir),
        load_tokenizer(saved_by(mistral_dir, tmp_path / "t", way)),
    )
    assert encode_text(found, "[INST] a")[0] == 733 and encode_text(found, "a  b")[1] == 28705
    rows = (ROOT / "demo" / "natural_rows.csv").read_text()
    for text in [*NASTY, *("x" + " " * n + "y" for n in range(1, 40)), rows]:
        assert encode_text(found, text) == encode_text(right, text)
        assert found.decode(encode_text(found, text)) == text
    if way != "ours":  # what is corrected: if this fails, transformers saves it right
        stock = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
        assert stock.encode("a  b", add_special_tokens=False).ids != encode_text(right, "a  b")


def test_a_tokenizer_json_of_another_vocabulary_as_transformers_5_saves_it_is_refused(
    tiny, tmp_path
):
    raw = json.loads((tiny / "tokenizer.json").read_text())
    raw |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="as transformers 5 saves it.*tokenizer.model"):
        load_tokenizer(tmp_path)


DATA = Path(mistral_common.__file__).parent / "data"
LATER = sorted(path for path in DATA.glob("*.model.v*") if not path.name.endswith("v1"))


@pytest.mark.parametrize("path", LATER, ids=[path.name for path in LATER])
def test_the_tokenizers_of_later_models_are_refused_by_name(tmp_path, path):
    shutil.copy(path, tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"control token \[INST\].*v2 or v3.*v0.1"):
        load_tokenizer(tmp_path)
    saved = tmp_path / "json"
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(saved)
    with pytest.raises(TokenizerError, match=r"v2 or v3|<unk>, <s>, </s> have the ids"):
        load_tokenizer(saved)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:dadfd56d\nsize 493443\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "content",
    [LFS, b"", b"[1, 2]", b"<!DOCTYPE html>", b'{"model": {}}', b'{"model": {"vocab": 3}}'],
)
def test_broken_files_are_named_with_their_remedy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        TokenizerError, match=rf"{name}.*{'LFS pointer' if content == LFS else ''}.*fetch it again"
    ):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, tiny):
    raw = json.loads((tiny / "tokenizer.json").read_text())
    raw["model"] |= {
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3},
        "merges": [],
        "byte_fallback": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="special token|comes back as"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tiny, mistral_dir):
    check_tokenizer(load_tokenizer(tiny), 2400, tiny)
    check_tokenizer(load_tokenizer(tiny), 2432, tiny)  # padded
    check_tokenizer(load_tokenizer(mistral_dir), 32_000, mistral_dir)
    for size in (2399, 32_000):
        with pytest.raises(TokenizerError, match=f"2400 pieces, the model {size} embeddings"):
            check_tokenizer(load_tokenizer(tiny), size, tiny)
