import pytest
import torch

from vlm3d_ext.networks.layers import FeatureMoments, FeatureWhitening


def features(num_cases=600, num_tokens=3, channels=4, seed=0):
    """Return correlated features with a mean far from zero, different for each token."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(num_cases, num_tokens, channels, generator=generator, dtype=torch.float64)
    mixing = torch.randn(num_tokens, channels, channels, generator=generator, dtype=torch.float64)
    shift = torch.randn(num_tokens, channels, generator=generator, dtype=torch.float64) * 5
    return torch.einsum("btc,tcd->btd", plain, mixing) + shift


def moments_of(*batches):
    moments = FeatureMoments(*batches[0].shape[1:])
    for batch in batches:
        moments.add(batch)
    return moments


def fitted(given, shrinkage=0.1, dtype=torch.float64):
    whitening = FeatureWhitening(*given.shape[1:], shrinkage).to(dtype)
    whitening.fit(moments_of(given))
    return whitening


def test_without_shrinkage_the_covariance_becomes_the_identity():
    given = features()
    whitened = fitted(given, shrinkage=1e-12)(given)
    centred = whitened - whitened.mean(0)
    covariance = torch.einsum("btc,btd->tcd", centred, centred) / len(given)
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64).expand(3, 4, 4), atol=1e-8, rtol=0)
    assert whitened.mean(0).abs().max() < 1e-10


def test_whitening_turns_the_features_as_little_as_possible():
    """ZCA, unlike PCA whitening: the matrix is symmetric and positive."""
    matrix = fitted(features()).matrix
    torch.testing.assert_close(matrix, matrix.mT, atol=1e-12, rtol=0)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_shrinkage_by_hand():
    """Channels (2, 0), (-2, 0), (0, 1), (0, -1) have the variances 2 and 0.5, mean 1.25; half of that is added."""
    given = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]], dtype=torch.float64)[:, None] + 7
    expected = torch.diag(torch.tensor([2 + 0.625, 0.5 + 0.625], dtype=torch.float64) ** -0.5)
    torch.testing.assert_close(fitted(given, shrinkage=0.5).matrix[0], expected, atol=1e-12, rtol=0)


def test_the_unit_of_the_features_does_not_matter():
    given = features(50)
    for factor in (1e-9, 1e6):
        torch.testing.assert_close(fitted(given * factor)(given * factor), fitted(given)(given), atol=1e-8, rtol=1e-8)


def test_moments_in_pieces_are_those_of_the_whole():
    given = features(23)
    whole, pieces = moments_of(given), moments_of(given[:1], given[1:9], given[9:])
    assert pieces.count == whole.count == 23
    for of_pieces, of_whole in zip(pieces.mean_and_covariance(), whole.mean_and_covariance(), strict=True):
        torch.testing.assert_close(of_pieces, of_whole, atol=1e-12, rtol=1e-12)
    mean, covariance = whole.mean_and_covariance()
    torch.testing.assert_close(mean, given.mean(0))
    for token in range(3):
        torch.testing.assert_close(covariance[token], torch.cov(given[:, token].mT, correction=0), atol=1e-10, rtol=0)


def test_moments_of_half_precision_are_not_summed_in_half_precision():
    given = features(4000).bfloat16()
    mean, _ = moments_of(given).mean_and_covariance()
    torch.testing.assert_close(mean, given.double().mean(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e3])
@pytest.mark.parametrize("num_cases", [7, 1000])
def test_a_region_that_never_varies_is_left_unscaled(constant, num_cases):
    """Also where rounding makes its variance a little more than nothing: it must not be blown up."""
    given = features(num_cases).float()
    given[:, 1] = constant * torch.tensor([1.0, -0.3, 1.7, 0.9])
    whitening = fitted(given, dtype=torch.float32)
    torch.testing.assert_close(whitening.matrix[1], torch.eye(4))
    other = given.clone()
    other[:, 1] += 0.5
    assert whitening(other).isfinite().all()
    torch.testing.assert_close(whitening(other)[:, 1], torch.full((num_cases, 4), 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(whitening(given)[:, 0], fitted(given[:, :1], dtype=torch.float32)(given[:, :1])[:, 0])


def test_before_the_fit_nothing_is_changed():
    given = features(5).float()
    assert torch.equal(FeatureWhitening(3, 4)(given), given)


@pytest.mark.parametrize("num_cases", [0, 1])
def test_too_few_cases_are_refused_and_change_nothing(num_cases):
    whitening = FeatureWhitening(3, 4)
    with pytest.raises(ValueError, match=f"at least 2 cases, got {num_cases}"):
        whitening.fit(moments_of(features(num_cases)))
    assert not whitening.mean.any() and torch.equal(whitening.matrix, torch.eye(4).expand(3, 4, 4))


def test_features_that_never_vary_are_refused():
    with pytest.raises(ValueError, match="the same for all cases"):
        FeatureWhitening(3, 4).fit(moments_of(torch.full((9, 3, 4), 0.1)))


@pytest.mark.parametrize("shrinkage", [0.0, -1.0, float("nan")])
def test_a_shrinkage_that_is_not_positive_is_refused(shrinkage):
    with pytest.raises(ValueError, match=f"must be greater than 0, got {shrinkage}"):
        FeatureWhitening(3, 4, shrinkage)


def test_statistics_travel_in_the_state_dict(tmp_path):
    given = features(40).float()
    whitening = fitted(given, dtype=torch.float32)
    torch.save(whitening.state_dict(), tmp_path / "whitening.pt")
    other = FeatureWhitening(3, 4)
    other.load_state_dict(torch.load(tmp_path / "whitening.pt", weights_only=True), strict=True)
    assert torch.equal(other(given), whitening(given))
    assert list(whitening.parameters()) == []


def test_under_autocast_it_stays_in_float32():
    given = features(40).float()
    whitening = fitted(given, dtype=torch.float32)
    expected = whitening(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whitening(given), expected)
        assert whitening(given.bfloat16()).dtype == torch.float32
        assert torch.einsum("btc,tcd->btd", given, whitening.matrix).dtype == torch.bfloat16  # autocast is at work
