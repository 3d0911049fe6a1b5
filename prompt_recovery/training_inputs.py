"""What a training needs: base model, rows, encoder and an earlier session's output, given or found
under /kaggle/input."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from prompt_recovery.data import ROW_COLUMNS
from prompt_recovery.inputs import BASE, InputError, bases_among, files_under, the_one
from prompt_recovery.recipe import Recipe
from prompt_recovery.run_folder import WRITTEN, last_checkpoint, step_of
from prompt_recovery.tables import columns_of

TABLES = re.compile(r"\.(csv|tsv|jsonl|ndjson|json|parquet)(\.(gz|bz2|xz|zip))?$", re.I)
KAGGLE_HOURS = 11.5  # a session of Kaggle ends after 12


def complete(recipe: Recipe) -> tuple[Recipe, Path | None]:
    """The recipe with what was left open, and the earlier output from which the run goes on, if
    any. What was found is printed.

    model_dir is the only one under input_dir, train_csv are all files there with the columns of
    rows; what an earlier run wrote is none of them. (The encoder is found by `with_encoder`, once
    the rows are known to be good.) resume=None goes on where input_dir holds an earlier run's
    output, and begins anew elsewhere. time_budget_hours=None is 11.5 where there is an input_dir,
    and no limit elsewhere.

    Raises InputError where nothing is found, or several where one is wanted, listing them.
    """
    root = Path(recipe.input_dir)
    own, earlier = _apart(root)
    rows = recipe.train_csv or tuple(str(path) for path in own if _holds_rows(path))
    if not rows:
        raise InputError(
            f"train_csv is None and no file under {root} has the columns {', '.join(ROW_COLUMNS)}: "
            "attach a dataset of rows as input, or set train_csv in the parameters cell."
        )
    recipe = replace(
        recipe,
        model_dir=the_one("model_dir", recipe.model_dir, bases_among(own), BASE, root),
        train_csv=rows,
        time_budget_hours=recipe.time_budget_hours or (KAGGLE_HOURS if root.is_dir() else None),
    )
    listed = "\n         ".join(recipe.train_csv)
    print(f"model    {recipe.model_dir}\nrows     {listed}")
    if recipe.time_budget_hours:
        print(f"time     {recipe.time_budget_hours:g} h, after which all is written")
    found = _to_go_on_from(earlier, recipe, root)
    return replace(recipe, resume=found is not None or bool(recipe.resume)), found


def with_encoder(recipe: Recipe) -> Recipe:
    """The recipe with its encoder_dir, given or the only one under input_dir. Raises InputError as
    `complete`."""
    root = Path(recipe.input_dir)
    found = [path.parent for path in _apart(root)[0] if path.name == "modules.json"]
    what = "a sentence encoder's modules.json"
    encoder_dir = the_one("encoder_dir", recipe.encoder_dir, found, what, root)
    print(f"encoder  {encoder_dir}")
    return replace(recipe, encoder_dir=encoder_dir)


def _apart(root: Path) -> tuple[list[Path], list[Path]]:
    """Files under root that no earlier run wrote, and the outputs of earlier runs."""
    files = files_under(root)
    earlier = [
        path.parent.parent for path in files if path.parts[-2:] == ("checkpoints", "settings.json")
    ]
    # what that run itself had moved aside
    earlier = [each for each in earlier if not re.fullmatch(r"earlier-\d+", each.name)]
    return [path for path in files if not any(path.is_relative_to(e) for e in earlier)], earlier


def _holds_rows(path: Path) -> bool:
    if not TABLES.search(path.name) or path.name in WRITTEN:
        return False
    return set(ROW_COLUMNS) <= set(columns_of(path))


def _to_go_on_from(earlier: list[Path], recipe: Recipe, root: Path) -> Path | None:
    """The earlier output to go on from; printed where there is one, used or not."""
    whole = {}
    for each in earlier:
        last = last_checkpoint(each / "checkpoints")
        if last is None:
            print(f"earlier  {each}: no whole checkpoint, nothing to go on from")
        elif recipe.resume is False:
            print(f"earlier  {each}: not used, since resume=False")
        else:
            whole[each] = last
    found = list(whole)
    if not found:
        if recipe.resume and last_checkpoint(Path(recipe.output_dir) / "checkpoints") is None:
            print(f"resume=True, and neither {recipe.output_dir} nor {root} holds a run: a new one")
        return None
    if len(found) > 1:
        raise InputError(
            f"{len(found)} places under {root} hold an earlier run's checkpoints:\n  "
            + "\n  ".join(map(str, found))
            + "\nAttach the one to go on from, or set resume=False to begin anew."
        )
    print(f"earlier  {found[0]}: goes on from its checkpoint of step {step_of(whole[found[0]])}")
    return found[0]
