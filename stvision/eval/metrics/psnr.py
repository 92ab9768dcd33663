"""Peak signal-to-noise ratio."""

import torch
from torch import Tensor

from stvision.eval.metrics.checks import check_images


def psnr(
    prediction: Tensor, target: Tensor, *, data_range: float = 1.0, cap: float = float("inf")
) -> Tensor:
    """Peak signal-to-noise ratio of each image, ``10 log10(data_range^2 / MSE)``, in dB.

    The squared error is averaged over channels and pixels of one image. The PSNR of a clip is by
    convention the mean over its frames, so call ``.mean(-1)`` on the result for ``(B, T, C, H, W)``.

    Args:
        prediction: ``(..., C, H, W)``, floating point.
        target: shape and device of ``prediction``.
        data_range: largest value minus smallest value that an image may hold.
        cap: largest value returned, in dB; equal images have an infinite ratio, which would swallow
            a mean over frames.

    Returns:
        ``(...)`` in float32 (float64 for float64 input), higher is better.

    Raises:
        TypeError: an input is not floating point.
        ValueError: the shapes differ, or ``data_range`` is not positive.
    """
    check_images(prediction, target)
    if data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    error = (prediction.to(dtype) - target.to(dtype)).square().mean(dim=(-3, -2, -1))
    return (10 * torch.log10(data_range**2 / error)).clamp(max=cap)
