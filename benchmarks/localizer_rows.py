"""The localizer: operations for five diseases and for one, and against networks that a user would take instead."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.networks.nets import AttentionUnet, DynUNet, SegResNet, SwinUNETR
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlm3d_ext.networks.nets import LesionLocalizationModule
from vlm3d_ext.text.disease_set import load_disease_set

from .measuring import time_pairs
from .repository import BUNDLES, ROOT
from .row import ResultsDiffer, Row

__all__ = ["localizer_against_attention_unet", "localizer_diseases", "localizer_peers", "localizer_time"]

FULL_SIZE = (64, 512, 512)
NUM_DISEASES = 5


def shipped_localizer(device: str = "meta", **options: Any) -> LesionLocalizationModule:
    """Return the network of the localization bundle's train.json; options replace its knobs."""
    config = ConfigParser.load_config_file(BUNDLES / "localization/configs/train.json")
    with torch.device(device):
        return ConfigParser({**config, **options}).get_parsed_content("network_def").eval()


def attention_unet(num_outputs: int = NUM_DISEASES) -> nn.Module:
    """Return MONAI's AttentionUnet of 64 to 512 channels, 23 million parameters."""
    return AttentionUnet(3, 1, num_outputs, channels=(64, 128, 256, 512), strides=(2, 2, 2)).eval()


def _operations(action: Callable[[], Tensor]) -> tuple[int, Tensor]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = action()
    return counter.get_total_flops(), result


def _drawing(network: LesionLocalizationModule, image: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs the localizer's three stages on local features that are there already."""
    with torch.no_grad():
        local = network.local_features(image)
    return lambda: network.draw_windows(image, network.refine(local, network.texts()))


def localizer_diseases(size: Sequence[int] = FULL_SIZE) -> Row:
    """operations of the localizer for five diseases against those for one"""
    image = torch.zeros(1, 1, *size, device="meta")
    content = json.loads((ROOT / "vlm3d_ext/text/disease_sets/chest_ct_5.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.json"
        one.write_text(json.dumps({**content, "name": "one", "diseases": content["diseases"][:1]}))
        flops, masks = {}, {}
        for name, options in {
            "five": {},
            "one": {"disease_set": str(one)},
            "five, a pass for each": {"passes": "per_disease"},
        }.items():
            flops[name], result = _operations(_drawing(shipped_localizer(**options), image))
            masks[name] = tuple(result.shape)
    num_diseases = load_disease_set("chest_ct_5").num_diseases
    if masks["five"] != (1, num_diseases, *size) or masks["one"] != (1, 1, *size):
        raise ResultsDiffer(f"masks have shapes {masks}")
    return Row(
        "localizer_diseases",
        localizer_diseases.__doc__ or "",
        flops["five"] / flops["one"],
        1.10,
        "each disease has a mask of full size",
        figures={name: f"{count / 1e12:.3g} TFLOP" for name, count in flops.items()},
    )


def localizer_against_attention_unet(size: Sequence[int] = FULL_SIZE) -> Row:
    """operations of the localizer for five diseases against AttentionUnet 64 to 512 on the same volume"""
    image = torch.zeros(1, 1, *size, device="meta")
    network = shipped_localizer()
    ours, masks = _operations(_drawing(network, image))
    encoder, _ = _operations(lambda: network.local_features(image)[0])
    with torch.device("meta"):
        reference = attention_unet()
    peer, others = _operations(lambda: reference(image))
    if masks.shape != others.shape:
        raise ResultsDiffer(f"masks have shapes {tuple(masks.shape)} and {tuple(others.shape)}")
    return Row(
        "localizer_against_attention_unet",
        localizer_against_attention_unet.__doc__ or "",
        ours / peer,
        0.10,
        f"both give {masks.shape[1]} masks of full size",
        figures={
            "localizer": f"{ours / 1e12:.3g} TFLOP",
            "AttentionUnet": f"{peer / 1e12:.3g} TFLOP",
            "encoder, shared with the other bundles": f"{encoder / 1e12:.3g} TFLOP",
            "ratio with the encoder": (ours + encoder) / peer,
        },
    )


def localizer_peers(size: Sequence[int] = (64, 512, 512)) -> Row:
    """operations of the localizer against the cheapest of SegResNet, DynUNet and SwinUNETR on the same volume"""
    image = torch.zeros(1, 1, *size, device="meta")
    ours, masks = _operations(_drawing(shipped_localizer(), image))
    # SwinUNETR reads numbers while it is built, so the networks are built for real
    peers = {
        "SegResNet of 32 filters": SegResNet(3, 32, 1, NUM_DISEASES),
        "DynUNet of 32 to 320": DynUNet(
            3, 1, NUM_DISEASES, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=[32, 64, 128, 256, 320]
        ),
        "SwinUNETR of 48": SwinUNETR(1, NUM_DISEASES, feature_size=48),
    }
    flops = {}
    for name, peer in peers.items():
        flops[name], result = _operations(functools.partial(peer.to("meta").eval(), image))
        if result.shape != masks.shape:
            raise ResultsDiffer(f"{name} gives masks of shape {tuple(result.shape)}, not {tuple(masks.shape)}")
    return Row(
        "localizer_peers",
        localizer_peers.__doc__ or "",
        ours / min(flops.values()),
        None,
        f"all give {masks.shape[1]} masks of full size",
        figures={
            "localizer": f"{ours / 1e12:.3g} TFLOP",
            **{
                name: f"{count / 1e12:.3g} TFLOP, {sum(p.numel() for p in peers[name].parameters()) / 1e6:.1f}M"
                for name, count in flops.items()
            },
        },
    )


def localizer_time(size: Sequence[int] = (32, 128, 128), repeats: int = 5) -> Row:
    """CPU time of encoder and localizer for five diseases against AttentionUnet 64 to 512 on the same volume"""
    torch.manual_seed(0)
    network, reference = shipped_localizer("cpu"), attention_unet()
    network.text_embedder.embeddings.normal_()
    image = torch.rand(1, 1, *size)
    with torch.inference_mode():
        shapes = network(image)["logits"].shape, reference(image).shape
    if shapes[0] != shapes[1]:
        raise ResultsDiffer(f"masks have shapes {tuple(shapes[0])} and {tuple(shapes[1])}")

    def ours(_: int) -> None:
        with torch.inference_mode():
            network(image)

    def peer(_: int) -> None:
        with torch.inference_mode():
            reference(image)

    return Row.of_times(
        "localizer_time",
        localizer_time.__doc__ or "",
        time_pairs(ours, peer, repeats),
        None,
        f"both give {shapes[0][1]} masks of {tuple(size)}",
    )
