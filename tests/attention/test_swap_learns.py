"""A square whose next place needs space and time together: Swap-CA against the plain sum."""

import pytest
import torch
from torch import Tensor, nn

from stvision.attention import SwapAttention
from stvision.layers.feed_forward import GatedFeedForward
from stvision.layers.frames import FrameConv

SIZE, FRAMES, WIDTH = 12, 3, 16


def squares(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, T, S, S, 1) of a 3 x 3 square on a torus, and the frame (count, S, S) after them."""
    place = torch.randint(0, SIZE, (count, 1, 2), generator=generator)
    speed = torch.randint(-2, 3, (count, 1, 2), generator=generator)
    corners = place + speed * torch.arange(FRAMES + 1)[:, None]  # (count, T + 1, 2)
    axis = torch.arange(SIZE)
    inside = (axis - corners[..., None]) % SIZE < 3  # (count, T + 1, 2, S)
    clips = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).float()
    return clips[:, :-1, ..., None], clips[:, -1]


class Toy(nn.Module):
    """A branch over space and one over time, joined, and the picture after the last frame."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.enter = nn.Linear(1, WIDTH)
        self.spatial = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")
        self.temporal = FrameConv(WIDTH, WIDTH, 3)
        self.mark = nn.Parameter(0.1 * torch.randn(FRAMES, SIZE, SIZE, WIDTH))
        self.join = SwapAttention(WIDTH, 2, window=(None, SIZE, SIZE), norm_num_groups=4)
        if join == "sum":  # the weights of Swap-CA go to a feed-forward on the sum
            self.join = GatedFeedForward(WIDTH, 6)
        self.leave = nn.Linear(WIDTH, 1)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, S, S) for clips (B, T, S, S, 1)."""
        x = self.enter(clips) + self.mark
        z_s = self.spatial(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view(x.shape)
        pixels = x.permute(0, 2, 3, 1, 4)
        z_t = self.temporal(pixels.flatten(0, 2)).view(pixels.shape).permute(0, 3, 1, 2, 4)
        if isinstance(self.join, SwapAttention):
            joined = self.join(z_s.relu(), z_t.relu())
        else:
            joined = z_s.relu() + z_t.relu()
            joined = joined + self.join(joined)
        return self.leave(joined[:, -1]).squeeze(-1)


def trained_loss(join: str, steps: int) -> tuple[float, int]:
    torch.manual_seed(0)
    model = Toy(join)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        clips, following = squares(32, generator)
        loss = nn.functional.binary_cross_entropy_with_logits(model(clips), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50, sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_swap_learns_what_the_sum_of_branches_cannot(capsys) -> None:
    """Reported rather than judged beyond a clear tie: the sum must not be the better of the two."""
    (swap, swap_size), (plain, plain_size) = (trained_loss(j, 1500) for j in ("swap", "sum"))
    with capsys.disabled():
        print(
            f"\ncross-entropy of the next frame: Swap-CA {swap:.4f} ({swap_size} weights), "
            f"sum {plain:.4f} ({plain_size} weights)"
        )
    assert abs(swap_size / plain_size - 1) < 0.05
    assert swap < plain
