"""A small DaViT learns ten shapes within five epochs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.models.davit import DaViT


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten outlines and fills at random places, sizes and colours on noise; pixels and classes."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    label = torch.randint(0, 10, (count,), generator=g)
    radius = torch.rand(count, 1, 1, generator=g) * 4 + 6
    row, column = (torch.rand(count, 1, 1, generator=g) * 12 + 10 for _ in range(2))
    u, v = (x - column) / radius, (y - row) / radius
    a, b = u.abs(), v.abs()
    disc, box, diamond = (u**2 + v**2).sqrt(), torch.maximum(a, b), a + b
    kinds = [
        disc < 1,
        (disc < 1) & (disc > 0.6),
        box < 0.9,
        (box < 0.9) & (box > 0.55),
        diamond < 1.1,
        (diamond < 1.1) & (diamond > 0.65),
        ((a < 0.3) | (b < 0.3)) & (box < 1),
        (((u - v).abs() < 0.4) | ((u + v).abs() < 0.4)) & (box < 0.9),
        torch.maximum(2 * a + v, -v) < 0.9,
        (b < 0.35) & (a < 1),
    ]
    mask = torch.stack(kinds, 1)[torch.arange(count), label].float()[:, None]
    colour = torch.rand(count, 3, 1, 1, generator=g) * 0.7 + 0.3
    return mask * colour + torch.randn(count, 3, 32, 32, generator=g) * 0.1, label


@pytest.mark.slow
def test_ten_shapes_are_told_apart() -> None:
    torch.manual_seed(0)
    (x, label), (unseen, wanted) = shapes(4000, 0), shapes(1000, 1)
    model = DaViT((1, 1, 1), (32, 64, 128), (2, 4, 8), 4, num_classes=10, drop_path_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=5 * 80)
    for _ in range(5):
        for batch in torch.randperm(4000).split(50):
            loss = F.cross_entropy(model(x[batch]), label[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
    model.eval()
    with torch.no_grad():
        assert (model(unseen).argmax(1) == wanted).float().mean() > 0.95
