import math

import pytest
import torch

from data_prep import causal_language_model
from data_prep.causal_language_model import Answer, CausalLanguageModelSettings, train_causal_language_model
from data_prep.token_batches import endless_batches, pad_rows, token_entropy
from vlm3d_ext.checkpoint_files import state_dict_sha256

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64, "batch_size": 8, "num_threads": 1}


def examples(num_words=8):
    """The answer names the prompt's word: frequencies say nothing of which."""
    return [Answer((2, 5 + word), (20 + word, 1)) for word in range(num_words)]


def train(rows, **settings):
    return train_causal_language_model(rows, 40, padding=0, end=1, settings=CausalLanguageModelSettings(**settings))


def test_token_entropy_by_hand():
    assert token_entropy([5, 5, 6, 7]) == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4
    assert token_entropy([9, 9, 9]) == 0


def test_batches_hold_every_row_once_before_any_again_and_rows_alike_in_length():
    lengths = [3, 50, 4, 49, 5, 48, 6]
    batches = endless_batches(lengths, 2, torch.Generator().manual_seed(0))
    first = [next(batches) for _ in range(4)]
    assert sorted(index for batch in first for index in batch) == list(range(7))
    assert all(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) < 45 for batch in first)
    assert sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) > 10 for b in first) <= 1
    assert pad_rows([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]


def test_it_learns_to_copy_from_the_prompt():
    result = train(examples(), **TINY, num_steps=150, learning_rate=1e-2)
    entropy = token_entropy(token for example in examples() for token in example.answer)
    assert result.loss_before > entropy > 1.5
    assert result.loss_after < 0.1 and not result.model.training
    ids = torch.tensor([example.prompt for example in examples()])
    answers = result.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert answers[:, 2:].tolist() == [list(example.answer) for example in examples()]


def test_padding_changes_no_loss():
    short, long = Answer((2, 5), (20, 1)), Answer((2, 6, 7, 8, 9, 10), (21, 22, 1))
    sizes = {**TINY, "num_steps": 1, "learning_rate": 1e-12}
    together, alone = train([short, long], **sizes), [train([row], **sizes).loss_before for row in (short, long)]
    assert together.loss_before == pytest.approx((2 * alone[0] + 3 * alone[1]) / 5, rel=1e-2)


def test_attention_in_float32_is_attention_without_autocast():
    """Without autocast nothing changes; with it, attention alone is more precise; afterwards all is as before."""
    network = train(examples(), **TINY, num_steps=1).model
    assert network.config._attn_implementation == "sdpa"
    attention = network.model.layers[0].self_attn
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    positions = network.model.rotary_emb(states, torch.arange(5)[None])

    def attended(bfloat16):
        seen = []
        hook = attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            attention(states, position_embeddings=positions, attention_mask=None)
        hook.remove()
        return seen[0]

    plain, in_bfloat16 = attended(False), attended(True)
    with causal_language_model._float32_attention(network):
        assert torch.equal(attended(False), plain)
        assert attended(True).dtype == torch.bfloat16  # what follows is as fast as before
        precise = attended(True)
    assert network.config._attn_implementation == "sdpa" and torch.equal(attended(True), in_bfloat16)
    assert (precise - plain).abs().mean() <= (in_bfloat16 - plain).abs().mean() < 0.01


def test_the_prompt_is_no_target():
    """Rows whose prompts differ but hold the same answer: the loss does fall to nothing, prompts cannot be foreseen."""
    rows = [Answer((2, 5 + number, 12 - number), (20, 21, 1)) for number in range(8)]
    assert train(rows, **TINY, num_steps=100, learning_rate=1e-2).loss_after < 0.05


def test_easy_examples_have_their_share_of_the_steps_and_none_of_the_last_tenth(monkeypatch):
    seen = []
    loss = causal_language_model._loss

    def recording(network, batch, padding):
        if network.training and torch.is_grad_enabled():
            seen.append({example.prompt[0] for example in batch})
        return loss(network, batch, padding)

    monkeypatch.setattr(causal_language_model, "_loss", recording)
    easy = [Answer((3, 5), (20, 1))] * 3
    settings = CausalLanguageModelSettings(**TINY, num_steps=40, easy_share=0.45)
    train_causal_language_model(examples(), 40, padding=0, end=1, settings=settings, easy_examples=easy)
    assert all(len(kinds) == 1 for kinds in seen) and len(seen) == 40
    assert [kinds.pop() for kinds in seen] == [2, 3] * 18 + [2] * 4


def test_the_seed_decides_and_the_callers_random_state_does_not():
    def digest(seed):
        torch.manual_seed(seed + 7)
        return state_dict_sha256(train(examples(), **TINY, num_steps=3, seed=seed).model.state_dict())

    first = digest(0)
    torch.rand(3)
    assert digest(0) == first != digest(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 36, "num_heads": 4}, "hidden_size 36 must be a multiple of twice num_heads 4"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"max_positions": 4}, "max_positions must be at least 64"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"easy_share": 0.95}, "easy_share must be between 0 and 0.9, got 0.95"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLanguageModelSettings(**settings)


def test_nothing_to_learn_from_and_too_long_an_example_are_refused():
    with pytest.raises(ValueError, match="no example to learn from"):
        train([], **TINY)
    with pytest.raises(ValueError, match="the longest prompt with its report has 65 tokens, max_positions is 64"):
        train([Answer((2,) * 60, (20,) * 5)], **TINY)
