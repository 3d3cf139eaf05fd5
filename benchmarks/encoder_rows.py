"""The encoder: operations, what training keeps, and time against the matrix products it cannot do without."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks.nets import ViT
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from vlm3d_ext.networks.layers import ACTIVATION_CHECKPOINTING
from vlm3d_ext.networks.nets import ThreeDVisionEncoder

from .kept_bytes import kept_bytes
from .measuring import time_pairs
from .repository import BUNDLES
from .row import ResultsDiffer, Row

__all__ = ["encoder_against_vit", "encoder_flops", "encoder_forward", "encoder_saved_bytes"]

FULL_SIZE = (64, 512, 512)


def shipped_encoder(device: str = "meta", **options: Any) -> ThreeDVisionEncoder:
    """Return the encoder of the bundle's train.json; options replace its knobs."""
    config = ConfigParser.load_config_file(BUNDLES / "encoder/configs/train.json")
    with torch.device(device):
        return ConfigParser({**config, **options}).get_parsed_content("network_def")


def encoder_flops(size: Sequence[int] = FULL_SIZE) -> Row:
    """operations of the encoder's forward pass against those of the same encoder with full attention"""
    flops, shapes = {}, {}
    for attention in ("slice_aware", "full"):
        with torch.device("meta"):
            encoder = ThreeDVisionEncoder(attention=attention).eval()
            image = torch.zeros(1, 1, *size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shapes[attention] = encoder(image).local_features.shape
        flops[attention] = counter.get_total_flops()
    if shapes["slice_aware"] != shapes["full"]:
        raise ResultsDiffer(f"features have shapes {shapes}")
    return Row(
        "encoder_flops",
        encoder_flops.__doc__ or "",
        flops["slice_aware"] / flops["full"],
        0.27,
        f"both give features of shape {tuple(shapes['full'])} and have as many parameters",
        figures={name: f"{count / 1e12:.3g} TFLOP" for name, count in flops.items()},
    )


def encoder_saved_bytes(size: Sequence[int] = (8, 256, 256), **options: Any) -> Row:
    """bytes kept for the backward pass in bf16, per token, layer and channel, with the shipped settings; no peer"""
    num_tokens = math.prod(n // p for n, p in zip(size, (4, 16, 16), strict=True))
    per_block = {}
    for mode in ACTIVATION_CHECKPOINTING:
        kept = {}
        # Two numbers of layers and two of slices, so that what is kept once cancels out: patches and regions, and the
        # bf16 copies of each layer's weights.
        for num_layers in (1, 2):
            encoder = shipped_encoder("cpu", num_layers=num_layers, activation_checkpointing=mode, **options).train()
            for slices in (size[0], 2 * size[0]):
                with torch.autocast("cpu", torch.bfloat16):
                    kept[num_layers, slices] = kept_bytes(encoder, torch.rand(1, 1, slices, *size[1:]))
        of_layer = [kept[2, slices] - kept[1, slices] for slices in (size[0], 2 * size[0])]
        per_block[mode] = (of_layer[1] - of_layer[0]) / (num_tokens * encoder.hidden_size)
    shipped = ConfigParser.load_config_file(BUNDLES / "encoder/configs/train.json")["activation_checkpointing"]
    _gradients_are_equal()
    return Row(
        "encoder_saved_bytes",
        encoder_saved_bytes.__doc__ or "",
        per_block[shipped],
        22.0,
        "gradients are equal to the last bit in all modes of activation_checkpointing",
        figures={f"activation_checkpointing {mode}": f"{value:.1f}" for mode, value in per_block.items()},
    )


def _gradients_are_equal() -> None:
    gradients = []
    for mode in ACTIVATION_CHECKPOINTING:
        torch.manual_seed(0)
        encoder = ThreeDVisionEncoder(
            patch_size=(2, 4, 4), hidden_size=48, num_layers=2, num_heads=4, num_depth_heads=1, mlp_dim=96,
            activation_checkpointing=mode,
        ).train()  # fmt: skip
        encoder(torch.linspace(0, 1, 512).view(1, 1, 8, 8, 8)).global_features.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    if not all(torch.equal(gradients[0], others) for others in gradients[1:]):
        raise ResultsDiffer("gradients depend on activation_checkpointing")


def encoder_forward(
    size: Sequence[int] = FULL_SIZE, num_layers: int = 12, repeats: int = 5, least_share: float = 0.95
) -> Row:
    """CPU time of the encoder's forward pass in bf16 against the matrix products it is made of, attention included"""
    torch.manual_seed(0)
    encoder = shipped_encoder("cpu", num_layers=num_layers).eval()
    image = torch.rand(1, 1, *size)
    products = _matrix_products(encoder, image)
    # on the meta device, where attention is counted, too
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shipped_encoder(num_layers=num_layers).eval()(image.to("meta"))
    of_products = sum(operations for operations, _ in products)
    counted = counter.get_total_flops()
    if not least_share <= of_products / counted <= 1.0:
        raise ResultsDiffer(f"the products are {of_products:.4g} of the {counted:.4g} operations of the forward pass")

    def ours(_: int) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            encoder(image)

    def peer(_: int) -> None:
        with torch.inference_mode():
            for _operations, product in products:
                product()

    return Row.of_times(
        "encoder_forward",
        encoder_forward.__doc__ or "",
        time_pairs(ours, peer, repeats),
        1.15,
        f"the products are {of_products / counted:.3f} of the counted operations",
        size=f"{tuple(size)}, {num_layers} layers",
    )


def _matrix_products(encoder: ThreeDVisionEncoder, image: Tensor) -> list[tuple[float, Callable[[], Tensor]]]:
    """Return the operations of each matrix product of the trunk, and a function that does it in bf16."""
    grid = [n // p for n, p in zip(image.shape[2:], encoder.patch_size, strict=True)]
    depth, places = grid[0], grid[1] * grid[2]
    num_tokens, width = depth * places, encoder.hidden_size
    blocks: list[Any] = list(encoder.blocks)
    attention = blocks[0].attention
    head_dim = width // attention.num_heads
    in_slab = attention.num_heads - attention.num_depth_heads
    products = [_linear(num_tokens, encoder.patch_embedding.weight[0].numel(), width)]
    for block in blocks:
        products += [
            _linear(num_tokens, width, 3 * width),
            _attention(depth, in_slab, places, head_dim),
            _attention(places, attention.num_depth_heads, depth, head_dim),
            _linear(num_tokens, width, width),
            _linear(num_tokens, width, block.mlp.linear1.out_features),
            _linear(num_tokens, block.mlp.linear1.out_features, width),
        ]
    return [*products, _linear(num_tokens, width, encoder.region_classifier.out_features)]


def _linear(num_rows: int, num_inputs: int, num_outputs: int) -> tuple[float, Callable[[], Tensor]]:
    rows = torch.randn(num_rows, num_inputs, dtype=torch.bfloat16)
    weight = torch.randn(num_outputs, num_inputs, dtype=torch.bfloat16)
    bias = torch.randn(num_outputs, dtype=torch.bfloat16)
    return 2.0 * num_rows * num_inputs * num_outputs, lambda: torch.nn.functional.linear(rows, weight, bias)


def _attention(batch: int, heads: int, length: int, channels: int) -> tuple[float, Callable[[], Tensor]]:
    q, k, v = torch.randn(3, batch, heads, length, channels, dtype=torch.bfloat16)
    return 4.0 * batch * heads * length**2 * channels, lambda: scaled_dot_product_attention(q, k, v)


def encoder_against_vit(size: Sequence[int] = (32, 256, 256), num_layers: int = 2, repeats: int = 5) -> Row:
    """CPU time of the encoder's forward pass against MONAI's ViT of the same patches, width and layers"""
    torch.manual_seed(0)
    encoder = shipped_encoder("cpu", num_layers=num_layers).eval()
    patch = encoder.patch_size
    vit = ViT(1, size, patch, hidden_size=encoder.hidden_size, mlp_dim=3072, num_layers=num_layers, num_heads=12).eval()
    image = torch.rand(1, 1, *size)
    with torch.inference_mode():
        shapes = encoder(image).local_features.shape, vit(image)[0].shape
    if shapes[0] != shapes[1]:
        raise ResultsDiffer(f"tokens have shapes {shapes[0]} and {shapes[1]}")

    def run(network: torch.nn.Module) -> Callable[[int], None]:
        def forward(_: int) -> None:
            with torch.inference_mode():
                network(image)

        return forward

    num_tokens = shapes[0][1]
    return Row.of_times(
        "encoder_against_vit",
        encoder_against_vit.__doc__ or "",
        time_pairs(run(encoder), run(vit), repeats),
        None,
        f"both give {num_tokens} tokens of {encoder.hidden_size} channels",
        size=f"{tuple(size)}, {num_layers} layers; the gain grows with the number of tokens, here {num_tokens}",
    )
