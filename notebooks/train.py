# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train: teach a Mixtral to recover prompts
#
# Somebody gave an LLM a text and an instruction, and the LLM rewrote the text. We see the text
# before and after; we want the instruction. This notebook fine-tunes a LoRA adapter for that on
# rows of `original_text, rewritten_text, rewrite_prompt` and leaves two files, which
# `notebooks/submission` puts on the unmodified base model.
#
# Every setting is in the next cell. Drive the notebook with `papermill notebooks/train.ipynb
# out.ipynb -p model_dir /path/to/Mixtral-8x7B-Instruct-v0.1 -p train_csv rows.csv -p encoder_dir
# /path/to/sentence-t5-base`. On Kaggle, attach the base, the rows, the encoder and the dataset of
# wheels as inputs, and leave the paths at None: they are found under `input_dir`.

# %% tags=["parameters"]
model_dir = None  # the base model's folder, as the hub has it
train_csv = None  # one path or a list of paths; None: all files of rows under input_dir
encoder_dir = None  # sentence-t5-base, say, in sentence-transformers format
input_dir = "/kaggle/input"  # where paths left at None are found
output_dir = "outputs/train"
style = "plain"  # plain | json | reason_json
system_placement = "user"  # user | before | turn
max_tokens = 640  # prompt and answer together
max_steps = -1  # -1: as many as the epochs take
epochs = 5
learning_rate = 2e-5
lora_r = 16
lora_alpha = 64
lora_dropout = 0.1
batch_size = 8
gradient_accumulation = 2
eval_fraction = 0.1
four_bit = None  # None: on a GPU, linear layers and experts in 4 bits; False: as stored
pad = "<pad>"  # <pad> | unk
seed = 0
# True: go on in output_dir, with a copy of the earlier output under input_dir, if there is one;
# False: begin anew, what stands in output_dir is moved aside; None: as input_dir holds one or not
resume = None
# the end comes in time for the adapter and its evaluation; None: 11.5 on Kaggle, else no limit
time_budget_hours = None
patience = 3  # evaluations without gain after which training stops
evaluations = 10  # in the whole run, each with a checkpoint
report_to = "none"  # none | tensorboard | wandb | trackio

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

# %%
import json
import math

from accelerate import PartialState
from IPython.display import Image, display

from prompt_recovery import (
    adapter,
    answers,
    data,
    engine,
    examples,
    files,
    metric,
    plots,
    run_folder,
    run_lock,
    splitting,
    time_budget,
    tokenizer,
    training,
    training_inputs,
    training_log,
)
from prompt_recovery.recipe import FALLBACK, Recipe

recipe = Recipe.of(globals())  # the settings above, read and checked
recipe, earlier = training_inputs.complete(recipe)  # and what they left open
output = Path(recipe.output_dir)
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Rows
# Rows that cannot teach anything are dropped and accounted for: blanks, texts that were not
# rewritten, duplicates, refusals, prompts too long for `max_tokens`, answers that could not be read
# back from what the model would write.

# %%
engine.check_model_dir(recipe.model_dir)
rows, account = data.clean_rows(data.read_rows(recipe.train_csv))
print(data.describe(rows, account))
tok = tokenizer.load_tokenizer(recipe.model_dir, pad=recipe.pad)
encoding = dict(max_tokens=recipe.max_tokens, format=recipe.format)
rows, example_of, account = examples.usable_examples(tok, rows, **encoding)
print(*data.describe_account(account), sep="\n")

# %% [markdown]
# The rest is split by task: if one prompt stood on both sides, the evaluation would measure memory.
# A column `split` in your rows, `train` or `held_out` in each, is taken as it is instead.
#
# "Held out" means: no row to train on has the same prompt in other words, as far as two tests see
# it. By their words, prompts are one task if they differ only in spelling, order, or words that say
# "rewrite this text". By the encoder of the score, they are one task from the printed cosine on.
# Another word in the same place ("as a pirate", "as a poet") makes another task. Paraphrases that
# are further apart ("be brief", "cut the padding") may stand on both sides. So the score is that of
# new wordings rather than of new ideas.
#
# Part of the held-out rows chooses the checkpoint, and the rest is for the report: the best of ten
# evaluations looks good on its own rows. With fewer than 40, all do both, which is said.

# %%
recipe = training_inputs.with_encoder(recipe)
encoder = metric.load_encoder(recipe.encoder_dir)
training.check_together(recipe, rows)
run_folder.begin(output, recipe.resume, earlier)
chance = (recipe.eval_fraction, recipe.seed)
split_csv = output / "split.csv"
train_rows, eval_rows = splitting.read_or_split(rows, split_csv, *chance, encoder, recipe.resume)
print(splitting.describe_split(train_rows, eval_rows))
scored, reported = splitting.hold_back(eval_rows, recipe.seed)
train_rows.head(3)

# %% [markdown]
# ## What a training example looks like
# Only the part between »»» and «««, the answer and its `</s>`, is supervised. The loss is masked by
# position.
#
# The pad token is a token of its own, not EOS. Most recipes pad with EOS and mask the loss wherever
# the pad id stands. That masks the end of the answer too: the model never learns to stop, and every
# answer runs on to the limit.

# %%
train_examples = [example_of[name] for name in train_rows["id"]]
eval_examples = [example_of[name] for name in eval_rows["id"]]
print(examples.show_example(tok, train_examples[0]))

# %% [markdown]
# Texts that are too long lose their middle, in proportion to their lengths; the instruction and the
# answer never do.

# %%
plots.plot_lengths(train_examples, recipe.max_tokens, output / "lengths.png")
display(Image(str(output / "lengths.png")))

# %% [markdown]
# ## Before
# The base model answers the held-out rows first, so that the gain can be seen.

# %%
base = engine.load_base(recipe.model_dir, four_bit=recipe.four_bit)
longest = max(examples.answer_length(example) for example in train_examples)
answer_options = encoding | dict(max_new_tokens=math.ceil(1.5 * longest), fallback_prompt=FALLBACK)
answering = time.monotonic()
before = answers.answer_table(base, tok, reported, description="answers before", **answer_options)
answering = time.monotonic() - answering

# %% [markdown]
# ## Fine-tune
# LoRA on the four attention projections. The input embeddings get a row for `<pad>`; `lm_head` does
# not, because nothing ever predicts it.

# %%
adapter.resize_input_embeddings(base, len(tok))
lora = adapter.add_lora(
    base,
    base=engine.base_id(recipe.model_dir),
    r=recipe.lora_r,
    alpha=recipe.lora_alpha,
    dropout=recipe.lora_dropout,
    target_modules=recipe.target_modules,
    seed=recipe.seed,
)
lora.print_trainable_parameters()

# %% [markdown]
# `batch_size` times `gradient_accumulation` rows make a step. On a GPU, a memory plan picks how
# many of them are computed at a time and which layers recompute their activations. A step that runs
# out of memory is done again in smaller parts. On a GPU without bf16 (a T4) the computation is in
# fp16 and the adapter in fp32; steps whose gradients are not finite are left out and counted.
#
# Killed? Run again with `resume=True`. If `time_budget_hours` is nearly over, training ends early
# enough for all that follows, and a later run goes on from there. On Kaggle that is a session with
# this one's output attached as input.

# %%
log = training.train(
    lora,
    tok,
    train_examples,
    eval_examples,
    recipe,
    score=lambda: metric.score_answers(
        answers.answer_table(lora, tok, scored, description=None, **answer_options),
        scored["rewrite_prompt"],
        encoder,
    ).mean(),
    scored_with=dict(
        encoder=metric.encoder_hash(recipe.encoder_dir),
        max_new_tokens=answer_options["max_new_tokens"],
    ),
    allowed=time_budget.of_training(started, recipe.time_budget_hours, answering),
)

# %% [markdown]
# As a script under `accelerate launch`, several processes have trained and hold the same adapter.
# The first goes on alone.

# %%
if not PartialState().is_main_process:
    run_lock.release(output)
    raise SystemExit

# %% [markdown]
# The training loss should fall smoothly. The held-out loss is measured on wordings that were never
# trained on. It can rise while the answers still get better, because there are many ways to word
# one instruction. So the score of the answers decides which adapter is kept: the one of the marked
# step. An answer that holds no prompt counts 0, and where scores are equal the lower loss decides.

# %%
adapter.save_adapter(lora, output / "adapter", recipe.format)
adapter_sha256 = files.sha256(output / "adapter" / adapter.WEIGHTS)
plots.plot_log(log, output / "loss.png", adapter_sha256=adapter_sha256)
display(Image(str(output / "loss.png")))

# %% [markdown]
# ## The adapter
# Two files, checked against the base's own config: no embeddings, no local paths, every tensor
# finite and in its place. The picture, the predictions and the evaluation carry the sha256 of its
# weights, so that none is taken for another's.

# %%
adapter.check_adapter(output / "adapter", recipe.model_dir)

# %% [markdown]
# ## After
# The score of an answer is the cosine of its embedding and the truth's, cubed with its sign kept.
# The mean is over the held-out rows of the report, with a bootstrap interval. An answer without a
# prompt counts 0. `held_out.csv` has these rows whole, to rehearse a submission on.

# %%
after = answers.answer_table(lora, tok, reported, description="answers after", **answer_options)
predictions = metric.score_table(reported, before, after, encoder)
files.write_csv(predictions.assign(adapter_sha256=adapter_sha256), output / "predictions.csv")
files.write_csv(reported[["id", *data.ROW_COLUMNS]], output / "held_out.csv")
evaluation = metric.evaluation(predictions, metric.encoder_name(recipe.encoder_dir))
evaluation |= dict(
    chosen_on_these_rows=bool(scored["id"].isin(reported["id"]).any()),
    style=recipe.style,
    rows_hash=data.rows_hash(train_rows),
    adapter_sha256=adapter_sha256,
    training=log.attrs["ended"],
    skipped_steps=training_log.skipped_steps(log),
)
files.write_text(json.dumps(evaluation, indent=2) + "\n", output / "evaluation.json")
run_lock.release(output)
evaluation

# %% [markdown]
# Every held-out row, before and after. Training should move the whole of them to the right, not a
# few.

# %%
if len(predictions):
    scores = predictions[["scs_before", "scs_after"]]
    scores.plot.hist(bins=40, alpha=0.6, figsize=(7, 2.5), xlabel="score", ylabel="held-out rows")

# %% [markdown]
# The five best, whole. `rewrite_prompt` is the truth. Rows with the same truth and the same answer
# are shown once.

# %%
shown = predictions.drop_duplicates(["rewrite_prompt", "after"]).drop(columns=["id", "how"])
plots.whole_texts(shown.nlargest(5, "scs_after"))

# %% [markdown]
# The five worst, which say more: is it the wording or the meaning that was missed, and did the
# answer end by `eos`?

# %%
plots.whole_texts(shown.nsmallest(5, "scs_after"))
