# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Submission: answer test.csv with the adapter
#
# Base model + adapter + `test.csv` -> `submission.csv`, without internet. On Kaggle, attach the base, the adapter and
# the competition as inputs and leave the three paths at None: they are found under /kaggle/input.
#
# `style` and `system_placement` must be those of the training run.

# %% tags=["parameters"]
model_dir = None
adapter_dir = None
test_csv = None
submission_csv = "/kaggle/working/submission.csv"
time_budget_hours = 8.5
max_new_tokens = 64
fallback_prompt = "Please improve this text while keeping its original meaning but altering the tone."
style = "plain"  # plain | json | reason_json
system_placement = "user"  # user | before | turn
four_bit = None  # None: on a GPU, or where the base's folder is in 4 bits

# %%
# %xmode Minimal
from prompt_recovery import adapter, data, model, submission, tokenizer

model_dir, adapter_dir, test_csv = submission.find_inputs(model_dir, adapter_dir, test_csv)
print(f"model    {model_dir}\nadapter  {adapter_dir}\ntest     {test_csv}")

# %% [markdown]
# Everything that can be checked without a GPU is checked before the model loads: a broken adapter costs seconds here,
# and an hour of quota after loading.

# %%
test = data.read_test(test_csv)
print(f"{len(test)} rows;", adapter.check_adapter(adapter_dir, model_dir))
test.head(3)

# %%
tok = tokenizer.load_tokenizer(model_dir, pad="unk", side="left")
base = model.load_base(model_dir, four_bit=four_bit)
lora = adapter.load_adapter(base, adapter_dir, model_dir)

# %% [markdown]
# The file is there from the first second, filled with the fallback; answers replace it as they come. Rows that the time
# budget does not reach keep the fallback.

# %%
report = submission.answer_test(
    lora,
    tok,
    test,
    submission_csv,
    fallback_prompt=fallback_prompt,
    time_budget_hours=time_budget_hours,
    style=style,
    system_placement=system_placement,
    max_tokens=min(4096, base.config.max_position_embeddings),
    max_new_tokens=max_new_tokens,
)

# %%
print(report.groupby(["how", "stopped"]).size().to_string())
report.head(10)
