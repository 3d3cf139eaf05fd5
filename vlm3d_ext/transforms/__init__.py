from .load_prepared_case import LoadPreparedCased
from .pretraining_draws import RandPatchMaskd, RandReportSentencesd, RandUseAnatomicalMaskd
from .presets import encoder_pretraining_transforms, prepared_case_transforms

__all__ = [
    "LoadPreparedCased",
    "RandPatchMaskd",
    "RandReportSentencesd",
    "RandUseAnatomicalMaskd",
    "encoder_pretraining_transforms",
    "prepared_case_transforms",
]
