"""Which prompts are the same task: by their words, and by an encoder's embeddings."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import regex

from prompt_recovery.data import DataError

# Words that say "rewrite this text" in one way or another. Prompts that differ in these alone are
# one task.
LIGHT = frozenset(
    "a an the this that these it its text texts passage paragraph following given below please "
    "kindly just now so be is are and can could would you me my rewrite write rewritten convert "
    "turn make put change transform in into as to of by with using on like".split()
)
COURTESY = regex.compile(
    "请你?|一些|一点|一下|下面|以下|这段|この|ください|下さい|주세요|กรุณา|โปรด|ช่วย|หน่อย"
)
TURNING = frozenset(  # one of these turns a task round, however long the prompt is
    "not no never none without dont doesnt isnt arent cannot cant except instead more less".split()
)
# One by one: characters of scripts without spaces, signs such as emoji, and a mark that stands in
# quotes. A word keeps what is part of its name (C#, C++, 50%, -5).
TOKENS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
    r"|[-+]?\d+(?:[.,]\d+)*%?(?![\p{L}\p{N}])"
    r"|[[\p{L}\p{N}_]--[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]][[\p{L}\p{M}\p{N}_]"
    r"--[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]*(?:[+]{1,2}|\#)?"
    r"|\p{S}|(?<=[\"“‘«])\p{P}+(?=[\"”’»])",
    regex.VERSION1,
)
# numbers, signs: no spelling or meaning is near another's
DECIDES = regex.compile(r"[\p{N}\p{S}\p{P}]")
LONG = 20  # words: from here on one may be added or left out, and the task is taken to be the same

# Prompts of unlike tasks: their mean cosine is what an encoder gives to texts that have only the
# genre in common (all-MiniLM-L6-v2: 0.27, so the threshold is 0.85).
UNLIKE = (
    "Rewrite this text as a poem.",
    "Translate it into French.",
    "Shorten the text to one sentence.",
    "Use the passive voice.",
    "Make it sound like a pirate.",
    "Correct the spelling.",
    "Turn this into a news report.",
    "Explain it to a child.",
)
# From UNLIKE's mean cosine to 1. The demo's 132 prompts of 22 tasks, 125 groups by wording, become
# 103 groups, at 0.7 they are 66, and at 0.65 52, where news reports join headlines (LOG.md,
# 2026-11-27).
SHARE_OF_THE_WAY = 0.8
NEIGHBOURS = 50  # of each prompt, the nearest ones that are looked at


class _Union:
    """Disjoint sets of 0..n-1, the smallest member their root."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def root(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        self.parent[max(one, other)] = min(one, other)

    def join_equal(self, keys: Iterable[Hashable]) -> None:
        first: dict[Hashable, int] = {}
        for node, key in enumerate(keys):
            self.join(first.setdefault(key, node), node)


def prompt_groups(
    prompts: Sequence[str], similarity: float = 0.9, encoder: Any = None
) -> list[int]:
    """Group number of each prompt, counted from 0 in order of first appearance: one group, one
    task.

    Words are split as the language does, in characters where it has no spaces, and what differs
    decides. Prompts are one task if they have the same words in any order and spelling, those that
    only say "rewrite this text" left aside; or if they have 20 words or more, one word is added or
    left out, and at least the share `similarity` of all their words is common. Another word in the
    same place makes another task.

    encoder: also joins prompts that are near in meaning ("use few words", "be brief"), see
    `embedding_threshold`; it costs the encoding of all prompts (311 a second with MiniLM on two
    cores). Without it 100,000 distinct prompts take 3 to 8 seconds on one core. Raises DataError
    for a similarity that is no share.
    """
    if not 0 < similarity <= 1:
        raise DataError(f"similarity={similarity}: give a share above 0 and up to 1, such as 0.9.")
    wordings = [_wording(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(wordings))
    tokens = _one_spelling([_tokens(wording) for wording in distinct])
    content = [[word for word in own if word not in LIGHT] or own for own in tokens]
    union = _Union(len(distinct))
    union.join_equal(frozenset(Counter(own).items()) for own in content)
    union.join_equal("".join(own) for own in content)  # "sci fi", "scifi"
    if similarity < 1:
        _join_long(union, tokens, similarity)
    if encoder is not None:
        _join_near(union, distinct, content, encoder)
    position = {wording: i for i, wording in enumerate(distinct)}
    numbers: dict[int, int] = {}
    return [numbers.setdefault(union.root(position[wording]), len(numbers)) for wording in wordings]


def _wording(prompt: str) -> str:
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(regex.sub(r"[\p{Cf}'’`]", "", folded).split())


def _tokens(wording: str) -> list[str]:
    return TOKENS.findall(COURTESY.sub("", wording)) or TOKENS.findall(wording) or [wording]


def _one_spelling(texts: list[list[str]]) -> list[list[str]]:
    """Every word replaced by the most frequent spelling: one letter away, with the same first
    letter, and of 7 letters or more, or with a letter added to 5 or more. Numbers have one
    spelling."""
    counts = Counter(word for own in texts for word in own)
    words = [word for word in counts if len(word) >= 5 and not DECIDES.search(word)]
    near: dict[str, list[str]] = defaultdict(list)
    for word in words:
        for place in range(1, len(word)):
            near[word[:place] + word[place + 1 :]].append(word)
        near[word].append(word)
    best = {word: word for word in words}

    def rank(word: str) -> tuple[int, str]:
        return -counts[word], word

    for shorter, spellings in near.items():
        if len(spellings) < 2:
            continue
        usual = min(spellings, key=rank)
        for word in spellings:
            # the two share all letters but one of each: too little in a short word (poem, poet)
            enough = shorter in (word, usual) or len(word) >= 7
            if enough and rank(usual) < rank(best[word]):
                best[word] = usual
    # a frequent spelling is settled before those that follow it
    for word in sorted(words, key=rank):
        best[word] = best[best[word]]
    return [[best.get(word, word) for word in own] for own in texts]


def _join_long(union: _Union, texts: list[list[str]], similarity: float) -> None:
    """Join long texts that differ by one word each, unless it stands in the same place, is a
    number, or turns the task round."""
    first: dict[int, tuple[int, str]] = {}
    for node, own in enumerate(texts):
        words = set(own)
        if len(words) < LONG - 1 or sum(len(word) > 1 for word in own) < LONG - 1:
            continue
        whole = hash(frozenset(words))
        parts = {word: hash(frozenset(words - {word})) for word in words}
        for left_out, key in [("", whole), *parts.items()]:
            other, other_left_out = first.setdefault(key, (node, left_out))
            if other == node or union.root(other) == union.root(node):
                continue
            changed = {left_out, other_left_out} - {""}
            common = len(words | set(texts[other])) - len(changed)
            if (
                common / (common + len(changed)) >= similarity
                and not any(word in TURNING or DECIDES.search(word) for word in changed)
                and not _same_place(own, left_out, texts[other], other_left_out)
            ):
                union.join(other, node)


def _same_place(one: list[str], word: str, other: list[str], replaced: str) -> bool:
    """Whether `word` of one text stands where the other has `replaced`."""
    if not word or not replaced:
        return False
    return any(
        kind == "replace" and word in one[a:b] and replaced in other[c:d]
        for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    )


def embedding_threshold(encoder: Any) -> float:
    """The cosine from which two prompts are taken for one task: 0.8 of the way from unlike prompts
    to equal ones, since encoders differ in what they give to unlike ones."""
    vectors = encoder.encode(list(UNLIKE), normalize_embeddings=True, show_progress_bar=False)
    unlike = float(np.mean((vectors @ vectors.T)[np.triu_indices(len(UNLIKE), 1)]))
    return unlike + SHARE_OF_THE_WAY * (1 - unlike)


def _join_near(union: _Union, wordings: list[str], content: list[list[str]], encoder: Any) -> None:
    """Join the groups whose first prompts are near. The nearest go first, and two groups join only
    where their mean embeddings are near too: else chains of neighbours would end in one group of
    everything."""
    nodes = [node for node in range(len(wordings)) if union.root(node) == node]
    tokenizer = getattr(encoder, "tokenizer", None)
    if tokenizer is not None and nodes:  # what it cannot read, it cannot tell apart
        read = tokenizer([wordings[node] for node in nodes])["input_ids"]
        nodes = [
            node for node, ids in zip(nodes, read, strict=True) if tokenizer.unk_token_id not in ids
        ]
    if not nodes:
        return
    encoded = encoder.encode(
        [wordings[node] for node in nodes], normalize_embeddings=True, show_progress_bar=False
    )
    vectors = np.asarray(encoded, dtype=np.float32)
    threshold = embedding_threshold(encoder)
    pairs: list[tuple[float, int, int]] = []
    for start in range(0, len(nodes), 1024):
        cosines = vectors[start : start + 1024] @ vectors.T
        for row, (near, own) in enumerate(zip(cosines, range(start, len(nodes)), strict=False)):
            near[: own + 1] = -1  # each pair once
            found = np.flatnonzero(near >= threshold)
            if len(found) > NEIGHBOURS:
                found = found[np.argpartition(-near[found], NEIGHBOURS)[:NEIGHBOURS]]
            pairs += [(float(cosines[row, other]), own, int(other)) for other in found]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    # prompts that share a template: the words that differ must be near by themselves
    differing = {
        (own, other): texts
        for _, own, other in pairs
        if (texts := _what_differs(content[nodes[own]], content[nodes[other]])) is not None
    }
    phrases = list({phrase for texts in differing.values() for phrase in texts})
    found = (
        encoder.encode(phrases, normalize_embeddings=True, show_progress_bar=False)
        if phrases
        else []
    )
    meaning = dict(zip(phrases, found, strict=True))
    sums = dict(enumerate(vectors.astype(np.float64)))
    near = _Union(len(nodes))
    for _, own, other in pairs:
        one, two = near.root(own), near.root(other)
        if one == two:
            continue
        if (own, other) in differing:
            left, right = differing[own, other]
            if not left or not right or float(meaning[left] @ meaning[right]) < threshold:
                continue
        cosine = sums[one] @ sums[two] / np.linalg.norm(sums[one]) / np.linalg.norm(sums[two])
        if cosine >= threshold:
            sums[min(one, two)] = sums[one] + sums[two]
            near.join(one, two)
            union.join(nodes[one], nodes[two])


def _what_differs(one: list[str], other: list[str]) -> tuple[str, str] | None:
    """The words that only one has and those that only the other has, if they share a template: half
    of the words or more. An empty text stands for a difference that no embedding may pass over."""
    left = [word for word in one if word not in other]
    right = [word for word in other if word not in one]
    if any(word in TURNING or DECIDES.search(word) for word in left + right):
        return "", ""
    shared = len(set(one) & set(other))
    if left and right and shared >= max(len(left), len(right)):
        return _phrase(left), _phrase(right)
    return None


def _phrase(words: list[str]) -> str:
    return ("" if all(len(word) == 1 for word in words) else " ").join(words)
