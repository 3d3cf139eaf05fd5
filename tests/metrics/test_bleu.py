from collections import Counter

import numpy as np
import pytest

from tests.metrics.report_texts import KINDS, as_caption_sets, pairs_of, random_pairs
from vlm3d_ext.metrics.bleu import corpus_bleu, count_ngrams, sentence_bleu


@pytest.mark.parametrize("kind", KINDS)
def test_bleu_equals_pycocoevalcap(kind):
    reference_code = pytest.importorskip("pycocoevalcap.bleu.bleu")
    hypotheses, references = pairs_of(kind)
    corpus, per_case = corpus_bleu(hypotheses, references)
    expected, expected_per_case = reference_code.Bleu(4).compute_score(*as_caption_sets(hypotheses, references), 0)
    np.testing.assert_allclose(corpus, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(per_case, np.transpose(expected_per_case), rtol=0, atol=1e-9)
    assert 0 < corpus[3] < corpus[0] <= 1


def test_bleu_by_hand():
    """5 of 6 words, 2 of 5 pairs, 1 of 4 triples and no run of four match; the lengths are equal."""
    scores = sentence_bleu("the heart is of normal size", "the heart is normal in size")
    assert scores[0] == pytest.approx(5 / 6)
    assert scores[1] == pytest.approx((5 / 6 * 2 / 5) ** (1 / 2))
    assert scores[2] == pytest.approx((5 / 6 * 2 / 5 * 1 / 4) ** (1 / 3))
    assert scores[3] == pytest.approx((5 / 6 * 2 / 5 * 1 / 4 * 1e-15 / 3) ** (1 / 4))


def test_a_short_text_pays_the_brevity_penalty_and_a_long_one_does_not():
    reference = "no pleural effusion is seen today"
    assert sentence_bleu("no pleural effusion", reference)[0] == pytest.approx(np.exp(1 - 6 / 3))
    assert sentence_bleu(f"{reference} or before", reference)[0] == pytest.approx(6 / 8)


def test_a_repeated_word_counts_as_often_as_the_reference_has_it():
    assert sentence_bleu("the the the the the the the", "the cat is on the mat x")[0] == pytest.approx(2 / 7)


def test_the_corpus_pools_counts_and_is_not_the_mean_of_cases():
    """Unigrams: 1 of 1 and 0 of 3 match; pooled 1 of 4 with lengths 4 and 4."""
    corpus, per_case = corpus_bleu(["a", "x y z"], ["a", "b c d"])
    assert corpus[0] == pytest.approx(1 / 4)
    assert per_case[:, 0] == pytest.approx([1, 0], abs=1e-8)


def test_identical_texts_score_one_and_short_ones_only_for_the_runs_they_have():
    assert sentence_bleu("no effusion is seen .", "no effusion is seen .") == pytest.approx((1, 1, 1, 1), abs=1e-6)
    assert sentence_bleu("no effusion seen", "no effusion seen") == pytest.approx((1, 1, 1, 1e-6 ** (1 / 4)), abs=1e-6)


def test_an_empty_hypothesis_scores_zero():
    assert sentence_bleu("", "no effusion") == sentence_bleu(" \n", "no effusion") == (0, 0, 0, 0)
    corpus, per_case = corpus_bleu(["", "no effusion is seen"], ["a nodule", "no effusion is seen"])
    assert (per_case[0] == 0).all() and per_case[1] == pytest.approx(np.ones(4), abs=1e-6)
    assert corpus == pytest.approx(np.full(4, np.exp(1 - 6 / 4)), abs=1e-6)


def test_case_order_and_punctuation():
    assert sentence_bleu("No effusion", "no effusion")[0] == pytest.approx(1 / 2)
    assert sentence_bleu("effusion.", "effusion")[0] == pytest.approx(0, abs=1e-9)
    ordered, mixed = "a b c d e f", "f d b a e c"
    assert sentence_bleu(mixed, ordered)[0] == pytest.approx(1) and sentence_bleu(mixed, ordered)[1] < 1e-6


def test_the_order_of_cases_and_white_space_change_nothing():
    hypotheses, references = random_pairs()
    corpus, per_case = corpus_bleu(hypotheses, references)
    turned, turned_per_case = corpus_bleu(
        hypotheses[::-1], [f"\n{text} ".replace(" ", "  ") for text in references[::-1]]
    )
    np.testing.assert_allclose(turned, corpus, rtol=1e-12)
    np.testing.assert_array_equal(turned_per_case[::-1], per_case)
    np.testing.assert_array_equal([sentence_bleu(*pair) for pair in zip(hypotheses, references, strict=True)], per_case)


def test_ngrams_of_a_text():
    assert count_ngrams("a b a b".split(), 2) == Counter({("a", "b"): 2, ("b", "a"): 1})
    assert not count_ngrams(["a"], 2)


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], []), ([], []), (["a"], ["b", "c"])])
def test_numbers_of_texts_must_agree(hypotheses, references):
    with pytest.raises(ValueError, match=f"got {len(hypotheses)} hypotheses and {len(references)} references"):
        corpus_bleu(hypotheses, references)
