"""Copying from a far region: learned by routing to one region, out of reach of attention in windows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.attention import BiLevelRoutingAttention, SpatialWindowAttention


def copy_task(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (N, 1, 16, 16, 36) of 4 x 4 regions, and the class (N, 16, 16) that each token must name.

    Half of a region's tokens carry its code and its class, the others no code and a random class;
    every token carries the code of the region whose class it has to name.
    """
    code = torch.stack([torch.randperm(16, generator=g) for _ in range(count)])
    partner = torch.randint(0, 16, (count, 16), generator=g)
    label = torch.randint(0, 4, (count, 16), generator=g)
    parts = (F.one_hot(code, 16), F.one_hot(code.gather(1, partner), 16), F.one_hot(label, 4))
    x = torch.cat(parts, -1).float()[:, :, None].repeat(1, 1, 16, 1)  # (N, regions, tokens, 36)
    blank = torch.rand(count, 16, 16, 1, generator=g) < 0.5
    wrong = F.one_hot(torch.randint(0, 4, (count, 16, 16), generator=g), 4).float()
    x[..., :16] *= ~blank
    x[..., 32:] = torch.where(blank, wrong, x[..., 32:])
    x = x.view(count, 4, 4, 4, 4, 36).transpose(2, 3).reshape(count, 1, 16, 16, 36)
    y = label.gather(1, partner).view(count, 4, 1, 4, 1).expand(-1, -1, 4, -1, 4)
    return x, y.reshape(count, 16, 16)


def accuracy(attention: nn.Module, steps: int = 600) -> float:
    """Share of tokens named rightly on unseen maps.

    Routing has no gradient, so a code whose region is never chosen is never learned; dropout in
    front of it changes the choice from step to step until all have been.
    """
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 64), nn.Dropout(0.3), attention, nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = copy_task(32, g)
        loss = F.cross_entropy(model(x)[:, 0].flatten(0, 2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    x, y = copy_task(200, g)
    model.eval()
    with torch.no_grad():
        return float((model(x)[:, 0].argmax(-1) == y).float().mean())


@pytest.mark.slow
def test_one_region_of_all_is_enough_to_copy_from_afar() -> None:
    torch.manual_seed(0)
    routed = BiLevelRoutingAttention(64, 1, n_win=4, topk=1, lepe_kernel=0)
    assert accuracy(routed) > 0.95
    torch.manual_seed(0)
    # a quarter is chance, and one region in sixteen asks for itself: 0.25 + 0.75 / 16 = 0.297
    assert accuracy(SpatialWindowAttention(64, 1, 4)) < 0.35
