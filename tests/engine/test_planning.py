"""How a model answers on cards that aren't there: plans, what they print, and the table of bytes
against what torch holds."""

import shutil

import pytest
import torch
from memory_cases import Alive
from tiny_bases import MIXTRAL, write
from tiny_models import random_prompts
from torch.utils._python_dispatch import _disable_current_modes
from transformers import GPT2Config, MixtralConfig

from prompt_recovery import __main__ as program
from prompt_recovery import adapter
from prompt_recovery.engine import (
    TooLittleMemory,
    generate,
    loading,
    plan,
    planning,
    reckoning,
    storage,
)
from prompt_recovery.engine.generation import ready
from prompt_recovery.engine.memory import GIB
from prompt_recovery.engine.planning import AnswerPlan, bytes_of, shape_of

PLANS = [  # GiB, layers, merged, the least and the most cache tokens, least piece
    ([14.7, 14.7], (16, 16), False, 16_000, 26_000, 2048),
    ([22.9, 22.9], (16, 16), True, 60_000, 120_000, 4096),
    ([40], (32,), True, 60_000, 120_000, 4096),
    ([16] * 4, (16, 16), True, 16_000, 40_000, 1024),
    ([78], (32,), True, 300_000, 420_000, 16_384),
]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("cards, layers, merged, least, most, piece", PLANS)
def test_plans(true_shape, cards, layers, merged, least, most, piece, saved):
    planned = plan(true_shape[saved], cards)
    found = planned.answering
    assert found.layers == layers and found.merged == merged and found.piece >= piece
    assert least <= found.cache_tokens <= most
    # what a card has is used, and never more
    for part, card in zip(planned.bytes, cards, strict=False):
        assert sum(part) <= card * GIB
    fullest = max(sum(part) / card for part, card in zip(planned.bytes, cards, strict=False))
    assert fullest > 0.999 * GIB
    # 2 x 8 heads x 128 x 2 bytes a layer
    assert planned.bytes[0].cache == found.cache_tokens * layers[0] * 4096
    assert planned.on_cpu == (not saved and max(cards) < 22)


def test_one_card_of_24_is_refused_with_figures(true_shape, capsys):
    with pytest.raises(
        TooLittleMemory, match=r"needs 23\.8 GiB .weights 22\.8.* free are \[23\.\d\] GiB"
    ):
        plan(true_shape[1], [24])
    assert program.main(["plan", str(true_shape[1]), "--cards", "24"]) == 1
    captured = capsys.readouterr()
    assert "TooLittleMemory: The model needs 23.8 GiB" in captured.err and not captured.out


def test_the_program_prints_a_plan_without_a_gpu(true_shape, capsys):
    assert (
        program.main(["plan", str(true_shape[0]), "--cards", "14.7", "14.7", "--per-hour", "2"])
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "layers a card: 16, 16 of 32" in printed and "adapter beside the 4-bit weights" in printed
    )
    assert "put together in the host's memory" in printed
    weights = next(line for line in printed.splitlines() if line.startswith("weights"))
    assert weights.split()[1:] == ["11.40", "11.40"]
    assert "on T4s, reckoned" in printed and "at 2.00 an hour" in printed
    program.main(["plan", str(true_shape[1]), "--cards", "40"])
    assert "reckoned" not in capsys.readouterr().out


def test_the_program_quantises_a_folder_once(tmp_path, tiny, capsys):
    target = tmp_path / "nf4"
    assert program.main(["quantise", str(tiny), str(target)]) == 0
    assert f"written: {target}" in capsys.readouterr().out
    ids = torch.tensor([[1, 300, 400]])
    saved, loaded = loading.load_base(target), loading.load_base(tiny, four_bit=True)
    assert torch.equal(saved(ids).logits, loaded(ids).logits)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert program.main(["quantise", str(tiny), str(target)]) == 1
    assert "is there already; give a new folder" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in target.iterdir()}


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["plan", "{tmp}/none", "--cards", "40"], "has no config.json"),
        (["plan", "{tmp}/gpt2", "--cards", "40"], "models of type gpt2 are not known"),
        (["plan", "{tiny}", "--cards", "inf"], "give GiB, such as 14.7"),
        (["plan", "{tiny}", "--cards", "40", "--rows", "{tmp}/none.csv"], "none.csv"),
        (["quantise", "{tmp}/cut", "{tmp}/out"], "SafetensorError"),
        (["quantise", "{tiny}", "/proc/none/out"], "proc"),
    ],
)
def test_bad_input_is_a_line(arguments, why, tmp_path, tiny, capsys):
    (tmp_path / "gpt2").mkdir()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    shutil.copytree(tiny, tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    capsys.readouterr()
    assert program.main([each.format(tmp=tmp_path, tiny=tiny) for each in arguments]) == 1
    captured = capsys.readouterr()
    assert why in captured.err and "layers a card" not in captured.out


def test_a_test_set_s_own_lengths_are_reckoned(tmp_path, mistral_dir, true_shape, capsys):
    import pandas as pd

    folder = shutil.copytree(true_shape[1], tmp_path / "base")
    shutil.copy(mistral_dir / "tokenizer.model", folder)
    rows = pd.DataFrame(
        dict(
            id=range(3),
            original_text=["a b c"] * 3,
            rewritten_text=["d e f", "g " * 500, "h " * 9000],
        )
    )
    rows.to_csv(tmp_path / "test.csv", index=False)
    assert (
        program.main(["plan", str(folder), "--cards", "40", "--rows", str(tmp_path / "test.csv")])
        == 0
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if "rows," in line)
    assert line.startswith("3 rows,") and 4032 < int(line.split()[2]) < 4032 + 2000


def test_t4s_are_reckoned_in_one_way(true_shape):
    """Figures of docs/MEASURED.md: 54 ms a card and step, 25.5 GFLOP a token, 15 to 20 minutes for
    1,300 rows."""
    planned = plan(true_shape[1], [14.7, 14.7])
    spent = reckoning.on_t4s(planned, [690] * 1300, 64)
    pieces = 690 * 1300 / planned.answering.piece
    flops = 690 * 1300 * 25.5e9 / 50e12
    assert spent.reading == pytest.approx(flops + pieces * 45.1e9 * 2.5 / 520e9, rel=0.02)
    groups = -(-1300 // (planned.answering.cache_tokens // 754))
    assert spent.writing / groups / 63 == pytest.approx(2 * 0.054, rel=0.15)
    assert (
        15 * 60 < sum(reckoning.on_t4s(planned, [690] * 1300, 64)._replace(loading=300)) < 23 * 60
    )


def test_a_training_on_t4s_is_reckoned_in_the_same_way_and_printed(true_shape, capsys):
    """1,500 rows of 600 tokens, 3 epochs, 4 rows at a time, one card at a time: 6 N operations a
    token, three dequantisations of all experts for each micro-batch."""
    planned = plan(true_shape[1], [14.7, 14.7])
    how = dict(at_a_time=4, held_out=150, new_tokens=64)
    spent = reckoning.train_on_t4s(planned, 1500, 600, 3, **how)
    tokens = 1500 * 600 * 3
    assert spent.multiplying == pytest.approx(tokens * 3 * 25.5e9 / 25e12, rel=0.02)
    assert spent.dequantising == pytest.approx(1125 * 3 * 45.1e9 * 2.5 / 260e9, rel=0.01)
    assert spent.steps < 3.5 * 3600
    # half of the rows at a time dequantise twice as often; twice the epochs are twice the time
    small = reckoning.train_on_t4s(planned, 1500, 600, 3, **how | dict(at_a_time=2))
    assert small.dequantising == pytest.approx(2 * spent.dequantising)
    assert reckoning.train_on_t4s(planned, 1500, 600, 6, **how).steps == 2 * spent.steps
    command = ["plan", str(true_shape[1]), "--cards", "14.7", "14.7", "--train"]
    assert program.main([*command, "1500", "600", "3"]) == 0
    printed = capsys.readouterr().out
    assert "reckoned: 1500 rows x 600 tokens x 3 epochs, 4 rows at a time, one card" in printed
    assert f"steps alone {spent.steps / 3600:.2f} h" in printed and "of 150 rows" in printed
    for bad in (["0", "600", "3"], ["1500", "nan", "3"], ["1500", "600", "inf"]):
        assert program.main([*command, *bad]) == 1 and "--train" in capsys.readouterr().err
    command[3:5] = ["40"]
    assert program.main([*command, "1500", "600", "3"]) == 1
    assert "reckoned for T4s" in capsys.readouterr().err


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("rows, length, piece", [(1, 1000, 256), (8, 120, 256), (4, 256, 1024)])
def test_the_table_is_what_torch_holds(rows, length, piece, merged, tmp_path, monkeypatch):
    """Mixtral's proportions in small, in bf16 by plain torch, which has no workspaces and no
    graphs."""
    config = MIXTRAL | dict(
        hidden_size=256,
        intermediate_size=896,
        num_local_experts=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=320,
        max_position_embeddings=2048,
    )
    base = loading.load_base(
        write(tmp_path / "m", MixtralConfig(**config)), torch.bfloat16, four_bit=True
    )
    lora = adapter.add_lora(base, base="m", r=16).eval()
    columns = -(-(length + 4) // 64) * 64
    monkeypatch.setattr(planning, "LONGEST", columns)
    monkeypatch.setattr(planning, "GRAPHS", 0)
    # bitsandbytes' way on a CPU has index tensors of its own
    by_torch = storage._by_torch

    def uncounted(*args, **kwargs):
        with _disable_current_modes():
            return by_torch(*args, **kwargs)

    monkeypatch.setattr(storage, "_by_torch", uncounted)
    prompts = random_prompts([length] * rows)
    with Alive() as alive, ready(lora, AnswerPlan((2,), merged, piece, rows * columns)) as prepared:
        alive.peak = alive.now
        list(generate(prepared, prompts, eos=-1, max_new_tokens=4, share_prefix=False))
        table = bytes_of(
            shape_of(base.config, torch.bfloat16),
            2,
            weights=0,
            last=True,
            piece=piece,
            rows=rows,
            cache_tokens=rows * columns,
            merged=merged,
            triton=False,
        )
    counted = table.to_come - table.margin
    # a bf16 LoRA beside the weights, 2 MB for logits and draws of so small a vocabulary are not in
    # it
    assert 0.5 < alive.peak / counted < 1.02, (alive.peak, table)
