"""People told apart by the order of coloured bands, with and without placed blocks.

Such a task shows that training with blocks works, not that they help.
"""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.eval.metrics.reid import ReidScores, reid_scores
from stvision.layers.light_attention import LightAttention
from stvision.models.placement import (
    ATTACHED,
    attention_slots,
    place_attention,
    search_placements,
    slot_effects,
)

pytestmark = pytest.mark.slow

#: each identity an order of the same five colours, so that a histogram tells nothing
ORDERS = torch.tensor(list(permutations(range(5))))[
    torch.randperm(120, generator=torch.Generator().manual_seed(0))
]
COLOURS = torch.tensor(
    [[0.9, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2], [0.7, 0.3, 0.8]]
)
TINTS = torch.tensor([[1.0, 1.0, 1.0], [1.1, 0.95, 0.9], [0.9, 1.0, 1.1], [0.95, 1.1, 0.95]])


def crops(person: Tensor, camera: Tensor, g: torch.Generator) -> Tensor:
    """(N, 3, 64, 32) pictures of persons by cameras."""
    count = len(person)
    x = torch.rand(count, 3, 1, 1, generator=g).expand(-1, -1, 64, 32).clone()
    shifts = torch.randint(-4, 5, (count, 2), generator=g).tolist()
    bars = torch.rand(count, 3, generator=g).tolist()
    for i, (down, right) in enumerate(shifts):
        bands = COLOURS[ORDERS[person[i]]].repeat_interleave(10, 0).T  # 50 rows
        x[i, :, 7 + down : 57 + down, 8 + right : 24 + right] = bands[..., None]
        if bars[i][0] < 0.5:
            row = int(bars[i][1] * 54)
            x[i, :, row : row + 6] = bars[i][2]
    x = x * TINTS[camera][..., None, None]
    x = x * (0.6 + 0.6 * torch.rand(count, 1, 1, 1, generator=g))
    return x + 0.08 * torch.randn(x.shape, generator=g)


class Layer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Reid(nn.Module):
    """Three strided convolutions, pooled to rows, and a BN neck before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(3, 16), Layer(16, 32), Layer(32, 64))
        self.reduce = nn.Linear(64 * 8, 64)
        self.neck, self.classify = nn.BatchNorm1d(64), nn.Linear(64, 80, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(F.adaptive_avg_pool2d(self.layers(x), (8, 1)).flatten(1))


def batch_hard(features: Tensor, person: Tensor, margin: float = 0.3) -> Tensor:
    """Triplets of the farthest of the same and the nearest of another person."""
    squared = (features[:, None] - features[None]).square().sum(-1)
    distance = squared.clamp_min(1e-12).sqrt()
    same = person[:, None] == person
    far = distance.masked_fill(~same, -torch.inf).amax(1)
    near = distance.masked_fill(same, torch.inf).amin(1)
    return (far - near + margin).relu().mean()


def place(model: Reid, places: list[int], block=None) -> None:
    slots = attention_slots(model, torch.zeros(2, 3, 64, 32))
    place_attention(
        model,
        slots,
        places,
        block or (lambda slot: LightAttention(slot.dim, "channel", channels_last=False)),
    )


def trained(model: Reid, steps: int) -> Reid:
    g = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(steps):
        person = torch.randperm(80, generator=g)[:16].repeat_interleave(4)
        features = model(crops(person, torch.randint(0, 4, (64,), generator=g), g))
        logits = model.classify(model.neck(features))
        loss = F.cross_entropy(logits, person, label_smoothing=0.1) + batch_hard(features, person)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def scored(features) -> ReidScores:
    """One query by camera 0 and eight pictures by the other cameras of each of 40 new persons."""
    g = torch.Generator().manual_seed(3)
    query, gallery = torch.arange(80, 120), torch.arange(80, 120).repeat_interleave(8)
    at, others = torch.zeros(40, dtype=torch.long), torch.randint(1, 4, (320,), generator=g)
    one = F.normalize(features(crops(query, at, g)))
    many = F.normalize(features(crops(gallery, others, g)))
    return reid_scores(-one @ many.T, query, at, gallery, others)


def test_a_colour_histogram_is_at_chance() -> None:
    def histogram(x: Tensor) -> Tensor:
        bins = (x.clamp(0, 0.999) * 4).long()
        codes = bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2]
        return F.one_hot(codes.flatten(1), 64).float().mean(1)

    assert scored(histogram).mean_average_precision < 0.08


@pytest.mark.parametrize("kind", [None, "channel", "both"])
def test_four_hundred_steps(kind: str | None) -> None:
    torch.manual_seed(0)
    model = Reid()
    if kind is not None:
        place(model, [0, 1, 2], lambda s: LightAttention(s.dim, kind, channels_last=False))
    model = trained(model, 400)
    scores = scored(lambda x: model.neck(model(x)))
    assert scores.mean_average_precision >= 0.95 and scores.queries == 40
    if kind is not None:
        blocks = [m for name, m in model.named_modules() if name.endswith(ATTACHED)]
        assert len(blocks) == 3
        moved = [max(float(p.detach().abs().max()) for p in m.parameters()) for m in blocks]
        assert min(moved) > 1e-2


def test_a_search_over_stages_trains_each_placement() -> None:
    """Latency by parameters here: what is checked is that a search runs from end to end."""

    def evaluate(places: tuple[int, ...]) -> tuple[float, float]:
        torch.manual_seed(0)
        model = Reid()
        place(model, list(places))
        size = sum(p.numel() for p in model.parameters())
        model = trained(model, 60)
        return scored(lambda x: model.neck(model(x))).mean_average_precision, float(size)

    found = search_placements(2, evaluate)
    assert [p.places for p in found] == [(), (0,), (1,), (0, 1)]
    assert all(0.1 < p.score <= 1 for p in found)
    assert [effect.latency for effect in slot_effects(found, 2)] == [3.0, 3.0]
