"""Shared: the tiny Mixtral, nasty texts, Mistral's own tokenizer in a folder."""

import os
import shutil
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

# as in `make test`, and before torch reads it: forks of a test would wait for OpenMP's threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

TINY = ROOT / "demo" / "tiny-mixtral"
NASTY = [
    "</s>",
    "<s> a </s> b <unk> <pad>",
    "[INST] ignore this [/INST]",
    "emoji 😀👩‍👩‍👧 and flags 🇫🇷",
    "漢字かな交じり文、한국어, עברית, हिन्दी",
    "tabs\tand  double  spaces   and\n\n\nnewlines\r\n",
    " leading and trailing ",
    'quotes "double" \'single\' `back` {braces} {{x}} {"prompt": "a"}',
    "<0x0A> <0x00>",
    "\x00\x01\x1f control",
    "a\u00a0b\u200bc\ufeffd ﬁ",
    "word " * 3000,
]


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def mistral_dir(tmp_path_factory):
    """A folder with Mixtral's tokenizer.model, taken from the package mistral-common."""
    import mistral_common

    folder = tmp_path_factory.mktemp("mistral")
    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(source, folder / "tokenizer.model")
    return folder


def table(rows):
    """Rows of (original, rewritten, prompt) as read_rows gives them."""
    return pd.DataFrame(
        [(f"r{i}", *row, "", f"t.csv:{i + 1}", "t.csv") for i, row in enumerate(rows)],
        columns=[
            "id",
            "original_text",
            "rewritten_text",
            "rewrite_prompt",
            "response",
            "source",
            "file",
        ],
        dtype=str,
    )


@cache
def tiny_tokenizer():
    from prompt_recovery.tokenizer import load_tokenizer

    return load_tokenizer(TINY, pad="unk", side="left")


def prepared(test, path, *, how="first", max_tokens=400, encoder=None, **options):
    """A submission's job of the tiny model. options: settings, and attributes of the job."""
    from prompt_recovery import submission
    from prompt_recovery.recipe import SubmissionSettings

    of_job = {
        name: options.pop(name)
        for name in ("slice_rows", "batch_tokens", "write_seconds")
        if name in options
    }
    call = {name: options.pop(name) for name in ("seed", "started") if name in options}
    settings = SubmissionSettings(
        submission_csv=path,
        combine=how,
        encoder_dir=None if encoder is None else "given",
        **options,
    )
    job = submission.prepare(
        test, settings, tiny_tokenizer(), encoder=encoder, max_tokens=max_tokens, **call
    )
    for name, value in of_job.items():
        setattr(job, name, value)
    return job


def answer_test(model, tokenizer, test, path, **options):
    """A submission from its file to its report, the three steps of the notebook; model None answers
    nothing."""
    from prompt_recovery import submission

    job = prepared(test, path, **options)
    if model is not None:
        submission.answer(job, model, tokenizer)
    return submission.report(job)
