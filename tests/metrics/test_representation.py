import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vlm3d_ext.metrics import effective_rank, intensity_histogram, knn_probe, linear_probe, per_label_auroc
from vlm3d_ext.metrics.representation import REGULARISATION_GRID

NAN = float("nan")
SIZES = {"training": 80, "validation": 40, "test": 60}


@pytest.mark.parametrize("num_directions", [1, 3, 7])
def test_effective_rank_of_equal_orthogonal_directions_is_their_number(num_directions):
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    directions = np.eye(8)[:num_directions] @ rotation
    features = np.concatenate([directions, -directions])
    assert effective_rank(features) == pytest.approx(num_directions)
    assert effective_rank(5 * features + 100) == pytest.approx(num_directions)  # neither scale nor place matters


def test_effective_rank_by_hand():
    """Singular values in the ratio 3 : 1 have the entropy of (3/4, 1/4)."""
    features = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert effective_rank(features) == pytest.approx(np.exp(entropy))


def test_effective_rank_of_a_collapsed_encoder_is_one():
    assert effective_rank(np.full((10, 4), 2.5)) == 1.0


def test_intensity_histogram_by_hand():
    image = np.zeros((2, 1, 2, 2))
    image[0] = [[0.0, 0.2], [0.8, 1.0]]  # 1.0 belongs to the last bin
    image[1] = 0.6
    np.testing.assert_allclose(intensity_histogram(image, 4), [0.5, 0, 0, 0.5, 0, 0, 1, 0])


def _planted(num_labels=2, signal=2.0, seed=0, num_features=6):
    """Features whose column l is shifted by label l, and their labels."""
    generator = np.random.default_rng(seed)
    labels = {split: (generator.random((n, num_labels)) < 0.5).astype(float) for split, n in SIZES.items()}
    features = {split: generator.standard_normal((n, num_features)) for split, n in SIZES.items()}
    for split in SIZES:
        features[split][:, :num_labels] += signal * labels[split]
    return features, labels


def _for_each_label(features, num_labels=2):
    return {split: [array] * num_labels for split, array in features.items()}


def test_linear_probe_finds_a_planted_signal_and_none_where_there_is_none():
    features, labels = _planted(signal=4.0)
    scores, auroc = linear_probe(_for_each_label(features), labels)
    assert (auroc > 0.95).all()
    np.testing.assert_allclose(auroc, per_label_auroc(labels["test"], scores))
    features, labels = _planted(signal=0.0)
    assert (np.abs(linear_probe(_for_each_label(features), labels)[1] - 0.5) < 0.25).all()


def test_linear_probe_sees_nothing_of_test_but_its_features():
    features, labels = _planted(signal=0.5)
    scores, _ = linear_probe(_for_each_label(features), labels)
    permuted = {**labels, "test": labels["test"][::-1]}
    np.testing.assert_array_equal(linear_probe(_for_each_label(features), permuted)[0], scores)
    # the scaling, too, is that of training: scoring half of the test cases alone gives their scores
    half = {**features, "test": features["test"][:30]}
    alone, _ = linear_probe(_for_each_label(half), {**labels, "test": labels["test"][:30]})
    np.testing.assert_allclose(alone, scores[:30])


def test_linear_probe_chooses_its_strength_on_validation():
    """The scores follow the validation labels only through the choice among four strengths."""
    features, labels = _planted(signal=0.3, num_features=60)
    seen = set()
    for seed in range(12):
        validation = (np.random.default_rng(seed).random((40, 2)) < 0.5).astype(float)
        scores, _ = linear_probe(_for_each_label(features), {**labels, "validation": validation})
        seen.add(scores[:, 0].round(6).tobytes())
    assert 2 <= len(seen) <= 4


def test_linear_probe_takes_the_strength_that_is_best_on_validation():
    """Against scikit-learn, one fit per strength; few cases and many features, so that the strengths differ."""
    features, labels = _planted(num_labels=1, signal=0.8, num_features=60)
    mean, deviation = features["training"].mean(0), features["training"].std(0)
    scaled = {split: (array - mean) / deviation for split, array in features.items()}
    on_validation, on_test = [], []
    for strength in REGULARISATION_GRID:
        model = LogisticRegression(C=strength, class_weight="balanced").fit(
            scaled["training"], labels["training"][:, 0]
        )
        on_validation.append(roc_auc_score(labels["validation"][:, 0], model.decision_function(scaled["validation"])))
        on_test.append(model.decision_function(scaled["test"]))
    best = int(np.argmax(on_validation))
    assert max(on_validation) - min(on_validation) > 0.01 and best != int(np.argmin(on_validation))
    scores, _ = linear_probe(_for_each_label(features, 1), labels)
    np.testing.assert_allclose(scores[:, 0], on_test[best], rtol=1e-3, atol=1e-5)


def test_linear_probe_leaves_unknown_labels_out():
    """A training case whose label is unknown might as well not be there, however far off its features are."""
    features, labels = _planted()
    labels["training"][:10, 0] = NAN
    scores, _ = linear_probe(_for_each_label(features), labels)
    features["training"] = features["training"].copy()
    first = {**_for_each_label(features)}
    first["training"][0] = features["training"].copy()
    first["training"][0][:10] = 1e6
    np.testing.assert_allclose(linear_probe(first, labels)[0], scores)


def test_linear_probe_of_a_label_that_training_never_shows_is_undefined():
    features, labels = _planted()
    labels["training"][:, 1] = 0
    scores, auroc = linear_probe(_for_each_label(features), labels)
    assert np.isnan(auroc[1]) and not np.isnan(auroc[0])
    assert (scores[:, 1] == 0).all()


def test_each_label_of_the_linear_probe_sees_its_own_features():
    features, labels = _planted(signal=4.0)
    blind = {split: [array, np.ones_like(array)] for split, array in features.items()}
    _, auroc = linear_probe(blind, labels)
    assert auroc[0] > 0.95 and auroc[1] == pytest.approx(0.5)


def test_knn_by_hand():
    """Fewer training cases than five: all are neighbours, and every test case gets the mean of the known labels."""
    features = {"training": np.eye(4), "validation": np.eye(4), "test": np.eye(4)[:2]}
    labels = {"training": np.array([[1.0, NAN], [0, NAN], [NAN, NAN], [0, 1]]), "validation": np.zeros((4, 2))}
    labels["test"] = np.array([[1.0, 1], [0, 0]])
    scores, auroc = knn_probe(features, labels)
    np.testing.assert_allclose(scores, [[1 / 3, 1], [1 / 3, 1]])
    np.testing.assert_allclose(auroc, [0.5, 0.5])


def test_knn_takes_the_five_nearest_by_angle():
    """Two bundles of five directions: each test case sees its own bundle, whatever the lengths."""
    generator = np.random.default_rng(0)
    labels = np.repeat([1.0, 0.0], 5)[:, None]
    directions = np.where(labels > 0, [[1.0, 0.2]], [[-1.0, 0.2]])
    lengths = generator.uniform(1, 9, (10, 1))
    training = np.concatenate([lengths * directions, -lengths.mean() * np.array([[0.0, 0.2]]).repeat(10, 0)])
    training_labels = np.concatenate([labels, np.full((10, 1), 0.0)])
    training -= training.mean(0)  # so that centring moves nothing
    features = {"training": training, "validation": training[:10], "test": 0.01 * training[[0, 9]]}
    scores, auroc = knn_probe(features, {"training": training_labels, "validation": labels, "test": labels[[0, 9]]})
    np.testing.assert_allclose(scores, [[1.0], [0.0]])
    assert auroc[0] == 1.0


def test_knn_gives_the_prior_where_no_neighbour_is_known():
    generator = np.random.default_rng(1)
    near, far = generator.normal([10, 0], 0.1, (6, 2)), generator.normal([-10, 0], 0.1, (6, 2))
    labels = np.concatenate([np.full((6, 1), NAN), np.array([[1.0, 1, 1, 0, 1, 1]]).T])
    features = {"training": np.concatenate([near, far]), "validation": far, "test": near[:1]}
    scores, _ = knn_probe(features, {"training": labels, "validation": labels[6:], "test": np.array([[1.0]])})
    # five neighbours: none of the test case's own side is known, so it gets the training prior
    assert scores[0, 0] == pytest.approx(5 / 6)
