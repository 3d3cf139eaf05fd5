from .load_prepared_case import LoadPreparedCased
from .presets import encoder_pretraining_transforms, prepared_case_transforms
from .pretraining_draws import RandPatchMaskd, RandReportSentencesd, RandUseAnatomicalMaskd

__all__ = [
    "LoadPreparedCased",
    "RandPatchMaskd",
    "RandReportSentencesd",
    "RandUseAnatomicalMaskd",
    "encoder_pretraining_transforms",
    "prepared_case_transforms",
]
