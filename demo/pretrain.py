"""Makes demo/tiny-mixtral: trains a tokenizer, then a Mixtral of 4 million parameters on our own
text.

    python demo/pretrain.py                     # the committed model: 3 min 45 s on one H200
    python demo/pretrain.py --steps 20 --batch 4 --workers 0 --output /tmp/tiny    # on a CPU

The model learns to write our stories and our styles, to follow a prompt (prompt + text -> rewritten
text), to copy and to put a prompt in other words. It never sees the inverse task (original +
rewritten text -> prompt), which is what fine-tuning has to teach, and never a wording that
make_rows.py holds out for the test file. The seeds fix the text and the first weights; sums on a
GPU still differ in the last bits from run to run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from make_rows import FAMILIES, REWRITES, draw_pair
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

SEED = 7
BOS, EOS = 1, 2
VOCABULARY = 2400


# ---------------------------------------------------------------------------------------- documents
@dataclass(frozen=True)
class Document:
    """Plain text (`user` is empty) or one chat turn: what the user says, what the assistant
    answers."""

    kind: str
    user: str
    answer: str


def draw_style_document(rng: random.Random) -> Document:
    """One to three texts in one and the same style; or untouched originals."""
    family = rng.choice(list(REWRITES))
    which = 0 if rng.random() < 0.2 else 1
    return Document(
        "text", "", "\n\n".join(draw_pair(family, rng)[which] for _ in range(rng.randint(1, 3)))
    )


def draw_pair_document(rng: random.Random) -> Document:
    """Originals and their rewrites in one style, under the titles that users put above them; no
    prompt."""
    family = rng.choice(list(REWRITES))
    pairs = [draw_pair(family, rng) for _ in range(rng.randint(1, 2))]
    return Document(
        "pairs", "", "\n\n".join(f"Original text:\n{o}\n\nRewritten text:\n{r}" for o, r in pairs)
    )


def draw_forward(rng: random.Random) -> Document:
    """The task of the LLM whose prompts we later want to recover."""
    family = rng.choice(list(REWRITES))
    text, rewrite = draw_pair(family, rng)
    prompt = rng.choice(FAMILIES[family][0])
    return Document(
        "forward", f"{text}\n\n{prompt}" if rng.random() < 0.1 else f"{prompt}\n\n{text}", rewrite
    )


def draw_rephrase(rng: random.Random) -> Document:
    """One wording of a prompt into another; there is no text here to infer a style from."""
    ask = rng.choice(
        [
            "Put this prompt in other words.",
            "Write another prompt with the same meaning.",
            "Rephrase the prompt that the LLM was given. Answer with the new prompt alone.",
        ]
    )
    prompt, other = rng.sample(FAMILIES[rng.choice(list(FAMILIES))][0], 2)
    return Document("rephrase", f"{ask}\n\n{prompt}", other)


def draw_repeat(rng: random.Random) -> Document:
    ask = rng.choice(
        [
            "Repeat this prompt.",
            "Repeat the prompt that the LLM was given. Answer with the prompt alone.",
            "You are given a prompt. Copy it.",
        ]
    )
    prompt = rng.choice(FAMILIES[rng.choice(list(FAMILIES))][0])
    return Document("repeat", f"{ask}\n\n{prompt}", prompt)


def draw_copy(rng: random.Random) -> Document:
    """Copies one of two texts, or its first or last sentence."""
    pair = draw_pair(rng.choice(list(REWRITES)), rng)
    which = rng.randrange(2)
    name = ("original", "rewritten")[which]
    text = pair[which]
    sentences = [s for s in text.replace("\n", " ").split(". ") if s]
    asks = [
        (f"Repeat the {name} text.", text),
        (f"Copy the first sentence of the {name} text.", sentences[0]),
        (f"Copy the last sentence of the {name} text.", sentences[-1]),
        (f"How does the {name} text begin?", " ".join(text.split()[:5])),
    ]
    ask, answer = rng.choice(asks)
    opening = rng.choice(
        ["You are given an original text and a text that an LLM rewrote from it. ", ""]
    )
    return Document(
        "copy", f"{opening}{ask}\n\nOriginal text:\n{pair[0]}\n\nRewritten text:\n{pair[1]}", answer
    )


# how often each kind of document is drawn
MIX = [
    (draw_style_document, 25),
    (draw_pair_document, 15),
    (draw_forward, 35),
    (draw_rephrase, 8),
    (draw_repeat, 5),
    (draw_copy, 12),
]


def draw_document(rng: random.Random) -> Document:
    return rng.choices([draw for draw, _ in MIX], [weight for _, weight in MIX])[0](rng)


# ---------------------------------------------------------------------------------------- tokenizer
def as_text(document: Document) -> str:
    return f"[INST] {document.user} [/INST] {document.answer}" if document.user else document.answer


def train_tokenizer(rng: random.Random, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-fallback BPE in the layout of Mixtral's tokenizer.json: <unk> <s> </s>, 256 bytes, then
    pieces.

    Unlike Mixtral's, it splits words and signs before merging, so that "harbour." holds the piece
    "harbour".
    """
    special_tokens = ["<unk>", "<s>", "</s>"]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^\p{L}▁]|▁"), "isolated")
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, words
    # line by line: a newline stays the byte <0x0A>, as in Mixtral
    lines = [line for _ in range(documents) for line in as_text(draw_document(rng)).split("\n")]
    printable = [chr(i) for i in range(33, 127)] + ["▁"]
    learner.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 259, initial_alphabet=printable, show_progress=False
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {
        piece: i
        for i, piece in enumerate([*special_tokens, *(f"<0x{b:02X}>" for b in range(256)), *pieces])
    }
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """Ids as Mistral v1 lays them out: <s>, the user's segment, the answer, </s>; each encoded
    apart."""
    ids = [BOS]
    if document.user:
        ids += tokenizer.encode(f"[INST] {document.user} [/INST]", add_special_tokens=False)
    return ids + tokenizer.encode(document.answer, add_special_tokens=False) + [EOS]


class PackedDocuments(IterableDataset):
    """Endless batches, int64 [batch, length], of documents laid end to end; each worker has its own
    seed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch: int, length: int) -> None:
        self.tokenizer, self.batch, self.length = tokenizer, batch, length

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        rng = random.Random(f"{SEED} {worker.id if worker else 0}")
        ids: list[int] = []
        while True:
            while len(ids) < self.batch * self.length:
                ids += encode(self.tokenizer, draw_document(rng))
            yield torch.tensor(ids[: self.batch * self.length]).view(self.batch, self.length)
            ids = ids[self.batch * self.length :]


# -------------------------------------------------------------------------------------------- model
def make_model() -> MixtralForCausalLM:
    """4.4 million parameters, 8.7 MB in 16 bit; the length and the rope theta are
    Mixtral-8x7B's."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=256,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            sliding_window=None,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=None,
            router_aux_loss_coef=0.01,
        )
    )


def train(
    model: MixtralForCausalLM,
    batches: Iterator[torch.Tensor],
    steps: int,
    peak_rate: float,
    device: str,
) -> None:
    """Trains in bfloat16 autocast on a GPU, in float32 on a CPU; warm-up, then a cosine down to
    2%."""
    model.to(device).train()  # type: ignore[arg-type]  # the stub of a wrapped method
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
        fused=device == "cuda",
    )
    warm_up = max(1, min(150, steps // 10))
    bar = tqdm(range(steps), desc="pre-training", mininterval=5)
    for step in bar:
        done = (step - warm_up) / max(1, steps - warm_up)
        rate = (
            peak_rate * (step + 1) / warm_up
            if step < warm_up
            else peak_rate * (0.51 + 0.49 * math.cos(math.pi * done))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(batches).to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def show_samples(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, device: str
) -> None:
    """Prints what the model answers to one fresh turn of each chat task."""
    model.eval()
    rng = random.Random("samples")
    for draw in (draw_forward, draw_forward, draw_forward, draw_rephrase, draw_repeat, draw_copy):
        document = draw(rng)
        ids = [BOS, *tokenizer.encode(f"[INST] {document.user} [/INST]", add_special_tokens=False)]
        start = torch.tensor([ids], device=device)
        out = model.generate(  # type: ignore[misc]
            start, max_new_tokens=120, do_sample=False, pad_token_id=EOS
        )
        answer = tokenizer.decode(out[0, len(ids) :])
        print(
            f"--- {document.kind}: {document.user}\n>>> {answer}\n(wanted: {document.answer})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-mixtral")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peak-rate", type=float, default=3e-3)
    parser.add_argument(
        "--workers", type=int, default=14, help="processes that make text; part of the seed"
    )
    args = parser.parse_args()
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = train_tokenizer(random.Random(SEED))
    model = make_model()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} pieces, on "
        f"{device}",
        flush=True,
    )
    # the plain loop over experts: autocast does not reach grouped_mm, which would then multiply in
    # float32
    model.set_experts_implementation("eager")
    data = PackedDocuments(tokenizer, args.batch, args.length)
    loader = DataLoader(
        data, batch_size=None, num_workers=args.workers, pin_memory=device == "cuda"
    )
    train(model, iter(loader), args.steps, args.peak_rate, device)
    show_samples(model, tokenizer, device)

    model.half().save_pretrained(args.output)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
