"""Metrics: one file each, pure functions on tensors.

Images are ``(..., C, H, W)`` floats in [0, 1]; every leading axis is kept, so a clip as
``(B, T, C, H, W)`` gives one number a frame.
"""

from stvision.eval.metrics.flicker import flicker
from stvision.eval.metrics.frechet import (
    FeatureStatistics,
    frechet_distance,
    frechet_distance_between,
)
from stvision.eval.metrics.lpips import ShiftTolerantLPIPS
from stvision.eval.metrics.psnr import psnr
from stvision.eval.metrics.reid import CropName, ReidScores, read_crop_name, reid_scores
from stvision.eval.metrics.ssim import ms_ssim, ssim

__all__ = [
    "CropName",
    "FeatureStatistics",
    "ReidScores",
    "ShiftTolerantLPIPS",
    "flicker",
    "frechet_distance",
    "frechet_distance_between",
    "ms_ssim",
    "psnr",
    "read_crop_name",
    "reid_scores",
    "ssim",
]
