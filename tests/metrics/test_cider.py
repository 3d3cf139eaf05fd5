import math

import numpy as np
import pytest

from tests.metrics.report_texts import KINDS, as_caption_sets, pairs_of, random_pairs
from vlm3d_ext.metrics.cider import DocumentFrequencies, cider_d


@pytest.mark.parametrize("kind", KINDS)
def test_cider_equals_pycocoevalcap(kind):
    reference_code = pytest.importorskip("pycocoevalcap.cider.cider")
    hypotheses, references = pairs_of(kind)
    scores = cider_d(hypotheses, references)
    mean, expected = reference_code.Cider().compute_score(*as_caption_sets(hypotheses, references))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    assert scores.mean() == pytest.approx(mean, abs=1e-9) and mean > 0


@pytest.mark.parametrize(("hypothesis", "reference"), [("", "a b"), ("a", "a"), ("a", "a b c"), ("a b", "c")])
def test_very_short_texts_are_as_in_pycocoevalcap(hypothesis, reference):
    reference_code = pytest.importorskip("pycocoevalcap.cider.cider")
    hypotheses, references = [hypothesis, "x y"], [reference, "x y z"]
    expected = reference_code.Cider().compute_score(*as_caption_sets(hypotheses, references))[1]
    np.testing.assert_allclose(cider_d(hypotheses, references), expected, rtol=0, atol=1e-12)


def test_cider_by_hand():
    """Of "a b" against "a c", with "a" in one of two references: words 1/2, pairs 0, nothing longer; 10 · (1/2) / 4."""
    assert cider_d(["a b", "x"], ["a c", "y z"])[0] == pytest.approx(10 / 8)


def test_a_common_word_weighs_less_than_a_rare_one():
    """ "a" is in 2 of 4 references, "b" in 1: the weights are log 2 and log 4, 1 : 2."""
    references = ["a b", "a c", "d e", "f g"]
    rare, common = cider_d(["b x", "c x", "x", "x"], references)[0], cider_d(["a x", "a x", "x", "x"], references)[0]
    norm = math.sqrt(1 + 4)  # of the reference "a b"; an unseen word "x" weighs log 4
    assert rare == pytest.approx(10 / 4 * (2 * 2) / (math.sqrt(4 + 4) * norm))
    assert common == pytest.approx(10 / 4 * (1 * 1) / (math.sqrt(1 + 4) * norm))


def test_repeating_a_word_gains_nothing_beyond_the_count_of_the_reference():
    references = ["a b c d", "e f g h"]
    once, twice = cider_d(["a x y z", ""], references)[0], cider_d(["a a y z", ""], references)[0]
    assert once == pytest.approx(10 / 4 * 1 / 4)
    assert twice == pytest.approx(10 / 4 * 1 / (math.sqrt(4 + 1 + 1) * 2))


def test_a_difference_in_length_costs_a_gaussian_of_six_words():
    """All runs of words are as rare as each other; twelve words "e" more are twelve words, and 11, 10 and 9 runs."""
    references = ["a b c d", "e f g h"]
    frequencies = DocumentFrequencies(2, {})
    assert cider_d(references, references, frequencies) == pytest.approx([10, 10])
    long = cider_d(["a b c d" + " e" * 12, ""], references, frequencies)[0]
    cosines = [
        4 / math.sqrt((4 + 12**2) * 4),
        3 / math.sqrt((3 + 1 + 11**2) * 3),
        2 / math.sqrt((2 + 2 + 10**2) * 2),
        1 / math.sqrt((1 + 3 + 9**2) * 1),
    ]
    assert long == pytest.approx(10 * np.mean(cosines) * math.exp(-(12**2) / (2 * 6**2)))


def test_identical_texts_score_ten_and_empty_or_foreign_ones_zero():
    _, references = random_pairs()
    references = [f"{text} x{i} y{i} z{i} w{i}" for i, text in enumerate(references)]
    assert cider_d(references, references) == pytest.approx(np.full(len(references), 10.0))
    assert (cider_d(["", "q r"], ["a b", "c d"]) == 0).all()


def test_a_single_case_scores_zero_unless_told_what_is_rare():
    reference = "a small nodule is seen"
    assert cider_d([reference], [reference]) == [0.0]
    frequencies = DocumentFrequencies.from_references([reference, "no effusion is seen"])
    assert cider_d([reference], [reference], frequencies) == pytest.approx([10.0])


def test_texts_one_at_a_time_score_as_all_together():
    hypotheses, references = random_pairs()
    frequencies = DocumentFrequencies.from_references(references)
    alone = [cider_d([h], [r], frequencies)[0] for h, r in zip(hypotheses, references, strict=True)]
    np.testing.assert_array_equal(alone, cider_d(hypotheses, references))
    np.testing.assert_array_equal(cider_d(hypotheses[::-1], references[::-1])[::-1], alone)


def test_document_frequencies_count_texts_and_not_words():
    frequencies = DocumentFrequencies.from_references(["a a a b", "a b", "c"])
    assert frequencies.num_documents == 3
    assert frequencies.counts[("a",)] == 2 and frequencies.counts[("a", "a", "b")] == 1
    assert frequencies.rarity(("a",)) == pytest.approx(math.log(3 / 2))
    assert frequencies.rarity(("never",)) == pytest.approx(math.log(3)) == frequencies.rarity(("c",))


def test_errors():
    with pytest.raises(ValueError, match="got 2 hypotheses and 1 references"):
        cider_d(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="got 0 hypotheses and 0 references"):
        cider_d([], [])
    with pytest.raises(ValueError, match="at least one reference text"):
        DocumentFrequencies.from_references([])
