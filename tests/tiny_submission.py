"""A submission of the tiny model: rows and settings."""

import pandas as pd
from conftest import TINY
from peft import LoraConfig, get_peft_model

from prompt_recovery import adapter
from prompt_recovery.engine import loading

FALLBACK = "Fall, back"
OPTIONS = dict(
    fallback_prompt=FALLBACK,
    time_budget_hours=1,
    style="plain",
    system_placement="user",
    max_tokens=400,
    max_new_tokens=4,
    model_dir=TINY,
)


def make_adapter(folder, format=None):
    lora = get_peft_model(
        loading.load_base(TINY), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    lora.peft_config["default"].base_model_name_or_path = "tiny-mixtral"
    return adapter.save_adapter(lora, folder, format)


def rows(count, words=6):
    texts = [" ".join(f"{n} cat{i}" for i in range(words)) for n in range(count)]
    return pd.DataFrame(
        {"id": [f"0{n}" for n in range(count)], "original_text": texts, "rewritten_text": texts},
        dtype=str,
    )


def read(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)
