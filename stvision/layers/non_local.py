"""The non-local block (Wang et al. 2018, section 3): all places of a grid attend to all, beside it.

The form of the embedded Gaussian, ``x + out(softmax(query key^T) value)``, one head, no scale.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.light_attention import from_clip, to_clip


class NonLocalBlock(nn.Module):
    """Attention of all places of (B, T, H, W, C) to all, added to them; fresh, the identity.

    Args:
        dim: channels C.
        inner: channels of queries, keys and values; ``None`` for half of C.
        over_time: attend to the places of all frames; otherwise each frame is alone.
        channels_last: ``False`` to take (B, C, H, W) and (B, C, T, H, W) as convolutions give them.

    Raises:
        ValueError: fewer than one channel.
    """

    def __init__(
        self,
        dim: int,
        inner: int | None = None,
        *,
        over_time: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        inner = max(1, dim // 2) if inner is None else inner
        for name, size in (("dim", dim), ("inner", inner)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.dim, self.over_time, self.channels_last = dim, over_time, channels_last
        self.query, self.key, self.value = (nn.Linear(dim, inner) for _ in range(3))
        self.out = nn.Linear(inner, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Grid to grid of the same shape."""
        grid = to_clip(x, self.dim, self.channels_last)
        places = grid.flatten(1, 3) if self.over_time else grid.flatten(2, 3).flatten(0, 1)
        mixed = F.scaled_dot_product_attention(
            self.query(places)[:, None],
            self.key(places)[:, None],
            self.value(places)[:, None],
            scale=1.0,
        )
        added = self.out(mixed[:, 0]).reshape(grid.shape)
        return from_clip(grid + added.to(grid.dtype), x, self.channels_last)
