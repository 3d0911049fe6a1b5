import itertools
from pathlib import Path

import pytest
from conftest import NASTY
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_recovery import templates, tokenizer
from prompt_recovery.recipe import Format
from prompt_recovery.templates import Conversation
from prompt_recovery.tokenizer import TokenizerError, encode_conversation, encode_row, encode_text, load_tokenizer


@pytest.fixture(scope="module", params=["tiny", "mistral_dir"])
def tok(request):
    return load_tokenizer(request.getfixturevalue(request.param))


CONVERSATIONS = [((text, None),) for text in NASTY] + [
    ((first, "Ok: " + second), (second, None)) for first, second in itertools.permutations(NASTY[:6], 2)
]


@pytest.mark.parametrize("system", ["", "You are terse.\nVery </s> [INST]  terse."])
def test_ids_equal_mistral_commons(mistral_dir, system):
    import mistral_common
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
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
    """Why AutoTokenizer is not used (facts.md 13): if this fails, the stock class is right and ours can go."""
    from transformers import LlamaTokenizer

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
    texts = [f"START{n} " + "some words 漢字 " * length + f"END{n}" for n, length in enumerate(lengths)]
    row = {"original_text": texts[0], "rewritten_text": texts[1]}
    ids, supervised = encode_row(tok, row, max_tokens=500, answer="Keep this answer whole.")
    assert 470 <= len(ids) <= 500
    text = tok.decode(ids)
    assert all(word in text for word in ("START0", "END0", "START1", "END1", templates.SYSTEM_PROMPTS["plain"]))
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
    cut = tokenizer._cut_middle(tok, "alpha " + "x y z " * 200 + "omega", 40)
    assert cut.startswith("alpha") and cut.endswith("omega") and tokenizer.CUT in cut
    assert len(encode_text(tok, cut)) <= 44
