from .classifier_training import ClassifierTraining, FeatureClassifierTraining
from .encoder_pretraining import EncoderPretraining, PretrainingHeads
from .image_prefix_language_model import ImagePrefixLanguageModel
from .lesion_localization import LesionLocalizationModule, LesionProbabilities, PlainLocalizer
from .localization_training import LocalizationTraining
from .multitask import FindingsAndLesions, VLM3DMultiTask
from .multitask_training import MultiTaskTraining
from .report_generator import (
    PolicyTraining,
    PrefixEmbeddings,
    ReportGenerator,
    ReportTraining,
    report_generator_network,
)
from .scan_evidence import ScanEvidence, scan_evidence_network
from .three_d_vision_encoder import RegionTokenEncoder, ThreeDVisionEncoder, VisionFeatures
from .volume_classifier import FindingProbabilities, VolumeClassifier

__all__ = [
    "ClassifierTraining",
    "EncoderPretraining",
    "FeatureClassifierTraining",
    "FindingProbabilities",
    "FindingsAndLesions",
    "ImagePrefixLanguageModel",
    "LesionLocalizationModule",
    "LesionProbabilities",
    "LocalizationTraining",
    "MultiTaskTraining",
    "PlainLocalizer",
    "PolicyTraining",
    "PrefixEmbeddings",
    "PretrainingHeads",
    "RegionTokenEncoder",
    "ReportGenerator",
    "ReportTraining",
    "ScanEvidence",
    "ThreeDVisionEncoder",
    "VLM3DMultiTask",
    "VisionFeatures",
    "VolumeClassifier",
    "report_generator_network",
    "scan_evidence_network",
]
