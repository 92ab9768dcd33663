"""Flicker: change from frame to frame that the true clip does not have."""

import torch
from torch import Tensor

from stvision.eval.metrics.checks import check_images


def flicker(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference between the frame-to-frame changes of two clips.

    For frames ``p`` and ``q`` it is the mean of ``|(p[t+1] - p[t]) - (q[t+1] - q[t])|``: a constant
    offset of colour costs nothing, a colour or brightness that jumps between frames does. Against
    a still target it is the mean change of the prediction itself.

    Args:
        prediction: ``(..., T, C, H, W)``, floating point in [0, 1], at least two frames.
        target: shape and device of ``prediction``.

    Returns:
        ``(...)`` in [0, 2], 0 for equal motion; float32 (float64 for float64 input).

    Raises:
        TypeError: an input is not floating point.
        ValueError: the shapes differ, or there are fewer than two frames.
    """
    check_images(prediction, target)
    if prediction.ndim < 4 or prediction.shape[-4] < 2:
        raise ValueError(
            "flicker needs clips (..., T, C, H, W) of at least two frames, "
            f"got {tuple(prediction.shape)}"
        )
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    drift = (prediction.to(dtype) - target.to(dtype)).diff(dim=-4)
    return drift.abs().mean(dim=(-4, -3, -2, -1))
