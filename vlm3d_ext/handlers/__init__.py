from .checkpoint_weights import CheckpointWeights
from .classification_evaluation import ClassificationEvaluation
from .classifier_calibration import ClassifierCalibrator
from .classifier_initialization import ClassifierInitialization
from .disease_text_initialization import DiseaseTextInitialization
from .feature_writer import FeatureWriter
from .finding_selection import FindingSelection
from .gradient_clipping import GradientClipping
from .lesion_mask_writer import LesionMaskWriter
from .lesion_thresholds import LesionThresholds
from .lineage import LineageHandler
from .localization_evaluation import LocalizationEvaluation
from .loss_history import LossHistory
from .mlflow_tracker import MLflowTracker
from .multitask_calibration import MultiTaskCalibrator
from .multitask_initialization import MultiTaskInitialization
from .out_of_memory_advice import OutOfMemoryAdvice
from .prediction_writer import PredictionWriter
from .progress_bar import ProgressBar
from .reference_policy import ReferencePolicy
from .report_evaluation import ReportEvaluationWriter
from .report_writer import ReportWriter
from .representation_probes import RepresentationProbes
from .resumable_checkpoint import ResumableCheckpoint
from .scan_result_writer import ScanResultWriter
from .seeding import IterationSeed
from .task_comparison import TaskComparison

__all__ = [
    "CheckpointWeights",
    "ClassificationEvaluation",
    "ClassifierCalibrator",
    "ClassifierInitialization",
    "DiseaseTextInitialization",
    "FeatureWriter",
    "FindingSelection",
    "GradientClipping",
    "IterationSeed",
    "LesionMaskWriter",
    "LesionThresholds",
    "LineageHandler",
    "LocalizationEvaluation",
    "LossHistory",
    "MLflowTracker",
    "MultiTaskCalibrator",
    "MultiTaskInitialization",
    "OutOfMemoryAdvice",
    "PredictionWriter",
    "ProgressBar",
    "ReferencePolicy",
    "ReportEvaluationWriter",
    "ReportWriter",
    "RepresentationProbes",
    "ResumableCheckpoint",
    "ScanResultWriter",
    "TaskComparison",
]
