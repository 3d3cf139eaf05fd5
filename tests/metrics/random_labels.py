"""Random multi-label cases for the tests of metrics."""

import numpy as np

NAN = float("nan")


def random_case(num=80, num_labels=4, seed=0, unknown=0.0):
    """Labels that depend on probabilities, with rounded probabilities so that ties occur."""
    generator = np.random.default_rng(seed)
    probabilities = generator.random((num, num_labels)).round(2)
    labels = (generator.random((num, num_labels)) < 0.15 + 0.5 * probabilities).astype(float)
    labels[generator.random((num, num_labels)) < unknown] = NAN
    return labels, probabilities
