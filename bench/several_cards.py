"""A host with two cards and no accelerate launch: a model on one of them trains on the planned
rows, and one whose layers are split over both answers as on one.

python bench/several_cards.py WORK [--layers 4]     two GPUs, about a minute with 4 layers
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from generation import random_prompts
from true_shape import fill, write_checkpoint

from prompt_recovery import training
from prompt_recovery.adapter import add_lora
from prompt_recovery.engine import TrainingPlan, generate, load_base, memory
from prompt_recovery.recipe import Recipe

ROWS, ACCUMULATION, STEPS = 4, 2, 3


class Tokenizer:
    """What training asks of a tokenizer."""

    eos_token_id, pad_token_id = 2, 0


def train(base, work: Path, four_bit: bool) -> None:
    """Print the rows that the model's forward sees in each call."""
    lora = add_lora(base, base="bench")
    seen: list[int] = []
    lora.get_input_embeddings().register_forward_pre_hook(
        lambda _m, args: seen.append(len(args[0]))
    )
    rows = [
        dict(input_ids=ids + [2], labels=[-100] * len(ids) + [2])
        for ids in random_prompts([60] * 24)
    ]
    training.plan_of = lambda *_: TrainingPlan(ROWS, ACCUMULATION)
    recipe = Recipe(output_dir=str(work / f"train-{four_bit}"), max_steps=STEPS)
    training.train(lora, Tokenizer(), rows, [], recipe)  # type: ignore[arg-type]
    right = seen == [ROWS] * ACCUMULATION * STEPS
    print(f"4-bit {four_bit}: rows of each forward {seen}, {'as planned' if right else 'WRONG'}")
    lora.unload()


def answers(base) -> list[list[int]]:
    prompts = random_prompts([60, 200, 333, 500] * 4)
    return [
        each.answers[0].ids for each in sorted(generate(base, prompts, eos=-1, max_new_tokens=16))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    write_checkpoint(args.work / "zeros", args.layers)
    found = []
    free = memory.free_memory()
    for split in (False, True):
        # as cards of which none has room for the model
        few = {number: int((1.8 + 0.46 * args.layers) * 2**30) for number in free}
        memory.free_memory = lambda few=few, split=split: few if split else free
        torch.manual_seed(0)
        base = load_base(args.work / "zeros", torch.bfloat16, four_bit=True)
        fill(base)
        where = {str(next(layer.parameters()).device) for layer in base.model.layers}
        print("cards with layers:", sorted(where))
        assert len(where) == 1 + split, "not the cards that are to be compared"
        found.append(answers(base))
        train(base, args.work, True)
        del base
        gc.collect()
        torch.cuda.empty_cache()
    memory.free_memory = lambda: free
    train(load_base(args.work / "zeros", torch.bfloat16, four_bit=False), args.work, False)
    same = sum(a == b for a, b in zip(*found, strict=True))
    print(f"answers of the split model equal to those on one card: {same} of {len(found[0])}")


if __name__ == "__main__":
    main()
