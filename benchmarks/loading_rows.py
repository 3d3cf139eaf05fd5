"""Loading prepared volumes: our loader against a DataLoader over NPZ files, whole volumes and patches."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlm3d_ext.data.prepared_case import read_prepared_case, read_prepared_patch
from vlm3d_ext.data.seeded_dataset import SeededDataLoader, SeededDataset
from vlm3d_ext.transforms import prepared_case_transforms

from .measuring import time_pairs
from .row import ResultsDiffer, Row
from .volumes import FULL_SIZE, prepared_cases, temporary_folder

__all__ = ["chunked_size", "loading_against_read", "loading_chunked", "loading_npz", "patch_read", "patch_read_cached"]

_BATCH_SIZE = 4
_NUM_WORKERS = 2
# through the files in an epoch: the beginning of an epoch costs what an epoch of thousands of files does not notice
_PASSES = 12
_PATCH = (32, 128, 128)
# more than any processor's cache
_SWEPT_BYTES = 160 * 2**20


class _NpzVolumes(Dataset):
    """What one writes first: an NPZ, opened by numpy."""

    def __init__(self, cases: Sequence[Mapping[str, Any]]) -> None:
        self.paths = [case["image"] for case in cases]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        with np.load(self.paths[index], allow_pickle=False) as content:
            arrays = {"image": content["imgs"][None], "anatomical_mask": content["gts"]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def loading_chunked(number: int = 8, repeats: int = 5) -> Row:
    """CPU time of our loader on chunked volumes against torch's DataLoader on NPZ files read by numpy"""
    return _loading("loading_chunked", loading_chunked.__doc__ or "", "blosc2", 1 / 15, number, repeats)


def loading_npz(number: int = 8, repeats: int = 5) -> Row:
    """CPU time of our loader on NPZ files against torch's DataLoader on the same files read by numpy"""
    return _loading("loading_npz", loading_npz.__doc__ or "", "npz", 0.6, number, repeats)


def _loading(name: str, what: str, volume_format: str, target: float, number: int, repeats: int) -> Row:
    with temporary_folder() as folder:
        npz_cases, scan = prepared_cases(folder, "npz", number)
        cases = npz_cases if volume_format == "npz" else prepared_cases(folder, volume_format, number)[0]
        dataset = SeededDataset(cases * _PASSES, prepared_case_transforms())
        loader = SeededDataLoader(dataset, _BATCH_SIZE, _NUM_WORKERS, shuffle=False)
        peer = DataLoader(_NpzVolumes(npz_cases * _PASSES), _BATCH_SIZE, num_workers=_NUM_WORKERS)
        _check_equal(loader, peer)

        def go_through(batches: Any) -> None:
            for _ in batches:
                pass

        times = time_pairs(lambda _: go_through(loader), lambda _: go_through(peer), repeats)
        own, other = (_mebibytes(Path(part["image"]) for part in parts) for parts in (cases, npz_cases))
    return Row.of_times(
        name,
        what,
        times,
        target,
        f"image and mask of all {number} volumes are equal",
        volumes=f"{FULL_SIZE} of {scan}, soft-tissue window",
        **{
            "ours per volume": _milliseconds(times.ours, number * _PASSES),
            "DataLoader + np.load per volume": _milliseconds(times.peer, number * _PASSES),
            "bytes of an image": f"{own / number:.2f} MiB, as NPZ {other / number:.2f} MiB",
        },
    )


def _check_equal(ours: Any, peer: Any) -> None:
    for batch, other in zip(ours, peer, strict=True):
        for key in ("image", "anatomical_mask"):
            if not torch.equal(batch[key], other[key]):
                raise ResultsDiffer(f"{key} of {batch['volume_id']} differs")


def _milliseconds(seconds: Sequence[float], number: int) -> str:
    return f"{sorted(seconds)[len(seconds) // 2] / number * 1000:.1f} ms"


def _mebibytes(paths: Any) -> float:
    return sum(path.stat().st_size for path in paths) / 2**20


def loading_against_read(number: int = 8, repeats: int = 7) -> Row:
    """CPU time of reading a chunked volume into memory that is there against reading its raw bytes from a file"""
    with temporary_folder() as folder:
        cases, scan = prepared_cases(folder, "blosc2", number)
        first = read_prepared_case(cases[0]["image"])
        raw = []
        for index, case in enumerate(cases):
            raw.append(folder / f"{index}.raw")
            content = read_prepared_case(case["image"])
            raw[-1].write_bytes(content.imgs.tobytes() + content.gts.tobytes())
        imgs, gts = np.empty_like(first.imgs), np.empty_like(first.gts)
        flat = np.empty(imgs.size + gts.size, dtype=np.uint8)

        def ours(pair: int) -> None:
            read_prepared_case(cases[pair % number]["image"], (imgs, gts))

        def peer(pair: int) -> None:
            with io.FileIO(raw[pair % number]) as file:
                file.readinto(flat.data)

        ours(1)
        peer(1)
        if not np.array_equal(flat, np.concatenate([imgs.ravel(), gts.ravel()])):
            raise ResultsDiffer("the voxels read differ")
        times = time_pairs(ours, peer, repeats)
    return Row.of_times(
        "loading_against_read",
        loading_against_read.__doc__ or "",
        times,
        None,
        "all voxels of image and mask are equal",
        volumes=f"{FULL_SIZE} of {scan}",
        **{"ours per volume": _milliseconds(times.ours, 1), "read() per volume": _milliseconds(times.peer, 1)},
    )


def patch_read(number: int = 24, repeats: int = 9) -> Row:
    """CPU time of a patch of a chunked volume that is not in memory against np.load(mmap_mode='r') of its .npy"""
    return _patches("patch_read", patch_read.__doc__ or "", number, repeats, cached=False)


def patch_read_cached(number: int = 24, repeats: int = 9) -> Row:
    """the same where the operating system has all files in memory, as in the second epoch of a small data set"""
    return _patches("patch_read_cached", patch_read_cached.__doc__ or "", number, repeats, cached=True)


def _patches(name: str, what: str, number: int, repeats: int, cached: bool) -> Row:
    """One patch of each file, opening included; the processor's caches are swept before each turn."""
    with temporary_folder() as folder:
        cases, scan = prepared_cases(folder, "blosc2", number)
        chunked, arrays = [Path(case["image"]) for case in cases], []
        for index, case in enumerate(cases):
            arrays.append(folder / f"{index}.npy")
            np.save(arrays[-1], read_prepared_case(case["image"]).imgs)
        places = _places(number)

        def ours(_: int) -> None:
            for path, start in zip(chunked, places, strict=True):
                read_prepared_patch(path, start, _PATCH)

        def peer(_: int) -> None:
            for path, start in zip(arrays, places, strict=True):
                _mapped_patch(path, start)

        for path, array, start in zip(chunked, arrays, places, strict=True):
            if not np.array_equal(read_prepared_patch(path, start, _PATCH), _mapped_patch(array, start)):
                raise ResultsDiffer(f"the patch at {start} differs")
        sweep = np.zeros(_SWEPT_BYTES, np.uint8)

        def empty_caches() -> None:
            sweep[::64] += 1
            for path in [] if cached else [*chunked, *arrays]:
                _forget(path)

        times = time_pairs(ours, peer, repeats, before=empty_caches)
        sizes = [_mebibytes(chunked), _mebibytes(arrays)]
    return Row.of_times(
        name,
        what,
        times,
        1.2,
        f"{number} patches of {_PATCH} at random places are equal",
        volumes=f"{FULL_SIZE} of {scan}, soft-tissue window",
        **{
            "ours per patch": _milliseconds(times.ours, number),
            "np.load per patch": _milliseconds(times.peer, number),
            "size against .npy": sizes[0] / sizes[1],
        },
    )


def _forget(path: Path) -> None:
    """Ask the operating system to drop what it holds of a file; it must be on disk for that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _places(patches: int) -> list[tuple[int, int, int]]:
    generator = np.random.default_rng(0)
    highest = [n - p + 1 for n, p in zip(FULL_SIZE, _PATCH, strict=True)]
    return [tuple(int(n) for n in generator.integers(0, highest)) for _ in range(patches)]  # type: ignore[misc]


def _mapped_patch(path: Path, start: tuple[int, int, int]) -> np.ndarray:
    k, j, i = (slice(s, s + n) for s, n in zip(start, _PATCH, strict=True))
    return np.load(path, mmap_mode="r")[k, j, i].copy()


def chunked_size(number: int = 1) -> Row:
    """bytes of a chunked image against its .npy; the worse of the two windows"""
    shares, scan = {}, ""
    for window in ("soft_tissue", "lung"):
        with temporary_folder() as folder:
            cases, scan = prepared_cases(folder, "blosc2", number, window)
            voxels = read_prepared_case(cases[0]["image"]).imgs.nbytes
            shares[window] = Path(cases[0]["image"]).stat().st_size / voxels
    return Row(
        "chunked_size",
        chunked_size.__doc__ or "",
        max(shares.values()),
        0.5,
        "patch_read compares the voxels",
        figures={**{f"{window} window": share for window, share in shares.items()}, "volume": f"{FULL_SIZE} of {scan}"},
    )
