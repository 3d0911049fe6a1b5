"""The submission's inputs: base model, adapters and test.csv, given or found under
/kaggle/input."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from prompt_recovery import data
from prompt_recovery.adapter import check_adapter, check_loaded
from prompt_recovery.adapter_files import CONFIG, AdapterError, digests, read_header
from prompt_recovery.base import load_config
from prompt_recovery.engine import check_base, load_base
from prompt_recovery.recipe import Format, SubmissionSettings
from prompt_recovery.salvage import salvage_test
from prompt_recovery.tokenizer import check_tokenizer, load_tokenizer

KAGGLE_INPUT = "/kaggle/input"
RERUN = "KAGGLE_IS_COMPETITION_RERUN"  # set while a submission is scored on the hidden rows
BASE = "a language model's config.json"
BASE_REMEDY = "Set allow_base=True to answer with the base model alone."
TRAINER_STATE = "trainer_state.json"  # lies in a trainer's checkpoint


class InputError(ValueError):
    """An input that cannot be found, or is there more than once."""


def find_inputs(
    model_dir: str | None,
    adapter_dir: str | Sequence[str] | None,
    test_csv: str | None,
    root: str | Path = KAGGLE_INPUT,
    allow_base: bool = False,
) -> tuple[Path, tuple[Path, ...], Path]:
    """The base's folder, those of the adapters, and test.csv. Those that are None are looked for
    under root, however deep (the mounts of Kaggle's Models, competitions and datasets lie at other
    depths than they did): the folders of a causal language model's config.json and of
    adapter_config.json, and test.csv.

    Several adapters are taken in the order of their paths, numbers in them by value; a trainer's
    checkpoints are passed over where there is an adapter beside them.

    Args:
        model_dir, adapter_dir, test_csv: as given, of adapters one or several; not checked.
        root: where the others are looked for.
        allow_base: there may be no adapter.

    Raises InputError for no match, or several of what is wanted once, listing them.
    """
    files = [] if model_dir and adapter_dir and test_csv else files_under(root)
    adapters = [path.parent for path in files if path.name == CONFIG]
    tests = [path for path in files if path.name == "test.csv"]
    base = the_one("model_dir", model_dir, bases_among(files), BASE, root)
    if adapter_dir:
        adapters = _folders(adapter_dir)
    else:
        finished = [folder for folder in adapters if not (folder / TRAINER_STATE).exists()]
        adapters = sorted(finished or adapters, key=by_number)
        if not finished and (adapters or not allow_base):
            remedy = "" if adapters else f" {BASE_REMEDY}"
            adapters = [the_one("adapter_dir", None, adapters, CONFIG, root, remedy)]
    return base, tuple(adapters), the_one("test_csv", test_csv, tests, "test.csv", root)


def _folders(adapter_dir: str | Path | Sequence[str | Path] | None) -> list[Path]:
    given = [adapter_dir] if isinstance(adapter_dir, (str, Path)) else adapter_dir
    return [Path(each) for each in given or ()]


def by_number(path: str | Path) -> list[tuple[str, int]]:
    """A key that sorts version 10 behind version 9."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", str(path))]


def the_one(
    name: str,
    given: str | None,
    matches: list[Path],
    what: str,
    root: str | Path,
    remedy: str = "",
) -> Path:
    """A path as given, or else the only match.

    Args:
        name, given: the setting and its value.
        matches: what was found under root.
        what, root, remedy: said in the error: what was looked for, where, and what else helps.

    Raises InputError for no match or several, listing them.
    """
    if given:
        return Path(given)
    if len(matches) != 1:
        listed = "\n  ".join(map(str, matches)) or "nothing"
        raise InputError(
            f"{name} is None and {len(matches)} places under {root} hold {what}:\n  {listed}\n"
            f"Attach exactly one as input, or set {name} in the parameters cell.{remedy}"
        )
    return matches[0]


def bases_among(files: list[Path]) -> list[Path]:
    """Folders of a causal language model's config.json that hold no adapter."""
    adapters = {path.parent for path in files if path.name == CONFIG}
    folders = [path.parent for path in files if path.name == "config.json"]
    return [each for each in folders if each not in adapters and _is_language_model(each)]


def files_under(root: str | Path) -> list[Path]:
    """Files below root, sorted; links are followed, and no folder is entered twice."""
    found, seen = [], set()
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in files]
    return sorted(found)


def _is_language_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # another program's
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    return isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)


def is_public_run(test: pd.DataFrame) -> bool:
    """Whether these are the public test.csv's rows, one, and nothing is scored: loading the model
    would waste quota."""
    return len(test) == 1 and not os.environ.get(RERUN)


def read_test(test_csv: str | Path) -> pd.DataFrame:
    """`data.read_test`. While a submission is scored, a file that it refuses is read as far as it
    can be, and what is wrong with it is printed (see `salvage`): nobody can mend the hidden rows,
    and each must get an answer.

    Raises DataError in every other run.
    """
    try:
        return data.read_test(test_csv)
    except data.DataError as error:
        if not os.environ.get(RERUN) or not Path(test_csv).is_file():
            raise
        test = salvage_test(test_csv)
        print(f"test.csv breaks the rules, {len(test)} rows are read all the same: {error}")
        return test


def usable_adapter(
    adapter_dir: str | Path | None,
    model_dir: str | Path,
    allow_base: bool = False,
    four_bit: bool | None = None,
) -> Path | None:
    """The adapter's folder if `check_adapter` finds it sound; nothing goes onto a GPU. Prints what
    it is.

    The base is checked first, with all that costs no loading: its files, whether it fits on the
    GPUs at hand, its tokenizer. Raises ModelError, Nf4Error, TooLittleMemory or TokenizerError for
    it. A missing or broken adapter raises InputError with the remedy, or is None with allow_base,
    which is printed.
    """
    check_base(model_dir, four_bit=four_bit)
    check_tokenizer(load_tokenizer(model_dir), load_config(model_dir).vocab_size, model_dir)
    try:
        if adapter_dir is None:
            raise AdapterError("There is no adapter.")
        print("adapter:", check_adapter(adapter_dir, model_dir, four_bit))
        return Path(adapter_dir)
    except (ValueError, OSError) as error:
        _without(error, allow_base)
        return None


def complete(settings: SubmissionSettings) -> SubmissionSettings:
    """The settings with the paths that were left open, found under input_dir. Each adapter is
    checked; nothing goes onto a GPU.

    Raises InputError as `find_inputs`, `usable_adapter` and `answer_format` do, and for the same
    adapter twice; SettingError where several adapters' answers are not combined."""
    model_dir, found, test_csv = find_inputs(
        settings.model_dir,
        settings.adapter_dir,
        settings.test_csv,
        settings.input_dir,
        settings.allow_base,
    )
    names = [f"adapter  {each}" for each in found or [None]]
    print("\n".join([f"model    {model_dir}", *names, f"test     {test_csv}"]))
    usable = [
        usable_adapter(each, model_dir, settings.allow_base, settings.four_bit)
        for each in found or [None]
    ]
    adapters = tuple(filter(None, usable))
    _check_different(adapters)
    for each in adapters or [None]:
        answer_format(each, settings.style, settings.system_placement)
    return replace(settings, model_dir=model_dir, adapter_dir=adapters or None, test_csv=test_csv)


def _check_different(adapters: Sequence[Path]) -> None:
    """Raises InputError for two adapters of the same bytes: one answer would count as two."""
    seen: dict[tuple[str, str], Path] = {}
    for folder in adapters:
        first = seen.setdefault(digests(folder), folder)
        if first is not folder:
            raise InputError(
                f"{first} and {folder} are the same adapter, whose answers would count twice: give "
                "each once in adapter_dir."
            )


def answer_format(
    adapter_dir: Path | None, style: str | None, system_placement: str | None
) -> Format:
    """style and system_placement as given; for None, as the adapter was trained, or the default
    where it does not say.

    Raises InputError for one that the adapter was not trained on: its answers would not parse, or
    would be worse.
    """
    trained = read_header(adapter_dir) if adapter_dir else {}
    result = {}
    for name, given in (("style", style), ("system_placement", system_placement)):
        if given and given != trained.get(name, given):
            raise InputError(
                f"{name}={given!r}, but the adapter in {adapter_dir} was trained with "
                f"{trained[name]!r}; leave it at None."
            )
        if given or name in trained:
            result[name] = given or trained[name]
    return Format(**result)


def load(
    model_dir: str | Path,
    adapter_dir: str | Path | Sequence[str | Path] | None,
    four_bit: bool | None = None,
    allow_base: bool = False,
) -> tuple[Any, Any]:
    """(base, tokenizer) to answer with; `submission.answer` puts each adapter on in its turn.

    Raises InputError for an adapter of another base than the one that was loaded, unless
    allow_base; see `load_base` for what else can be wrong.
    """
    tokenizer = load_tokenizer(model_dir, pad="unk", side="left")
    base = load_base(model_dir, four_bit=four_bit)
    for folder in _folders(adapter_dir):
        try:
            check_loaded(base, folder, model_dir)
        except AdapterError as error:
            _without(error, allow_base)
    return base, tokenizer


def _without(error: Exception, allow_base: bool) -> None:
    if not allow_base:
        raise InputError(f"{error} {BASE_REMEDY}") from error
    print(f"answering with the other adapters, or with the base model alone: {error}")
