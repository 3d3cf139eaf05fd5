import pytest

from vlm3d_ext.text.repetition import distinct_share, repeated_ngram_share, repeated_sentence_share


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("No mass. No mass. No mass.", 2, 3 / 5),
        ("No mass. No mass. No mass.", 1, 4 / 6),
        ("a b c d e a b c d", 4, 1 / 6),
        ("A nodule of 5 mm. a nodule of 6.5 mm", 5, 1 / 6),
        ("one two three", 4, 0),
        ("one two three four", 4, 0),
        ("", 4, 0),
    ],
)
def test_repeated_ngrams_by_hand(text, n, expected):
    assert repeated_ngram_share(text, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No mass. No effusion. No mass.", 1 / 3),
        ("A nodule of 5 mm. A NODULE of 6 mm", 1 / 2),
        ("No mass. No large mass.", 0),
        ("", 0),
    ],
)
def test_repeated_sentences_by_hand(text, expected):
    assert repeated_sentence_share(text) == pytest.approx(expected)


def test_saying_a_text_twice_repeats_half_of_it():
    text = "The trachea is open. Heart size is normal. A nodule of 5 mm is seen."
    assert repeated_sentence_share(f"{text} {text}") == pytest.approx(1 / 2)
    assert 0.4 < repeated_ngram_share(f"{text} {text}") < 0.5  # the four-grams across the seam are new


def test_distinct_share_by_hand():
    assert distinct_share(["No mass.", "no mass", "A mass.", "A mass of 3 mm.", "A mass of 4 mm."]) == pytest.approx(
        3 / 5
    )
    assert distinct_share(["a"] * 4) == 1 / 4
    assert distinct_share(["a", "b"]) == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        repeated_ngram_share("a b", 0)
    with pytest.raises(ValueError, match="at least one text"):
        distinct_share([])
