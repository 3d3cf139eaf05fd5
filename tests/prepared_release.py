"""A tiny prepared data set for tests, made by the real writer: bright blocks that its reports and labels speak of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.data.test_volume_geometry import oriented_geometry
from vlm3d_ext.data.atomic_files import write_json
from vlm3d_ext.data.case_manifest import SPLITS
from vlm3d_ext.data.prepared_case import write_prepared_case
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import restore_mask, target_geometry, write_mask_nifti
from vlm3d_ext.text.label_set import load_label_set

SIZE = (8, 16, 16)


def make_prepared_release(
    folder: Path,
    num_cases: tuple[int, int, int] = (8, 4, 6),
    num_windows: int = 1,
    seed: int = 0,
    with_lesions: bool = False,
    sizes: Mapping[int, tuple[int, int, int]] | None = None,
    slice_mm: float = 5.0,
) -> Path:
    """Write prepared cases and their manifest; returns the manifest's path.

    The image is noise; a case with pleural effusion has a bright base, one with cardiomegaly a bright middle. Every
    fourth case has no mask, every fifth no report.

    With lesions, the base is drawn as pleural effusion and the middle as pericardial effusion, on the prepared grid and
    on that of scans with pixels half as large, stored in two orientations; every seventh case is annotated in part.
    Nobody says anything of nodules.

    Args:
        folder: where to.
        num_cases: of training, validation and test; they are numbered through from 1.
        num_windows: channels of the images.
        seed: of the noise.
        with_lesions: whether lesions are drawn.
        sizes: number of a case -> size of its image, where it is not `SIZE`.
        slice_mm: distance of slices.
    """
    generator = np.random.default_rng(seed)
    names = load_label_set("ct_rate_18").names
    manifest: dict = {"name": "tiny", "label_set": "ct_rate_18", "label_names": list(names), "settings": {}}
    number = 0
    for split, count in zip(SPLITS, num_cases, strict=True):
        manifest[split] = []
        for _ in range(count):
            number += 1
            source = source_geometry(number, (sizes or {}).get(number, SIZE), slice_mm)
            case = _write_case(folder, number, split, names, num_windows, generator, source)
            manifest[split].append({**case, **_write_lesions(folder, number, case, source)} if with_lesions else case)
    manifest["fingerprint"] = f"tiny-{seed}-{num_cases}-{num_windows}-{with_lesions}-{sizes}-{slice_mm}"
    path = folder / "manifest.json"
    write_json(path, manifest)
    return path


def source_geometry(number: int, size: tuple[int, int, int] = SIZE, slice_mm: float = 5.0) -> VolumeGeometry:
    """Return the stored grid of a case's scan: the same body as the prepared one of a size, with pixels of 1 mm."""
    shape_ijk = (2 * size[2], 2 * size[1], size[0])
    return oriented_geometry("RAS" if number % 2 else "LPS", shape_ijk, (1.0, 1.0, slice_mm))


def _prepared_geometry(source: VolumeGeometry) -> VolumeGeometry:
    depth, height, width = source.shape
    (prepared,) = target_geometry(source.canonical(), (depth, height // 2, width // 2))
    return prepared


def _write_case(folder, number, split, names, num_windows, generator, source):
    effusion, large_heart = number % 2, (number // 2) % 2
    prepared = _prepared_geometry(source)
    image = generator.integers(0, 60, (num_windows, *prepared.shape))
    regions = np.zeros(prepared.shape, dtype=np.uint8)
    regions[:4, :, :8] = 5
    regions[4:, :, 8:] = 1
    regions[2:6, 4:12, 4:12] = 7
    image[:, :2] += 150 * effusion
    image[:, 2:6, 4:12, 4:12] += 100 * large_heart
    has_mask = number % 4 != 0
    prefix = "valid" if split == "test" else "train"
    volume_id = f"{prefix}_{number}_a_1"
    images = image.astype(np.uint8)
    write_prepared_case(
        folder,
        volume_id,
        images if num_windows > 1 else images[0],
        regions if has_mask else None,
        list(prepared.spacing_mm),
        {
            "volume_id": volume_id,
            "prepared_geometry": prepared.to_dict(),
            "source_geometry": source.to_dict(),
        },
    )
    labels: list[int | None] = [0] * len(names)
    labels[names.index("Pleural effusion")] = effusion
    labels[names.index("Cardiomegaly")] = large_heart
    labels[names.index("Hiatal hernia")] = None
    findings = [
        "Pleural effusion is observed on the right." if effusion else "Pleural effusion was not detected.",
        "The heart is enlarged." if large_heart else "Heart size is normal.",
    ]
    return {
        "volume_id": volume_id,
        "scan_id": volume_id.removesuffix("_1"),
        "patient_id": volume_id.removesuffix("_a_1"),
        "image": f"volumes/{volume_id}.npz",
        "geometry": f"volumes/{volume_id}.json",
        "has_anatomical_mask": has_mask,
        "labels": labels,
        "lesion_masks": {},
        "lesion_masks_source": {},
        "report": {"findings": " ".join(findings), "impression": ""} if number % 5 else None,
        "source": f"{volume_id}.nii.gz",
    }


def _write_lesions(folder, number, case, source):
    prepared = _prepared_geometry(source)
    names, labels = load_label_set("ct_rate_18").names, list(case["labels"])
    labels[names.index("Pericardial effusion")] = large_heart = (number // 2) % 2
    labels[names.index("Lung nodule")] = None
    base, middle = np.zeros((2, *prepared.shape), dtype=np.uint8)
    base[:2] = 1
    middle[2:6, 4:12, 4:12] = 1
    drawn = {"pleural_effusion": base} if number % 2 else {}
    drawn |= {"pericardial_effusion": middle} if large_heart else {}
    paths: dict[str, dict[str, str]] = {"lesion_masks": {}, "lesion_masks_original_grid": {}}
    drawn = {disease: mask for disease, mask in drawn.items() if mask.any()}
    for disease, mask in drawn.items():
        for name, of_paths in paths.items():
            of_paths[disease] = f"{name}/{disease}/{case['volume_id']}.nii.gz"
        write_mask_nifti(folder / paths["lesion_masks"][disease], mask, prepared)
        on_source = restore_mask(mask, prepared, source)
        write_mask_nifti(folder / paths["lesion_masks_original_grid"][disease], on_source, source)
    return {**paths, "labels": labels, "lesion_masks_partial": sorted(drawn) if number % 7 == 0 else []}
