"""Cost over a factor of eight, in slices, voxels and files: it has to grow linearly."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.padded_batches import collate_padded
from vlm3d_ext.data.seeded_dataset import SeededDataLoader, SeededDataset
from vlm3d_ext.transforms.presets import prepared_case_transforms

from .encoder_rows import shipped_encoder
from .growth import Growth, growth_row, quadratic_share, time_growth
from .localizer_rows import shipped_localizer
from .preparation_growth import scaling_planning, scaling_preparation
from .prepared_volumes import write_prepared_set
from .row import ResultsDiffer, Row

__all__ = ["scaling_loading", "scaling_planning", "scaling_preparation", "scaling_slices", "scaling_voxels"]

# Wide enough for matrix products to matter, narrow enough for one thread.
_NARROW = {"hidden_size": 192, "num_layers": 2, "num_heads": 6, "num_depth_heads": 2, "mlp_dim": 768}
_NARROW_LOCALIZER = {"denoising_layers": 2, "denoising_mlp_dim": 384, "base_channels": 16, "head_channels": 4}


def scaling_slices(
    slices: Sequence[int] = (64, 128, 256, 512),
    plane: Sequence[int] = (512, 512),
    timed_slices: Sequence[int] = (32, 64, 128, 256),
    timed_plane: Sequence[int] = (256, 256),
    rounds: int = 5,
    **options: Any,
) -> Row:
    """exponent of the encoder's cost over the number of slices: operations as shipped, CPU time at a small width"""
    encoder = shipped_encoder(**options).eval()
    sizes = [(depth, *plane) for depth in slices]
    counts, shapes = _counted(lambda image: encoder(image).local_features, sizes)
    tokens = [shape[1] for shape in shapes]
    if any(number * slices[0] != tokens[0] * depth for number, depth in zip(tokens, slices, strict=True)):
        raise ResultsDiffer(f"{list(slices)} slices give {tokens} tokens")
    share = _quadratic_share("slices", slices, counts)
    torch.manual_seed(0)
    narrow = shipped_encoder("cpu", **{**_NARROW, **options}).eval()
    forward = _forward(narrow, {depth: (depth, *timed_plane) for depth in timed_slices})
    timed = time_growth(forward, timed_slices, rounds)
    return growth_row(
        "scaling_slices",
        scaling_slices.__doc__ or "",
        {"operations": Growth(slices, [[count / 1e12 for count in counts]], "TFLOP"), "time": timed},
        f"tokens grow with the slices, operations are a polynomial of degree two in them, exactly; "
        f"depth attention's square is {share:.2%} at {slices[-1]} slices",
    )


def scaling_voxels(
    planes: Sequence[Sequence[int]] = ((128, 256), (256, 256), (256, 512), (512, 512)),
    depth: int = 64,
    timed_planes: Sequence[Sequence[int]] = ((64, 128), (128, 128), (128, 256), (256, 256)),
    timed_depth: int = 32,
    rounds: int = 5,
    **options: Any,
) -> Row:
    """exponent of the localizer's cost over the voxels of a slice: operations as shipped, CPU time at a small width"""
    localizer = shipped_localizer(**options)
    sizes = [(depth, *plane) for plane in planes]
    counts, shapes = _counted(lambda image: localizer(image)["logits"], sizes)
    if [shape[2:] for shape in shapes] != [torch.Size(size) for size in sizes]:
        raise ResultsDiffer(f"volumes of {sizes} give masks of {[tuple(shape[2:]) for shape in shapes]}")
    voxels = [height * width for height, width in planes]
    share = _quadratic_share("voxels of a slice", voxels, counts)
    torch.manual_seed(0)
    narrow = shipped_localizer("cpu", **{**_NARROW, **_NARROW_LOCALIZER, **options})
    narrow.text_embedder.embeddings.normal_()
    shapes_timed = {height * width: (timed_depth, height, width) for height, width in timed_planes}
    timed = time_growth(_forward(narrow, shapes_timed), list(shapes_timed), rounds)
    return growth_row(
        "scaling_voxels",
        scaling_voxels.__doc__ or "",
        {"operations": Growth(voxels, [[count / 1e12 for count in counts]], "TFLOP"), "time": timed},
        f"masks have their volume's size, operations are a polynomial of degree two in the voxels of a slice, exactly; "
        f"in-slice attention's square is {share:.1%} at {planes[-1][0]} x {planes[-1][1]}",
    )


def scaling_loading(
    files: Sequence[int] = (8, 16, 32, 64),
    size: Sequence[int] = (16, 128, 128),
    rounds: int = 5,
    formats: Sequence[str] = ("npz", "blosc2"),
) -> Row:
    """exponent of the CPU time of loading over the number of files, in each form in which volumes are kept"""
    series, digests = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in formats:
            manifest = CaseManifest(write_prepared_set(Path(folder) / name, files[-1], size, name))
            cases = manifest.cases("training")
            digests[name] = {num: _digests(cases[:num]) for num in (files[0], files[-1])}
            series[name] = time_growth(_loading(cases), files, rounds)
    largest = digests[formats[0]][files[-1]]
    for name in formats:
        few, many = (digests[name][num] for num in (files[0], files[-1]))
        if len(many) != files[-1] or few != {volume_id: many[volume_id] for volume_id in few} or many != largest:
            raise ResultsDiffer(f"{name}: what is loaded of a volume depends on how many are, or on the form")
    return growth_row(
        "scaling_loading",
        scaling_loading.__doc__ or "",
        series,
        f"the {files[0]} volumes are the same among {files[-1]}, and in all forms",
        size=str(tuple(size)),
    )


def _counted(
    forward: Callable[[Tensor], Tensor], sizes: Sequence[tuple[int, ...]]
) -> tuple[list[int], list[torch.Size]]:
    """Return operations and shape of the result for each size, on the meta device."""
    counts, shapes = [], []
    for size in sizes:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shapes.append(forward(torch.zeros(1, 1, *size, device="meta")).shape)
        counts.append(counter.get_total_flops())
    return counts, shapes


def _quadratic_share(what: str, sizes: Sequence[int], counts: Sequence[int]) -> float:
    share = quadratic_share(sizes, counts)
    if share is None:
        raise ResultsDiffer(f"operations {list(counts)} are no polynomial of degree two in the {what} {list(sizes)}")
    return share


def _forward(network: torch.nn.Module, shapes: Mapping[int, tuple[int, ...]]) -> Callable[[int, int], None]:
    """Return a function of a key of `shapes` that runs the network on a random volume of that shape."""
    images = {key: torch.rand(1, 1, *shape) for key, shape in shapes.items()}

    def forward(key: int, _: int) -> None:
        with torch.inference_mode():
            network(images[key])

    return forward


def _loader(cases: Sequence[dict[str, Any]]) -> SeededDataLoader:
    dataset = SeededDataset(cases, prepared_case_transforms())
    return SeededDataLoader(dataset, batch_size=4, shuffle=False, collate_fn=collate_padded)


def _loading(cases: Sequence[dict[str, Any]]) -> Callable[[int, int], None]:
    def load(num_files: int, _: int) -> None:
        for _batch in _loader(cases[:num_files]):
            pass

    return load


def _digests(cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the SHA-256 of image and regions of each volume, as the loader hands them over."""
    return {
        volume_id: hashlib.sha256(image.numpy().tobytes() + regions.numpy().tobytes()).hexdigest()
        for batch in _loader(cases)
        for volume_id, image, regions in zip(batch["volume_id"], batch["image"], batch["anatomical_mask"], strict=True)
    }
