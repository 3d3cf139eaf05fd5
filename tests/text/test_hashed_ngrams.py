import hashlib
import subprocess
import sys

import pytest

from vlm3d_ext.text.hashed_ngrams import hash_ngrams, words_of


def test_words_are_lower_case_and_numbers_alike():
    assert words_of("No 5 mm nodule; 12.5mm, 3,5 x Ödem_1") == [
        "no",
        "0",
        "mm",
        "nodule",
        "0",
        "mm",
        "0",
        "x",
        "ödem",
        "0",
    ]


@pytest.mark.parametrize(("max_n", "expected"), [(1, 4), (2, 7), (3, 9), (9, 10)])
def test_number_of_ngrams(max_n, expected):
    assert len(hash_ngrams("small right pleural effusion", 1000, max_n)) == expected


def test_buckets_are_blake2b_of_the_ngrams():
    def bucket(ngram):
        return int.from_bytes(hashlib.blake2b(ngram.encode(), digest_size=8).digest(), "little") % 997

    assert hash_ngrams("Pleural effusion", 997) == [
        bucket("pleural"),
        bucket("effusion"),
        bucket("pleural\x1feffusion"),
    ]


def test_the_same_in_another_process():
    code = "from vlm3d_ext.text.hashed_ngrams import hash_ngrams; print(hash_ngrams('no pleural effusion', 4096))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert out.stdout.strip() == str(hash_ngrams("No  pleural effusion.", 4096))


def test_numbers_share_buckets_but_negation_and_order_do_not():
    assert hash_ngrams("a 5 mm nodule", 2**20) == hash_ngrams("a 12.5 mm nodule", 2**20)
    assert set(hash_ngrams("effusion no", 2**20)) != set(hash_ngrams("no effusion", 2**20))


def test_buckets_are_in_range_and_evenly_used():
    words = " ".join(f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiou" for c in "npqrstvwxz")  # 500 words
    buckets = hash_ngrams(words, 50, 1)
    counts = [buckets.count(bucket) for bucket in range(50)]
    assert sum(counts) == 500 and min(counts) >= 1 and max(counts) <= 25  # mean 10, standard deviation about 3.2


def test_nothing_in_nothing_out_and_bad_sizes():
    assert hash_ngrams(" .;", 8) == []
    with pytest.raises(ValueError, match="num_buckets must be at least 1, got 0"):
        hash_ngrams("a", 0)
    with pytest.raises(ValueError, match="max_n must be at least 1, got 0"):
        hash_ngrams("a", 8, 0)
