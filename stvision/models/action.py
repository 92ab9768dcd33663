"""Action classifier: names what happens in a short clip, and gives its features.

A residual network whose convolutions are split into one over space and one over time, as R(2+1)D in
Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition" (2018), section
3.5, at a size that trains in minutes on 64 x 64 clips (about 1 M weights, 2 MiB in float16). Time is
never strided and no clip is mirrored in :func:`augment_clips`: which way things move is what tells
many actions apart.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class _TemporalConv(nn.Module):
    """Convolution of three frames at every pixel, on frames ``(B * T, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        height = x.shape[-2]
        # [(b t), c, h, w] -> [b, c, t, (h w)]; views when x is channels-last
        x = x.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(3)
        x = self.conv(x)
        return x.unflatten(3, (height, -1)).transpose(1, 2).flatten(0, 1)


class _Block(nn.Module):
    """Convolution over space, convolution over time, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.time = _TemporalConv(out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        # a block that starts as its shortcut trains at high rates (Goyal et al. 2017, section 5.1)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        residual = F.relu(self.norm1(self.space(x)))
        residual = self.norm2(self.time(residual, num_frames))
        return F.relu(self.shortcut(x) + residual)


class ActionClassifier(ModelMixin, ConfigMixin):
    """Video classifier on clips of any length and size.

    Args:
        class_names: names of the classes, in the order of the logits; saved in the config.
        widths: channels of the stages; each but the first halves height and width.
        depth: blocks of each stage.
        num_frames: frames of the clips it is trained on; recorded for users, other lengths work.
        sample_size: height and width of those clips in pixels; recorded for users.
        dropout: probability of dropping a feature before the last layer, in training.
        in_channels: colour channels.

    Raises:
        ValueError: fewer than two classes, or two of one name.
    """

    @register_to_config
    def __init__(
        self,
        class_names: Sequence[str] = ("no", "yes"),
        widths: Sequence[int] = (32, 64, 128, 160),
        depth: int = 2,
        num_frames: int = 12,
        sample_size: int = 64,
        dropout: float = 0.2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(class_names) < 2 or len(set(class_names)) != len(class_names):
            raise ValueError(
                f"class_names must be at least two different names, got {list(class_names)}"
            )
        self.stem = nn.Conv2d(in_channels, widths[0], 5, stride=2, padding=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for i in range(depth):
                blocks.append(_Block(channels, width, 2 if stage and not i else 1))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        # not `dropout`: diffusers answers that name from the config
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(channels, len(class_names))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.config["class_names"])

    @property
    def feature_dim(self) -> int:
        """Length of a feature vector."""
        return self.head.in_features

    def features(self, frames: Tensor) -> Tensor:
        """Mean over time and space of the last feature maps.

        Args:
            frames: ``(B, C, T, H, W)`` in [-1, 1], floating point.

        Returns:
            ``(B, feature_dim)``, in the dtype of the weights.

        Raises:
            TypeError: ``frames`` is not floating point.
            ValueError: ``frames`` has another number of axes or channels.
        """
        channels = self.config["in_channels"]
        if frames.ndim != 5 or frames.shape[1] != channels:
            raise ValueError(f"frames must be (B, {channels}, T, H, W), got {tuple(frames.shape)}")
        if not frames.is_floating_point():
            raise TypeError(f"frames must be floating point in [-1, 1], got {frames.dtype}")
        num_frames = frames.shape[2]
        x = frames.transpose(1, 2).flatten(0, 1).to(self.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x, num_frames)
        return x.mean(dim=(2, 3)).unflatten(0, (-1, num_frames)).mean(1)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of clips ``(B, C, T, H, W)`` in [-1, 1]; see :meth:`features`."""
        return self.head(self.drop(self.features(frames)))

    @torch.no_grad()
    def classify(self, frames: Tensor) -> list[str]:
        """Name of the most likely class of each clip ``(B, C, T, H, W)`` in [-1, 1]."""
        names = self.class_names
        return [names[i] for i in self.head(self.features(frames)).argmax(-1).tolist()]


def jitter_colours(
    frames: Tensor, amount: float, generator: torch.Generator | None = None
) -> Tensor:
    """Random saturation, contrast and brightness, one draw a clip for all its frames.

    Args:
        frames: ``(B, C, T, H, W)`` in [-1, 1], floating point, on any device.
        amount: largest relative change of each, 0 to below 1.
        generator: source of all draws, on the device of ``frames``.

    Returns:
        A new tensor of the shape and dtype of ``frames``, not clamped.

    Raises:
        ValueError: ``amount`` lies outside of that.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"the change of colours must be at least 0 and below 1, got {amount}")

    def uniform(low: float, high: float) -> Tensor:
        draw = torch.rand(len(frames), generator=generator, device=frames.device)
        return (low + (high - low) * draw).view(-1, 1, 1, 1, 1).to(frames.dtype)

    grey = frames.mean(dim=1, keepdim=True)
    x = grey + (frames - grey) * uniform(1 - amount, 1 + amount)
    centre = x.mean(dim=(1, 2, 3, 4), keepdim=True)
    x = centre + (x - centre) * uniform(1 - amount, 1 + amount)
    return x + uniform(-amount, amount)


def augment_clips(
    frames: Tensor,
    *,
    max_shift: int = 4,
    jitter: float = 0.2,
    degrade: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random shift, colour and degradation of training clips, one draw a clip for all its frames.

    The degradation (half resolution and back, and noise) keeps a classifier that is trained on
    real clips from leaning on fine texture, which clips out of a decoder lack. Mirroring and time
    reversal are left out on purpose: they change what happens.

    Args:
        frames: ``(B, C, T, H, W)`` in [-1, 1], floating point, on any device.
        max_shift: largest shift in pixels in either direction; the border is repeated.
        jitter: largest relative change of brightness, contrast and saturation.
        degrade: probability that a clip is blurred by halving, and, apart from that, given noise
            of a standard deviation of up to 0.1.
        generator: source of all draws, on the device of ``frames``.

    Returns:
        A new tensor of the shape and dtype of ``frames``, clamped to [-1, 1].

    Raises:
        ValueError: ``frames`` is not 5-D, or ``max_shift`` or ``jitter`` is negative.
    """
    if frames.ndim != 5:
        raise ValueError(f"frames must be (B, C, T, H, W), got {tuple(frames.shape)}")
    if max_shift < 0 or not 0 <= jitter < 1:
        raise ValueError(
            f"max_shift must be >= 0 and jitter in [0, 1), got {max_shift} and {jitter}"
        )
    batch, _, _, height, width = frames.shape
    device = frames.device

    def uniform(low: float, high: float) -> Tensor:
        draw = torch.rand(batch, generator=generator, device=device)
        return (low + (high - low) * draw).view(-1, 1, 1, 1, 1).to(frames.dtype)

    def shifted(size: int) -> Tensor:
        draw = torch.randint(
            -max_shift, max_shift + 1, (batch, 1), generator=generator, device=device
        )
        return (torch.arange(size, device=device) + draw).clamp(0, size - 1)

    rows, columns = shifted(height), shifted(width)
    item = torch.arange(batch, device=device)[:, None, None]
    # indexing with (item, rows, columns) puts those three axes in front
    x = frames.permute(0, 3, 4, 1, 2)[item, rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 4, 1, 2)

    coarse = F.avg_pool3d(x, (1, 2, 2), ceil_mode=True)
    coarse = F.interpolate(coarse.flatten(1, 2), size=(height, width), mode="bilinear")
    x = torch.where(uniform(0, 1) < degrade, coarse.unflatten(1, x.shape[1:3]), x)

    x = jitter_colours(x, jitter, generator)

    noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
    strength = uniform(0, 0.1) * (uniform(0, 1) < degrade)
    return (x + noise * strength).clamp(-1, 1)
