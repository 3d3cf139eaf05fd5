"""The rows of report generation, at sizes of a second: what they count, and that they refuse results that differ."""

import pytest
import torch

from benchmarks import report_rows
from benchmarks.random_language_model import random_language_model, random_prompts, random_tokens
from benchmarks.row import ResultsDiffer
from vlm3d_ext.networks.blocks import VisionToLLMProjector
from vlm3d_ext.networks.nets.image_prefix_language_model import ImagePrefixLanguageModel

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 320}
PROMPT = {"num_queries": 5, "num_words": 7}


def _projector_operations(num_tokens, vision, width, queries=256, num_layers=3):
    """Two operations for each weight and token, four for each query, token and channel."""
    of_a_layer = queries * (2 * width**2 + 2 * 1.5 * width**2) * 2 + 4 * queries * num_tokens * width
    return 2 * num_tokens * vision * 2 * width + num_layers * of_a_layer


def test_pooling_saves_the_operations_of_three_quarters_of_the_tokens():
    row = report_rows.projector_with_pooling((3, 4, 8), vision_channels=16, output_channels=32, timed_channels=32)
    pooled, whole = (_projector_operations(1 + 20 + tokens, 16, 32) for tokens in (24, 96))
    assert row.ratio == pytest.approx(pooled / whole, rel=1e-12)
    each = row.figures["pooled, against all tokens with keys and values for each layer"]
    assert each == pytest.approx(pooled / (whole + 2 * 2 * 117 * 16 * 64), rel=1e-12)


def test_a_projector_that_counts_its_tokens_is_refused(monkeypatch):
    forward = VisionToLLMProjector.forward
    monkeypatch.setattr(
        VisionToLLMProjector, "forward", lambda self, *inputs: forward(self, *inputs) * inputs[2].shape[1]
    )
    with pytest.raises(ResultsDiffer, match="prefixes of constant features differ"):
        report_rows.projector_with_pooling((2, 4, 4), vision_channels=16, output_channels=32, timed_channels=32)


def test_samples_of_one_scan():
    row = report_rows.generation_16_samples(**PROMPT, num_tokens=4, repeats=5, **TINY)
    assert row.target == 3.0 and len(row.figures["ours_s"]) == 5
    assert row.verdict == "refused" or row.ratio > 0
    assert row.figures["ratio of 4 samples"] > 0


def test_samples_that_are_not_the_greedy_text_are_refused(monkeypatch):
    generate = ImagePrefixLanguageModel._generate_from_cache

    def forgetful(self, prompts, num_samples, settings):
        tokens = generate(self, prompts, num_samples, settings)
        return tokens if num_samples == 1 else tokens.roll(1, dims=1)

    monkeypatch.setattr(ImagePrefixLanguageModel, "_generate_from_cache", forgetful)
    with pytest.raises(ResultsDiffer, match="not the greedy text"):
        report_rows.generation_16_samples(**PROMPT, num_tokens=6, repeats=5, **TINY)


def test_operations_of_a_packed_step_approach_the_share_of_positions():
    """A prompt of 96 positions once and four answers, instead of four times both; the head, which answers alone need,
    and attention keep the count from being just that."""
    answers = (6, 8, 8, 8)
    row = report_rows.policy_step_packed(
        num_queries=64, num_words=32, answers=answers, longer_answers=(48,), repeats=5, **TINY
    )
    counted = row.figures["operations, counted"]
    assert counted == pytest.approx((96 + 4 * 8) / (4 * (96 + 8)), rel=0.1)
    assert row.figures["operations, answers of 48"] == pytest.approx((96 + 4 * 48) / (4 * (96 + 48)), rel=0.1)
    assert row.verdict == "refused" or 0 < row.ratio


def test_log_probabilities_that_differ_are_refused(monkeypatch):
    logits = ImagePrefixLanguageModel.report_logits

    def shifted(self, prompts, token_ids, mask, share_prefix=True):
        result = logits(self, prompts, token_ids, mask, share_prefix)
        return result.roll(1, dims=1) if share_prefix else result

    monkeypatch.setattr(ImagePrefixLanguageModel, "report_logits", shifted)
    with pytest.raises(ResultsDiffer, match="log-probabilities differ by"):
        report_rows.policy_step_packed(**PROMPT, answers=(3, 4), repeats=5, **TINY)


def test_gradients_that_differ_are_refused(monkeypatch):
    fill = ImagePrefixLanguageModel._fill_cache
    monkeypatch.setattr(ImagePrefixLanguageModel, "_fill_cache", torch.no_grad()(fill))
    with pytest.raises(ResultsDiffer, match="gradients differ by"):
        report_rows.policy_step_packed(**PROMPT, answers=(3, 4), repeats=5, **TINY)


def test_the_random_model_reads_its_prompt_and_is_the_same_each_time():
    model, again = (random_language_model(**TINY) for _ in range(2))
    assert model.base_sha256 == again.base_sha256
    tokens = random_tokens(model, 1, 5)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    of_one, of_other = (
        model.log_probabilities(random_prompts(model, **PROMPT, seed=seed), tokens, mask) for seed in (0, 1)
    )
    assert (of_one - of_other).abs().max() > 0.01
    torch.testing.assert_close(again.log_probabilities(random_prompts(again, **PROMPT), tokens, mask), of_one)
    of_one.sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.adapters.values())
