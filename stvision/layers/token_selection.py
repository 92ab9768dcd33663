"""Choosing tokens of a sequence (B, L, C), with gradients to the scores (Wang et al. 2023, Selective S4).

A mask generator gives two logits a token, to keep it and to drop it. Either each token decides for
itself and a loss holds the mean at a ratio, or exactly K tokens with the greatest odds are taken. The
forward is a hard choice, the backward that of the probability (straight-through).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SELECTIONS = ("exact", "ratio")


class Selection(NamedTuple):
    """Tokens chosen.

    Attributes:
        gate: (B, L), 1 for kept and 0 for dropped, with the gradient of the probability.
        kept: (B, K) positions of the kept in ascending order; ``None`` where their number differs.
    """

    gate: Tensor
    kept: Tensor | None


def gumbel_like(x: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of ``x``."""
    return -torch.empty_like(x).exponential_().log()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` in the forward, ``soft`` in the backward."""
    return hard + (soft - soft.detach())


def select_exact(logits: Tensor, keep: int, noise: bool = False) -> Selection:
    """Keep the ``keep`` tokens with the greatest odds, in their order.

    Args:
        logits: (B, L, 2), to keep and to drop.
        keep: K, 1 to L.
        noise: perturb the odds by Gumbel noise, which draws K tokens without replacement.

    Raises:
        ValueError: ``keep`` or the shape does not fit.
    """
    odds = _odds(logits)
    if not 1 <= keep <= odds.shape[1]:
        raise ValueError(f"keep must be 1 to {odds.shape[1]} tokens, got {keep}")
    scores = odds + gumbel_like(odds) - gumbel_like(odds) if noise else odds
    index = scores.topk(keep, dim=1).indices.sort(1).values
    hard = torch.zeros_like(odds).scatter(1, index, 1.0)
    return Selection(straight_through(hard, scores.sigmoid()), index)


def select_ratio(logits: Tensor, noise: bool = False, temperature: float = 1.0) -> Selection:
    """Keep each token that is rather kept than dropped: a straight-through Gumbel-softmax of two.

    Args:
        logits: (B, L, 2), to keep and to drop.
        noise: draw instead of taking the more probable.
        temperature: of the probability in the backward, above 0.

    Raises:
        ValueError: temperature or shape does not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    odds = _odds(logits)
    scores = odds + gumbel_like(odds) - gumbel_like(odds) if noise else odds
    hard = (scores > 0).to(odds.dtype)
    return Selection(straight_through(hard, (scores / temperature).sigmoid()), None)


def _odds(logits: Tensor) -> Tensor:
    if logits.ndim != 3 or logits.shape[-1] != 2:
        raise ValueError(f"logits must be (B, L, 2), got {tuple(logits.shape)}")
    return logits[..., 0] - logits[..., 1]


def ratio_loss(gate: Tensor, ratio: float) -> Tensor:
    """Squared distance of the mean of ``gate`` (B, L) to ``ratio``, between 0 and 1."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    return (gate.mean() - ratio).square()


def mask_tokens(x: Tensor, selection: Selection) -> Tensor:
    """Tokens (B, L, C) with the dropped set to zero."""
    return x * selection.gate[..., None].to(x.dtype)


def gather_tokens(x: Tensor, selection: Selection) -> Tensor:
    """The kept tokens (B, K, C) in their order, with the gradient to their odds.

    Raises:
        ValueError: a selection without such a list, whose number of tokens differs by sample.
    """
    if selection.kept is None:
        raise ValueError("gathering needs a selection of exactly K tokens; mask this one instead")
    index = selection.kept[..., None].expand(-1, -1, x.shape[-1])
    gate = selection.gate.gather(1, selection.kept)
    return x.gather(1, index) * gate[..., None].to(x.dtype)


class MaskGenerator(nn.Module):
    """Two logits a token from what it says itself and from the mean over all tokens.

    It sees the whole sequence, so what is built on it is not causal.

    Args:
        dim: channels C, even.
        hidden: channels between; ``None`` for ``dim // 2``.

    Raises:
        ValueError: odd channels.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = dim // 2 if hidden is None else hidden
        if dim < 2 or dim % 2 or hidden < 1:
            raise ValueError(f"dim must be even and hidden at least 1, got {dim} and {hidden}")
        self.norm = nn.LayerNorm(dim)
        self.local_part = nn.Linear(dim, dim // 2)
        self.global_part = nn.Linear(dim, dim // 2)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, L, C) to logits (B, L, 2) to keep and to drop, in at least float32.

        Of half precision's few numbers many tokens would get the same, and none would be the better.
        """
        x = self.norm(x)
        mean = F.gelu(self.global_part(x)).mean(1, keepdim=True)
        local = F.gelu(self.local_part(x))
        hidden = F.gelu(self.fc1(torch.cat([local, mean.expand_as(local)], dim=-1)))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            last = self.fc2
            return F.linear(hidden.to(wide), last.weight.to(wide), last.bias.to(wide))
