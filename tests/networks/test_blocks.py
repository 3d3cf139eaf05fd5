import math

import torch

from vlm3d_ext.networks.blocks import AnatomicalStructureEncoder, HashedNgramSentenceEncoder
from vlm3d_ext.networks.layers import SineCosinePositionEmbedding, token_centres_mm


def _structure_measures():
    """Measures of a volume of four tokens of 500 ml: the whole, one region in two tokens, one region that is absent."""
    encoder = AnatomicalStructureEncoder(hidden_size=8, num_regions=2, num_intensities=2)
    positions_mm = torch.tensor([[[-100.0, 0, 0], [100.0, 0, 50], [0.0, 0, 0], [0.0, 0, 0]]])
    shares = torch.tensor([[[1.0, 1, 1, 1], [1.0, 1, 0, 0], [0, 0, 0, 0]]])
    intensities = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.0, 0.0]]])
    return encoder.measure(shares, positions_mm, torch.tensor([500.0]), intensities)[0]


def test_structure_measures_by_hand():
    whole, present, absent = _structure_measures()
    assert math.isclose(whole[0], math.log10(2000.1) / 2, abs_tol=1e-4)
    assert math.isclose(present[0], math.log10(1000.1) / 2, abs_tol=1e-4)
    torch.testing.assert_close(present[1:4], torch.tensor([0.0, 0.0, 0.25]), atol=1e-5, rtol=0)
    torch.testing.assert_close(present[4:7], torch.tensor([1.0, 0.001, 0.25]), atol=1e-4, rtol=0)
    torch.testing.assert_close(present[7:], torch.tensor([0.5, 0.75**0.5]), atol=1e-4, rtol=0)
    assert math.isclose(absent[0], math.log10(0.1) / 2, abs_tol=1e-4)
    assert torch.equal(absent[1:], torch.zeros(8))


def test_structure_encoder_is_differentiable_for_a_region_within_one_token():
    encoder = AnatomicalStructureEncoder(hidden_size=8, num_regions=1, num_intensities=1)
    shares = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]], requires_grad=True)
    positions_mm = torch.tensor([[[0.0, 0, 0], [9.0, 9, 9]]])
    queries = encoder(shares, positions_mm, torch.tensor([1.0]), torch.ones(1, 2, 1))
    queries.square().sum().backward()
    assert torch.isfinite(shares.grad).all()


def test_token_centres_by_hand():
    z_mm, y_mm, x_mm = token_centres_mm((2, 1, 2), (4, 8, 8), torch.tensor([[5.0, 1.0, 2.0]]))
    assert z_mm.tolist() == [[-10.0, 10.0]]
    assert y_mm.tolist() == [[0.0]]
    assert x_mm.tolist() == [[-8.0, 8.0]]


def test_padding_moves_no_token_centre():
    spacing = torch.tensor([[2.0, 1.0, 1.0]])
    alone = token_centres_mm((2, 2, 2), (4, 4, 4), spacing)
    padded = token_centres_mm((5, 2, 3), (4, 4, 4), spacing, torch.tensor([[8, 8, 8]]))
    for short, long in zip(alone, padded, strict=True):
        torch.testing.assert_close(long[:, : short.shape[1]], short)


def test_position_embedding_tells_places_apart_and_knows_millimetres():
    embedding = SineCosinePositionEmbedding(50)
    z_mm = torch.tensor([[0.0, 30.0], [0.0, 60.0]])
    codes = embedding(z_mm, torch.zeros(2, 1), torch.zeros(2, 1))
    assert codes.shape == (2, 2, 1, 1, 50)
    assert torch.equal(codes[0, 0], codes[1, 0])
    assert (codes[0, 1] - codes[1, 1]).norm() > 0.5
    assert torch.equal(codes[..., 48:], torch.zeros(2, 2, 1, 1, 2))  # 50 = 6 · 8 + 2


def test_sentence_encoder_ignores_padding_and_order():
    torch.manual_seed(0)
    encoder = HashedNgramSentenceEncoder(100, 8, 6)
    short = encoder(torch.tensor([[[5, 9]]]))
    long = encoder(torch.tensor([[[9, 5, 0, 0]]]))
    torch.testing.assert_close(short, long)
    assert torch.isfinite(encoder(torch.zeros(1, 1, 3, dtype=torch.int64))).all()
