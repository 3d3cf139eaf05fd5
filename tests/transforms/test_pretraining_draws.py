import pytest
import torch

from vlm3d_ext.text.sentence_bank import SentenceBank
from vlm3d_ext.transforms import RandPatchMaskd, RandReportSentencesd, RandUseAnatomicalMaskd

REPORTS = [
    {
        "findings": f"Finding alpha{chr(97 + n)} is present. Trachea is normal.",
        "impression": f"Diagnosis beta{chr(97 + n)}.",
    }
    for n in range(20)
]


def _texts_of(bank, sample, wanted):
    """Return the texts of the drawn sentences that are true (or untrue), found by their n-grams."""
    text_of = {sentence.ngram_ids: sentence.text for sentence in bank.sentences}
    rows = (sample["sentence_mask"] & (sample["sentence_is_true"] == wanted)).nonzero().flatten().tolist()
    return [text_of[tuple(i for i in sample["sentence_ngrams"][row].tolist() if i)] for row in rows]


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.4, 0.5, 1.0])
def test_the_share_of_hidden_blocks_is_exact(ratio):
    transform = RandPatchMaskd((2, 4, 4), ratio, block_size=(1, 2, 2)).set_random_state(0)
    for _ in range(5):
        mask = transform({"image": torch.zeros(1, 10, 32, 16)})["patch_mask"]
        assert mask.shape == (5 * 8 * 4,) and mask.dtype == torch.bool
        assert mask.sum() == round(ratio * 5 * 4 * 2) * 4


def test_whole_blocks_are_hidden():
    mask = RandPatchMaskd((2, 4, 4), 0.5, (1, 2, 2)).set_random_state(0)({"image": torch.zeros(1, 6, 32, 24)})[
        "patch_mask"
    ]
    blocks = mask.view(3, 4, 2, 3, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4)
    assert torch.equal(blocks.any(1), blocks.all(1))
    assert 0 < blocks.any(1).sum() < len(blocks)


def test_blocks_at_the_edge_of_an_odd_grid_are_cut():
    """13 x 18 voxels in patches of 4 are 4 x 5 tokens; blocks of 2 x 2 leave half a block at the right."""
    transform = RandPatchMaskd((2, 4, 4), 0.5, (1, 2, 2)).set_random_state(1)
    mask = transform({"image": torch.zeros(1, 5, 13, 18)})["patch_mask"].view(3, 4, 5)
    assert mask.shape.numel() == 60
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 2), slice(2, 4), slice(4, 5)):
            for slab in range(3):
                block = mask[slab, rows, columns]
                assert block.all() or not block.any()


def test_every_token_is_hidden_as_often_as_the_ratio_says():
    transform = RandPatchMaskd((1, 1, 1), 0.4, (1, 1, 1)).set_random_state(0)
    counts = sum(transform({"image": torch.zeros(1, 1, 5, 4)})["patch_mask"].float() for _ in range(2000))
    assert (counts / 2000 - 0.4).abs().max() < 0.06  # five standard errors of 0.011


def test_some_draws_hide_nothing():
    transform = RandPatchMaskd((2, 4, 4), 0.5, probability=0.3).set_random_state(0)
    hidden = [transform({"image": torch.zeros(1, 4, 16, 16)})["patch_mask"].float().mean().item() for _ in range(1000)]
    assert set(hidden) == {0.0, 0.5}
    assert sum(value > 0 for value in hidden) / 1000 == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio must lie in \[0, 1\], got {ratio}"):
        RandPatchMaskd((1, 1, 1), ratio)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_mask_is_used_as_often_as_asked(probability):
    transform = RandUseAnatomicalMaskd(probability).set_random_state(0)
    used = [transform({"has_anatomical_mask": torch.tensor(True)})["use_anatomical_mask"].item() for _ in range(1000)]
    assert sum(used) / 1000 == pytest.approx(probability, abs=0.07)
    assert probability not in (0.0, 1.0) or len(set(used)) == 1


def test_a_mask_that_is_not_there_is_never_used():
    transform = RandUseAnatomicalMaskd(1.0)
    assert not transform({"has_anatomical_mask": torch.tensor(False)})["use_anatomical_mask"]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_case_that_says_it_is_left_as_it_is(probability):
    transform = RandUseAnatomicalMaskd(probability).set_random_state(0)
    for says in (True, False):
        sample = {"has_anatomical_mask": torch.tensor(True), "use_anatomical_mask": says}
        assert transform(sample)["use_anatomical_mask"].item() is says
    absent = {"has_anatomical_mask": torch.tensor(False), "use_anatomical_mask": True}
    assert transform(absent)["use_anatomical_mask"].item() is False


def test_true_sentences_are_the_reports_own_and_untrue_ones_never():
    bank = SentenceBank(REPORTS)
    transform = RandReportSentencesd(bank, num_true=2, num_untrue=9).set_random_state(0)
    seen_true, seen_untrue = set(), set()
    for number in range(400):
        report = REPORTS[number % 20]
        own = {sentence.text for sentence in bank.sentences_of(report)}
        sample = transform({"report": report})
        true, untrue = _texts_of(bank, sample, True), _texts_of(bank, sample, False)
        assert len(true) == len(set(true)) == 2 and set(true) <= own
        assert len(untrue) == len(set(untrue)) and not set(untrue) & own  # "trachea is normal" stands in every report
        seen_true |= set(true)
        seen_untrue |= set(untrue)
    assert seen_true == {sentence.text for sentence in bank.sentences}
    assert seen_untrue == seen_true - {"trachea is normal"}


def test_all_sentences_of_a_short_report_are_taken_and_its_free_rows_filled():
    bank = SentenceBank(REPORTS)
    sample = RandReportSentencesd(bank, num_true=8, num_untrue=12).set_random_state(0)({"report": REPORTS[3]})
    own = {sentence.text for sentence in bank.sentences_of(REPORTS[3])}
    assert set(_texts_of(bank, sample, True)) == own and len(own) == 3
    assert len(_texts_of(bank, sample, False)) > 12


def test_regions_and_ngrams_are_those_of_the_sentence():
    bank = SentenceBank([{"findings": "The trachea is open.", "impression": ""}], num_buckets=50, max_ngrams=10)
    sample = RandReportSentencesd(bank, 2, 1).set_random_state(0)({"report": {"findings": "The trachea is open."}})
    assert sample["sentence_mask"].tolist() == sample["sentence_is_true"].tolist() == [True, False, False]
    assert sample["sentence_regions"][0].nonzero().flatten().tolist() == [5]  # region 6 of 20
    assert tuple(sample["sentence_ngrams"][0, :7].tolist()) == bank.sentences[0].ngram_ids  # 4 words and 3 pairs
    assert sample["sentence_ngrams"][0, 7:].sum() == 0 and sample["sentence_ngrams"].shape == (3, 10)
    assert "report" not in sample


@pytest.mark.parametrize("report", [None, {"findings": "", "impression": ""}])
def test_a_case_without_a_report_has_no_sentence(report):
    sample = RandReportSentencesd(SentenceBank(REPORTS), 2, 3).set_random_state(0)({"report": report})
    assert not sample["sentence_mask"].any() and not sample["sentence_is_true"].any()
    assert sample["sentence_ngrams"].sum() == 0 and sample["sentence_ngrams"].shape == (5, 64)


def test_a_bank_without_sentences_gives_no_untrue_ones():
    sample = RandReportSentencesd(SentenceBank([None]), 4, 3).set_random_state(0)({"report": REPORTS[0]})
    assert sample["sentence_mask"].sum() == 3 and sample["sentence_is_true"].sum() == 3


def test_draws_are_those_of_the_seed():
    bank = SentenceBank(REPORTS)

    def draw(seed):
        transform = RandReportSentencesd(bank, 2, 5).set_random_state(seed)
        return torch.stack([transform({"report": REPORTS[0]})["sentence_ngrams"] for _ in range(3)])

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
