"""Argument checks that the image metrics share."""

from torch import Tensor


def check_images(prediction: Tensor, target: Tensor, *, min_side: int = 1) -> None:
    """Refuse what is not two equal stacks of floating-point images ``(..., C, H, W)``.

    Args:
        prediction: ``(..., C, H, W)``, floating point.
        target: shape and device of ``prediction``.
        min_side: smallest height and width allowed, in pixels.

    Raises:
        TypeError: either is not floating point.
        ValueError: fewer than three axes, differing shapes, or a side below ``min_side``.
    """
    for name, images in (("prediction", prediction), ("target", target)):
        if not images.is_floating_point():
            raise TypeError(
                f"{name} must be floating point in [0, 1], got {images.dtype}; "
                "divide 8-bit frames by 255"
            )
    if prediction.shape != target.shape or prediction.ndim < 3:
        raise ValueError(
            "prediction and target must share one shape (..., C, H, W), "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if min(prediction.shape[-2:]) < min_side:
        raise ValueError(
            f"height and width must be at least {min_side} pixels, got {tuple(prediction.shape[-2:])}"
        )
