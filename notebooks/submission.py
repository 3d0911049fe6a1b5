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
# Base model + adapter + `test.csv` -> `submission.csv`, without internet. On Kaggle, attach the base, the adapter, the
# dataset of wheels and the competition as inputs and leave the paths at None: they are found under `input_dir`.
#
# `style` and `system_placement` are those that the adapter was trained with, which it says itself.

# %% tags=["parameters"]
model_dir = None
adapter_dir = None
test_csv = None
input_dir = "/kaggle/input"
submission_csv = "/kaggle/working/submission.csv"
time_budget_hours = 8.5  # counted from here, with the loading of the model; Kaggle's limit is 9
max_new_tokens = 64
fallback_prompt = "Please improve this text while keeping its original meaning but altering the tone."
style = None  # plain | json | reason_json; None: the adapter's
system_placement = None  # user | before | turn; None: the adapter's
four_bit = None  # None: on a GPU, or where the base's folder is in 4 bits
answers_per_row = 1  # more than one: the first is the likeliest, the others are drawn, and combine joins or picks
temperature = 0.8  # of those that are drawn
top_p = 0.95
combine = "first"  # first | join | agree
mean_prompt = None  # a sentence that goes behind every answer
threshold = None  # of agreement, as notebooks/compare picks it: rows whose answers agree less get the mean_prompt alone
encoder_dir = None  # a sentence encoder's folder, such as sentence-t5's, for "agree" and threshold
allow_base = False  # go on with the base alone if the adapter is missing or broken
answer_public_test = False  # load the model even for the one row of the public test.csv

# %% [markdown]
# What Kaggle's image lacks is installed from the attached wheels; where none are attached, nothing happens.

# %%
# %xmode Minimal
import glob
import subprocess
import sys
import time
from pathlib import Path

started = time.monotonic()
libraries = glob.glob(f"{input_dir}/**/prompt_recovery-*.whl", recursive=True)
folders = [sorted(Path(path).parent.glob("*.whl")) for path in sorted(libraries)]
wheels = max(folders, key=len, default=[])  # one may lie beside the adapter too
if wheels:
    print(f"installing {len(wheels)} wheels of {wheels[0].parent}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, *map(str, wheels)], check=True)

# %%
from dataclasses import asdict

from prompt_recovery import base, data, inputs, metric, submission
from prompt_recovery.recipe import SubmissionSettings

asked = SubmissionSettings.of(globals())  # the settings above, read and checked
model_dir, adapter_dir, test_csv = inputs.find_inputs(
    asked.model_dir, asked.adapter_dir, asked.test_csv, asked.input_dir, asked.allow_base
)
print(f"model    {model_dir}\nadapter  {adapter_dir}\ntest     {test_csv}")

# %% [markdown]
# Everything that can be checked without a GPU is checked before the model loads: a broken adapter costs seconds here,
# and an hour of quota after loading. The file is there from now on, filled with the fallback, or with what an earlier run
# finished before it was killed.

# %%
test = data.read_test(test_csv)
adapter_dir = inputs.usable_adapter(adapter_dir, model_dir, asked.allow_base)
settings = asdict(inputs.answer_format(adapter_dir, asked.style, asked.system_placement)) | dict(
    model_dir=model_dir,
    adapter_dir=adapter_dir,
    fallback_prompt=asked.fallback_prompt,
    time_budget_hours=asked.time_budget_hours,
    max_tokens=min(4096, base.load_config(model_dir).max_position_embeddings),
    max_new_tokens=asked.max_new_tokens,
    started=started,
)
if not Path(asked.submission_csv).exists():
    submission.answer_test(None, None, test, asked.submission_csv, **settings)
test.head(3)

# %% [markdown]
# Several answers to a row are made into one: joined, or the one that the others agree with most. A mean prompt and
# joining can raise the score and recover nothing. `threshold` holds for the encoder, mean prompt, way to combine and number
# of answers for which `notebooks/compare` picked it.

# %%
settings |= dict(
    answers_per_row=asked.answers_per_row,
    temperature=asked.temperature,
    top_p=asked.top_p,
    how=asked.combine,
    mean_prompt=asked.mean_prompt,
    threshold=asked.threshold,
    encoder=metric.load_encoder(asked.encoder_dir, device="cpu") if asked.encoder_dir else None,
)
report = submission.answer_test(None, None, test, asked.submission_csv, **settings)
print(f"{settings['style']} answers, {asked.answers_per_row} a row, {asked.combine}")

# %% [markdown]
# While nothing is scored, `test.csv` has one row: it keeps the fallback, and the model isn't loaded. Set
# `answer_public_test` to see that it loads.

# %%
public = inputs.is_public_run(test) and not asked.answer_public_test
print("public test.csv: the fallback is the answer" if public else f"loading the model for {len(test)} rows")
lora, tok = (None, None) if public else inputs.load(model_dir, adapter_dir, asked.four_bit, asked.allow_base)

# %% [markdown]
# Answers replace the fallback as they come. If they come too slowly for the time budget, the rows to come get a single
# answer, then shorter ones, and those that can't be reached keep the fallback; each of these steps is printed.

# %%
if not public:
    report = submission.answer_test(lora, tok, test, asked.submission_csv, **settings)

# %%
print(report.groupby(["source", "how", "stopped"]).size().to_string())
report.head(10)
