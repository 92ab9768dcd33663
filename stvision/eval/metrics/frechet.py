"""Fréchet distance between two sets of features, gathered a batch at a time.

Dowson and Landau, "The Fréchet distance between multivariate normal distributions" (1982); the use
on network features is Heusel et al. (2017, images) and Unterthiner et al. (2018, video). A number
means something only together with the network, the number of frames and the resizing that gave the
features: see :func:`stvision.eval.features.distance_name`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of feature vectors that arrive in batches, in float64 on the CPU.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1983), so the result is
    that of one pass over all vectors whatever the order and the batch sizes, and memory is one
    matrix of ``dim * dim`` numbers however many clips come.

    Args:
        dim: length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Take in ``(N, dim)`` vectors of any floating dtype and device; returns itself.

        Raises:
            ValueError: the shape is another, or a value is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (N, {self.dim}), got {tuple(features.shape)}")
        if not len(features):
            return self
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise ValueError("features hold values that are not finite")
        mean = features.mean(0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Take in what ``other`` has gathered; returns itself.

        Raises:
            ValueError: ``other`` has another ``dim``.
        """
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} and {self.dim} features do not merge")
        self._merge(other.count, other.mean, other._scatter)
        return self

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        shift = mean - self.mean
        self._scatter = (
            self._scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        )
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``(dim, dim)``, divided by ``count - 1``.

        Raises:
            ValueError: fewer than two vectors were taken in.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. The product of two covariances is not
    symmetric and its root is fragile; the trace of that root is the sum of the singular values of
    ``C_a^(1/2) C_b^(1/2)``, which needs roots of symmetric matrices only and stays exact when a
    covariance is singular (fewer clips than features).

    Args:
        mean_a: ``(D,)``.
        covariance_a: ``(D, D)``, symmetric, positive semidefinite.
        mean_b: ``(D,)``.
        covariance_b: ``(D, D)``, symmetric, positive semidefinite.

    Returns:
        A number of at least 0 in the squared unit of the features; computed in float64.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    dim = mean_a.numel()
    shapes = [tuple(x.shape) for x in (mean_a, covariance_a, mean_b, covariance_b)]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"means must be (D,) and covariances (D, D), got {shapes}")
    mean_a, covariance_a, mean_b, covariance_b = (
        x.detach().to("cpu", torch.float64) for x in (mean_a, covariance_a, mean_b, covariance_b)
    )
    cross = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace()
    return max(0.0, float(distance - 2 * cross))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance_between(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """:func:`frechet_distance` of what two statistics have gathered."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def gather(batches: Iterable[Tensor]) -> FeatureStatistics:
    """Statistics over batches ``(N, D)``; ``D`` is taken from the first.

    Raises:
        ValueError: there is no batch.
    """
    statistics: FeatureStatistics | None = None
    for batch in batches:
        statistics = statistics or FeatureStatistics(batch.shape[-1])
        statistics.update(batch)
    if statistics is None:
        raise ValueError("no features to gather")
    return statistics
