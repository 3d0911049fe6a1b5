# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compare: which data, which output, how many answers
#
# Each cell of the grid trains an adapter, or takes the base as it is (`max_steps` 0), and answers
# the same held-out rows. The first one is what the others are compared with. As it stands, six
# cells run on the embedded tiny Mixtral.
#
# Killed, or given more cells? Run again: what a cell answered is kept in `output_dir` under a hash
# of its settings and rows, and is not computed again.

# %% tags=["parameters"]
model_dir = "demo/tiny-mixtral"  # the base model's folder, as the hub has it
train_csv = "demo/rows.csv"  # one path or a list of paths
output_dir = "outputs/compare"
encoder_dir = None  # sentence-transformers format; None: MiniLM, which the requirements install
# one mapping for each cell, {"adapters": [1, 2], "combine": "join"} for cells 1 and 2 together;
# or names to lists, each combination of their values a cell, such as
# {"style": ["plain", "json"], "few_shot": [0, 2], "lora_r": [1, 16]}
grid = [
    {"max_steps": 0},
    {"style": "plain"},
    {"style": "json"},
    {"lora_r": 1, "lora_alpha": 4},
    {"train_rows": 200},
    {"answers_per_row": 4, "combine": "join"},
]
# the same in all cells; what is named neither here nor in grid is as in recipe.Cell
shared = {
    "learning_rate": 5e-3,
    "lora_dropout": 0.0,
    "gradient_accumulation": 1,
    "max_steps": 100,
    "max_new_tokens": 40,
}
# None: no such column
mean_prompt = "Please improve this text while keeping its original meaning but altering the tone."
eval_fraction = 0.1
four_bit = None  # None: on a GPU, or where the base's folder is in 4 bits
seed = 0

# %%
from IPython import get_ipython

from prompt_recovery.quiet import silence_known_notices

silence_known_notices()  # of libraries, by name: those that are nothing to act on
if shell := get_ipython():
    shell.InteractiveTB.set_mode("Minimal")  # errors in one line; %xmode would print one about it

# %%
from pathlib import Path

from IPython.display import Image, display

from prompt_recovery import comparison, comparison_table, engine, metric, tokenizer
from prompt_recovery.comparison_grid import make_cells
from prompt_recovery.recipe import Grid

settings = Grid.of(globals())  # the settings above, read and checked
cells = make_cells(settings.grid, **settings.shared)
output = Path(settings.output_dir)
output.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Cells and rows
# One split for all cells, by prompt and with near-duplicates together, over all files that any cell
# trains on: no cell trains on a wording that is held out. It is kept in `output_dir/split.csv`;
# other rows want another `output_dir`. What can't be trained or answered in any cell is refused
# before the first one runs.

# %%
engine.check_model_dir(settings.model_dir)
tok = tokenizer.load_tokenizer(settings.model_dir, pad="unk", side="left")
encoder = metric.load_encoder(settings.encoder_dir or metric.minilm_dir())
chance = (settings.eval_fraction, settings.seed)
train_rows, eval_rows = comparison.read_split(cells, settings.train_csv, *chance, output, encoder)
comparison.check_cells(cells, tok, train_rows, eval_rows, settings.model_dir)
print(f"{len(cells)} cells")

# %% [markdown]
# ## Run
# Few-shot examples are rows of the cell's training side. They stand before the rows that are
# answered; training does not see them. Answers may run on after a JSON object has closed, so that
# it shows whether a cell learned to stop.

# %%
base = engine.load_base(settings.model_dir, four_bit=settings.four_bit)
rows = dict(train_rows=train_rows, eval_rows=eval_rows)
folders = dict(output_dir=output, model_dir=settings.model_dir)
answers = comparison.run_cells(cells, base, tok, **rows, **folders)

# %% [markdown]
# ## Table
# `gain` is the difference to the first cell on the same rows, with its paired 95% interval: if that
# holds 0, the rows do not tell the two apart. `scs_with_mean` is the score with the mean prompt
# behind the answer; `scs` is what is recovered. `threshold`, where there is one, is the agreement
# under which rows do better with the mean prompt alone: the submission notebook takes it, with the
# same encoder, mean prompt, way to combine and answers per row. It was picked on these rows, so it
# gains less on others than `scs_with_threshold` says. A cell's adapter lies in `output_dir` under
# the name in `adapter`; `few_shot` stands in this notebook only.

# %%
mean_prompt = settings.mean_prompt
table = comparison_table.result_table(cells, answers, eval_rows, encoder, mean_prompt=mean_prompt)
table.to_csv(output / "comparison.csv", index_label="cell")
table.round(4)

# %% [markdown]
# Whether joining several cells' adapters beats the best of them: recommended only where the paired
# interval of the difference lies above 0.

# %%
print(comparison_table.recommend(table))

# %%
comparison_table.plot_results(table, output / "comparison.png")
display(Image(str(output / "comparison.png")))
