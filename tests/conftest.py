"""Shared: the tiny Mixtral, nasty texts, every fixture that tests of several files use. Heavy
imports stand in the fixtures: most tests need none of them."""

import base64
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

# as in `make test`, and before torch reads it: forks of a test would wait for OpenMP's threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# the packages before the folders of tests that are named like them, wherever python starts
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

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


# their assertions say what was found, as those of tests do
pytest.register_assert_rewrite(
    "forked_machines",
    "kaggle_cases",
    "memory_cases",
    "tiny_bases",
    "tiny_models",
    "tiny_submission",
    "tiny_training",
)


# files that take a core 30 s and more, the longest first
SLOW = """
test_notebooks test_kaggle_upload test_submission_faults test_training test_submission
test_adapters_of_others test_kernels_ahead test_kaggle_upload_rest test_kernels test_demo_ensemble
test_distributed test_end_in_time test_kaggle_sessions test_comparison test_several_adapters
test_recipe test_kaggle_notebook
""".split()


def pytest_collection_modifyitems(items):
    """The slow files begin: one at the end would run alone, while the other worker waits."""
    items.sort(key=lambda item: (*SLOW, item.path.stem).index(item.path.stem))


def pytest_collection_finish():
    """What was imported stays: with it a collection takes 0.3 s, and a fork's would copy it all."""
    gc.collect()
    gc.freeze()


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
            "origin",
            "file",
        ],
        dtype=str,
    )


@cache
def tiny_tokenizer():
    from prompt_recovery.tokenizer import load_tokenizer

    return load_tokenizer(TINY, pad="unk", side="left")


def prepared(test, path, *, combine="first", max_tokens=400, encoder=None, **options):
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
        combine=combine,
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


@contextmanager
def full_disk(room):
    """Inside the block no file can grow beyond so many bytes: a write then fails as on a full
    disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def told(tmp_path_factory, monkeypatch):
    """A folder in which the forks of a test leave their word."""
    monkeypatch.setenv("PYTEST_FOLDER", str(tmp_path_factory.mktemp("told")))


@pytest.fixture(scope="module")
def encoder():
    from prompt_recovery import metric

    return metric.load_encoder(metric.minilm_dir(), device="cpu")


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A dense base with random weights in 16 and in 4 bits, each with the tiny tokenizer."""
    from transformers import MistralConfig, MistralForCausalLM, set_seed

    from prompt_recovery.engine import load_base, save_quantised

    folder = tmp_path_factory.mktemp("bases")
    set_seed(0)
    config = MistralConfig(
        vocab_size=2400,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder / "mistral")
    shutil.copy(TINY / "tokenizer.json", folder / "mistral")
    base = load_base(folder / "mistral", four_bit=True)
    save_quantised(base, folder / "mistral", folder / "nf4")
    return folder


@pytest.fixture
def case(tmp_path, capsys, monkeypatch):
    import kaggle_fork
    from kaggle_cases import Case
    from kaggle_stand_in import KEY, SIGNATURE, USER

    from kaggle_upload import cli, publish

    case = Case(tmp_path, capsys)
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case.server.environment(str(tmp_path / "home")).items():
        monkeypatch.setenv(name, value)
    # whoever has signed in has it; two first calls at once would both make it, and one fails
    (tmp_path / "home" / ".config" / "kaggle").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(cli, "subprocess", kaggle_fork)  # the same program, started faster
    monkeypatch.setattr(publish, "POLL", 0.1)
    monkeypatch.setattr(publish, "SETTLE", 1)
    monkeypatch.setattr(publish, "LISTING", 20.0)
    yield case
    case.server.shutdown()
    case.server.server_close()
    # whatever happened: no credential is printed or stored, no signed address printed
    assert SIGNATURE not in case.said
    assert not list((tmp_path / "tmp").iterdir()), (
        "upload sessions are shared with other uses of the program"
    )
    secrets = (KEY.encode(), base64.b64encode(f"{USER}:{KEY}".encode()))
    for text in [
        case.said.encode(),
        *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()),
    ]:
        assert not any(secret in text for secret in secrets)


@pytest.fixture(scope="session")
def newer_program(tmp_path_factory):
    """A folder with kaggle 2.2.5, or a skip where pip cannot get it."""
    from kaggle_cases import OUTSIDE

    folder = tmp_path_factory.mktemp("kaggle-2.2.5")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(folder),
        "--retries",
        "0",
    ]
    packages = ["kaggle==2.2.5", "kagglesdk==0.1.38"]
    run = subprocess.run([*command, *packages], capture_output=True, text=True, env=OUTSIDE)
    if run.returncode:
        pytest.skip(f"pip cannot get kaggle 2.2.5: {run.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(params=["installed", "2.2.5"])
def each_program(request, case, monkeypatch):
    """Run the test with the pinned kaggle program, and with 2.2.5."""
    from kaggle_upload import cli

    if request.param == "2.2.5":
        monkeypatch.setenv("PYTHONPATH", str(request.getfixturevalue("newer_program")))
        assert "2.2.5" in cli.run("--version", timeout=20).out


@pytest.fixture
def base(tmp_path):
    """A folder as save_pretrained leaves it: two shards, index, configs, tokenizer, and a file that
    is not sent."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file(
            {f"w{number}": torch.randn(40_000, generator=torch.Generator().manual_seed(number))},
            folder / name,
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}})
    )
    quantised = {
        "quant_method": "prompt_recovery_nf4",
        "layout": "nf4-per-expert-1",
        "base": "org/base",
    }
    config = {"architectures": ["MixtralForCausalLM"], "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "README.md").write_text("not sent")
    return folder


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of what the wheel is built from (the repository may be edited meanwhile); pip is given
    its way out."""
    from kaggle_cases import OUTSIDE

    from kaggle_upload import wheels

    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "prompt_recovery", folder / "prompt_recovery")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    monkeypatch.setattr(wheels, "ROOT", folder)
    proxies = {name: OUTSIDE.get(name, "") for name in ("http_proxy", "https_proxy", "HOME")}

    def run(command, *, env, **options):
        return subprocess.run(command, env=env | proxies, **options)

    monkeypatch.setattr(wheels, "subprocess", SimpleNamespace(run=run))
    return folder


@pytest.fixture(scope="module")
def true_shape(tmp_path_factory):
    """Folders with the config of Mixtral-8x7B and no weights: as the hub has it, and as
    save_quantised writes it."""
    from memory_cases import TRUE_SHAPE

    from prompt_recovery.engine import quantiser

    hub, saved = (tmp_path_factory.mktemp("true") / name for name in ("hub", "saved"))
    TRUE_SHAPE.save_pretrained(hub)
    shutil.copytree(hub, saved)
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = quantiser.Nf4Config().to_dict()
    (saved / "config.json").write_text(json.dumps(config))
    return hub, saved


@pytest.fixture(scope="module")
def loaded():
    from prompt_recovery import inputs

    return inputs.load(TINY, None)


@pytest.fixture
def faulty(loaded):
    """Makes the model call fault(input_ids) before each of its steps."""
    base, tok = loaded
    handles = []

    def install(fault):
        while handles:
            handles.pop().remove()
        hook = base.register_forward_pre_hook(
            lambda _, args, kwargs: fault(kwargs["input_ids"]), with_kwargs=True
        )
        handles.append(hook)
        return base, tok

    yield install
    while handles:
        handles.pop().remove()
