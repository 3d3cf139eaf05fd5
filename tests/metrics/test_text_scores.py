import logging
import time

import numpy as np
import pytest

from tests.metrics.report_texts import as_caption_sets, pairs_of, random_pairs
from vlm3d_ext.metrics import text_scores
from vlm3d_ext.metrics.bleu import corpus_bleu
from vlm3d_ext.metrics.meteor import meteor_exact_stem, meteor_exact_stem_absent
from vlm3d_ext.metrics.rouge_l import rouge_l
from vlm3d_ext.metrics.text_scores import score_texts

needs_stemmer = pytest.mark.skipif(meteor_exact_stem_absent() is not None, reason=str(meteor_exact_stem_absent()))
BLEU = ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]


def scores_of(hypotheses, references, **options):
    return score_texts(hypotheses, references, [f"case_{i}" for i in range(len(references))], **options)


@needs_stemmer
def test_names_and_shapes():
    scores = scores_of(*random_pairs(7))
    assert list(scores.per_case) == [*BLEU, "rouge_l", "cider", "meteor_exact_stem"]
    assert all(values.shape == (7,) for values in scores.per_case.values())
    assert set(scores.mean) == {*(f"{name}_corpus" for name in BLEU), "rouge_l", "cider", "meteor_exact_stem"}
    assert scores.absent == {"meteor_1_5": "not asked for (with_meteor_1_5=False)"}
    assert scores.case_ids == [f"case_{i}" for i in range(7)] and scores.left_out == []


@needs_stemmer
def test_the_means_are_those_of_the_parts():
    hypotheses, references = random_pairs()
    scores = scores_of(hypotheses, references)
    assert [scores.mean[f"{name}_corpus"] for name in BLEU] == pytest.approx(corpus_bleu(hypotheses, references)[0])
    assert scores.mean["bleu_4_corpus"] != pytest.approx(scores.per_case["bleu_4"].mean(), abs=1e-3)
    for name in ("rouge_l", "cider", "meteor_exact_stem"):
        assert scores.mean[name] == pytest.approx(scores.per_case[name].mean())
    assert scores.per_case["rouge_l"][3] == rouge_l(hypotheses[3], references[3])
    assert scores.per_case["meteor_exact_stem"][3] == meteor_exact_stem(hypotheses[3], references[3])


@pytest.mark.parametrize("kind", ["OpenI: neighbour", "CT-RATE: dropped words"])
def test_means_equal_pycocoevalcap_on_real_reports(kind):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    rouge, cider = pytest.importorskip("pycocoevalcap.rouge.rouge"), pytest.importorskip("pycocoevalcap.cider.cider")
    hypotheses, references = (texts[:20] for texts in pairs_of(kind))
    sets = as_caption_sets(hypotheses, references)
    mean = scores_of(hypotheses, references).mean
    assert [mean[f"{name}_corpus"] for name in BLEU] == pytest.approx(bleu.compute_score(*sets, 0)[0], abs=1e-9)
    assert mean["rouge_l"] == pytest.approx(rouge.Rouge().compute_score(*sets)[0], abs=1e-9)
    assert mean["cider"] == pytest.approx(cider.Cider().compute_score(*sets)[0], abs=1e-9)


def test_an_empty_hypothesis_scores_zero_in_every_metric():
    scores = scores_of(["", "a b c d e", " "], ["no effusion", "a b c d e", "a  nodule"])
    for name, values in scores.per_case.items():
        assert values[0] == values[2] == 0 and values[1] > 0.99, name
    assert scores.left_out == []


def test_an_empty_reference_is_left_out_of_all_and_named(caplog):
    hypotheses, references = random_pairs(6)
    whole = scores_of(hypotheses, references)
    with caplog.at_level(logging.WARNING):
        scores = score_texts(
            ["anything", *hypotheses, "x"], ["", *references, " \n"], ["first", *whole.case_ids, "last"]
        )
    assert scores.left_out == ["first", "last"] and scores.case_ids == whole.case_ids
    assert scores.mean == whole.mean
    for name, values in whole.per_case.items():
        np.testing.assert_array_equal(scores.per_case[name], values)
    assert "2 of 8 cases have no reference text: first, last" in caplog.text


def test_cider_of_a_single_case_is_absent_and_not_zero():
    scores = scores_of(["a nodule is seen", "x"], ["a nodule is seen", ""])
    assert "cider" not in scores.per_case and "cider" not in scores.mean
    assert "two cases or more" in scores.absent["cider"]
    assert scores.mean["rouge_l"] == 1.0


def test_what_cannot_run_is_absent_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(text_scores, "meteor_exact_stem_absent", lambda: "no stemmer")
    monkeypatch.setattr(text_scores, "meteor_1_5_absent", lambda: "no java")
    scores = scores_of(*random_pairs(3), with_meteor_1_5=True)
    assert scores.absent == {"meteor_exact_stem": "no stemmer", "meteor_1_5": "no java"}
    assert not any("meteor" in name for name in (*scores.per_case, *scores.mean))
    assert "METEOR 1.5 is absent: no java" in caplog.text


def test_the_two_meteors_have_two_names(monkeypatch):
    monkeypatch.setattr(text_scores, "meteor_1_5_absent", lambda: None)
    monkeypatch.setattr(text_scores, "meteor_1_5", lambda h, r: (0.25, np.array([0.125, 0.5])))
    scores = scores_of(["a", "b"], ["a", "c"], with_meteor_1_5=True)
    np.testing.assert_array_equal(scores.per_case["meteor_1_5"], [0.125, 0.5])
    assert scores.mean["meteor_1_5_corpus"] == 0.25 and "meteor_1_5" not in scores.mean
    assert "meteor" not in scores.mean and "meteor_1_5" not in scores.absent


def test_a_java_that_hangs_costs_that_score_only(monkeypatch):
    def hangs(hypotheses, references):
        raise TimeoutError("METEOR 1.5 took more than 600 s")

    monkeypatch.setattr(text_scores, "meteor_1_5_absent", lambda: None)
    monkeypatch.setattr(text_scores, "meteor_1_5", hangs)
    scores = scores_of(["a", "b"], ["a", "b"], with_meteor_1_5=True)
    assert scores.absent["meteor_1_5"] == "METEOR 1.5 took more than 600 s" and scores.mean["rouge_l"] == 1


@needs_stemmer
def test_four_hundred_reports_of_two_hundred_words_take_seconds():
    generator = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(120)]
    texts = [" ".join(generator.choice(vocabulary, 200)) for _ in range(401)]
    start = time.perf_counter()
    scores_of(texts[1:], texts[:-1])
    assert time.perf_counter() - start < 15  # 3 s on an idle core


@pytest.mark.parametrize(
    ("hypotheses", "references", "case_ids", "message"),
    [
        (["a"], ["a", "b"], ["1", "2"], "got 1 hypotheses, 2 references and 2 case ids"),
        (["a", "b"], ["a", "b"], ["1"], "got 2 hypotheses, 2 references and 1 case ids"),
        ([], [], [], "no cases to score"),
        (["a", "b"], ["", " "], ["1", "2"], "all 2 reference texts are empty.*check which column"),
        (["a", "b"], ["a", "b"], ["1", "1"], "occur more than once: 1"),
    ],
)
def test_errors(hypotheses, references, case_ids, message):
    with pytest.raises(ValueError, match=message):
        score_texts(hypotheses, references, case_ids)


def test_a_text_that_is_no_text():
    with pytest.raises(TypeError, match="case 2: the reference is nan, expected a str"):
        score_texts(["a", "b"], ["a", float("nan")], ["1", "2"])
