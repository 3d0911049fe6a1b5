# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Submission: answer test.csv with one adapter or several
#
# Base model + adapters + `test.csv` -> `submission.csv`, without internet. On Kaggle, attach the
# base, the adapters, the dataset of wheels and the competition as inputs, and leave the paths at
# None: they are found under `input_dir`, adapters in the order of their paths.

# %% [markdown]
# Every setting is in the next cell. `style` and `system_placement` are those that each adapter was
# trained with, which it says itself.

# %% tags=["parameters"]
model_dir = None
adapter_dir = None  # one path or a list: each adapter answers every row, in this order
test_csv = None
input_dir = "/kaggle/input"
submission_csv = "/kaggle/working/submission.csv"
time_budget_hours = 8.5  # counted from here, with the loading of the model; Kaggle's limit is 9
max_new_tokens = 64
fallback_prompt = (
    "Please improve this text while keeping its original meaning but altering the tone."
)
style = None  # plain | json | reason_json; None: each adapter's
system_placement = None  # user | before | turn; None: each adapter's
four_bit = None  # None: on a GPU, or where the base's folder is in 4 bits
answers_per_row = 1  # by each adapter; the first is the likeliest, the others are drawn
temperature = 0.8  # of those that are drawn
top_p = 0.95
combine = "first"  # first | join | agree: how several answers become one
mean_prompt = None  # a sentence that goes behind every answer
threshold = None  # of agreement, of notebooks/compare: under it a row gets mean_prompt alone
encoder_dir = None  # a sentence encoder's folder, for "agree", threshold and the rehearsal's score
allow_base = False  # go on with the base alone if the adapter is missing or broken
answer_public_test = False  # load the model even for the one row of the public test.csv

# %% [markdown]
# ## Libraries
# What Kaggle's image lacks is installed from the attached wheels. They are there for several
# Pythons, and pip picks those of this one. Where none are attached, what is installed is used.

# %%
import glob
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from IPython import get_ipython

if shell := get_ipython():
    shell.InteractiveTB.set_mode("Minimal")  # errors in one line; %xmode would print one about it
started = time.monotonic()
libraries = glob.glob(f"{input_dir}/**/prompt_recovery-*.whl", recursive=True)
folders = [sorted(Path(path).parent.glob("*.whl")) for path in sorted(libraries)]
wheels = max(folders, key=len, default=[])  # one may lie beside the adapter too
if wheels:
    print(f"installing {len(wheels)} wheels of {wheels[0].parent}")
    names = sorted({"==".join(path.name.split("-")[:2]) for path in wheels})
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-index", "--no-deps", f"--find-links={wheels[0].parent}", *names]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        raise ImportError(
            f"The wheels in {wheels[0].parent} can't be installed on Python "
            f"{sys.version.split()[0]}"
            f" ({installed.stderr.strip().splitlines()[-1]}): make the dataset of wheels anew, for"
            " this Python (docs/KAGGLE.md), and attach its new version."
        )
elif importlib.util.find_spec("prompt_recovery") is None:
    raise ImportError(
        f"prompt_recovery is not installed, and no wheel of it lies under {input_dir}: attach your"
        " dataset of wheels, such as OWNER/prompt-recovery-wheels (docs/KAGGLE.md makes it)."
    )

# %%
from prompt_recovery.quiet import silence_known_notices

silence_known_notices()  # of libraries, by name: those that are nothing to act on

# %% [markdown]
# ## Settings
# Everything that needs no GPU is checked before the model loads: a mistake costs seconds here, and
# an hour of quota later. First the settings themselves, all of them at once.

# %%
import pandas as pd

from prompt_recovery import inputs, metric, rehearsal, submission, tokenizer
from prompt_recovery.plots import whole_texts
from prompt_recovery.recipe import SubmissionSettings

settings = SubmissionSettings.of(globals())

# %% [markdown]
# Then what they point to. Each adapter's two files are compared with each other and with the base's
# config.

# %%
settings = inputs.complete(settings)

# %% [markdown]
# ## Rows
# No row of `test.csv` is ever dropped, and its ids are kept as they are written.

# %%
test = inputs.read_test(settings.test_csv)
print(f"{len(test)} rows")
whole_texts(test.head(1))

# %% [markdown]
# ## Several answers to a row
# Several answers, of several adapters or drawn from one, are made into one: joined, or the one that
# the others agree with most. A mean prompt and joining can raise the score and recover nothing.
# Whether joining adapters beats the best of them, `notebooks/compare` says on held-out rows. With
# "first", several adapters are refused: all but one would answer for nothing.
#
# `threshold` holds for the encoder, mean prompt, way to combine and number of answers for which
# `notebooks/compare` picked it.

# %%
encoder = metric.load_encoder(settings.encoder_dir, device="cpu") if settings.encoder_dir else None

# %% [markdown]
# ## The file
# `submission.csv` is whole and valid from here on, however this notebook ends. It is filled with
# the fallback, or with what an earlier run finished before it was killed.

# %%
tok = tokenizer.load_tokenizer(settings.model_dir, pad="unk", side="left")
job = submission.prepare(test, settings, tok, encoder=encoder, started=started)

# %% [markdown]
# This is what the model is asked about the first row, by each adapter. The instruction is the one
# it was trained with; a text that is too long loses its middle.

# %%
asked = f"{settings.answers_per_row} a row, {settings.combine}"
for member in job.members:
    print(f"{member.name}: {member.format.style} answers, {asked}")
    for prompt in list(member.prompts.values())[:1]:
        print(tok.decode(prompt))

# %% [markdown]
# ## The model
# While nothing is scored, `test.csv` has one row: it keeps the fallback, and the model isn't
# loaded. Set `answer_public_test` to see that it loads.

# %%
public = inputs.is_public_run(test) and not settings.answer_public_test
if public:
    print("public test.csv: the fallback is the answer")
else:
    print(f"loading the model for {len(test)} rows")

# %% [markdown]
# The base takes minutes to load from a mount, and most of that is reading 24 GiB, or 87 GiB where
# its experts are not yet in 4 bits. It is loaded once for all adapters.

# %%
model = None
if not public:
    paths = settings.model_dir, settings.adapter_dir
    model, tok = inputs.load(*paths, settings.four_bit, settings.allow_base)

# %% [markdown]
# ## Answers
# They replace the fallback as they come, one adapter after the other. The bar shows the seconds to
# go and those left in the budget; a line every half minute says the same to the log.
#
# If they come too slowly, the rows to come go without the last adapters. If there is too little
# time for the first, they get a single answer, then shorter ones, and those that can't be reached
# keep the fallback. Each of these steps is printed.

# %%
if model is not None:
    submission.answer(job, model, tok)

# %% [markdown]
# ## What came out
# The file is read back and checked as a scorer would read it. `how` says where in the model's words
# the prompt was found, or why the fallback stands; `stopped` says why the model ended: it should be
# `eos`. `adapters` names those whose answers a row has.

# %%
report = submission.report(job)
report.groupby(["adapters", "source", "how", "stopped"]).size().to_frame("rows")

# %% [markdown]
# One answer for many rows is a sign of trouble: an adapter that learned a single prompt, or a base
# that is not its own.

# %%
whole_texts(report["answer"].value_counts().head().rename("rows").reset_index())

# %% [markdown]
# Five rows, whole. A good answer is an instruction, in the words that somebody would have used.

# %%
shown = report.sample(min(5, len(report)), random_state=0).sort_index()
whole_texts(test.loc[shown.index].assign(answer=shown["answer"]))

# %% [markdown]
# This is what lies on the disk.

# %%
whole_texts(pd.read_csv(settings.submission_csv).head(3))

# %% [markdown]
# ## Rehearsal
# Before you hand in, give rows with their prompts as `test_csv`, such as the `held_out.csv` that
# training leaves: rows that no adapter was trained on. The model is not shown the prompts.
# They are read here, when every row has its answer.
#
# The score is that of the file, fallbacks and all. The times are those of this machine, and for two
# T4s they are reckoned. Without prompts in `test_csv` this prints nothing.

# %%
rehearsal.report(job, report)
