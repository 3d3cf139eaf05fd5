import pytest

from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.text.hashed_ngrams import hash_ngrams
from vlm3d_ext.text.sentence_bank import SentenceBank, normalise_sentence


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The heart is ENLARGED. ", "the heart is enlarged"),
        ("  a\tnodule\n of  5 mm.", "a nodule of # mm"),
        ("Nodule of 12.5mm at T4", "nodule of # at #"),
        ("Trachea is open", "trachea is open"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalisation(sentence, expected):
    assert normalise_sentence(sentence) == expected


def test_normalising_twice_changes_nothing():
    once = normalise_sentence("A 7 mm nodule in the LEFT lower lobe (series 3).")
    assert normalise_sentence(once) == once


def test_sentences_that_differ_in_measurements_only_are_one():
    bank = SentenceBank([{"findings": "A nodule of 5 mm."}, {"findings": "A nodule of 12 mm. No effusion."}, None])
    assert [sentence.text for sentence in bank.sentences] == ["a nodule of # mm", "no effusion"]


def test_both_sections_in_the_order_of_the_report():
    bank = SentenceBank([])
    report = {"findings": "First thing. Second thing.", "impression": "Third thing. FIRST thing."}
    assert [sentence.text for sentence in bank.sentences_of(report)] == ["first thing", "second thing", "third thing"]
    assert bank.sentences_of(None) == [] and bank.sentences_of({"findings": None}) == []


def test_a_number_alone_states_nothing():
    assert SentenceBank([{"findings": "12.\nTrachea is open."}]).sentences[0].text == "trachea is open"
    assert len(SentenceBank([{"findings": "12.\nTrachea is open.\n3"}]).sentences) == 1


def test_asking_for_another_reports_sentences_adds_nothing_to_the_bank():
    """Else the sentences of validation would be learnt as untrue statements of training."""
    bank = SentenceBank([{"findings": "Trachea is open."}])
    (foreign,) = bank.sentences_of({"findings": "The aorta is wide."})
    assert foreign.text == "the aorta is wide" and [s.text for s in bank.sentences] == ["trachea is open"]
    (own,) = bank.sentences_of({"findings": "Trachea is OPEN"})
    assert own is bank.sentences[0]


def test_regions_are_those_that_the_sentence_names():
    bank = SentenceBank(
        [{"findings": "Nodule in the right middle lobe. No contrast was given. Heart and aorta are wide."}]
    )
    regions = [[index for index, flag in enumerate(s.regions, 1) if flag] for s in bank.sentences]
    lobe, heart, aorta = (region_by_name(name).index for name in ("right_middle_lobe", "heart", "aorta"))
    assert regions == [[lobe], [], sorted([heart, aorta])]
    assert all(len(sentence.regions) == 20 for sentence in bank.sentences)


@pytest.mark.parametrize("num_buckets", [2, 3, 40])
def test_no_ngram_has_the_id_of_padding(num_buckets):
    words = " ".join(f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
    bank = SentenceBank([{"findings": words}], num_buckets, max_ngrams=100)
    ids = bank.sentences[0].ngram_ids
    assert len(ids) == 26 + 25
    assert set(ids) == set(range(1, num_buckets)) if num_buckets < 40 else min(ids) >= 1 and max(ids) < num_buckets
    text = bank.sentences[0].text
    assert [i - 1 for i in ids] == hash_ngrams(text, num_buckets - 1)


def test_at_most_so_many_ngrams_are_kept():
    report = {"findings": "one two three four five six"}
    whole, cut = (SentenceBank([report], 999, n).sentences[0].ngram_ids for n in (64, 4))
    assert len(whole) == 11 and cut == whole[:4]


def test_from_manifest_cases():
    cases = [{"report": {"findings": "Trachea is open."}}, {"report": None}, {}]
    bank = SentenceBank.from_cases(cases, num_buckets=100)
    assert [sentence.text for sentence in bank.sentences] == ["trachea is open"] and bank.num_buckets == 100
