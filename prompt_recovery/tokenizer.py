"""Conversations to token ids, the way Mistral's instruct format (v1) has them, without
special-token injection.

`encode_conversation` is the only place where ids and the loss mask are made: training and
generation both call it, so the prompt that is trained on and the prompt that is answered are the
same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from prompt_recovery.recipe import PADS, Format
from prompt_recovery.templates import Conversation, render_conversation

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
# sha256 of the pieces of Mistral's v1 vocabulary in the order of their ids, a line each
MISTRAL_V1 = "9667493c598ed599f14df3157cb9a6f373d49a1b2d99d98c79e937ff490d219b"
PROBE = "a</s><s> <unk>[INST]  two  spaces\n\tné 漢 😀"
# stands where the middle of an over-long text was; plain ASCII, so that it costs 2-3 tokens
CUT = " ... "


class TokenizerError(ValueError):
    """A tokenizer that does not follow Mistral's conventions, or a row that cannot be encoded."""


def load_tokenizer(
    model_dir: str | Path, pad: str = "<pad>", side: str = "right"
) -> PreTrainedTokenizerFast:
    """The tokenizer of a Mixtral folder, with a pad token that is not EOS.

    `tokenizer.model` (Mistral's reference) is preferred to `tokenizer.json`. Neither goes through
    `AutoTokenizer`: transformers 5 rebuilds it as a `LlamaTokenizer` whose ids differ from
    Mistral's own ("[INST]" after <s>, two spaces), and saves it so. Of a `tokenizer.json` with
    Mistral's vocabulary only the vocabulary is taken, which gives all ids.

    pad: "<pad>" adds a token (its id is the vocabulary's size, so that training resizes the input
    embeddings); "unk" pads with id 0, which every base has. Never EOS: collators that mask by id
    would mask the answer's end too.
    side: "right" to train, "left" to generate.
    Raises TokenizerError for an unknown pad, a missing or broken file, a vocabulary without <unk>
    0, <s> 1, </s> 2, the tokenizers of Mistral's later models (v2, v3), and a tokenizer.json as
    transformers 5 saves other vocabularies.
    """
    if pad not in PADS:
        raise TokenizerError(
            f"pad is {pad!r}; it must be one of {PADS}. EOS would never be learned as a stop."
        )
    folder = Path(model_dir)
    if (folder / "tokenizer.model").is_file():
        backend = _from_sentencepiece(folder / "tokenizer.model")
    elif (folder / "tokenizer.json").is_file():
        backend = _from_json(folder / "tokenizer.json")
    else:
        raise TokenizerError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; give the base model's "
            "folder."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side=side, **SPECIAL_TOKENS
    )
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS.values()]
    if ids != [0, 1, 2]:
        raise TokenizerError(
            f"{folder}: <unk>, <s>, </s> have the ids {ids}; Mistral's are 0, 1, 2. Use Mixtral's "
            "files."
        )
    if pad == "<pad>":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    else:
        tokenizer.pad_token = SPECIAL_TOKENS["unk_token"]
    probe = encode_text(tokenizer, PROBE)
    if any(i < 3 for i in probe):
        raise TokenizerError(
            f"{folder}: text such as </s> becomes a special token; use the folder's "
            "tokenizer.model."
        )
    if tokenizer.decode(probe) != PROBE:
        raise TokenizerError(
            f"{folder}: {PROBE!r} comes back as {tokenizer.decode(probe)!r}: a broken tokenizer. "
            "Use the files of the base model as the hub has them."
        )
    return tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, model_dir: str | Path
) -> None:
    """Raises TokenizerError where a tokenizer can't be that of a base with vocab_size embeddings:
    ids beyond them, or a twentieth of them without a piece (bases are padded by less)."""
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    if not 0.95 * vocab_size <= size <= vocab_size:
        raise TokenizerError(
            f"{model_dir}: the tokenizer has {size} pieces, the model {vocab_size} embeddings: it "
            "is another model's. Put this base's own tokenizer.model there."
        )


def _from_json(path: Path) -> Tokenizer:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocab, normaliser = raw["model"]["vocab"], json.dumps(raw["normalizer"])
        pieces = "\n".join(sorted(vocab, key=vocab.__getitem__))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{path} is no tokenizer.json of a BPE ({_cause(path, error)}): fetch it again."
        ) from error
    _refuse_later_versions(
        path, {*vocab, *(each.get("content") for each in raw.get("added_tokens", []))}
    )
    if hashlib.sha256(pieces.encode()).hexdigest() == MISTRAL_V1:
        # what tokenizer.model says: pieces in the order of their scores, runs of spaces last
        hidden = {*SPECIAL_TOKENS.values(), *(f"<0x{byte:02X}>" for byte in range(256))}
        scores = {
            piece: -1e9 if set(piece) == {"▁"} else float(-number)
            for piece, number in vocab.items()
        }
        return _bpe(vocab, scores, hidden)
    if "Prepend" not in normaliser:
        raise TokenizerError(
            f"{path} puts no space before a text, as transformers 5 saves it, and gives other ids "
            "than the model was trained with: put the base's tokenizer.model there."
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no class of its own
        raise TokenizerError(f"{path} can't be read ({error}): fetch it again.") from error


def _refuse_later_versions(path: Path, pieces: set[str]) -> None:
    if "[INST]" in pieces:
        raise TokenizerError(
            f"{path} has a control token [INST]: it is Mistral's v2 or v3, of later models, and "
            "only v1 is written here (Mixtral-8x7B-Instruct-v0.1, Mistral-7B-Instruct-v0.1 and "
            "v0.2)."
        )


def _cause(path: Path, error: Exception) -> str:
    pointer = path.read_bytes()[:40].startswith(b"version https://git-lfs")
    return (
        "a Git LFS pointer, not the file itself" if pointer else f"{type(error).__name__}: {error}"
    )


def _from_sentencepiece(path: Path) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"{path} is no SentencePiece model ({_cause(path, error)}): fetch it again."
        ) from error
    size = pieces.get_piece_size()
    vocab = {pieces.id_to_piece(i): i for i in range(size)}
    _refuse_later_versions(path, set(vocab))
    hidden = {
        p
        for p, i in vocab.items()
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)
    }
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(size)}
    return _bpe(vocab, scores, hidden)


def _bpe(vocab: dict[str, int], scores: dict[str, float], hidden: set[str]) -> Tokenizer:
    # merges ordered by the pieces' scores: ordered by id (transformers' default) "▁▁" would win
    # over "▁the"
    from transformers.tokenization_utils_base import generate_merges

    merges = generate_merges(vocab, scores, skip_tokens=hidden)
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text as text: no BOS, and `</s>` or `<pad>` in it give ordinary pieces, never
    special ids."""
    return (
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if text
        else []
    )


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation, answer: str | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and which of them are supervised: the answer and its EOS, nothing else.

    `<s>` before `[INST] user [/INST] assistant</s>` ... `[INST] user [/INST]`, then the answer and
    `</s>` if given. Every bracketed piece is encoded on its own, as mistral-common's v1 does.
    Earlier answers are context, not targets.
    """
    ids = [tokenizer.bos_token_id] + encode_text(tokenizer, conversation.before)
    for user, assistant in conversation.turns:
        ids += encode_text(tokenizer, f"[INST] {user} [/INST]")
        if assistant is not None:
            ids += encode_text(tokenizer, assistant) + [tokenizer.eos_token_id]
    supervised = [False] * len(ids)
    if answer is not None:
        target = encode_text(tokenizer, answer) + [tokenizer.eos_token_id]
        ids += target
        supervised += [True] * len(target)
    return ids, supervised


def encode_row(
    tokenizer: PreTrainedTokenizerFast,
    row: Mapping[Any, Any],  # str keys; pandas calls its records' keys Hashable
    *,
    max_tokens: int,
    format: Format = Format(),  # noqa: B008  (frozen)
    examples: Sequence[Mapping[str, Any]] = (),
    answer: str | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids and loss mask of a row, at most max_tokens long.

    Where they are longer, the middle of the original and of the rewritten text is cut out, in
    proportion to their lengths (a short one keeps an eighth of both texts' tokens); the
    instruction, the examples and the answer are never cut.

    Args:
        tokenizer: of `load_tokenizer`.
        row: with original_text and rewritten_text.
        max_tokens: of all, the answer included.
        format: by which the row becomes a conversation.
        examples: rows with their prompts that stand before it, see `render_conversation`.
        answer: what training teaches; None: the conversation stays open.

    Raises TokenizerError where those alone do not fit.
    """
    original, rewritten = str(row["original_text"]), str(row["rewritten_text"])

    def encode(first: str, second: str) -> tuple[list[int], list[bool]]:
        conversation = render_conversation(
            first, second, format.style, format.system_placement, examples
        )
        return encode_conversation(tokenizer, conversation, answer)

    ids, supervised = encode(original, rewritten)
    if len(ids) <= max_tokens:
        return ids, supervised
    lengths = [len(encode_text(tokenizer, text)) for text in (original, rewritten)]
    text_tokens = max_tokens - (len(ids) - sum(lengths))
    # pieces join differently once the text is cut, so the first guess can be some tokens off:
    # shrink by the excess
    while text_tokens > 0:
        # a short text beside a huge one keeps up to an eighth of both texts' tokens: in strict
        # proportion it would vanish
        first = max(text_tokens * lengths[0] // sum(lengths), min(lengths[0], text_tokens // 8))
        first = min(first, text_tokens - min(lengths[1], text_tokens // 8))
        second = text_tokens - first
        ids, supervised = encode(
            _cut_middle(tokenizer, original, first), _cut_middle(tokenizer, rewritten, second)
        )
        if len(ids) <= max_tokens:
            return ids, supervised
        text_tokens -= len(ids) - max_tokens
    fixed = len(encode("", "")[0])
    raise TokenizerError(
        f"max_tokens is {max_tokens}, but instruction, examples and answer alone take {fixed} "
        f"tokens and are never cut; raise max_tokens to {fixed + 64} or more, or give fewer "
        "examples."
    )


def loses_its_middle(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[Any, Any], *, max_tokens: int, format: Format
) -> bool:
    """Whether `encode_row` cuts the row's texts."""
    texts = str(row["original_text"]), str(row["rewritten_text"])
    whole = render_conversation(*texts, format.style, format.system_placement)
    return len(encode_conversation(tokenizer, whole)[0]) > max_tokens


def _cut_middle(tokenizer: PreTrainedTokenizerFast, text: str, keep: int) -> str:
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    spans = encoded["offset_mapping"]
    if len(spans) <= keep:
        return text
    keep = max(0, keep - len(encode_text(tokenizer, CUT)))
    head, tail = keep - keep // 2, keep // 2
    return (
        text[: spans[head - 1][1] if head else 0]
        + CUT
        + text[spans[-tail][0] if tail else len(text) :]
    )
