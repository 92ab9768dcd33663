"""A bright object among noise is located better with efficient local attention than without."""

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
    for _ in range(6):
        for batch in torch.randperm(1000).split(50):
            loss = (model(x[batch]) - place[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(unseen) - wanted).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "small"])
def test_places_are_found_better(variant: str) -> None:
    errors = {}
    for name in ("none", "squeeze-excite", "ela"):
        torch.manual_seed(0)
        gates: dict[str, nn.Module] = {
            "none": nn.Identity(),
            "squeeze-excite": SqueezeExcite(32),
            "ela": EfficientLocalAttention(32, variant, channels_last=False),
        }
        errors[name] = error(gates[name])
    assert errors["ela"] < 0.9 * errors["none"] and errors["ela"] < errors["squeeze-excite"]
