import time
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from tests.metrics.report_texts import KINDS, as_caption_sets, pairs_of, random_pairs
from vlm3d_ext.metrics.rouge_l import common_subsequence_length, rouge_l


@pytest.mark.parametrize("kind", KINDS)
def test_rouge_l_equals_pycocoevalcap(kind):
    reference_code = pytest.importorskip("pycocoevalcap.rouge.rouge")
    hypotheses, references = (texts[:30] for texts in pairs_of(kind))  # its loops take 10 ms a pair
    scores = [rouge_l(*pair) for pair in zip(hypotheses, references, strict=True)]
    mean, expected = reference_code.Rouge().compute_score(*as_caption_sets(hypotheses, references))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    assert np.mean(scores) == pytest.approx(mean, abs=1e-9)


def test_white_space_is_read_as_pycocoevalcap_reads_it():
    """Only single spaces part words: a line break joins two, and a double space holds an empty word."""
    reference_code = pytest.importorskip("pycocoevalcap.rouge.rouge")
    for pair in [("no\neffusion is seen", "no effusion is seen"), ("a  b ", "a b"), ("a  b", "x  y")]:
        assert rouge_l(*pair) == pytest.approx(reference_code.Rouge().calc_score([pair[0]], [pair[1]]), abs=1e-12)
    assert rouge_l("a  b", "x  y") > 0


def test_rouge_l_by_hand():
    """The subsequence "the heart normal" has 3 of 4 and of 6 words: P = 3/4, R = 1/2, 2.44 · 3/8 / (1/2 + 1.08)."""
    assert rouge_l("the heart normal is", "the heart is of normal size") == pytest.approx(2.44 * 3 / 8 / 1.58)


def test_recall_weighs_more_than_precision():
    long, short = "a b c d e f g h", "a b c d"
    assert rouge_l(long, short) > rouge_l(short, long) > 0


def test_identical_empty_and_foreign_texts():
    hypotheses, _ = random_pairs()
    assert [rouge_l(text, text) for text in hypotheses] == pytest.approx([1.0] * len(hypotheses))
    assert rouge_l("", "no effusion") == rouge_l(" ", "no  effusion") == rouge_l("", "") == 0
    assert rouge_l("a b", "c d") == rouge_l("a", "") == 0
    assert rouge_l("No", "no") == 0


def plain_length(first, second):
    """The recursion of the definition."""

    @cache
    def length(i, j):
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@pytest.mark.parametrize("seed", range(60))
def test_subsequence_length_equals_the_recursion(seed):
    generator = np.random.default_rng(seed)
    first, second = (list(generator.choice(list("abcde"), size)) for size in generator.integers(0, 90, 2))
    length = common_subsequence_length(first, second)
    assert length == plain_length(first, second) == common_subsequence_length(second, first)
    assert length == common_subsequence_length(first[::-1], second[::-1])


def test_a_hundred_reports_of_two_hundred_words_take_less_than_a_second():
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefghij"), 200)) for _ in range(101)]
    start = time.perf_counter()
    scores = [rouge_l(*pair) for pair in pairwise(texts)]
    assert time.perf_counter() - start < 1 and min(scores) > 0.2
