"""Structural similarity, on one scale and on several.

Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural
similarity" (2004), equation 13; Wang, Simoncelli and Bovik, "Multi-scale structural similarity for
image quality assessment" (2003), equation 7. Windows that would leave the image are not counted,
colour channels are scored apart and averaged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.eval.metrics.checks import check_images

#: exponents of the five scales, finest first (2003, section 3.2)
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ssim(
    prediction: Tensor,
    target: Tensor,
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Tensor:
    """Mean structural similarity of each image.

    Args:
        prediction: ``(..., C, H, W)``, floating point, both sides at least ``window``.
        target: shape and device of ``prediction``.
        data_range: largest value minus smallest value that an image may hold.
        window: side of the Gaussian window in pixels, odd.
        sigma: standard deviation of the window in pixels.
        k1: stabiliser of the luminance term, as a fraction of ``data_range``.
        k2: stabiliser of the contrast term, as a fraction of ``data_range``.

    Returns:
        ``(...)`` in [-1, 1], 1 for equal images; float32 (float64 for float64 input).

    Raises:
        TypeError: an input is not floating point.
        ValueError: the shapes differ, an image is smaller than the window, or the window is even.
    """
    _check_window(window)
    check_images(prediction, target, min_side=window)
    similarity, _ = _terms(prediction, target, data_range, window, sigma, k1, k2)
    return similarity.mean(-1)


def ms_ssim(
    prediction: Tensor,
    target: Tensor,
    *,
    data_range: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    weights: tuple[float, ...] = MS_SSIM_WEIGHTS,
) -> Tensor:
    """Multi-scale structural similarity: contrast on every scale, luminance on the coarsest.

    Scales are halved by 2 x 2 averaging. A negative contrast term counts as zero, since it has no
    real power.

    Args:
        prediction: ``(..., C, H, W)``, floating point; both sides at least
            ``window * 2 ** (len(weights) - 1)``: 176 pixels with the defaults.
        target: shape and device of ``prediction``.
        data_range: largest value minus smallest value that an image may hold.
        window: side of the Gaussian window in pixels, odd.
        sigma: standard deviation of the window in pixels.
        k1: stabiliser of the luminance term.
        k2: stabiliser of the contrast term.
        weights: exponent of each scale, finest first.

    Returns:
        ``(...)`` in [0, 1], 1 for equal images; float32 (float64 for float64 input).

    Raises:
        TypeError: an input is not floating point.
        ValueError: the shapes differ, or the images are too small for that many scales.
    """
    _check_window(window)
    check_images(prediction, target, min_side=window * 2 ** (len(weights) - 1))
    score: Tensor | None = None
    for scale, weight in enumerate(weights):
        similarity, contrast = _terms(prediction, target, data_range, window, sigma, k1, k2)
        term = similarity if scale == len(weights) - 1 else contrast
        term = term.clamp(min=0) ** weight
        score = term if score is None else score * term
        if scale < len(weights) - 1:
            prediction, target = _halve(prediction), _halve(target)
    assert score is not None
    return score.mean(-1)


def _check_window(window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and positive, got {window}")


def _halve(images: Tensor) -> Tensor:
    halved = F.avg_pool2d(images.reshape(-1, 1, *images.shape[-2:]), 2)
    return halved.view(*images.shape[:-2], *halved.shape[-2:])


def _terms(
    prediction: Tensor,
    target: Tensor,
    data_range: float,
    window: int,
    sigma: float,
    k1: float,
    k2: float,
) -> tuple[Tensor, Tensor]:
    """Similarity and contrast term of each channel, both ``(..., C)``, averaged over pixels."""
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    offset = torch.arange(window, device=prediction.device, dtype=dtype) - window // 2
    taps = torch.exp(-(offset**2) / (2 * sigma**2))
    taps = taps / taps.sum()

    def blur(images: Tensor) -> Tensor:
        # Separable, and by shifted sums: a convolution on a GPU may round its input to TF32, which
        # would drown the small differences of squares below.
        for axis in (-2, -1):
            size = images.shape[axis] - window + 1
            total = torch.zeros((), dtype=dtype, device=images.device)
            for i, tap in enumerate(taps):
                total = total + images.narrow(axis, i, size) * tap
            images = total
        return images

    x = prediction.to(dtype).reshape(-1, 1, *prediction.shape[-2:])
    y = target.to(dtype).reshape(-1, 1, *target.shape[-2:])
    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x * mean_x
    var_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    shape = prediction.shape[:-2]
    return (
        (luminance * contrast).mean(dim=(1, 2, 3)).view(shape),
        contrast.mean(dim=(1, 2, 3)).view(shape),
    )
