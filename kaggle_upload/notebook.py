"""Push the submission or the train notebook with its pinned sources, and hand in a version of the
first."""

from __future__ import annotations

import html
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from kaggle_upload import cli
from kaggle_upload.handles import Page, UploadError
from kaggle_upload.stage import lay_out, read

KERNEL = "python3"  # the only one of Kaggle's image
TRAINS = re.compile(r"^\s*train_csv\s*=|\b(?:training|comparison)\.\w+\(", re.M)
TRAINS_ONE = re.compile(r"\btraining\.train\(")
# what a machine of one's own has and Kaggle has not
LOCAL = re.compile(
    r"^((?:model|encoder|adapter|input)_dir|(?:train|test)_csv)\b[ \t]*(?::[^=\n]*)?=[ \t]*"
    r"(?=[\[('\"]|[rRfFuU]['\"]|(?:pathlib\.)?Path\()(?!.*/kaggle/)(.+?)(?:  #.*)?$",
    re.M,
)

HOURS = re.compile(r"^time_budget_hours = ([\d.]+)", re.M)
SESSION, SUBMISSION = 12, 9  # hours after which Kaggle ends a run, and loses what it wrote


def check(path: Path, train: bool = False) -> list[tuple[str, str]]:
    """The (type, source) of the notebook's cells.

    Raises UploadError for what would only fail, or do another thing, in the run that each push
    starts: no notebook, no kernel that Kaggle has, no code, a path that is not Kaggle's, more time
    than Kaggle gives, or one that trains where it should answer (with `train`: that does not).
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
        kernel = notebook["metadata"].get("kernelspec", {}).get("name")
        if notebook["nbformat"] != 4:
            raise ValueError(f"nbformat is {notebook['nbformat']}, it must be 4")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UploadError(
            f"{path} is not a notebook that Kaggle can run ({error!r}): give one of nbformat 4, as "
            "Jupyter saves it."
        ) from error
    code = "\n".join(source for kind, source in cells if kind == "code")
    if not re.search(r"^\s*[^#\s]", code, re.M):
        raise UploadError(
            f"{path} holds no code: give the notebook that "
            f"{'trains' if train else 'writes submission.csv'}."
        )
    if kernel != KERNEL:
        has = f"names the kernel {kernel!r}" if kernel else "names no kernel"
        raise UploadError(
            f"{path} {has}, and its run on Kaggle would end at once; Kaggle has {KERNEL!r}: "
            f"`jupytext --set-kernel {KERNEL} {path}`."
        )
    if train and not TRAINS_ONE.search(code):
        raise UploadError(
            f"{path} does not train: give notebooks/train.ipynb, or leave out --train."
        )
    if not train and TRAINS.search(code):
        raise UploadError(
            f"{path} trains, and a submission only answers: give notebooks/submission.ipynb, or "
            "push it with --train."
        )
    for name, value in LOCAL.findall(code):
        raise UploadError(
            f"{path} sets {name} = {value}, which is no path of Kaggle's (/kaggle/input/...): "
            "leave it at None, and it is found among the sources."
        )
    limit = SESSION if train else SUBMISSION
    if (hours := HOURS.findall(code)) and float(hours[-1]) >= limit:
        raise UploadError(
            f"{path} sets time_budget_hours = {hours[-1]}, and Kaggle ends the run after {limit}: "
            f"give less, such as {limit - 0.5:g}."
        )
    return cells


def push(
    handle: Page, path: Path, metadata: dict[str, Any], timeout: float, train: bool = False
) -> int:
    """Push the notebook and compare what Kaggle then holds with what was sent; the version number.

    Args:
        handle: the notebook's page on Kaggle.
        path: the .ipynb.
        metadata: of `stage.notebook_metadata`.
        timeout: seconds of a call of the kaggle program.
        train: it is a training's notebook.

    Raises UploadError as `check` does, before Kaggle is asked, where the run of a notebook whose
    output it needs has not ended well, and where it was not saved, or was saved without a source,
    public, or with internet.
    """
    sent = check(path, train)
    for needed in metadata["kernel_sources"]:
        _check_ended(Page.parse(needed, "notebook", new=False), timeout, "Nothing was pushed.")
    with tempfile.TemporaryDirectory() as folder:
        lay_out(read([path]), Path(folder), {"kernel-metadata.json": metadata})
        reply = cli.run("kernels", "push", "-p", folder, timeout=timeout)
    print(reply.out.strip())
    pushed = re.search(r"^Kernel version (\d+) successfully pushed", reply.out, re.M)
    if reply.kind != "ok" or not pushed:
        raise UploadError(
            f"{reply.failure(f'Pushing {handle}')} If the reply was lost it may be there all the "
            f"same: look at https://www.kaggle.com/code/{handle} before pushing again, each push "
            "starts a run."
        )
    version = int(pushed[1])
    with tempfile.TemporaryDirectory() as folder:
        pulled = cli.run(
            "kernels", "pull", f"{handle}/{version}", "-p", folder, "-m", timeout=timeout
        )
        if pulled.kind != "ok":
            raise pulled.failure(f"{handle}/{version} was pushed; reading it back to compare")
        held = json.loads((Path(folder) / "kernel-metadata.json").read_text(encoding="utf-8"))
        cells = json.loads((Path(folder) / held["code_file"]).read_text(encoding="utf-8"))["cells"]
    # the program does not report sources that Kaggle dropped
    wrong = [
        f"{kind} {wanted} was not attached"
        for kind in ("model", "dataset", "competition", "kernel")
        for wanted in metadata[f"{kind}_sources"]
        if not any(_same(wanted, got) for got in held.get(f"{kind}_sources") or ())
    ]
    wrong += ["it is public"] if held["is_private"] is not True else []
    wrong += ["it has internet"] if held["enable_internet"] else []
    # of the last session, which may be an old one
    if held["machine_shape"] not in (None, "", metadata["machine_shape"]):
        print(
            f"note: Kaggle names {held['machine_shape']} as accelerator; "
            f"{metadata['machine_shape']} was asked for."
        )
    if [(cell["cell_type"], "".join(cell["source"])) for cell in cells] != sent:
        wrong.append("its cells are not those that were sent")
    if wrong:
        raise UploadError(
            f"{handle}/{version} was pushed, but {'; '.join(wrong)}. Check that each source "
            "exists, that you may use it and that you have accepted the competition's rules, "
            "then push again."
        )
    return version


def submit(notebook: Page, competition: str, file: str, message: str, timeout: float) -> None:
    """Hand in a finished version of a notebook; prints the remaining submissions before.

    Args:
        notebook: with its version.
        competition, file, message: its slug, the output that is handed in, what is listed with it.
        timeout: seconds of a call of the kaggle program.

    Raises UploadError where none remain, the version's run has not ended well, a newer version
    hides its state, or no new submission is listed afterwards.
    """
    limits = cli.run("competitions", "submission-limits", competition, "--json", timeout=timeout)
    remaining = (limits.json() or {}).get("numAllowedNow", 0) if limits.kind == "ok" else None
    if remaining is None:
        raise limits.failure(f"Asking for the remaining submissions of {competition}")
    print(f"{remaining} submissions to {competition} remain today.")
    if remaining < 1:
        raise UploadError(f"No submission to {competition} remains today; nothing was handed in.")
    place = f"{notebook.owner}/{notebook.slug}"
    _check_ended(notebook, timeout, "Nothing was handed in.")
    _check_newest(notebook, timeout)
    before = {row["ref"] for row in _submissions(competition, timeout)}
    command = ("competitions", "submit", competition, "-k", place, "-f", file)
    number = str(notebook.version)
    reply = cli.run(*command, f"--message={message}", "--version", number, timeout=timeout)
    fresh = [row for row in _submissions(competition, timeout) if row["ref"] not in before]
    ours = [row for row in fresh if _words(row["description"]) == _words(message)]
    if not ours and reply.kind == "ok":  # Kaggle may keep another text than it was sent
        ours = fresh
    if not ours:
        others = "".join(f" {row['ref']} ({row['description']!r}) is new." for row in fresh)
        raise UploadError(
            f"No new submission {message!r} is listed: handing in {notebook} said: {reply.said}."
            f"{others} It may stand all the same, and another one counts too: look at `kaggle "
            f"competitions submissions {competition}` before you hand in again."
        )
    print(reply.out.strip())
    for row in ours:
        print(f"submission {row['ref']}: {row['status']}, {row['description']!r}")
    print(f"Its score: kaggle competitions submissions {competition}")


def _check_ended(notebook: Page, timeout: float, consequence: str) -> None:
    status = cli.run("kernels", "status", str(notebook), timeout=timeout)
    # the first line; a failure message, which may say anything, comes after it
    found = re.search(rf'^{re.escape(str(notebook))} has status "([\w.]+)"$', status.out, re.M)
    if status.kind != "ok" or not found or found[1].rpartition(".")[2].upper() != "COMPLETE":
        raise UploadError(
            f"The run of {notebook} has not ended well: {status.said}. Wait for it, or look at its "
            f"log: `kaggle kernels logs {notebook.owner}/{notebook.slug}`. {consequence}"
        )


def _check_newest(notebook: Page, timeout: float) -> None:
    """Make sure that the state read is that of this version.

    kaggle 2.2.4 takes a version for `kernels status` and drops it: it answers for the latest run.
    Raises UploadError where a newer version stands; prints where that can't be known.
    """
    release = re.search(r"(\d+)\.(\d+)\.(\d+)", cli.run("--version", timeout=timeout).out)
    if release and tuple(map(int, release.groups())) >= (2, 2, 5):
        return
    assert notebook.version is not None
    place = f"{notebook.owner}/{notebook.slug}"
    if _stands(f"{place}/{notebook.version + 1}", timeout):
        raise UploadError(
            f"{notebook} is not the newest version, and the kaggle program tells the state of the "
            "newest run only: hand in the newest, push this one again, or install kaggle 2.2.5. "
            "Nothing was handed in."
        )
    if not _stands(str(notebook), timeout):
        print(
            f"note: whether {notebook} is the newest version can't be known here; the run that has "
            f"ended well is the newest one of {place}."
        )


def _stands(version: str, timeout: float) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return cli.ask("kernels", "pull", version, "-p", folder, timeout=timeout).kind == "ok"


def _submissions(competition: str, timeout: float) -> list[dict[str, Any]]:
    reply = cli.ask("competitions", "submissions", competition, "--format", "json", timeout=timeout)
    if reply.kind != "ok":
        raise reply.failure(f"Listing the submissions to {competition}")
    return reply.json() or []


def _words(text: str | None) -> str:
    """A text without what a server may trim or escape."""
    return " ".join(html.unescape(text or "").split())


def _same(wanted: str, got: str) -> bool:
    """Whether Kaggle's name of a source is ours: field by field, a version of it may follow."""
    fields, others = wanted.lower().split("/"), got.lower().strip("/").split("/")
    return others[: len(fields)] == fields
