from .classifier_training import ClassifierTraining, FeatureClassifierTraining
from .encoder_pretraining import EncoderPretraining, PretrainingHeads
from .image_prefix_language_model import ImagePrefixLanguageModel
from .lesion_localization import LesionLocalizationModule, LesionProbabilities, PlainLocalizer
from .localization_training import LocalizationTraining
from .report_generator import PolicyTraining, PrefixEmbeddings, ReportGenerator, ReportTraining
from .scan_evidence import ScanEvidence, scan_evidence_network
from .three_d_vision_encoder import RegionTokenEncoder, ThreeDVisionEncoder, VisionFeatures
from .volume_classifier import FindingProbabilities, VolumeClassifier

__all__ = [
    "ClassifierTraining",
    "EncoderPretraining",
    "FeatureClassifierTraining",
    "FindingProbabilities",
    "ImagePrefixLanguageModel",
    "LesionLocalizationModule",
    "LesionProbabilities",
    "LocalizationTraining",
    "PlainLocalizer",
    "PolicyTraining",
    "PrefixEmbeddings",
    "PretrainingHeads",
    "RegionTokenEncoder",
    "ReportGenerator",
    "ReportTraining",
    "ScanEvidence",
    "ThreeDVisionEncoder",
    "VisionFeatures",
    "VolumeClassifier",
    "scan_evidence_network",
]
