from .calibration import (
    ClassifierCalibration,
    fit_calibration,
    fit_thresholds,
    negative_log_likelihood,
    rescale_to_half,
)
from .calibration_error import per_label_brier, per_label_calibration_error, reliability_curve
from .case_resampling import percentile_interval, resampling_weights
from .crg import crg_from_counts, crg_score
from .decisions import DecisionCounts, count_decisions, decide
from .dice_by_threshold import DiceByThreshold
from .generated_report_scores import GeneratedReportScores
from .label_collector import MultiLabelScores
from .mean_loss import MeanLoss
from .multi_label import bootstrap_interval, macro_auroc, per_label_auroc
from .ranking import per_label_average_precision, weighted_auroc_and_average_precision
from .representation import effective_rank, intensity_histogram, knn_probe, linear_probe
from .task_outputs import of_task

__all__ = [
    "ClassifierCalibration",
    "DecisionCounts",
    "DiceByThreshold",
    "GeneratedReportScores",
    "MeanLoss",
    "MultiLabelScores",
    "bootstrap_interval",
    "count_decisions",
    "crg_from_counts",
    "crg_score",
    "decide",
    "effective_rank",
    "fit_calibration",
    "fit_thresholds",
    "intensity_histogram",
    "knn_probe",
    "linear_probe",
    "macro_auroc",
    "negative_log_likelihood",
    "of_task",
    "per_label_auroc",
    "per_label_average_precision",
    "per_label_brier",
    "per_label_calibration_error",
    "percentile_interval",
    "reliability_curve",
    "resampling_weights",
    "rescale_to_half",
    "weighted_auroc_and_average_precision",
]
