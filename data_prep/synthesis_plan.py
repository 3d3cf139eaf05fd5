"""Which patients, scans, reconstructions and findings a synthetic data set has: everything that is decided before a
voxel is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.finding_record import CT_RATE_18, FINDING_PREVALENCE, IMPLIED_FINDINGS

__all__ = ["ScanPlan", "SynthesisSettings", "VolumePlan", "assign_findings", "plan_data_set"]

_HEALTHY_SHARE = 0.08
# The findings that only the other label set asks for may be rarer, or no scan would be left with few findings.
_RARE_SHARE = 0.7
_KEYS_OF_CT_RATE = {*(name.lower().replace(" ", "_") for name in CT_RATE_18), "ground_glass_opacity"}
_SECOND_SCAN_SHARE = 0.15
_SECOND_RECONSTRUCTION_SHARE = 0.25
# Sharp kernels are noisy and fine-grained, soft ones smooth.
_KERNELS = {
    "soft": {"noise_hu": (10.0, 20.0), "smoothness_mm": 3.2},
    "sharp": {"noise_hu": (26.0, 48.0), "smoothness_mm": 1.0},
}


@dataclass(frozen=True)
class SynthesisSettings:
    """What determines a synthetic data set, down to the last byte.

    Args:
        num_train_patients, num_valid_patients: patients per official split.
        seed: seed of everything.
        release: "v2" (HU, correct headers) or "v1" (blank headers, stored values).
        size: (D, H, W) of a typical volume; the number of slices varies from scan to scan.
        field_of_view_mm: (z, y, x) extent of a typical volume.
        minimum_prevalence: least share of positive scans for a finding that is rarer in CT-RATE; 0.7 of it for
            findings that only the set vlm3d_18 names.
        adversity: whether to add the quirks of the real data set.

    Raises:
        ValueError: for numbers out of range.
    """

    num_train_patients: int = 40
    num_valid_patients: int = 16
    seed: int = 0
    release: str = "v2"
    size: tuple[int, int, int] = (64, 128, 128)
    field_of_view_mm: tuple[float, float, float] = (320.0, 360.0, 360.0)
    minimum_prevalence: float = 0.18
    adversity: bool = False

    def __post_init__(self) -> None:
        if self.num_train_patients < 0 or self.num_valid_patients < 0 or not self.num_patients:
            raise ValueError(
                f"need at least one patient, got {self.num_train_patients} for training and "
                f"{self.num_valid_patients} for validation."
            )
        if self.release not in ("v1", "v2"):
            raise ValueError(f"release must be 'v1' or 'v2', got {self.release!r}.")
        if len(self.size) != 3 or min(self.size) < 8:
            raise ValueError(f"size must be three numbers D H W of at least 8, got {self.size}.")
        if len(self.field_of_view_mm) != 3 or min(self.field_of_view_mm) < 100:
            raise ValueError(f"field_of_view_mm must be three lengths of at least 100, got {self.field_of_view_mm}.")
        if not 0 <= self.minimum_prevalence <= 0.8:
            raise ValueError(f"minimum_prevalence must be between 0 and 0.8, got {self.minimum_prevalence}.")

    @property
    def num_patients(self) -> int:
        """Return the number of patients in both splits."""
        return self.num_train_patients + self.num_valid_patients

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        settings = asdict(self)
        return {**settings, "size": list(self.size), "field_of_view_mm": list(self.field_of_view_mm)}


@dataclass(frozen=True)
class VolumePlan:
    """One reconstruction: its grid and its kernel.

    Args:
        volume_id: such as train_1_a_1.
        size: (D, H, W).
        spacing_mm: (z, y, x).
        kernel: "soft" or "sharp".
        noise_hu, noise_smoothness_mm: what the kernel does to the noise.
        rescale_intercept: -1024 or -8192, as in CT-RATE's metadata.
        padded: whether voxels outside the circular field of view hold -8192.
    """

    volume_id: str
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    kernel: str
    noise_hu: float
    noise_smoothness_mm: float
    rescale_intercept: int
    padded: bool


@dataclass(frozen=True)
class ScanPlan:
    """One acquisition of one patient.

    Args:
        split: "train" or "valid".
        scan_id, patient_id: such as train_1_a and train_1.
        patient_seed: seed of the body.
        finding_keys: the findings that this scan shall show.
        scan_seed: seed of their places, of noise and of the report.
        volumes: the reconstructions.
    """

    split: str
    scan_id: str
    patient_id: str
    patient_seed: int
    finding_keys: tuple[str, ...]
    scan_seed: tuple[int, ...]
    volumes: tuple[VolumePlan, ...]

    @property
    def least_radius_mm(self) -> float:
        """Return half the diagonal of the coarsest voxel: a ball so large holds a voxel centre wherever it lies."""
        return max(0.5 * math.dist((0, 0, 0), volume.spacing_mm) for volume in self.volumes) + 0.3


def assign_findings(
    num_scans: int, seed: int | Sequence[int], minimum_prevalence: float, prevalence: Mapping[str, float] | None = None
) -> list[tuple[str, ...]]:
    """Deal findings out to scans so that the share of each is what was asked for, exactly, also in a small data set.

    A few scans stay healthy. Independent draws would leave a finding of 18 % without any positive in one of seven
    sets of ten scans.

    Returns:
        for each scan the names of its findings, in the order of `FINDING_PREVALENCE`.
    """
    prevalence = FINDING_PREVALENCE if prevalence is None else prevalence
    seeds = [seed] if isinstance(seed, int) else list(seed)
    rng = np.random.default_rng([*seeds, 21])
    order = rng.permutation(num_scans)
    ill = order[min(round(_HEALTHY_SHARE * num_scans), num_scans - 1) :]
    dealt: list[list[str]] = [[] for _ in range(num_scans)]
    # What brings other findings along comes first; those then fill up what is missing to their own share.
    for key in sorted(prevalence, key=lambda key: key not in IMPLIED_FINDINGS):
        least = minimum_prevalence * (1.0 if key in _KEYS_OF_CT_RATE else _RARE_SHARE)
        wanted = math.ceil(max(prevalence[key], least) * num_scans - 1e-9)
        has_it = {n for n, keys in enumerate(dealt) if any(key in IMPLIED_FINDINGS.get(k, ()) for k in keys)}
        free = [scan for scan in rng.permutation(ill) if int(scan) not in has_it]
        for scan in free[: max(wanted - len(has_it), 0)]:
            dealt[int(scan)].append(key)
    return [tuple(key for key in prevalence if key in keys) for keys in dealt]


def plan_data_set(settings: SynthesisSettings) -> list[ScanPlan]:
    """Decide on all scans of a data set; a function of the settings only."""
    plans: list[ScanPlan] = []
    for number, (split, num_patients) in enumerate(
        (("train", settings.num_train_patients), ("valid", settings.num_valid_patients))
    ):
        scans: list[tuple[int, str]] = []
        for patient in range(1, num_patients + 1):
            rng = np.random.default_rng([settings.seed, number, patient, 22])
            letters = "ab" if rng.random() < _SECOND_SCAN_SHARE else "a"
            scans.extend((patient, letter) for letter in letters)
        if not scans:
            continue
        findings = assign_findings(len(scans), [settings.seed, number], settings.minimum_prevalence)
        for (patient, letter), keys in zip(scans, findings, strict=True):
            scan_seed = (settings.seed, number, patient, ord(letter))
            scan_id = f"{split}_{patient}_{letter}"
            plans.append(
                ScanPlan(
                    split=split,
                    scan_id=scan_id,
                    patient_id=f"{split}_{patient}",
                    patient_seed=int(np.random.default_rng([settings.seed, number, patient, 23]).integers(1, 2**31)),
                    finding_keys=keys,
                    scan_seed=scan_seed,
                    volumes=_plan_volumes(settings, scan_id, np.random.default_rng([*scan_seed, 24])),
                )
            )
    return plans


def _plan_volumes(settings: SynthesisSettings, scan_id: str, rng: np.random.Generator) -> tuple[VolumePlan, ...]:
    depth, height, width = settings.size
    extent_z, extent_y, extent_x = settings.field_of_view_mm
    extent_z *= rng.uniform(0.96, 1.04)
    zoom = rng.uniform(0.95, 1.06)
    # Rounded as scanners round: so the CSV, the header and the picture agree to the last digit.
    spacing_y, spacing_x = round(extent_y * zoom / height, 4), round(extent_x * zoom / width, 4)
    num_volumes = 2 if rng.random() < _SECOND_RECONSTRUCTION_SHARE else 1
    kernels = list(rng.permutation(list(_KERNELS)))[:num_volumes]
    intercept = -8192 if rng.random() < 0.28 else -1024
    volumes = []
    for number, kernel in enumerate(kernels, start=1):
        # A second reconstruction is often of thicker slices.
        num_slices = max(8, round(depth * rng.uniform(0.85, 1.05) * (1.0 if number == 1 else 0.75)))
        volumes.append(
            VolumePlan(
                volume_id=f"{scan_id}_{number}",
                size=(num_slices, height, width),
                spacing_mm=(round(extent_z / num_slices, 3), spacing_y, spacing_x),
                kernel=str(kernel),
                noise_hu=float(rng.uniform(*_KERNELS[str(kernel)]["noise_hu"])),  # type: ignore[misc]
                noise_smoothness_mm=float(_KERNELS[str(kernel)]["smoothness_mm"]),  # type: ignore[arg-type]
                rescale_intercept=intercept,
                padded=intercept == -8192,
            )
        )
    return tuple(volumes)
