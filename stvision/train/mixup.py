"""Mixed clips with soft targets: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

Both take a second clip of the batch for each clip. Mixup adds the two with weights of a Beta
distribution; CutMix puts a box of the second into the first, the same box in all frames, of a share
that follows a Beta distribution. All draws come from the given generator, on its device, and nothing
waits for the host.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_targets(
    labels: Tensor, num_classes: int, smoothing: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Probabilities that a classifier shall give.

    Args:
        labels: (B,) int64.
        num_classes: C.
        smoothing: share that is spread over all classes, at least 0 and below 1.
        dtype: of the result.

    Returns:
        (B, C), rows summing to one.

    Raises:
        ValueError: another share.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"label smoothing must be at least 0 and below 1, got {smoothing}")
    hard = F.one_hot(labels, num_classes).to(dtype)
    return hard * (1 - smoothing) + smoothing / num_classes


def mixup(frames: Tensor, targets: Tensor, partner: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """``lam`` of each clip and of its target, and the rest of its partner's.

    Args:
        frames: (B, C, T, H, W).
        targets: (B, classes).
        partner: (B,) int64, place of each clip's second one.
        lam: (B,) in [0, 1].

    Returns:
        Clips and targets of the same shapes.
    """
    wide = lam.to(frames.dtype).view(-1, 1, 1, 1, 1)
    mixed = torch.lerp(frames[partner], frames, wide)
    return mixed, torch.lerp(targets[partner], targets, lam.to(targets.dtype)[:, None])


def cut_boxes(lam: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """The boxes that CutMix replaces: sides of a share ``sqrt(1 - lam)``, cut off at the border.

    Args:
        lam: (B,) in [0, 1], share that stays.
        centre: (B, 2) in [0, 1), row and column of the middle as shares of the height and width.
        height: H.
        width: W.

    Returns:
        (B, 4) int64: first row, end of the rows, first column, end of the columns.
    """
    size = torch.tensor([height, width], device=lam.device)
    half = (size * (1 - lam).sqrt()[:, None]).long() // 2
    middle = (centre * size).long()
    low, high = (middle - half).clamp(min=0), torch.minimum(middle + half, size)
    return torch.stack([low, high], 2).flatten(1)


def cutmix(
    frames: Tensor, targets: Tensor, partner: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Each clip with a box of its partner, and targets by the share of pixels of each.

    Args:
        frames: (B, C, T, H, W).
        targets: (B, classes).
        partner: (B,) int64, place of each clip's second one.
        boxes: (B, 4) int64, see :func:`cut_boxes`; the same in all frames.

    Returns:
        Clips and targets of the same shapes.
    """
    height, width = frames.shape[-2:]
    rows = torch.arange(height, device=frames.device)
    columns = torch.arange(width, device=frames.device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & (
        (columns >= left) & (columns < right)
    )[:, None]
    mixed = torch.where(inside[:, None, None], frames[partner], frames)
    kept = 1 - inside.flatten(1).to(targets.dtype).mean(1)
    return mixed, torch.lerp(targets[partner], targets, kept[:, None])


def draw_beta(
    alpha: float, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """(count,) float32 draws of Beta(alpha, alpha), from ``generator`` on ``device``."""
    both = torch.full((count, 2), alpha, device=device)
    # torch.distributions draws by the same function, but only from the global generator
    return torch._sample_dirichlet(both, generator=generator)[:, 0]


@dataclass(frozen=True)
class MixConfig:
    """How clips of a batch are mixed; both mixup and cutmix at 0 switch it off."""

    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for no mixup. VideoMAE has 0.8."""
    cutmix: float = 0.0
    """Alpha of CutMix's; 0 for no CutMix. VideoMAE has 1.0."""
    probability: float = 1.0
    """Share of clips that are mixed at all."""
    switch: float = 0.5
    """Share of those that are mixed by CutMix, where both are on."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")


def mix_clips(
    frames: Tensor, targets: Tensor, config: MixConfig, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Mix a batch by :class:`MixConfig`; each clip has draws of its own.

    Args:
        frames: (B, C, T, H, W) floating point.
        targets: (B, classes), see :func:`soft_targets`.
        config: which mixture, how often.
        generator: source of all draws, on the device of ``frames``.

    Returns:
        Clips and targets of the same shapes.
    """
    if (config.mixup == 0 and config.cutmix == 0) or config.probability == 0:
        return frames, targets
    batch, device = len(frames), frames.device
    partner = torch.randperm(batch, generator=generator, device=device)
    draws = torch.rand(batch, 4, generator=generator, device=device)
    mixed = draws[:, 0] < config.probability
    share = config.switch if config.mixup and config.cutmix else float(config.cutmix > 0)
    by_box = mixed & (draws[:, 1] < share)
    # a clip that is left as it is has lam 1 for one and an empty box for the other
    if config.mixup:
        lam = draw_beta(config.mixup, batch, generator, device)
        frames, targets = mixup(
            frames, targets, partner, torch.where(mixed & ~by_box, lam, torch.ones_like(lam))
        )
    if config.cutmix:
        lam = draw_beta(config.cutmix, batch, generator, device)
        lam = torch.where(by_box, lam, torch.ones_like(lam))
        boxes = cut_boxes(lam, draws[:, 2:], *frames.shape[-2:])
        frames, targets = cutmix(frames, targets, partner, boxes)
    return frames, targets
