from dataclasses import replace

import pytest
import torch

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.text.finding_prompts import tokenize_findings
from vlm3d_ext.text.label_set import Finding, load_label_set
from vlm3d_ext.text.pretrained_text_model import load_text_model


def finding(name, positive, negative=()):
    return Finding(name, name.lower(), (), tuple(positive), tuple(negative), ())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_text_model(str(make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert")))[0]


FINDINGS = [
    finding("Effusion", ["Pleural effusion is seen."], ["No effusion."]),
    finding("Hernia", ["A hernia.", "A hiatal hernia is present."]),
]


def test_rows_are_the_prompts_in_order(tokenizer):
    prompts = tokenize_findings(tokenizer, FINDINGS, max_positions=48)
    texts = ["Pleural effusion is seen.", "No effusion.", "A hernia.", "A hiatal hernia is present."]
    for ids, mask, text in zip(prompts.input_ids, prompts.attention_mask, texts, strict=True):
        assert ids[mask == 1].tolist() == tokenizer(text)["input_ids"]
        assert set(ids[mask == 0].tolist()) <= {tokenizer.pad_token_id}
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding at the end
    assert prompts.input_ids.shape == (4, len(tokenizer(texts[3])["input_ids"]))  # as long as the longest
    assert prompts.finding_index.tolist() == [0, 0, 1, 1] and prompts.num_findings == 2
    assert prompts.is_positive.tolist() == [True, False, True, True]
    assert prompts.input_ids.dtype == prompts.attention_mask.dtype == prompts.finding_index.dtype == torch.int64


def test_negative_prompts_can_be_left_out(tokenizer):
    prompts = tokenize_findings(tokenizer, FINDINGS, 48, use_negative=False)
    assert prompts.is_positive.all() and prompts.finding_index.tolist() == [0, 1, 1]


def test_every_prompt_that_ships_is_known_and_fits(tokenizer):
    for name in ("ct_rate_18", "vlm3d_18", "rad_chestct_16"):
        findings = load_label_set(name).findings
        prompts = tokenize_findings(tokenizer, findings, 48, num_soft_tokens=4)
        assert prompts.num_findings == len(findings) == len(set(prompts.finding_index.tolist()))
        assert not (prompts.input_ids == tokenizer.unk_token_id).any()


def test_the_limit_is_exact_and_counts_soft_and_special_tokens(tokenizer):
    only = [finding("Hernia", ["A hernia."])]  # [CLS] a hernia . [SEP]
    assert tokenize_findings(tokenizer, only, max_positions=8, num_soft_tokens=3).input_ids.shape == (1, 5)
    with pytest.raises(
        ValueError, match=r"'Hernia'.*'A hernia\.' has 5 tokens.*at most 4 fit.*8 positions less 4 soft"
    ):
        tokenize_findings(tokenizer, only, max_positions=8, num_soft_tokens=4)


def test_a_long_prompt_is_refused_in_one_short_line(tokenizer):
    long = finding("Edema", ["Edema."], ["There is no sign of edema in any of the lobes, " * 40])
    with pytest.raises(ValueError, match=r"'Edema'.*'There is no sign of edema \.\.\.'.*shorten the prompt") as caught:
        tokenize_findings(tokenizer, [long], 48)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        ([], "no finding"),
        ([finding("Mass", [])], "'Mass' has no positive prompt"),
        ([finding("Mass", ["A mass.", "  "])], "'Mass' has an empty prompt"),
        ([finding("Mass", ["A mass."], [""])], "'Mass' has an empty prompt"),
    ],
)
def test_bad_findings_are_refused(tokenizer, findings, message):
    with pytest.raises(ValueError, match=message):
        tokenize_findings(tokenizer, findings, 48)


def test_a_tokenizer_without_padding_token_gives_the_same_tokens(tmp_path):
    tokenizer = load_text_model(str(make_tiny_text_model(tmp_path / "bert")))[0]
    with_pad = tokenize_findings(tokenizer, FINDINGS, 48)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    without = tokenize_findings(tokenizer, FINDINGS, 48)
    assert torch.equal(with_pad.attention_mask, without.attention_mask)
    real = with_pad.attention_mask == 1
    assert torch.equal(with_pad.input_ids[real], without.input_ids[real])


def test_findings_of_ones_own_are_as_good_as_those_of_a_set(tokenizer):
    shipped = load_label_set("ct_rate_18").findings[3]
    mine = replace(shipped, name="Mine", key="mine")
    ours, theirs = (tokenize_findings(tokenizer, [one], 48) for one in (mine, shipped))
    assert torch.equal(ours.input_ids, theirs.input_ids)
