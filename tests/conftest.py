"""Shared: the tiny Mixtral, nasty texts, Mistral's own tokenizer in a folder."""

import shutil
import sys
from pathlib import Path

import pytest

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
