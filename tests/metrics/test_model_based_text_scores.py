"""The glue only: fake packages stand for bert_score and radeval, and an empty cache for the hub."""

import logging
import sys
from types import ModuleType

import numpy as np
import pytest

from vlm3d_ext.metrics import model_based_text_scores as module
from vlm3d_ext.metrics.model_based_text_scores import (
    MODEL_BASED_SCORES,
    available_model_based_scores,
    model_based_scores,
)

HYPOTHESES, REFERENCES = ["a nodule", "an effusion is seen"], ["one nodule is there", "an effusion"]
NAN = float("nan")


@pytest.fixture(autouse=True)
def nothing_installed_nor_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for package in ("bert_score", "radeval"):
        monkeypatch.delitem(sys.modules, package, raising=False)


@pytest.fixture
def cached(monkeypatch):
    """Every file of every repository is in the cache."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: f"/cache/{file}")


def num_words(texts):
    return np.array([float(len(text.split())) for text in texts])


@pytest.fixture
def bert_score(monkeypatch):
    """A bert_score whose P, R and F1 are the words of the hypothesis, of the reference, and their product."""
    package = ModuleType("bert_score")
    package.calls = []

    def score(cands, refs, *, model_type, rescale_with_baseline):
        package.calls.append((cands, refs, model_type, rescale_with_baseline))
        return num_words(cands), num_words(refs), num_words(cands) * num_words(refs)

    package.score = score
    monkeypatch.setitem(sys.modules, "bert_score", package)
    return package


@pytest.fixture
def radeval(monkeypatch):
    """A radeval 2.2 that counts words; only what it was asked for, and other keys per case than of a corpus."""
    package = ModuleType("radeval")
    package.values = {
        "radgraph": ["radgraph_simple", "radgraph_partial", "radgraph_complete"],
        "green": ["green"],
        "ratescore": ["ratescore"],
        "f1radbert_ct": ["f1radbert_ct_sample_acc"],
    }
    package.calls = []

    class RadEval:
        def __init__(self, metrics, per_sample, show_progress):
            (self.metric,), self.per_sample, self.show_progress = metrics, per_sample, show_progress

        def __call__(self, refs, hyps):
            assert isinstance(refs, list) and isinstance(hyps, list)
            package.calls.append((self.metric, self.per_sample, hyps))
            if self.per_sample:
                return {key: list(num_words(hyps) + 10 * num_words(refs)) for key in package.values[self.metric]}
            return {
                f"f1radbert_ct_{mean}_f1": value for mean, value in (("micro", 0.5), ("macro", 0.25), ("weighted", 1))
            }

    package.RadEval = RadEval
    monkeypatch.setitem(sys.modules, "radeval", package)
    return package


def test_each_absent_package_is_named_with_its_command_and_its_download():
    reasons = available_model_based_scores()
    assert list(reasons) == ["bertscore", "radgraph", "green", "ratescore", "radbert_ct"] == list(MODEL_BASED_SCORES)
    assert "pip install bert_score" in reasons["bertscore"] and "roberta-large (about 1.4 GB)" in reasons["bertscore"]
    for name in ("radgraph", "green", "ratescore", "radbert_ct"):
        assert "pip install 'radeval>=2.2'" in reasons[name]
        assert all(repository in reasons[name] for repository in MODEL_BASED_SCORES[name].weights)


@pytest.mark.parametrize("name", MODEL_BASED_SCORES)
def test_an_absent_package_is_an_error_and_never_a_zero(name):
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs the package .* not installed: `pip install"):
        model_based_scores([name], HYPOTHESES, REFERENCES)


def test_nothing_runs_if_one_of_them_cannot(bert_score):
    with pytest.raises(ModuleNotFoundError, match="green needs the package radeval"):
        model_based_scores(["bertscore", "green"], HYPOTHESES, REFERENCES)
    assert bert_score.calls == []


def test_bertscore(bert_score, cached):
    assert available_model_based_scores()["bertscore"] is None
    score = model_based_scores(["bertscore"], HYPOTHESES, REFERENCES)["bertscore"]
    np.testing.assert_array_equal(score.per_case["bertscore_precision"], [2, 4])
    np.testing.assert_array_equal(score.per_case["bertscore_recall"], [4, 2])
    np.testing.assert_array_equal(score.per_case["bertscore_f1"], [8, 8])
    assert score.corpus == {"bertscore_precision": 3, "bertscore_recall": 3, "bertscore_f1": 8}
    assert bert_score.calls == [(HYPOTHESES, REFERENCES, "roberta-large", False)]


def test_scores_through_radeval(radeval, cached):
    scores = model_based_scores(["radgraph", "green", "ratescore"], HYPOTHESES, REFERENCES)
    assert list(scores["radgraph"].per_case) == ["radgraph_simple", "radgraph_partial", "radgraph_complete"]
    for score in scores.values():
        for name, values in score.per_case.items():
            np.testing.assert_array_equal(values, [42, 24])
            assert score.corpus[name] == 33
    assert [call[:2] for call in radeval.calls] == [("radgraph", True), ("green", True), ("ratescore", True)]


def test_radbert_has_an_f1_of_the_corpus_and_reads_empty_texts(radeval, cached):
    score = model_based_scores(["radbert_ct"], ["", "an effusion"], REFERENCES)["radbert_ct"]
    np.testing.assert_array_equal(score.per_case["radbert_ct_all_labels_equal"], [40, 22])
    assert score.corpus == {
        "radbert_ct_micro_f1": 0.5,
        "radbert_ct_macro_f1": 0.25,
        "radbert_ct_weighted_f1": 1.0,
        "radbert_ct_all_labels_equal": 31.0,
    }
    assert [call[2] for call in radeval.calls] == [["", "an effusion"]] * 2


def test_an_empty_hypothesis_scores_zero_without_the_model(bert_score, cached, caplog):
    score = model_based_scores(["bertscore"], ["a", " ", "c d"], ["x", "y", "z"])["bertscore"]
    np.testing.assert_array_equal(score.per_case["bertscore_f1"], [1, 0, 2])
    assert score.corpus["bertscore_f1"] == 1 and bert_score.calls[0][0] == ["a", "c d"]
    assert "1 of 3 hypotheses are empty and score 0" in caplog.text


def test_a_case_without_a_value_is_nan_and_said(radeval, cached, caplog, monkeypatch):
    monkeypatch.setattr(radeval.RadEval, "__call__", lambda self, refs, hyps: {"green": [None, 0.5]})
    score = model_based_scores(["green"], HYPOTHESES, REFERENCES)["green"]
    np.testing.assert_array_equal(score.per_case["green"], [NAN, 0.5])
    assert score.corpus == {"green": 0.5} and "green has no value for 1 of 2 cases" in caplog.text


def test_a_download_is_said_before_and_can_be_forbidden(bert_score, caplog):
    assert available_model_based_scores()["bertscore"] is None
    with pytest.raises(FileNotFoundError, match=r"weights roberta-large \(about 1.4 GB\).* not in the cache"):
        model_based_scores(["bertscore"], HYPOTHESES, REFERENCES, may_download=False)
    assert bert_score.calls == []
    with caplog.at_level(logging.WARNING):
        model_based_scores(["bertscore"], HYPOTHESES, REFERENCES)
    assert "downloading roberta-large (about 1.4 GB)" in caplog.text


def test_with_the_hub_switched_off_missing_weights_are_a_reason(bert_score, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not in the cache" in available_model_based_scores()["bertscore"]
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        model_based_scores(["bertscore"], HYPOTHESES, REFERENCES)


def test_cached_weights_are_no_download(bert_score, radeval, cached, caplog, tmp_path):
    model_based_scores(["bertscore"], HYPOTHESES, REFERENCES, may_download=False)
    with pytest.raises(FileNotFoundError, match="StanfordAIMI/RRG_scorers"):
        model_based_scores(["radgraph"], HYPOTHESES, REFERENCES, may_download=False)
    folder = tmp_path / "radgraph" / "0.1.18" / "radgraph-xl"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    model_based_scores(["radgraph"], HYPOTHESES, REFERENCES, may_download=False)
    assert "downloading" not in caplog.text


def test_a_configuration_without_weights_is_not_cached(bert_score, monkeypatch):
    only_config = lambda repository, file: "/cache/config.json" if file == "config.json" else None  # noqa: E731
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", only_config)
    with pytest.raises(FileNotFoundError, match="roberta-large"):
        model_based_scores(["bertscore"], HYPOTHESES, REFERENCES, may_download=False)


def test_a_failing_package_is_named_with_what_it_needs(bert_score, monkeypatch):
    def score(*args, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr(bert_score, "score", score)
    with pytest.raises(RuntimeError, match=r"bert_score failed with OSError: no route to the hub.*roberta-large"):
        model_based_scores(["bertscore"], HYPOTHESES, REFERENCES)


@pytest.mark.parametrize("values", [{}, {"ratescore": [0.5]}])
def test_a_package_that_gives_too_little_is_an_error(radeval, cached, monkeypatch, values):
    monkeypatch.setattr(radeval.RadEval, "__call__", lambda self, refs, hyps: values)
    with pytest.raises(RuntimeError, match=r"values of 'ratescore', expected 2;.*radeval>=2\.2"):
        model_based_scores(["ratescore"], HYPOTHESES, REFERENCES)


def test_what_a_user_should_know_is_said(radeval, cached, caplog):
    model_based_scores(["green"], HYPOTHESES, REFERENCES)
    assert "runs Python code of the weights' repository" in caplog.text


@pytest.mark.parametrize(
    ("names", "hypotheses", "references", "message"),
    [
        (["bleurt"], ["a"], ["a"], r"unknown model-based scores \['bleurt'\]; choose from \['bertscore'"),
        (["bertscore"], ["a"], [], "got 1 hypotheses and 0 references"),
        (["bertscore"], [], [], "at least one of them"),
        (["bertscore"], ["a", "b"], ["a", ""], "1 references are empty, the first at index 1"),
    ],
)
def test_errors(names, hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        model_based_scores(names, hypotheses, references)
