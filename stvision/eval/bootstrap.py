"""Confidence intervals by the bootstrap over clips.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13: the percentile interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number with the interval in which resampled clips put it.

    Args:
        value: the statistic on all clips.
        low: lower end of the interval.
        high: upper end of the interval.
        count: clips behind it.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap_mean(
    values: Sequence[float], *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate | None:
    """Mean with its percentile interval; ``None`` for no values.

    Args:
        values: one number a clip.
        samples: resamplings with replacement.
        level: share of resampled means inside the interval, between 0 and 1.
        seed: seed of the resampling.
    """
    return bootstrap_ratio(values, np.ones(len(values)), samples=samples, level=level, seed=seed)


def bootstrap_ratio(
    above: Sequence[float],
    below: Sequence[float] | np.ndarray,
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate | None:
    """Ratio of two means over the same clips, resampled together, with its percentile interval.

    Returns:
        ``None`` when there are no clips or the lower mean is zero.

    Raises:
        ValueError: the lengths differ, or ``samples`` or ``level`` is out of range.
    """
    if len(above) != len(below):
        raise ValueError(f"paired values must have one length, got {len(above)} and {len(below)}")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples must be >= 1 and level in (0, 1), got {samples} and {level}")
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    if not len(top) or bottom.mean() == 0:
        return None
    draws = np.random.default_rng(seed).integers(0, len(top), (samples, len(top)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = top[draws].mean(1) / bottom[draws].mean(1)
    tail = (1 - level) / 2
    # a resampling without a single success below has no ratio; it counts as infinite
    ratios = np.where(np.isnan(ratios), np.inf, ratios)
    low, high = np.quantile(ratios, [tail, 1 - tail], method="nearest")
    return Estimate(float(top.mean() / bottom.mean()), float(low), float(high), len(top))
