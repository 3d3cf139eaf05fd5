"""Report scores that need the weights of a model: BERTScore, RadGraph, GREEN, RaTEScore and the RadBERT-CT labels.

All are optional: the packages are no dependency of this one, and the weights are hundreds of megabytes or more. What is
missing is an error that says what to install; no score is ever 0 because something was not there.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MODEL_BASED_SCORES", "ModelBasedScore", "ScoreSource", "available_model_based_scores", "model_based_scores"]

_logger = logging.getLogger(__name__)

_BERT_SCORE_MODEL = "roberta-large"
# radeval unpacks RadGraph's weights into a folder of its own, named after the release of radgraph that it follows.
_RADGRAPH_REPOSITORY = "StanfordAIMI/RRG_scorers"
_RADGRAPH_FOLDER = Path("radgraph") / "0.1.18" / "radgraph-xl"
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class ScoreSource:
    """Where a score comes from.

    Attributes:
        package: name to import.
        pip_command: what installs it.
        weights: repositories of the Hugging Face hub.
        size: of what would be downloaded, in words.
        metric: name within radeval, or "" where radeval is not used.
        keys: what the package calls its values per case -> what they are called here.
        remark: what else a user should know before it runs.
    """

    package: str
    pip_command: str
    weights: tuple[str, ...]
    size: str
    metric: str
    keys: dict[str, str]
    remark: str = ""


_RADEVAL = ("radeval", "pip install 'radeval>=2.2'")

# Sizes are rounded up; which weights a metric takes is fixed within radeval 2.2.
MODEL_BASED_SCORES: dict[str, ScoreSource] = {
    "bertscore": ScoreSource(
        "bert_score",
        "pip install bert_score",
        (_BERT_SCORE_MODEL,),
        "about 1.4 GB",
        "",
        {"precision": "bertscore_precision", "recall": "bertscore_recall", "f1": "bertscore_f1"},
        "reads the first 512 tokens of a text",
    ),
    "radgraph": ScoreSource(
        *_RADEVAL,
        (_RADGRAPH_REPOSITORY,),
        "about 0.5 GB",
        "radgraph",
        {name: name for name in ("radgraph_simple", "radgraph_partial", "radgraph_complete")},
    ),
    "green": ScoreSource(
        *_RADEVAL,
        ("StanfordAIMI/GREEN-radllama2-7b",),
        "about 14 GB",
        "green",
        {"green": "green"},
        "runs Python code of the weights' repository; radeval gives 0 where it cannot read the model's answer",
    ),
    "ratescore": ScoreSource(
        *_RADEVAL,
        ("Angelakeke/RaTE-NER-Deberta", "FremyCompany/BioLORD-2023-C"),
        "about 1.2 GB",
        "ratescore",
        {"ratescore": "ratescore"},
    ),
    "radbert_ct": ScoreSource(
        *_RADEVAL,
        ("IAMJB/RadBERT-CT",),
        "about 0.5 GB",
        "f1radbert_ct",
        {"f1radbert_ct_sample_acc": "radbert_ct_all_labels_equal"},
        "reads the first 512 tokens of a text",
    ),
}
# Of all cases together, as radeval rounds them (4 digits); an F1 over labels has no value per case.
_RADBERT_CORPUS_KEYS = {
    "f1radbert_ct_micro_f1": "radbert_ct_micro_f1",
    "f1radbert_ct_macro_f1": "radbert_ct_macro_f1",
    "f1radbert_ct_weighted_f1": "radbert_ct_weighted_f1",
}


@dataclass(frozen=True)
class ModelBasedScore:
    """Values of one model-based score.

    Attributes:
        per_case: value name -> (N,); NaN where the model gave none.
        corpus: value name -> the mean of the cases that have a value, or for F1 over labels the value of all together.
    """

    per_case: dict[str, np.ndarray]
    corpus: dict[str, float]


def available_model_based_scores() -> dict[str, str | None]:
    """Return for each score why it cannot run here, or None if it can; loads and downloads nothing.

    Weights that are not in the cache are a reason only where the hub is switched off (HF_HUB_OFFLINE=1); otherwise
    they would be downloaded.
    """
    return {name: _reason(name, may_download=not _hub_is_off()) for name in MODEL_BASED_SCORES}


def model_based_scores(
    names: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], *, may_download: bool = True
) -> dict[str, ModelBasedScore]:
    """Return the model-based scores that are asked for, one reference per hypothesis.

    Whether all can run is settled before the first one starts. Before weights are downloaded one line of the log says
    which, and how much. An empty hypothesis scores 0 without being shown to the model, and the log says how many there
    were; RadBERT-CT alone reads it, as a report in which nothing is found.

    Args:
        names: keys of `MODEL_BASED_SCORES`.
        hypotheses: N generated texts.
        references: N reference texts, none of them empty.
        may_download: whether weights that are not in the cache are downloaded, or are an error.

    Raises:
        ModuleNotFoundError: if a package is missing; says which, and the pip command.
        FileNotFoundError: if weights are missing and may not be downloaded; says which, and how much it would be.
        RuntimeError: if the package fails, or gives something else than N values.
        ValueError: if a name is unknown, the numbers of texts differ, there are none, or a reference is empty.
    """
    unknown = [name for name in names if name not in MODEL_BASED_SCORES]
    if unknown:
        raise ValueError(f"unknown model-based scores {unknown}; choose from {list(MODEL_BASED_SCORES)}.")
    _check(hypotheses, references)
    may_download = may_download and not _hub_is_off()
    for name in names:
        if reason := _reason(name, may_download):
            missing = ModuleNotFoundError if not _importable(MODEL_BASED_SCORES[name].package) else FileNotFoundError
            raise missing(reason)
    return {name: _run(name, list(hypotheses), list(references)) for name in names}


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(
            f"model-based scores need one reference per hypothesis and at least one of them, got {len(hypotheses)} "
            f"hypotheses and {len(references)} references."
        )
    empty = [index for index, reference in enumerate(references) if not reference.strip()]
    if empty:
        raise ValueError(f"{len(empty)} references are empty, the first at index {empty[0]}; leave these cases out.")


def _run(name: str, hypotheses: list[str], references: list[str]) -> ModelBasedScore:
    source = MODEL_BASED_SCORES[name]
    missing = _missing_weights(source)
    if missing:
        _logger.warning("%s: downloading %s (%s) from the Hugging Face hub", name, ", ".join(missing), source.size)
    if source.remark:
        _logger.warning("%s: %s", name, source.remark)
    shown = np.array([name == "radbert_ct" or bool(text.strip()) for text in hypotheses])
    if not shown.all():
        _logger.warning("%s: %d of %d hypotheses are empty and score 0", name, (~shown).sum(), len(shown))
    per_case = {key: np.zeros(len(shown)) for key in source.keys.values()}
    corpus: dict[str, float] = {}
    if shown.any():
        pairs = [pair for pair, keep in zip(zip(hypotheses, references, strict=True), shown, strict=True) if keep]
        try:
            values, corpus = _ask_package(name, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        except Exception as error:
            # whatever a foreign package raises, the reader must learn which score it was and what it needs
            raise RuntimeError(
                f"{name}: the package {source.package} failed with {type(error).__name__}: {error}. It needs the "
                f"weights {', '.join(source.weights)} ({source.size}); check that they "
                f"can be downloaded or are in the cache, and the version (`{source.pip_command}`)."
            ) from error
        for key, own_key in source.keys.items():
            column = np.asarray(values.get(key, ()), dtype=float)
            if column.shape != (len(pairs),):
                raise RuntimeError(
                    f"{name}: the package {source.package} gave {column.size} values of {key!r}, expected {len(pairs)};"
                    f" it may be a version that this was not written for: `{source.pip_command}`."
                )
            per_case[own_key][shown] = column
    for key, column in per_case.items():
        undefined = np.isnan(column)
        if undefined.any():
            _logger.warning("%s: %s has no value for %d of %d cases", name, key, undefined.sum(), len(column))
        corpus[key] = float("nan") if undefined.all() else float(np.nanmean(column))
    return ModelBasedScore(per_case, corpus)


def _ask_package(name: str, hypotheses: list[str], references: list[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the package's values per case under its own keys, and values that only a corpus has."""
    source = MODEL_BASED_SCORES[name]
    package = importlib.import_module(source.package)
    if not source.metric:
        columns = package.score(hypotheses, references, model_type=_BERT_SCORE_MODEL, rescale_with_baseline=False)
        return {key: column.tolist() for key, column in zip(source.keys, columns, strict=True)}, {}
    evaluator = package.RadEval(metrics=[source.metric], per_sample=True, show_progress=False)
    values = evaluator(refs=references, hyps=hypotheses)
    if name != "radbert_ct":
        return values, {}
    evaluator.per_sample = False
    of_all = evaluator(refs=references, hyps=hypotheses)
    return values, {own_key: float(of_all[key]) for key, own_key in _RADBERT_CORPUS_KEYS.items()}


def _reason(name: str, may_download: bool) -> str | None:
    source = MODEL_BASED_SCORES[name]
    missing = _missing_weights(source)
    if not _importable(source.package):
        download = f"; it would then download {', '.join(missing)} ({source.size})" if missing else ""
        return f"{name} needs the package {source.package}, which is not installed: `{source.pip_command}`{download}."
    if missing and not may_download:
        return (
            f"{name} needs the weights {', '.join(missing)} ({source.size}), which are not in the cache, and downloads "
            "are off; run once with may_download=True and without HF_HUB_OFFLINE, or copy the cache from a machine "
            "that has them."
        )
    return None


def _importable(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _missing_weights(source: ScoreSource) -> list[str]:
    """Return the repositories whose weights are not in the cache."""
    return [repository for repository in source.weights if not _is_cached(repository)]


def _is_cached(repository: str) -> bool:
    if repository == _RADGRAPH_REPOSITORY:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return any((caches / _RADGRAPH_FOLDER).glob("*"))
    from huggingface_hub import try_to_load_from_cache

    found = [isinstance(try_to_load_from_cache(repository, file), str) for file in ("config.json", *_WEIGHT_FILES)]
    return found[0] and any(found[1:])


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
