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

#: copies of a chunk's maps alive at once: scores, map, high band, result
_COPIES = 4


@dataclass(frozen=True)
class ModuleEnergy:
    """Energies of the maps of one module in one U-Net call; scalars on the model's device.

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
        query, key = (x[:, part].transpose(2, 3).to(self.wide) for x in (self.query, self.key))
        scores = (query * self.scale) @ key.transpose(-1, -2)
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
    sums = torch.zeros(3, dtype=field.wide, device=query.device)
    kept: list[Tensor] = []
    with torch.no_grad():
        for part in parts:
            own = field.own(part)
            guided = field.guided(own, part)
            high = field.high(guided)
            for i, x in enumerate((own, high, guided - high)):
                sums[i] += x[first_conditional:].square().sum()
            if keep:
                kept.append(own if layout is None else frame_maps(own))
    rows = (batch - first_conditional) * count * heads * length
    before, e_high, e_low = (sums / rows).unbind()
    gain = motion_gain(before, e_high, e_low, options.beta)

    # 2. The result
    remake = len(parts) > 1 or torch.is_grad_enabled()
    outputs = []
    for part in parts:
        if remake:
            guided = field.guided(field.own(part), part)
            high = field.high(guided)
        maps = guided + (gain - 1) * high
        flat = renormalise(maps.reshape(*maps.shape[:3], length, length), options.clamp)
        out = flat @ value[:, part].transpose(2, 3).to(field.wide)
        outputs.append(out.transpose(2, 3).to(query.dtype))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    energy = ModuleEnergy(before, e_high, e_low, gain)
    return Guided(output, energy, field.by_pixel(kept) if keep else None)
