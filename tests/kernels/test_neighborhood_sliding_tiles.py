"""Sliding tile attention is neighborhood attention whose stride is the tile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.kernels.neighborhood import neighborhood_attention_generic


def slid(length: int, tile: int, reach: int) -> Tensor:
    """(L, L) mask: a tile sees ``reach`` tiles around its own, shifted inwards at the ends."""
    place = torch.arange(length) // tile
    first = (place - reach // 2).clamp(0, length // tile - reach)
    return (place >= first[:, None]) & (place < first[:, None] + reach)


def error(grid: tuple[int, ...], tile: tuple[int, ...], reach: tuple[int, ...]) -> float:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *grid, 2, 4, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(1, 1, dtype=torch.bool)
    for sizes in zip(grid, tile, reach, strict=True):
        mask = torch.kron(mask, slid(*sizes))
    axes = len(grid)
    flat = [x.flatten(1, axes).transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*flat, attn_mask=mask).transpose(1, 2).view(v.shape)
    window = tuple(m * t for m, t in zip(reach, tile, strict=True))
    found = neighborhood_attention_generic(q, k, v, window, stride=tile)
    return float((found - wanted).abs().max())


@pytest.mark.parametrize(
    ("grid", "tile", "reach"),
    [
        ((20,), (4,), (3,)),
        ((21,), (3,), (5,)),
        ((12, 20), (3, 4), (1, 3)),
        ((4, 6, 10), (2, 3, 2), (1, 1, 3)),
    ],
)
def test_an_odd_number_of_tiles_slides(
    grid: tuple[int, ...], tile: tuple[int, ...], reach: tuple[int, ...]
) -> None:
    assert error(grid, tile, reach) < 1e-12


def test_an_even_number_of_tiles_is_half_a_tile_off() -> None:
    assert error((20,), (4,), (2,)) > 1e-2
