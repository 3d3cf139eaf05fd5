from .classifier_training import ClassifierTraining, FeatureClassifierTraining
from .encoder_pretraining import EncoderPretraining, PretrainingHeads
from .lesion_localization import LesionLocalizationModule, LesionProbabilities, PlainLocalizer
from .localization_training import LocalizationTraining
from .three_d_vision_encoder import RegionTokenEncoder, ThreeDVisionEncoder, VisionFeatures
from .volume_classifier import FindingProbabilities, VolumeClassifier

__all__ = [
    "ClassifierTraining",
    "EncoderPretraining",
    "FeatureClassifierTraining",
    "FindingProbabilities",
    "LesionLocalizationModule",
    "LesionProbabilities",
    "LocalizationTraining",
    "PlainLocalizer",
    "PretrainingHeads",
    "RegionTokenEncoder",
    "ThreeDVisionEncoder",
    "VisionFeatures",
    "VolumeClassifier",
]
