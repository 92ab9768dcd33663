"""A bright object among noise is located better with efficient local attention than with its peers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stvision.layers.ela import EfficientLocalAttention


class SqueezeExcite(nn.Module):
    """The gate without places, to compare with."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, 8), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[..., None, None]


class CoordinateAttention(nn.Module):
    """The gate on rows and columns whose norm and squeeze take both together (Hou et al. 2021)."""

    def __init__(self, dim: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.Conv2d(dim, squeezed, 1), nn.BatchNorm2d(squeezed), nn.Hardswish()
        )
        self.rows, self.columns = nn.Conv2d(squeezed, dim, 1), nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        lines = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], 2)
        rows, columns = self.squeeze(lines).split([x.shape[2], x.shape[3]], 2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.mT).sigmoid()


def objects(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 24, 24) and the object's place, each coordinate in -1 to 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 24, 24, generator=g) * 0.5
    place = torch.randint(2, 22, (count, 2), generator=g)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            x[torch.arange(count), 0, place[:, 0] + dy, place[:, 1] + dx] += 1.5
    return x, (place - 11.5) / 11.5


def error(gate: nn.Module) -> float:
    """Mean distance in a coordinate after six epochs of two convolutions with ``gate``."""
    c = 32
    model = nn.Sequential(
        *(nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()),
        *(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), gate, nn.ReLU()),
        *(nn.AvgPool2d(6), nn.Flatten(), nn.Linear(16 * c, 2)),
    )
    (x, place), (unseen, wanted) = objects(1000, 0), objects(500, 99)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    # to rest at the end: at a constant rate the order of the two gates with places changes by seed
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6 * 20)
    for _ in range(6):
        for batch in torch.randperm(1000).split(50):
            loss = (model(x[batch]) - place[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    model.eval()
    with torch.no_grad():
        return float((model(unseen) - wanted).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "squeezed"), [("base", 8), ("small", 16)])
def test_places_are_found_better(variant: str, squeezed: int) -> None:
    """Than without a gate, with one that knows no places, and with a larger one that does."""
    gates: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "squeeze-excite": lambda: SqueezeExcite(32),
        "coordinate": lambda: CoordinateAttention(32, squeezed),
        "ela": lambda: EfficientLocalAttention(32, variant, channels_last=False),
    }
    errors, sizes = {}, {}
    for name, build in gates.items():
        torch.manual_seed(0)
        gate = build()
        sizes[name] = sum(p.numel() for p in gate.parameters())
        torch.manual_seed(0)  # the same convolutions and batches for all
        errors[name] = error(gate)
    assert sizes["coordinate"] >= sizes["ela"]
    assert errors["ela"] < 0.9 * errors["none"], errors
    assert errors["ela"] < min(errors["squeeze-excite"], errors["coordinate"]), errors
