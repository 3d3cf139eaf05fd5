from .feature_writer import FeatureWriter
from .loss_history import LossHistory
from .mlflow_tracker import MLflowTracker
from .representation_probes import RepresentationProbes
from .resumable_checkpoint import ResumableCheckpoint

__all__ = ["FeatureWriter", "LossHistory", "MLflowTracker", "RepresentationProbes", "ResumableCheckpoint"]
