import math

import pytest
import torch

from data_prep.masked_language_model import (
    MaskedLanguageModelSettings,
    mask_tokens,
    train_masked_language_model,
    unigram_entropy,
)
from vlm3d_ext.networks.blocks.prompted_text_encoder import state_dict_sha256

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 16, "batch_size": 8}


def test_unigram_entropy_by_hand():
    assert unigram_entropy([[2, 5, 5, 3], [2, 6, 7, 3]]) == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4
    assert unigram_entropy([[2, 9, 9, 9, 3]]) == 0


def test_masking_as_in_bert():
    ids = torch.randint(5, 1000, (200, 100), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 90], ids[:, 91:] = 2, 3, 0
    hidden, targets = mask_tokens(ids, 0.4, 1000, torch.Generator().manual_seed(0))
    chosen = targets != -100
    words = ids >= 5
    assert not chosen[~words].any() and torch.equal(hidden[~chosen], ids[~chosen])
    assert torch.equal(targets[chosen], ids[chosen])
    assert chosen[words].float().mean() == pytest.approx(0.4, abs=0.02)
    masked = (hidden[chosen] == 4).float().mean()
    kept = (hidden[chosen] == ids[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)
    assert (hidden[chosen] >= 4).all()


def sequences(num_pairs=20):
    """Pairs of words that belong together: half of each can be known from the other half only."""
    return [[2, 5 + word, 25 + word, 3] for word in range(num_pairs)]


def test_it_learns_what_frequencies_cannot_tell():
    sizes = {**TINY, "hidden_size": 32, "batch_size": 100}
    settings = MaskedLanguageModelSettings(**sizes, num_steps=200, learning_rate=5e-3, mask_probability=0.3)
    result = train_masked_language_model(sequences(5) * 20, 45, settings)
    entropy, entropy_at_position = unigram_entropy(sequences(5)), math.log(5)
    assert entropy == pytest.approx(math.log(10))
    assert result.loss_before > 0.9 * entropy and result.loss_after < 0.5 * entropy_at_position
    assert not result.model.training


def test_the_seed_decides_and_the_number_of_threads_does_not():
    def digest(seed, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(threads)  # the caller's random state plays no part
        try:
            settings = MaskedLanguageModelSettings(**TINY, num_steps=5, seed=seed)
            result = train_masked_language_model(sequences(), 45, settings)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return state_dict_sha256(result.model.state_dict())

    assert digest(0) == digest(0, threads=2) != digest(1)


def test_long_sentences_are_cut_to_the_positions():
    settings = MaskedLanguageModelSettings(**TINY, num_steps=1)
    result = train_masked_language_model([[2, *range(5, 45), 3]], 45, settings)
    assert math.isfinite(result.loss_after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, "hidden_size 10 must be a multiple of num_heads 4"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"max_positions": 4}, "max_positions must be at least 8"),
        ({"mask_probability": 1.0}, "mask_probability must be between 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedLanguageModelSettings(**settings)


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="no sentence with a word"):
        train_masked_language_model([[2, 3]], 45, MaskedLanguageModelSettings(**TINY))
