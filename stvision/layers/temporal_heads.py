"""Heads that read the features of a clip's frames (Ma et al. 2017): TS-LSTM and Temporal-Inception.

Both take (B, T, D), one vector of a frozen network for each of some frames spread over the video, and
give class scores. The features of two streams are laid side by side in D.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def segment_max(x: Tensor, segments: int) -> Tensor:
    """Greatest value of each channel in each of ``segments`` runs of equal length.

    Args:
        x: (B, T, D); the last ``T % segments`` steps are left out.
        segments: S, 1 to T.

    Returns:
        (B, S, D).

    Raises:
        ValueError: the shape, or fewer steps than segments.
    """
    return _segments(x, segments).amax(2)


def _segments(x: Tensor, segments: int) -> Tensor:
    if x.ndim != 3 or not 1 <= segments <= x.shape[1]:
        raise ValueError(
            f"x must be (B, T, D) with at least segments={segments} (1 or more) steps, "
            f"got {tuple(x.shape)}"
        )
    length = x.shape[1] // segments
    return x[:, : segments * length].unflatten(1, (segments, length))


class _LSTM(nn.Module):
    """The last output of an LSTM: (B, S, D) to (B, hidden). Keys and beginnings are torch's.

    Written out, for torch's graphs take no ``nn.LSTM`` whole; the steps are few.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden, dim))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * hidden))
        for p in self.parameters():
            nn.init.uniform_(p, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden_size)
        for entering in F.linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1):
            gates = entering + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            enter, forget, new, leave = gates.chunk(4, dim=-1)
            c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
            h = leave.sigmoid() * c.tanh()
        return h


class TSLSTM(nn.Module):
    """Temporal segment LSTM: norm and maximum in fixed segments, an LSTM over them, its last output.

    The published configuration takes 25 frames in 3 segments. Its LSTM had connections from the
    cells to the gates; this one is torch's, without them.

    Args:
        dim: channels D of the features.
        num_classes: outputs; 0 to stop before the linear layer.
        segments: S; each has a batch norm of its own, shared by its steps. In training each step
            is normalised by its own statistics.
        hidden: channels of the LSTM.
        dropout: before the linear layer.
        init_range: all parameters begin uniform in plus and minus this, as published; ``None`` for
            torch's own beginnings.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        segments: int = 3,
        hidden: int = 512,
        dropout: float = 0.0,
        init_range: float | None = 0.1,
    ) -> None:
        super().__init__()
        _check_head(dim, num_classes)
        if segments < 1 or hidden < 1:
            raise ValueError(f"segments and hidden must be at least 1, got {segments}, {hidden}")
        self.dim, self.num_classes, self.num_features = dim, num_classes, hidden
        self.segments = segments
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(segments))
        self.lstm = _LSTM(dim, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()
        if init_range is not None:
            for p in self.parameters():
                nn.init.uniform_(p, -init_range, init_range)

    def pool(self, x: Tensor) -> Tensor:
        """Norm and maximum of each segment: (B, T, D) to (B, S, D)."""
        parts = _segments(_features(x, self.dim), self.segments)
        pooled = []
        for i, norm in enumerate(self.norms):
            # in training the norm sees one step at a time
            steps = [norm(step) for step in parts[:, i].unbind(1)]
            pooled.append(torch.stack(steps, 1).amax(1))
        return torch.stack(pooled, 1)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, T, D), T at least the number of segments, to scores (B, classes).

        ``pre_logits`` leaves the linear layer out: (B, hidden).
        """
        x = self.drop(self.norm(self.lstm(self.pool(x))))
        return x if pre_logits else cast(Tensor, self.fc(x))


class _Branch(nn.Module):
    """Convolution over time, batch norm, ReLU, maximum over time."""

    def __init__(self, in_dim: int, dim: int, taps: int, pool: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, (1, taps), padding=(0, taps // 2))
        self.norm = nn.BatchNorm2d(dim)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), (1, self.pool))


class TemporalInception(nn.Module):
    """Convolutions over time with filters shared by all features, down to one step.

    Features are rows and steps columns of an image. Four modules of parallel branches halve the
    steps, the last divides by three, so 24 to 47 steps come down to one; 1 x 1 convolutions then
    leave one channel of D values.

    Args:
        dim: features D.
        num_classes: outputs; 0 to stop before the last linear layer.
        taps: steps of the filters of the parallel branches, odd. With a single one and
            ``grow=False`` it is the published variant like VGG.
        grow: double the channels of each branch from module to module, from 1 on.
        hidden: channels before the last linear layer.
        dropout: of the channel that is left, and before the last linear layer.

    Raises:
        ValueError: sizes that do not fit.
    """

    #: what each module divides the steps by, rounding down
    pools = (2, 2, 2, 3)

    def __init__(
        self,
        dim: int,
        num_classes: int,
        taps: Sequence[int] = (5, 7),
        grow: bool = True,
        hidden: int = 1024,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        _check_head(dim, num_classes)
        if not taps or any(k < 1 or k % 2 == 0 for k in taps):
            raise ValueError(f"taps must be odd numbers of at least 1, got {tuple(taps)}")
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.dim, self.num_classes, self.num_features = dim, num_classes, hidden
        self.branches = nn.ModuleList()
        width = 1
        for i, pool in enumerate(self.pools):
            out = 2**i if grow else 1
            self.branches.append(nn.ModuleList(_Branch(width, out, k, pool) for k in taps))
            width = out * len(taps)
        self.reduce = nn.Sequential()
        while width > 1:
            narrow = max(1, width // 4 if width == 16 else width // 2)
            self.reduce.extend([nn.Conv2d(width, narrow, 1), nn.BatchNorm2d(narrow), nn.ReLU()])
            width = narrow
        self.channel_drop = nn.Dropout2d(dropout)
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, T, D) to scores (B, classes).

        ``pre_logits`` leaves the last linear layer out: (B, hidden).

        Raises:
            ValueError: another shape, or steps that do not come down to one: they must be 24 to 47.
        """
        x = _features(x, self.dim)
        steps = x.shape[1]
        for pool in self.pools:
            steps //= pool
        if steps != 1:
            raise ValueError(f"x must have 24 to 47 steps, got {x.shape[1]}")
        x = x.mT[:, None]  # (B, 1, D, T)
        for module in self.branches:
            x = torch.cat([branch(x) for branch in cast(nn.ModuleList, module)], 1)
        x = self.channel_drop(self.reduce(x))
        x = self.drop(F.relu(self.norm(self.fc1(x.flatten(1)))))
        return x if pre_logits else cast(Tensor, self.fc(x))


def _check_head(dim: int, num_classes: int) -> None:
    if dim < 1 or num_classes < 0:
        raise ValueError(
            f"dim must be at least 1 and num_classes at least 0, got {dim} and {num_classes}"
        )


def _features(x: Tensor, dim: int) -> Tensor:
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must be (B, T, {dim}), got {tuple(x.shape)}")
    return x
