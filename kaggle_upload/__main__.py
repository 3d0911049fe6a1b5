"""Publish on Kaggle, through the kaggle program: python -m kaggle_upload
adapter|base|wheels|notebook|submit --help"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from kaggle_upload import notebook, stage, versions, wheels
from kaggle_upload.contents import adapter_content, base_content
from kaggle_upload.handles import Page, UploadError, Variation, competition_slug
from kaggle_upload.publish import Publish, show
from kaggle_upload.remote import Remote, RemoteDataset, RemoteModel

VERSIONS = stage.HERE / "versions.csv"
NOTEBOOKS = stage.HERE.parent / "notebooks"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m kaggle_upload", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    made = {}
    for name, text in (
        ("adapter", "a LoRA adapter as a new version of a private model's variation"),
        ("base", "a 4-bit base checkpoint, likewise; an interrupted upload is resumed"),
        ("wheels", "our wheel and the pinned ones that Kaggle's image lacks, as a private dataset"),
        (
            "notebook",
            "push notebooks/submission.ipynb, or with --train notebooks/train.ipynb: private, no "
            "internet, 2x T4, pinned sources",
        ),
        ("submit", "hand in a finished version of the notebook"),
    ):
        made[name] = sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="show what would be sent; ask Kaggle and write nothing",
        )
        sub.add_argument(
            "--timeout",
            type=_seconds,
            default=120,
            metavar="S",
            help="of a call besides transfers (%(default)s s)",
        )
    for name in ("adapter", "base", "wheels"):
        _add_publishing(made[name], name)
    text = "Kaggle's Python; without it wheels for both go into the dataset, and the notebook picks"
    made["wheels"].add_argument("--python", choices=[*wheels.PYTHONS], help=text)
    made["adapter"].add_argument("--with-library", action="store_true", help="send our wheel along")
    model = "OWNER/MODEL/transformers/VARIATION/N"
    add = made["notebook"].add_argument
    add("--to", required=True, metavar="OWNER/NOTEBOOK")
    add("--base", required=True, metavar=model)
    add("--wheels", required=True, metavar="OWNER/DATASET")
    add("--file", type=Path, metavar="IPYNB", help="another one (of notebooks/)")
    text = "to answer with; may be repeated: each adapter answers"
    add("--adapter", action="append", default=[], metavar=model, help=text)
    add("--competition", metavar="SLUG", help="whose test.csv is answered")
    add("--train", action="store_true", help="push the train notebook, which takes:")
    add("--rows", action="append", default=[], metavar="OWNER/DATASET", help="may be repeated")
    add("--encoder", metavar=f"OWNER/DATASET or {model}", help="sentence-t5's")
    text = "the notebook whose run ended in time: its output is gone on from"
    add("--earlier", metavar="OWNER/NOTEBOOK", help=text)
    made["submit"].add_argument("--notebook", required=True, metavar="OWNER/NOTEBOOK/N")
    made["submit"].add_argument("--message", required=True)
    made["submit"].add_argument(
        "--output", default="submission.csv", help="the notebook's output file (%(default)s)"
    )
    made["submit"].add_argument("--competition", required=True, metavar="SLUG")
    return top


def _add_publishing(sub: argparse.ArgumentParser, name: str) -> None:
    """What adapter, base and wheels take."""
    form = "OWNER/DATASET" if name == "wheels" else "OWNER/MODEL/transformers/VARIATION"
    if name != "wheels":
        sub.add_argument("dir", type=Path, metavar="DIR")
    sub.add_argument("--to", required=True, metavar=form)
    sub.add_argument(
        "--notes",
        required=name == "adapter",
        default=f"{name} by kaggle_upload",
        help="of the version",
    )
    verify = "download" if name == "adapter" else "list"
    text = "compare names and sizes, or sha256 too (%(default)s)"
    sub.add_argument("--verify", choices=("list", "download"), default=verify, help=text)
    sub.add_argument("--force", action="store_true", help="publish unchanged content once more")
    text = "where files are staged until they stand on Kaggle; on DIR's file system they are links"
    sub.add_argument(
        "--work",
        type=Path,
        help=text + " (DIR/../.kaggle_upload; wheels: outputs/kaggle_upload)",
    )
    sub.add_argument(
        "--versions",
        type=Path,
        default=VERSIONS,
        metavar="CSV",
        help="the record (%(default)s)",
    )


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, more than 0.")
    return float(text)


def _check_words(args: argparse.Namespace) -> None:
    """Raises UploadError for blank notes, messages and files; argparse makes [] of "--"."""
    for name in ("notes", "message", "output"):
        value = getattr(args, name, "x")
        if not isinstance(value, str) or not value.strip():
            raise UploadError(f"--{name} is blank or '--': write at least a word.")


def publish(args: argparse.Namespace, temp: Path) -> None:
    """adapter, base and wheels."""
    handle: Variation | Page
    details: dict[str, Any] = {}
    remote: Remote
    if args.command == "wheels":
        handle = Page.parse(args.to, "dataset")
        metadata = stage.dataset_metadata(handle)
        remote = RemoteDataset(handle, args.timeout)
        content = stage.read(wheels.collect(temp, [args.python] if args.python else wheels.PYTHONS))
        work = Path("outputs/kaggle_upload")
    else:
        handle = Variation.parse(args.to)
        metadata = stage.model_metadata(handle)
        remote = RemoteModel(handle, args.timeout)
        if args.command == "adapter":
            content, details = adapter_content(
                args.dir, wheels.build_library(temp) if args.with_library else None
            )
        else:
            content, details = base_content(args.dir)
        work = args.dir.resolve().parent / ".kaggle_upload"
    if args.dry_run:
        versions.read(args.versions)
        return show(handle, content, metadata, args.notes)
    work = (args.work or work).resolve()
    Publish(
        remote, content, metadata, args.notes, work, args.versions, args.verify, args.force, details
    ).run()


def push(args: argparse.Namespace) -> None:
    """notebook, to answer or to train."""
    needed = ("rows", "encoder") if args.train else ("adapter", "competition")
    others = ("adapter", "competition") if args.train else ("rows", "encoder", "earlier")
    mode = "with" if args.train else "without"
    if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
        raise UploadError(f"{mode} --train the notebook needs {' and '.join(missing)} too.")
    if useless := [f"--{name}" for name in others if getattr(args, name)]:
        raise UploadError(f"{mode} --train the notebook takes no {' and no '.join(useless)}.")
    handle = Page.parse(args.to, "notebook")
    models = [args.base] if args.train else [*args.adapter, args.base]
    datasets = [args.wheels, *args.rows]
    if args.train:
        # a dataset has two parts, a model's version five, as names and as addresses
        is_dataset = len(args.encoder.split("/")) == 2 or "/datasets/" in args.encoder
        (datasets if is_dataset else models).append(args.encoder)
    earlier = [Page.parse(args.earlier, "notebook", new=False)] if args.earlier else []
    if handle in earlier:
        raise UploadError(
            f"--earlier {handle} is the notebook that would be pushed, and the push makes a new "
            "version of it: give another --to, such as one with a number."
        )
    file = args.file or NOTEBOOKS / ("train.ipynb" if args.train else "submission.ipynb")
    metadata = stage.notebook_metadata(
        handle,
        file.name,
        _different([Variation.parse(text, pinned=True) for text in models]),
        [Page.parse(text, "dataset", new=False) for text in datasets],
        [competition_slug(args.competition)] if args.competition else [],
        earlier,
    )
    stage.pick(file.parent, [file.name])
    cells = notebook.check(file, args.train)
    code = "\n".join(source for kind, source in cells if kind == "code")
    if len(args.adapter) > 1 and re.findall(r"^combine\s*=\s*(\S+)", code, re.M)[-1:] == [
        '"first"'
    ]:
        print(
            f'note: {file} has combine = "first", which refuses several adapters unless there is a '
            "threshold: give --file with join or agree (docs/KAGGLE.md)."
        )
    if args.dry_run:
        about = json.dumps(metadata, indent=2)
        print(f"would push {file} with kernel-metadata.json: {about}")
    else:
        print(f"{handle}/{notebook.push(handle, file, metadata, args.timeout, args.train)}")


def _different(models: list[Variation]) -> list[Variation]:
    """The adapters and the base as they were given. Raises UploadError for one that is given twice;
    says in which order the notebook will find adapters, if it is another one."""
    names = [str(each) for each in models]
    if len(set(names)) < len(names):
        raise UploadError(f"{', '.join(names)}: give each once.")
    adapters = names[:-1]
    from prompt_recovery.inputs import by_number  # imports torch

    found = sorted(adapters, key=by_number)
    if found != adapters:
        print(
            f"note: the notebook takes adapters in the order of their paths: {', '.join(found)}. "
            "For another order set adapter_dir in its parameters."
        )
    return models


def _joined(argv: list[str]) -> list[str]:
    """Notes and messages in one word with their option, unless they look like one themselves.

    argparse takes "-half the rows" for the option -h.
    """
    result: list[str] = []
    for word in argv:
        option = re.fullmatch(r"-h|--[a-z-]+(=.*)?", word)
        if result and result[-1] in ("--notes", "--message") and not option:
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def main(argv: list[str] | None = None) -> int:
    """0 if all that was asked for stands on Kaggle, else 1."""
    args = parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        _check_words(args)
        if args.command in ("adapter", "base", "wheels"):
            with tempfile.TemporaryDirectory() as temp:
                publish(args, Path(temp))
        elif args.command == "notebook":
            push(args)
        else:
            version = Page.parse(args.notebook, "notebook", pinned=True)
            competition = competition_slug(args.competition)
            if args.dry_run:
                print(
                    f"would hand in {args.output} of {version} to {competition}: {args.message!r}"
                )
            else:
                notebook.submit(version, competition, args.output, args.message, args.timeout)
    except (UploadError, ValueError, OSError) as error:  # AdapterError and Nf4Error are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
