"""Pairs of report texts for the tests of metrics: random sentences, and real reports where the sample data are."""

import csv
import tarfile
import xml.etree.ElementTree as ElementTree
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"
OPENI = SHARED / "reports_openi" / "ecgen-radiology.tar.xz"
CT_RATE = SHARED / "ctrate" / "validation_reports_drop_dup_with_volumes.head400.csv"
WORDS = "No no effusion effusions nodule is seen . , the the the in of left right lobe upper normal".split()


def random_pairs(num=13, seed=0, longest=25):
    """References of up to `longest` words from a small vocabulary, and hypotheses that keep runs of them."""
    generator = np.random.default_rng(seed)
    references = [" ".join(generator.choice(WORDS, generator.integers(1, longest + 1))) for _ in range(num)]
    additions = [" ".join(generator.choice(WORDS, generator.integers(1, 5))) for _ in range(num)]
    kept = [without_some_words(text, seed + index) for index, text in enumerate(references)]
    return [" ".join(parts).strip() for parts in zip(kept, additions, strict=True)], references


def without_some_words(text, seed=0, share=0.2):
    generator = np.random.default_rng(seed)
    return " ".join(word for word in text.split(" ") if generator.random() >= share)


def openi_sections(num=100):
    """FINDINGS and IMPRESSION of the first reports that have both."""
    if not OPENI.is_file():
        pytest.skip("the shared sample data (reports_openi) are not there")
    with tarfile.open(OPENI) as archive:
        return list(islice(_openi_sections_of(archive), num))


def _openi_sections_of(archive):
    for member in archive:
        if member.name.endswith(".xml"):
            texts = ElementTree.fromstring(archive.extractfile(member).read()).iter("AbstractText")
            text = {element.get("Label"): element.text or "" for element in texts}
            if text.get("FINDINGS") and text.get("IMPRESSION"):
                yield text["FINDINGS"], text["IMPRESSION"]


def ct_rate_sections(num=100):
    """Findings and impressions of the first reports."""
    if not CT_RATE.is_file():
        pytest.skip("the shared sample data (ctrate) are not there")
    with CT_RATE.open(newline="", encoding="utf-8") as file:
        return [(row["Findings_EN"], row["Impressions_EN"]) for row in islice(csv.DictReader(file), num)]


def pairs_of(kind):
    """Return hypotheses and references: "random", or of real reports as the names below say."""
    if kind == "random":
        return random_pairs(40)
    source, relation = kind.split(": ")
    sections = openi_sections() if source == "OpenI" else ct_rate_sections()
    findings, impressions = [section[0] for section in sections], [section[1] for section in sections]
    if relation == "impression":
        return impressions, findings
    if relation == "neighbour":
        return findings[1:] + findings[:1], findings
    return [without_some_words(text, seed) for seed, text in enumerate(findings)], findings


KINDS = (
    "random",
    "OpenI: neighbour",
    "OpenI: impression",
    "CT-RATE: neighbour",
    "CT-RATE: dropped words",
    "CT-RATE: impression",
)


def as_caption_sets(hypotheses, references):
    """Return references and hypotheses as pycocoevalcap takes them."""
    return {i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(hypotheses)}
