from .multi_label_classifier import MultiLabelClassifier

__all__ = ["MultiLabelClassifier"]
