from .checkpoint_weights import CheckpointWeights
from .feature_writer import FeatureWriter
from .gradient_clipping import GradientClipping
from .lineage import LineageHandler
from .loss_history import LossHistory
from .mlflow_tracker import MLflowTracker
from .progress_bar import ProgressBar
from .representation_probes import RepresentationProbes
from .resumable_checkpoint import ResumableCheckpoint
from .seeding import IterationSeed

__all__ = [
    "CheckpointWeights",
    "FeatureWriter",
    "GradientClipping",
    "IterationSeed",
    "LineageHandler",
    "LossHistory",
    "MLflowTracker",
    "ProgressBar",
    "RepresentationProbes",
    "ResumableCheckpoint",
]
