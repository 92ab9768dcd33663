"""The frame-axis form of BroadWay for attention over a volume: all frames times a window in space.

Seer's maps join every token of a window with every earlier one, in (frame, row, column) order.
Read as ``A[t, o, u, p]`` (query frame and offset, key frame and offset), such a map has a profile
over key frames for each key offset p. Three readings of "the spectrum along keys" are possible:

* along all F·s·s keys: neighbours in that order are neighbours in space, so it would amplify
  texture, not motion;
* along all F frames of an offset: the gain would put weight on frames that the mask hides;
* along the *visible* frames of an offset, taken here: frames 0..t for offsets up to the query's
  own, 0..t-1 for later ones. The constant of each profile, its share of the row, is untouched, so
  rows keep their sum, hidden weights stay zero, and where a token looks in space stays as it is;
  only how that varies over time is enhanced.

The band is the same in cycles a frame whatever the number n of visible frames. The transform of
length n obeys Parseval's theorem, so energies add up and the gain's formula holds unchanged. With
one token a frame and no mask this is the papers' own form.

Self-guidance blends what the frames get: with ``M[t, o, u] = sum_p A`` and the reference's M_1
resized in space, a frame's weights are multiplied by ``(M + alpha (M_1 - M)) / M``. Windows of two
blocks hold different pixels, so no finer correspondence exists; inside a frame each block keeps
its own weights. M_1 is causal and sums to 1, so the result is and does.
"""

import torch
from torch import Tensor

from stvision.guidance.maps import high_band_projection


def visible_projections(frames: int, tau: float) -> Tensor:
    """(F + 1, F, F) float64: entry n filters the first n of F frames and drops the others."""
    table = torch.zeros(frames + 1, frames, frames, dtype=torch.float64)
    for n in range(1, frames + 1):
        table[n, :n, :n] = high_band_projection(n, tau, of=frames)
    return table


def volume_high_band(maps: Tensor, tau: float, *, causal: bool) -> Tensor:
    """High band of each offset's profile over its visible frames.

    Args:
        maps: (..., F, S, F, S) float32 or float64: query frame, query offset, key frame, key
            offset, offsets in raster order.
        tau: see :func:`stvision.guidance.maps.high_band`.
        causal: a token sees itself and earlier ones in (frame, offset) order.

    Returns:
        Shape of ``maps``; the rest is the low band, orthogonal to it row by row.
    """
    frames, offsets = maps.shape[-2:]
    table = visible_projections(frames, tau).to(maps)
    if not causal:
        return torch.einsum("...up,uv->...vp", maps, table[frames])
    seen = torch.ones(offsets, offsets, dtype=torch.bool, device=maps.device).tril()[:, None, :]
    out = torch.empty_like(maps)
    for t in range(frames):
        row = maps[..., t, :, :, :]
        own = torch.einsum("...up,uv->...vp", row, table[t + 1])
        before = torch.einsum("...up,uv->...vp", row, table[t])
        out[..., t, :, :, :] = torch.where(seen, own, before)
    return out


def frame_maps(maps: Tensor) -> Tensor:
    """(..., F, S, F, S) to (..., S, F, F): what each query pixel gives to the frames, in all."""
    return maps.sum(-1).transpose(-3, -2)


def volume_self_guidance(maps: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """Draw the frame maps of a volume map towards those of an earlier block.

    Args:
        maps: (..., F, S, F, S), float32 or float64.
        reference: (..., S, F, F), rows summing to 1, causal when ``maps`` are.
        alpha: 0 keeps ``maps``, 1 gives the reference's frame maps.

    Returns:
        Shape of ``maps``; rows sum to 1.
    """
    own = maps.sum(-1)  # (..., F, S, F)
    wanted = own + alpha * (reference.transpose(-3, -2).to(own) - own)
    scale = torch.where(own > 0, wanted / own.clamp_min(torch.finfo(own.dtype).tiny), 0)
    out = maps * scale[..., None]
    # a frame whose weights all underflowed cannot be given any: the row shares it out
    return out / out.sum((-2, -1), keepdim=True)
