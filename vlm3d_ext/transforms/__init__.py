from .load_features import LoadFeaturesd
from .load_prepared_case import LoadPreparedCased
from .presets import classification_transforms, encoder_pretraining_transforms, prepared_case_transforms
from .pretraining_draws import RandPatchMaskd, RandReportSentencesd, RandUseAnatomicalMaskd

__all__ = [
    "LoadFeaturesd",
    "LoadPreparedCased",
    "RandPatchMaskd",
    "RandReportSentencesd",
    "RandUseAnatomicalMaskd",
    "classification_transforms",
    "encoder_pretraining_transforms",
    "prepared_case_transforms",
]
