"""Neighborhood attention: each query attends to the nearest tokens of a 1-D, 2-D or 3-D grid."""

from stvision.kernels.neighborhood.api import (
    explain,
    merge,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
)

__all__ = ["explain", "merge", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]
