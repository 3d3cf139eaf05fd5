from .checkpoint_weights import CheckpointWeights
from .classification_evaluation import ClassificationEvaluation
from .classifier_calibration import ClassifierCalibrator
from .classifier_initialization import ClassifierInitialization
from .feature_writer import FeatureWriter
from .finding_selection import FindingSelection
from .gradient_clipping import GradientClipping
from .lineage import LineageHandler
from .loss_history import LossHistory
from .mlflow_tracker import MLflowTracker
from .prediction_writer import PredictionWriter
from .progress_bar import ProgressBar
from .representation_probes import RepresentationProbes
from .resumable_checkpoint import ResumableCheckpoint
from .seeding import IterationSeed

__all__ = [
    "CheckpointWeights",
    "ClassificationEvaluation",
    "ClassifierCalibrator",
    "ClassifierInitialization",
    "FeatureWriter",
    "FindingSelection",
    "GradientClipping",
    "IterationSeed",
    "LineageHandler",
    "LossHistory",
    "MLflowTracker",
    "PredictionWriter",
    "ProgressBar",
    "RepresentationProbes",
    "ResumableCheckpoint",
]
