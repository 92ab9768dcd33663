"""Guided attention of one module: maps in chunks, energies of the conditional half, result."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stvision.attention.windows import WindowLayout
from stvision.guidance.maps import (
    gather_maps,
    high_band_projection,
    motion_gain,
    renormalise,
    temporal_self_guidance,
)
from stvision.guidance.volume_maps import frame_maps, volume_high_band, volume_self_guidance

if TYPE_CHECKING:
    from stvision.guidance.broadway import BroadWay

#: copies of a chunk's maps alive at once: map, earlier map or high band, result
_COPIES = 3


@dataclass(frozen=True)
class ModuleEnergy:
    """Energies of the maps of one module in one U-Net call, (videos,) on the model's device.

    Each video has its own energies and gain, so that it does not depend on those made with it.

    Args:
        before: E1, mean energy of a row of the model's own maps.
        high: E_h after self-guidance.
        low: E_l after self-guidance.
        gain: factor of the high band.
        module: dotted name in the U-Net.
        step: step of the sampling run, from 0.
        run: sampling run, from 0.
    """

    before: Tensor
    high: Tensor
    low: Tensor
    gain: Tensor
    module: str = ""
    step: int = 0
    run: int = 0

    @property
    def after(self) -> Tensor:
        """Energy of the maps that are used (before a clamp, if any)."""
        return self.gain**2 * self.high + self.low


@dataclass(frozen=True)
class Guided:
    """Result of :func:`guide`.

    Args:
        output: shape of the queries.
        energy: what was measured.
        reference: (B, h, w, heads, F, F) frame maps of each pixel, when asked for.
    """

    output: Tensor
    energy: ModuleEnergy
    reference: Tensor | None


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """``left @ right`` of (..., L, d) and (..., d, M) in ``wide``."""
    half = left.dtype in (torch.float16, torch.bfloat16)
    mixed = half and left.is_cuda and torch.version.hip is None
    if mixed and not torch.is_grad_enabled():
        # half-precision operands, accumulated in and written as float32: no wide copies of them
        out = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=wide)
        return out.unflatten(0, left.shape[:-2])
    return left.to(wide) @ right.to(wide)


def _square_sums(maps: Tensor) -> Tensor:
    """(B, ...) to (B,): sums of squares, without a tensor of squares."""
    return torch.linalg.vector_norm(maps.flatten(1), dim=1).square()


class _Field:
    """Maps of a module, one chunk of pixels or windows at a time."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        options: "BroadWay",
        size: tuple[int, int],
        layout: WindowLayout | None,
        causal: bool,
        reference: Tensor | None,
    ) -> None:
        self.query, self.key, self.scale = query, key, scale
        self.options, self.size, self.layout, self.causal = options, size, layout, causal
        if reference is not None and reference.shape[3] != query.shape[3]:
            reference = reference.mean(3, keepdim=True)
        self.reference = reference
        self.wide = torch.promote_types(query.dtype, torch.float32)
        length = query.shape[2]
        self.frames = length if layout is None else layout.grid[0]
        self.offsets = length // self.frames
        numbers = torch.arange(size[0] * size[1], device=query.device)
        if layout is not None:  # pixels in the order of the windows' tokens: (windows, S)
            field = numbers.view(1, *size, 1)
            one = WindowLayout((1, *size), layout.window)
            numbers = one.pack(field[:, None]).squeeze(-1)
        self.pixels = numbers

    @property
    def shape(self) -> tuple[int, ...]:
        """Trailing axes of a map."""
        if self.layout is None:
            return (self.frames, self.frames)
        return (self.frames, self.offsets, self.frames, self.offsets)

    def own(self, part: slice) -> Tensor:
        """The model's maps: (B, N, heads, F, F) or (B, N, heads, F, S, F, S)."""
        query, key = (x[:, part].transpose(2, 3) for x in (self.query, self.key))
        scores = _product(query, key.transpose(-1, -2), self.wide)
        scores = scores * self.scale if torch.is_grad_enabled() else scores.mul_(self.scale)
        if self.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(-1).view(*scores.shape[:3], *self.shape)

    def guided(self, maps: Tensor, part: slice) -> Tensor:
        """Maps after self-guidance."""
        alpha = self.options.alpha
        if self.reference is None or alpha == 0:
            return maps
        pixels = self.pixels[part]
        earlier = gather_maps(self.reference, pixels.flatten(), self.size, self.options.resize)
        if self.layout is None:
            return temporal_self_guidance(maps, earlier, alpha)
        # (B, N·S, heads, F, F) -> (B, N, heads, S, F, F)
        earlier = earlier.unflatten(1, (-1, self.offsets)).transpose(2, 3)
        return volume_self_guidance(maps, earlier, alpha)

    def high(self, maps: Tensor) -> Tensor:
        """High band of maps."""
        if self.layout is None:
            return maps @ high_band_projection(self.frames, self.options.tau).to(maps)
        return volume_high_band(maps, self.options.tau, causal=self.causal)

    def by_pixel(self, parts: list[Tensor]) -> Tensor:
        """Frame maps of all chunks as (B, h, w, heads, F, F)."""
        maps = torch.cat(parts, dim=1)
        if self.layout is None:
            return maps.unflatten(1, self.size)
        maps = maps.transpose(2, 3).flatten(1, 2)  # (B, windows·S, heads, F, F)
        return maps[:, self.pixels.flatten().argsort()].unflatten(1, self.size)


def guide(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    options: "BroadWay",
    size: tuple[int, int],
    layout: WindowLayout | None = None,
    causal: bool = False,
    first_conditional: int = 0,
    reference: Tensor | None = None,
    keep: bool = False,
) -> Guided:
    """Temporal self-attention with guided maps.

    Args:
        query: (B, N, L, heads, d): N pixels and L frames, or N windows and their L tokens.
        key: like ``query``.
        value: like ``query``.
        scale: factor of the scores.
        options: of the method.
        size: rows and columns of the field.
        layout: windows, when L holds more than frames.
        causal: a token sees itself and earlier ones.
        first_conditional: items of the batch before this one are left out of the energies.
        reference: (B, h1, w1, heads, F, F) frame maps of the corresponding module.
        keep: return this module's own frame maps as a reference for others.
    """
    field = _Field(query, key, scale, options, size, layout, causal, reference)
    batch, count, length, heads = query.shape[:4]
    item = batch * heads * length**2 * torch.finfo(field.wide).bits // 8 * _COPIES
    chunk = max(1, options.max_map_bytes // item)
    parts = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]

    # 1. Energies over the whole field, and the reference for later modules
    videos = batch - first_conditional
    sums = torch.zeros(3, videos, dtype=field.wide, device=query.device)
    kept: list[Tensor] = []
    with torch.no_grad():
        for part in parts:
            own = field.own(part)
            if keep:
                kept.append(own.clone() if layout is None else frame_maps(own))
            sums[0] += _square_sums(own[first_conditional:])
            guided = field.guided(own, part)
            if guided is not own:
                del own
            high = field.high(guided)
            sums[1] += _square_sums(high[first_conditional:])
            sums[2] += _square_sums(guided[first_conditional:])
    before, e_high, e_all = sums / (count * heads * length)
    e_low = e_all - e_high  # the bands are orthogonal
    gain = motion_gain(before, e_high, e_low, options.beta)
    # both halves of guidance share the gain of the conditional one
    factor = gain.repeat(batch // videos).view(-1, *(1,) * (guided.ndim - 1)) - 1

    # 2. The result
    remake = len(parts) > 1 or torch.is_grad_enabled()
    outputs = []
    for part in parts:
        if remake:
            guided = field.guided(field.own(part), part)
            maps = guided + factor * field.high(guided)
        else:
            maps = guided.addcmul_(high, factor)
        del guided
        if not remake:
            del high
        flat = maps.reshape(*maps.shape[:3], length, length)
        if options.clamp:  # rows keep their sum of 1 otherwise: the constant is untouched
            flat = renormalise(flat, clamp=True)
        # as in fused attention, half-precision values meet weights of their precision
        out = flat.to(query.dtype) @ value[:, part].transpose(2, 3)
        outputs.append(out.transpose(2, 3))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    energy = ModuleEnergy(before, e_high, e_low, gain)
    return Guided(output, energy, field.by_pixel(kept) if keep else None)
