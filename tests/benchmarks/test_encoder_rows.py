import pytest
import torch
from torch import nn

from benchmarks.encoder_rows import encoder_flops, encoder_forward, encoder_saved_bytes
from benchmarks.kept_bytes import kept_bytes
from benchmarks.localizer_rows import localizer_against_attention_unet, localizer_diseases

SMALL = {"hidden_size": 96, "num_heads": 3, "num_depth_heads": 1, "mlp_dim": 384}


def test_kept_bytes_by_hand():
    """A linear layer keeps its input, which is given, a sine its own, which the layer made; the result lives."""
    network = nn.Sequential(nn.Linear(3, 5), _Sine()).train()
    assert kept_bytes(network, torch.rand(7, 3, requires_grad=True)) == 2 * 7 * 5 * 4


class _Sine(nn.Module):
    def forward(self, x):
        return x.sin()


def test_operations_of_full_attention_are_four_times_as_many():
    row = encoder_flops()
    assert row.verdict == "met" and 0.2 < row.ratio
    assert row.figures["full"] == "12.7 TFLOP"


def test_saved_bytes_are_those_of_the_shipped_mode():
    row = encoder_saved_bytes(size=(4, 64, 64), **SMALL)
    kept = [float(row.figures[f"activation_checkpointing {mode}"]) for mode in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] == pytest.approx(2.0, abs=0.1)
    assert row.ratio == pytest.approx(kept[1], abs=0.06)
    # input, query, key and value, attention's result, its projection, the hidden layer
    assert kept[1] == pytest.approx(2 * (1 + 3 + 1 + 1 + 4), rel=0.06)


def test_the_forward_pass_is_compared_with_its_own_products():
    row = encoder_forward(size=(8, 64, 64), num_layers=1, least_share=0.5)
    assert "of the counted operations" in row.equality
    assert row.refused or row.ratio > 0.5


def test_the_localizer_at_full_size():
    assert localizer_diseases().verdict == "met"
    row = localizer_against_attention_unet()
    assert row.verdict == "met" and row.figures["AttentionUnet"] == "23.5 TFLOP"
