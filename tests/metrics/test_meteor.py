import importlib.util
import subprocess
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest

from tests.metrics.report_texts import as_caption_sets, ct_rate_sections, pairs_of, random_pairs
from vlm3d_ext.metrics import meteor
from vlm3d_ext.metrics.meteor import meteor_1_5, meteor_1_5_absent, meteor_exact_stem, meteor_exact_stem_absent

needs_stemmer = pytest.mark.skipif(meteor_exact_stem_absent() is not None, reason=str(meteor_exact_stem_absent()))
needs_java = pytest.mark.skipif(meteor_1_5_absent() is not None, reason=str(meteor_1_5_absent()))
HIDDEN = {"snowballstemmer", "nltk"}


@pytest.fixture
def processes(monkeypatch):
    """The processes that were started, in order."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return started


def hide_packages(monkeypatch, names):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))
    meteor._stemmer.cache_clear()


@needs_stemmer
def test_meteor_by_hand():
    """Six words each; "the", "on" are function words (1/4), the others content words (3/4).

    Exact: the, sat, on, mat; stem: cat / cats; "a" and "the" do not match. The weighted matches are
    1/4 + 0.6 · 3/4 + 3/4 + 1/4 + 3/4 = 2.45 of 3 · 1/4 + 3 · 3/4 = 3 in either text, so P = R = F = 2.45 / 3. The
    chunks are "the cat sat on" and "mat": 2 for 5 matches.
    """
    expected = 2.45 / 3 * (1 - 0.6 * (2 / 5) ** 0.2)
    assert meteor_exact_stem("the cats sat on a mat", "the cat sat on the mat") == pytest.approx(expected)


@needs_stemmer
def test_recall_weighs_more_than_precision():
    """One of one and one of four content words: F = P R / (0.85 P + 0.15 R), penalty 0.6 for one chunk of one match."""
    short, long = "nodule", "nodule seen upper lobe"
    assert meteor_exact_stem(short, long) == pytest.approx(0.25 / (0.85 + 0.15 * 0.25) * 0.4)
    assert meteor_exact_stem(long, short) == pytest.approx(0.25 / (0.85 * 0.25 + 0.15) * 0.4)


@needs_stemmer
def test_identical_reordered_empty_and_foreign_texts():
    for text in random_pairs()[0]:
        assert meteor_exact_stem(text, text) == pytest.approx(1.0)
        assert meteor_exact_stem(text.upper(), text) == pytest.approx(1.0)
    assert meteor_exact_stem("b c", "c b") == pytest.approx(1 - 0.6)  # two chunks for two matches
    assert meteor_exact_stem("", "effusion") == meteor_exact_stem("effusion", "") == meteor_exact_stem("", "") == 0
    assert meteor_exact_stem("nodule", "effusion") == 0


@needs_stemmer
def test_repeated_words_match_once_and_stems_count_less():
    """The word is one of three: P = 1/3, R = 1, penalty 0.6."""
    assert meteor_exact_stem("x x x", "x") == pytest.approx((1 / 3) / (0.85 / 3 + 0.15) * 0.4)
    assert meteor_exact_stem("cats sit", "cat sits") == pytest.approx(0.6)


@needs_stemmer
def test_punctuation_marks_are_words():
    assert meteor_exact_stem("No effusion.", "no effusion .") == pytest.approx(1.0)
    assert meteor._split("Nodule of 1.5 mm (4x5), well-defined.") == (
        ["nodule", "of", "1.5", "mm", "(", "4x5", ")", ",", "well-defined", "."]
    )


def chunks_of(matches):
    return 1 + sum((i + 1, j + 1) != following for (i, j), following in pairwise(matches))


def fewest_chunks(first, second):
    """Over all alignments of as many words as can be; both texts hold the same letters, in another order."""
    places = {letter: [j for j, other in enumerate(second) if other == letter] for letter in set(first)}
    alignments = [[]]
    for letter, of_letter in places.items():
        own = [i for i, other in enumerate(first) if other == letter]
        alignments = [
            [*known, *zip(own, order, strict=True)] for known in alignments for order in permutations(of_letter)
        ]
    return min(chunks_of(sorted(matches)) for matches in alignments)


def test_the_alignment_has_as_many_matches_as_can_be_and_few_chunks():
    generator = np.random.default_rng(0)
    excess = []
    for _ in range(60):
        first = list(generator.choice(list("aabbccde"), 8, replace=False))
        second = list(generator.permutation(first))
        matches = meteor._align(first, second)
        assert sorted(i for i, _ in matches) == sorted(j for _, j in matches) == list(range(8))
        assert all(first[i] == second[j] for i, j in matches)
        excess.append(chunks_of(matches) - fewest_chunks(first, second))
    assert min(excess) == 0 and max(excess) <= 2 and np.mean(excess) < 0.2
    for first, second in zip(*random_pairs(), strict=True):
        common = (Counter(first.split()) & Counter(second.split())).total()
        assert len(meteor._align(first.split(), second.split())) == common


@needs_stemmer
def test_the_stemmer_is_named_where_it_is_absent(monkeypatch):
    hide_packages(monkeypatch, HIDDEN)
    with pytest.raises(ModuleNotFoundError, match="pip install snowballstemmer"):
        meteor_exact_stem("a nodule", "a nodule")
    assert "pip install snowballstemmer" in meteor_exact_stem_absent()
    monkeypatch.undo()
    assert meteor_exact_stem("a nodule", "a nodule") == 1


def test_what_meteor_1_5_lacks_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    assert "install a Java runtime" in meteor_1_5_absent()
    with pytest.raises(ModuleNotFoundError, match="Java"):
        meteor_1_5(["a"], ["a"])
    monkeypatch.setattr(meteor.shutil, "which", lambda name: "/usr/bin/java")
    hide_packages(monkeypatch, {"pycocoevalcap"})
    assert "pip install pycocoevalcap" in meteor_1_5_absent()
    monkeypatch.setattr(meteor, "_pycocoevalcap_folder", lambda: tmp_path)
    assert "meteor-1.5.jar" in meteor_1_5_absent()


def _exact_and_stem_by_java(hypotheses, references):
    """METEOR 1.5 with two of its matchers, on words that are split as here; starts in a fraction of a second."""
    split = [[" ".join(meteor._split(text)) for text in texts] for texts in (hypotheses, references)]
    return meteor._run_jar(*split, ("-m", "exact stem", "-w", "1.0 0.6", "-lower"), 60)[1]


@needs_java
@needs_stemmer
def test_exact_and_stem_equal_meteor_1_5_where_no_word_is_repeated():
    sentences = [text.split(". ")[0] for text, _ in ct_rate_sections(200)]
    hypotheses, references = [], []
    for hypothesis, reference in zip(sentences, sentences[1:] + sentences[:1], strict=True):
        hypotheses.append(" ".join(dict.fromkeys(meteor._split(hypothesis))))
        references.append(" ".join(dict.fromkeys(meteor._split(reference))))
    # two forms of one word would be a repetition too, for the stem
    stems = meteor._stemmer()
    single = [
        index
        for index, pair in enumerate(zip(hypotheses, references, strict=True))
        if all(len(set(map(stems, text.split()))) == len(text.split()) for text in pair)
    ]
    hypotheses, references = [hypotheses[index] for index in single], [references[index] for index in single]
    own = [meteor_exact_stem(*pair) for pair in zip(hypotheses, references, strict=True)]
    assert len(own) > 100 and 0.1 < np.mean(own) < 0.9
    np.testing.assert_allclose(own, _exact_and_stem_by_java(hypotheses, references), rtol=0, atol=1e-9)


@needs_java
@needs_stemmer
def test_exact_and_stem_are_near_meteor_1_5_on_whole_reports():
    hypotheses, references = (texts[:30] for texts in pairs_of("CT-RATE: neighbour"))
    own = np.array([meteor_exact_stem(*pair) for pair in zip(hypotheses, references, strict=True)])
    by_java = _exact_and_stem_by_java(hypotheses, references)
    assert abs(own.mean() - by_java.mean()) < 0.03
    assert np.corrcoef(own, by_java)[0, 1] > 0.9


@needs_java
def test_meteor_1_5_equals_pycocoevalcap_and_leaves_no_process_behind(processes):
    """Synonyms and paraphrases match, which exact and stem do not; an empty last hypothesis is scored, too.

    Both Java processes read 60 MB of paraphrases, which takes 10 s: they do it at the same time.
    """
    reference_code = pytest.importorskip("pycocoevalcap.meteor.meteor").Meteor()
    hypotheses, references = (texts[:5] for texts in random_pairs())
    hypotheses += ["The heart\nis big .", "the image is usual", "the heart is large .", ""]
    references += ["the heart is large .", "the picture is usual", "the heart is large .", "no effusion"]
    corpus, per_case = meteor_1_5(hypotheses, references, time_limit_s=240)
    assert [process.returncode for process in processes[1:]] == [0]

    on_one_line = [text.replace("\n", " ") for text in hypotheses]  # pycocoevalcap hangs on a line break
    expected, expected_per_case = reference_code.compute_score(*as_caption_sets(on_one_line, references))
    np.testing.assert_allclose(per_case, expected_per_case, rtol=0, atol=1e-9)
    assert corpus == pytest.approx(expected, abs=1e-9) != pytest.approx(per_case.mean(), abs=1e-6)

    assert per_case[-2] == pytest.approx(1.0) and per_case[-1] == 0
    assert (per_case[-4:-2] > 0.5).all() and (per_case[-4:-2] < 1).all()
    assert meteor_exact_stem_absent() or per_case[-3] > meteor_exact_stem(hypotheses[-3], references[-3]) + 0.05


@needs_java
def test_meteor_1_5_keeps_its_time_limit(processes):
    with pytest.raises(TimeoutError, match=r"more than 0\.2 s for 1 texts"):
        meteor_1_5(["a nodule"], ["a nodule"], time_limit_s=0.2)
    assert len(processes) == 1 and processes[0].returncode is not None


@needs_java
def test_a_failure_of_java_is_told():
    with pytest.raises(RuntimeError, match="expected 1; it said"):
        meteor._run_jar(["a"], ["a"], ("-m", "no_such_matcher"), 60)
    with pytest.raises(ValueError, match="got 1 hypotheses and 2 references"):
        meteor_1_5(["a"], ["a", "b"])
