from .mean_loss import MeanLoss
from .multi_label import bootstrap_interval, macro_auroc, per_label_auroc
from .representation import effective_rank, intensity_histogram, knn_probe, linear_probe

__all__ = [
    "MeanLoss",
    "bootstrap_interval",
    "effective_rank",
    "intensity_histogram",
    "knn_probe",
    "linear_probe",
    "macro_auroc",
    "per_label_auroc",
]
