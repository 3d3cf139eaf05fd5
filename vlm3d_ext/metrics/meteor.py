"""METEOR, twice: own code with two of its four matchers, and METEOR 1.5 itself through Java. The two do not compare."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

__all__ = [
    "METEOR_1_5_TIME_LIMIT_S",
    "meteor_1_5",
    "meteor_1_5_absent",
    "meteor_exact_stem",
    "meteor_exact_stem_absent",
]

# The English parameters of METEOR 1.5 (Denkowski and Lavie 2014, table 1) for its task "rank", which is the default.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_EXACT_WEIGHT, _STEM_WEIGHT = 1.0, 0.6

# What METEOR 1.5 counts as an English function word: all with a relative frequency above 1e-3 in a news corpus.
_FUNCTION_WORDS = frozenset(
    """the , . to of and a in that for " is on 's it with was as said at he by be from have has are his but an this not
    i will ’ they ) -rrb- ( -lrb- who their had we which were been more or s its would about new one after you : also
    up when there than $ all out her people she year two - can if last first “ over other ” into some what so -- no
    time years could ? 't — '""".split()
)
# Punctuation marks are words of their own, as in METEOR 1.5; "1.5", "4x5" and "well-defined" are one word each.
_WORD = re.compile(r"\w+(?:[-.,'’]\w+)*|[^\w\s]")

METEOR_1_5_TIME_LIMIT_S = 600.0
_JAR = Path("meteor") / "meteor-1.5.jar"
_PARAPHRASES = Path("meteor") / "data" / "paraphrase-en.gz"


def meteor_exact_stem(hypothesis: str, reference: str) -> float:
    """Return METEOR with the matchers "exact" and "stem" only, in [0, 1].

    Not the challenge's METEOR, which also matches synonyms and paraphrases: see `meteor_1_5`.

    Text is lower-cased, and punctuation marks are words. Words with the same stem are aligned one to one, as many as
    can be; m counts the aligned, a content word 0.75 and a function word 0.25, times 1 for the same word and 0.6 for
    the same stem. With P and R = m over all words, weighted alike, F = P R / (0.85 P + 0.15 R), and the score is
    F (1 - 0.6 (chunks / matches) ** 0.2), where a chunk is a run that is aligned in one piece. Without any penalty if
    one chunk covers both texts.

    Which words are aligned, where a word occurs more than once, decides the number of chunks, which METEOR wants small.
    Here the longest common run is taken first, then the next, and among equals the one that has moved least; METEOR 1.5
    searches with a beam, which is too narrow for reports: with these two matchers, neighbouring CT-RATE findings of 200
    words have a mean of 0.248 here and of 0.234 there. Short texts without repeated words agree exactly.

    Source: Denkowski and Lavie 2014, "Meteor Universal", section 2.

    Raises:
        ModuleNotFoundError: if there is no stemmer: neither the package snowballstemmer nor nltk.
    """
    stem = _stemmer()
    words, reference_words = _split(hypothesis), _split(reference)
    matches = _align([stem(word) for word in words], [stem(word) for word in reference_words])
    if not matches:
        return 0.0
    weights = [_EXACT_WEIGHT if words[i] == reference_words[j] else _STEM_WEIGHT for i, j in matches]
    precision = sum(w * _weight(words[i]) for w, (i, _) in zip(weights, matches, strict=True))
    precision /= sum(_weight(word) for word in words)
    recall = sum(w * _weight(reference_words[j]) for w, (_, j) in zip(weights, matches, strict=True))
    recall /= sum(_weight(word) for word in reference_words)
    f_mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    chunks = 1 + sum((i + 1, j + 1) != following for (i, j), following in pairwise(matches))
    if chunks == 1 and len(matches) == len(words) == len(reference_words):
        return f_mean
    return f_mean * (1 - _GAMMA * (chunks / len(matches)) ** _BETA)


def meteor_exact_stem_absent() -> str | None:
    """Return why `meteor_exact_stem` cannot run here, or None if it can."""
    try:
        _stemmer()
    except ModuleNotFoundError as error:
        return str(error)
    return None


def meteor_1_5(
    hypotheses: Sequence[str], references: Sequence[str], *, time_limit_s: float = METEOR_1_5_TIME_LIMIT_S
) -> tuple[float, np.ndarray]:
    """Return METEOR 1.5, the challenge's, of a corpus and of each of its cases, with one reference per case.

    Runs the Java program that the package pycocoevalcap carries, with all four matchers and its own tokenizer, as
    pycocoevalcap does, in one process that ends with this call. Starting it takes some 10 s and up to 2 GB. The corpus
    value pools the counts of all cases; it is what pycocoevalcap calls METEOR, and not the mean of the cases.

    Source: Denkowski and Lavie 2014, "Meteor Universal".

    Args:
        hypotheses: N generated texts; an empty one scores 0.
        references: N reference texts.
        time_limit_s: after this the Java process is ended.

    Returns:
        The corpus value, and that of each case (N,), in [0, 1].

    Raises:
        ModuleNotFoundError: if java, pycocoevalcap, or a file of it is missing.
        ValueError: if the numbers of texts differ, or there are none.
        TimeoutError: if Java needs more than the time limit.
        RuntimeError: if Java fails or gives something else than N scores.
    """
    if absent := meteor_1_5_absent():
        raise ModuleNotFoundError(absent)
    return _run_jar(hypotheses, references, ("-norm",), time_limit_s)


def meteor_1_5_absent() -> str | None:
    """Return why `meteor_1_5` cannot run here, or None if it can."""
    if shutil.which("java") is None:
        return "METEOR 1.5 needs Java, and no `java` is on the PATH; install a Java runtime (8 or later)."
    package = _pycocoevalcap_folder()
    if package is None:
        return "METEOR 1.5 is a Java program of the package pycocoevalcap; run `pip install pycocoevalcap`."
    for file in (_JAR, _PARAPHRASES):
        if not (package / file).is_file():
            return f"METEOR 1.5 needs {package / file}; run `pip install --force-reinstall pycocoevalcap`."
    return None


def _run_jar(
    hypotheses: Sequence[str], references: Sequence[str], options: Sequence[str], time_limit_s: float
) -> tuple[float, np.ndarray]:
    if len(hypotheses) != len(references) or not len(references):
        raise ValueError(
            f"METEOR needs one reference per hypothesis and at least one of them, got {len(hypotheses)} hypotheses and "
            f"{len(references)} references."
        )
    package = _pycocoevalcap_folder()
    assert package is not None
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, texts in (("hypotheses.txt", hypotheses), ("references.txt", references)):
            files.append(Path(folder) / name)
            # one text a line; any other white space in it means nothing to METEOR
            files[-1].write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(package / _JAR), *map(str, files)]
        try:
            done = subprocess.run(
                [*command, "-l", "en", *options, "-q"],
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=time_limit_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"METEOR 1.5 took more than {time_limit_s:g} s for {len(references)} texts; score fewer at a time, or "
                "give a longer time_limit_s."
            ) from None
    # quiet mode: the scores of the cases go to stderr, the corpus value to stdout
    per_case, corpus = _numbers(done.stderr), _numbers(done.stdout)
    if done.returncode != 0 or len(per_case) != len(references) or len(corpus) != 1:
        raise RuntimeError(
            f"METEOR 1.5: java ended with {done.returncode} and gave {len(per_case)} scores, expected "
            f"{len(references)}; it said: {(done.stderr or done.stdout).strip()[-500:]}"
        )
    return corpus[0], np.array(per_case)


def _numbers(output: str) -> list[float]:
    """Return the lines that are numbers; Java may add lines of its own, such as which options it picked up."""
    return [float(line) for line in output.splitlines() if re.fullmatch(r"\d+(\.\d+)?(E-?\d+)?", line.strip())]


def _pycocoevalcap_folder() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _weight(word: str) -> float:
    return 1 - _DELTA if word in _FUNCTION_WORDS else _DELTA


def _align(stems: Sequence[str], reference_stems: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of places with the same stem, each place in one pair at most, in the order of the hypothesis."""
    places: dict[str, list[int]] = defaultdict(list)
    for j, stem in enumerate(reference_stems):
        places[stem].append(j)
    free, reference_free = [True] * len(stems), [True] * len(reference_stems)
    matches: list[tuple[int, int]] = []
    while True:
        longest = 0
        starts: list[tuple[int, int]] = []
        # from the end, so that the length of the run that starts at (i, j) is one more than that at (i + 1, j + 1)
        following: dict[int, int] = {}
        for i in range(len(stems) - 1, -1, -1):
            runs: dict[int, int] = {}
            if free[i]:
                for j in places.get(stems[i], ()):
                    if reference_free[j]:
                        runs[j] = length = following.get(j + 1, 0) + 1
                        if length > longest:
                            longest, starts = length, []
                        if length == longest:
                            starts.append((i, j))
            following = runs
        if not starts:
            return sorted(matches)
        for i, j in sorted(starts, key=lambda start: (abs(start[0] - start[1]), start)):
            if all(free[i : i + longest]) and all(reference_free[j : j + longest]):
                free[i : i + longest] = reference_free[j : j + longest] = [False] * longest
                matches.extend((i + step, j + step) for step in range(longest))


@cache
def _stemmer() -> Callable[[str], str]:
    """Return the English Snowball stemmer ("Porter 2"), which is METEOR 1.5's; both packages have it, without data."""
    if importlib.util.find_spec("snowballstemmer") is not None:
        import snowballstemmer

        return lru_cache(maxsize=65536)(snowballstemmer.stemmer("english").stemWord)
    if importlib.util.find_spec("nltk") is not None:
        from nltk.stem.snowball import EnglishStemmer

        return lru_cache(maxsize=65536)(EnglishStemmer().stem)
    raise ModuleNotFoundError(
        "METEOR (exact and stem) needs a stemmer, and neither the package snowballstemmer nor nltk is installed; run "
        "`pip install snowballstemmer`."
    )
