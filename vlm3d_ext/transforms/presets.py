"""Transform chains that several configs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.transforms import Compose, DeleteItemsd

from ..text.disease_set import load_disease_set
from ..text.sentence_bank import SentenceBank
from .grey_levels import RandIntensityFactord, RandIntensityOffsetd
from .lesion_targets import LoadLesionTargetsd, RandLesionCropsd
from .load_evidence import WritePromptd
from .load_prepared_case import LoadPreparedCased
from .pretraining_draws import RandPatchMaskd, RandReportSentencesd, RandUseAnatomicalMaskd

__all__ = [
    "classification_transforms",
    "encoder_pretraining_transforms",
    "localization_transforms",
    "multitask_transforms",
    "prepared_case_transforms",
]


def prepared_case_transforms(use_anatomical_mask: bool = True, keep: Sequence[str] = ()) -> Compose:
    """Return the chain that loads a case without any random draw, for inference.

    Args:
        use_anatomical_mask: whether masks guide the region features where there are masks.
        keep: further entries of the case to hand on, such as ``geometry``.
    """
    return Compose(
        [LoadPreparedCased(keep), RandUseAnatomicalMaskd(float(use_anatomical_mask)), DeleteItemsd("report")]
    )


def encoder_pretraining_transforms(
    patch_size: Sequence[int],
    mask_ratio: float,
    sentence_bank: SentenceBank,
    num_true_sentences: int = 8,
    num_untrue_sentences: int = 24,
    mask_guidance_probability: float = 0.5,
    masking_probability: float = 1.0,
    intensity_augmentation: float = 0.0,
) -> Compose:
    """Return the chain of the encoder's pre-training.

    Args:
        patch_size: (D, H, W) voxels of a token.
        mask_ratio: share of the volume that is hidden.
        sentence_bank: sentences of the training reports.
        num_true_sentences: sentences of the report per draw.
        num_untrue_sentences: sentences of other reports per draw.
        mask_guidance_probability: how often region features are guided by the mask, not by the prediction.
        masking_probability: how often anything is hidden at all.
        intensity_augmentation: largest relative change of contrast and absolute change of brightness, in units of the
            [0, 1] image; 0 for validation. Keep it small: HU are calibrated, and 0.1 of a soft-tissue window is 40 HU,
            which is the step from water to muscle.
    """
    return Compose(
        [
            LoadPreparedCased(),
            *_intensity_augmentation(intensity_augmentation),
            RandPatchMaskd(patch_size, mask_ratio, probability=masking_probability),
            RandUseAnatomicalMaskd(mask_guidance_probability),
            RandReportSentencesd(sentence_bank, num_true_sentences, num_untrue_sentences),
        ]
    )


def classification_transforms(mask_guidance_probability: float = 0.5, intensity_augmentation: float = 0.0) -> Compose:
    """Return the chain of the classifier's training on volumes.

    Args:
        mask_guidance_probability: how often region features are guided by the mask, where the case does not say it.
        intensity_augmentation: as in `encoder_pretraining_transforms`; 0 for validation.
    """
    return Compose(
        [
            LoadPreparedCased(),
            *_intensity_augmentation(intensity_augmentation),
            RandUseAnatomicalMaskd(mask_guidance_probability),
            DeleteItemsd("report"),
        ]
    )


def localization_transforms(
    disease_set: str,
    crop_size: Sequence[int] | None = None,
    patch_size: Sequence[int] = (4, 16, 16),
    num_crops: int = 2,
    partial_shell_mm: float = 15.0,
    intensity_augmentation: float = 0.0,
) -> Compose:
    """Return the chain of the localizer's training, or of its validation on whole scans.

    Args:
        disease_set: name or path of the diseases.
        crop_size: (d, h, w) voxels of a crop; None leaves the scan whole.
        patch_size: (d, h, w) voxels of a token.
        num_crops: crops of a scan.
        partial_shell_mm: see `LoadLesionTargetsd`.
        intensity_augmentation: as in `encoder_pretraining_transforms`; 0 for validation.
    """
    diseases = load_disease_set(disease_set)
    crops: list[Any] = [] if crop_size is None else [RandLesionCropsd(diseases, crop_size, patch_size, num_crops)]
    return Compose(
        [
            LoadPreparedCased(keep=["lesion_masks", "lesion_masks_partial", "disease_labels", "crop_disease"]),
            LoadLesionTargetsd(diseases, partial_shell_mm),
            *_intensity_augmentation(intensity_augmentation),
            *crops,
            DeleteItemsd(["report", "labels", "anatomical_mask", "has_anatomical_mask"]),
        ]
    )


def multitask_transforms(
    disease_set: str,
    prompts: WritePromptd,
    crop_size: Sequence[int] | None = None,
    patch_size: Sequence[int] = (4, 16, 16),
    num_crops: int = 2,
    partial_shell_mm: float = 15.0,
    intensity_augmentation: float = 0.0,
    mask_guidance_probability: float = 0.5,
) -> Compose:
    """Return the chain of joint training, or of its validation on whole scans: everything that a case has.

    Args:
        disease_set: name or path of the diseases.
        prompts: writes the report's prompt.
        crop_size: as in `localization_transforms`, like the next three.
        patch_size: (d, h, w) voxels of a token.
        num_crops: crops of a scan.
        partial_shell_mm: see `LoadLesionTargetsd`.
        intensity_augmentation: as in `encoder_pretraining_transforms`; 0 for validation.
        mask_guidance_probability: how often region features are guided by the mask, where the case does not say it.
    """
    diseases = load_disease_set(disease_set)
    crops: list[Any] = [] if crop_size is None else [RandLesionCropsd(diseases, crop_size, patch_size, num_crops)]
    return Compose(
        [
            LoadPreparedCased(keep=["lesion_masks", "lesion_masks_partial", "disease_labels", "crop_disease"]),
            LoadLesionTargetsd(diseases, partial_shell_mm),
            *_intensity_augmentation(intensity_augmentation),
            RandUseAnatomicalMaskd(mask_guidance_probability),
            *crops,
            prompts,
        ]
    )


def _intensity_augmentation(size: float) -> list[Any]:
    return [RandIntensityFactord(size), RandIntensityOffsetd(size)] if size > 0 else []
