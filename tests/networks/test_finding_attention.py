import math

import pytest
import torch

from vlm3d_ext.networks.layers import FindingAttention

BATCH, FINDINGS, TOKENS, CHANNELS, TEXT, HEADS, HEAD_DIM = 2, 4, 5, 6, 7, 3, 2
ATTENDS = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return FindingAttention(CHANNELS, TEXT, TOKENS, HEADS, HEAD_DIM).double()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(BATCH, TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    text = torch.randn(FINDINGS, TEXT, generator=generator, dtype=torch.float64)
    return features, torch.nn.functional.normalize(text, dim=-1)


def by_loops(attention, features, text, attends):
    seen = torch.zeros(BATCH, FINDINGS, TEXT, dtype=torch.float64)
    for case in range(BATCH):
        for finding in range(FINDINGS):
            query = attention.query(text[finding] * math.sqrt(TEXT))
            heads = []
            for head in range(HEADS):
                part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                weights, values = [], []
                for token in range(TOKENS):
                    if not attends[finding, token]:
                        continue
                    key = attention.key(features[case, token] + attention.token_embedding[token])
                    weights.append(torch.exp((query[part] @ key[part]) / math.sqrt(HEAD_DIM)))
                    values.append(attention.value(features[case, token])[part])
                total = sum(weights)
                heads.append(sum(weight / total * value for weight, value in zip(weights, values, strict=True)))
            seen[case, finding] = attention.output.weight @ torch.cat(heads)
    return seen


def test_it_is_a_loop_over_findings_heads_and_tokens(attention, inputs):
    seen = attention(*inputs, ATTENDS)
    torch.testing.assert_close(seen, by_loops(attention, *inputs, ATTENDS), atol=1e-10, rtol=0)


def test_a_finding_never_sees_a_token_it_may_not_attend_to(attention, inputs):
    features, text = inputs
    before = attention(features, text, ATTENDS)
    for token in range(1, TOKENS):
        changed = features.clone()
        changed[:, token] += 100
        after = attention(changed, text, ATTENDS)
        blind = ~ATTENDS[:, token]
        assert torch.equal(after[:, blind], before[:, blind])
        assert (after[:, ~blind] != before[:, ~blind]).any(-1).all()  # else the line above could not fail


def test_gradients(attention, inputs):
    features, text = (tensor.clone().requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(lambda *given: attention(*given, ATTENDS), (features, text))
    attention(features, text, ATTENDS)[:, 1].square().sum().backward()
    assert features.grad[:, 0].all() and not features.grad[:, 1:].any()
    # with one token to look at, there is nothing to choose, so that neither query nor key matters
    assert not attention.query.weight.grad.any() and attention.value.weight.grad.all()


def test_findings_do_not_see_each_other(attention, inputs):
    features, text = inputs
    order = torch.tensor([2, 0, 3])
    torch.testing.assert_close(
        attention(features, text[order], ATTENDS[order]), attention(features, text, ATTENDS)[:, order]
    )


def test_tokens_are_told_apart(attention, inputs):
    """The same features in another region mean something else."""
    features, text = inputs
    everywhere = torch.ones_like(ATTENDS)
    exchanged = features[:, [0, 2, 1, 3, 4]]
    assert not torch.allclose(attention(features, text, everywhere), attention(exchanged, text, everywhere))
