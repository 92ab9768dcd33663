"""Fréchet distance and its statistics against closed forms, scipy and numpy in float64."""

import numpy as np
import pytest
import torch

from stvision.eval.metrics import FeatureStatistics, frechet_distance, frechet_distance_between
from stvision.eval.metrics.frechet import gather


def gaussian(seed: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim + 3, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), root @ root.T / dim


def features(seed: int, count: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + 50


@pytest.mark.parametrize("dim", [1, 7, 40])
def test_matches_the_matrix_square_root(dim):
    linalg = pytest.importorskip("scipy.linalg")
    (m1, c1), (m2, c2) = gaussian(1, dim), gaussian(2, dim)
    root = linalg.sqrtm((c1 @ c2).numpy())
    expected = float((m1 - m2).square().sum() + (c1 + c2).trace()) - 2 * np.trace(root).real
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)


def test_known_gaussians():
    zero = torch.zeros(3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    # a shift costs its square; commuting covariances cost the squared difference of deviations
    assert frechet_distance(zero, eye, zero + 2, eye) == pytest.approx(12)
    widths = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    expected = float((widths - 3).square().sum())
    assert frechet_distance(zero, (widths**2).diag(), zero, 9 * eye) == pytest.approx(expected)


def test_same_gaussian_has_no_distance():
    mean, covariance = gaussian(3, 30)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-10)


def test_fewer_clips_than_features():
    x, y = features(0, 6, 20), features(1, 5, 20)
    a, b = gather([x]), gather([y])
    assert frechet_distance_between(a, a) == pytest.approx(
        0, abs=1e-8 * float(a.covariance.trace())
    )
    # by the factors of the covariances, which needs no matrix square root
    fx, fy = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = torch.linalg.svdvals(fx @ fy.T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + fx.square().sum() + fy.square().sum()
    assert frechet_distance_between(a, b) == pytest.approx(float(expected - 2 * cross), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[29], [1, 28], [7, 0, 1, 1, 20]])
def test_streaming_equals_one_pass(sizes, dtype):
    x = features(4, 29, 5).to(dtype)
    statistics = gather(x.split(sizes))
    assert statistics.count == 29
    expected = x.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(expected.T), rtol=1e-9)


def test_merging_equals_one_stream():
    x = features(5, 21, 4)
    merged = gather([x[:5]]).merge(gather([x[5:]])).merge(FeatureStatistics(4))
    whole = gather([x])
    torch.testing.assert_close(merged.covariance, whole.covariance)
    torch.testing.assert_close(merged.mean, whole.mean)
    assert merged.count == whole.count


def test_a_far_mean_loses_no_digits():
    x = features(6, 200, 3)
    near, far = gather(x.split(9)), gather((x + 1e7).split(9))
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: FeatureStatistics(0), "dim must be at least 1", id="dim"),
        pytest.param(
            lambda: FeatureStatistics(3).update(torch.zeros(2, 4)), r"\(N, 3\)", id="shape"
        ),
        pytest.param(
            lambda: FeatureStatistics(1).update(torch.tensor([[float("nan")]])), "finite", id="nan"
        ),
        pytest.param(lambda: gather([torch.zeros(1, 2)]).covariance, "at least 2", id="one"),
        pytest.param(lambda: gather([]), "no features", id="none"),
        pytest.param(
            lambda: FeatureStatistics(2).merge(FeatureStatistics(3)), "do not merge", id="merge"
        ),
        pytest.param(
            lambda: frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3)),
            "covariances",
            id="dims",
        ),
    ],
)
def test_bad_features_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
