from .grey_levels import RandIntensityFactord, RandIntensityOffsetd, network_image
from .lesion_targets import LoadLesionTargetsd, RandLesionCropsd
from .load_evidence import LoadEvidenced, WritePromptd
from .load_features import LoadFeaturesd
from .load_prepared_case import LoadPreparedCased
from .presets import (
    classification_transforms,
    encoder_pretraining_transforms,
    localization_transforms,
    multitask_transforms,
    prepared_case_transforms,
)
from .pretraining_draws import RandPatchMaskd, RandReportSentencesd, RandUseAnatomicalMaskd

__all__ = [
    "LoadEvidenced",
    "LoadFeaturesd",
    "LoadLesionTargetsd",
    "LoadPreparedCased",
    "RandIntensityFactord",
    "RandIntensityOffsetd",
    "RandLesionCropsd",
    "RandPatchMaskd",
    "RandReportSentencesd",
    "RandUseAnatomicalMaskd",
    "WritePromptd",
    "classification_transforms",
    "encoder_pretraining_transforms",
    "localization_transforms",
    "multitask_transforms",
    "network_image",
    "prepared_case_transforms",
]
