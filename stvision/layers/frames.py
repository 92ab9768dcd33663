"""Image layers on clips whose frames are folded into the batch: (B·T, C, H, W)."""

import torch
from torch import Tensor, nn


def is_channels_last(x: Tensor) -> bool:
    """Whether a (N, C, H, W) tensor keeps the channels of a pixel side by side."""
    return x.shape[1] > 1 and x.stride(1) == 1


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm that also takes groups of a single number, which torch's refuses.

    Args:
        x: (N, C, ...).
        groups: of channels that share statistics; divides C.
        weight: (C,), ``None`` for ones.
        bias: (C,), ``None`` for zeros.
        eps: added to variances.

    Returns:
        Tensor like ``x``; a number alone in its group lies at its mean, so the bias comes out.
    """
    return torch.group_norm(x, groups, weight, bias, eps, torch.backends.cudnn.enabled)


class GroupNorm(nn.GroupNorm):
    """:func:`group_norm` with the arguments and keys of torch's module."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_norm_volume(norm: nn.GroupNorm, x: Tensor, frames: int, norm_frames: int) -> Tensor:
    """Apply ``norm`` and show the result as a volume with channels last.

    Args:
        norm: group norm over C channels.
        x: (B·T, C, H, W), frames of a clip consecutive.
        frames: T.
        norm_frames: frames that share statistics, T or 1.

    Returns:
        (B, T, H, W, C), a view of what the norm wrote.
    """
    n, c, h, w = x.shape
    batch = n // frames
    if _crashes_backward(norm, x):
        x = x.contiguous()
    if norm_frames == 1:
        return norm(x).permute(0, 2, 3, 1).unflatten(0, (batch, frames))
    if is_channels_last(x):
        # the rows of all frames stacked are one tall channels-last image
        tall = x.permute(0, 2, 3, 1).reshape(batch, frames * h, w, c).permute(0, 3, 1, 2)
        return norm(tall).permute(0, 2, 3, 1).unflatten(1, (frames, h))
    return norm(x.unflatten(0, (batch, frames)).transpose(1, 2)).permute(0, 2, 3, 4, 1)


def _crashes_backward(norm: nn.GroupNorm, x: Tensor) -> bool:
    """Whether torch's backward of a channels-last group norm would read a missing gradient.

    On the CPU it ends the process when weights are trained and the input is not (torch 2.13).
    """
    trained = norm.weight is not None and norm.weight.requires_grad and torch.is_grad_enabled()
    return trained and not x.requires_grad and x.device.type == "cpu" and is_channels_last(x)


def group_norm_frames(norm: nn.GroupNorm, x: Tensor, norm_frames: int) -> Tensor:
    """Apply ``norm`` with statistics over (norm_frames, H, W) jointly.

    Args:
        norm: group norm over C channels.
        x: (B·T, C, H, W), frames of a clip consecutive.
        norm_frames: frames that share statistics; 1 is the ordinary norm of images.

    Returns:
        (B·T, C, H, W). No copy is made for channels-last inputs where the norm's kernel keeps
        that layout (CPU); contiguous inputs are reordered once on each side, for B = 1 on one.
    """
    if norm_frames == 1:
        return norm(x)
    volume = group_norm_volume(norm, x, norm_frames, norm_frames)
    if is_channels_last(x):
        return volume.flatten(0, 1).permute(0, 3, 1, 2)
    return volume.permute(0, 1, 4, 2, 3).flatten(0, 1)


def add_per_clip(x: Tensor, per_clip: Tensor, frames: int) -> Tensor:
    """``x + per_clip``, the same (B, C) values for every frame and pixel of a clip.

    Args:
        x: (B·T, C, H, W).
        per_clip: (B, C).
        frames: T.
    """
    if frames == 1:
        return x + per_clip[:, :, None, None]
    folded = x.unflatten(0, (per_clip.shape[0], frames))
    return (folded + per_clip[:, None, :, None, None]).flatten(0, 1)


class PointwiseConv(nn.Conv2d):
    """1 x 1 convolution on channels-last tokens, with the weight layout (out, in, 1, 1) of a Conv2d.

    Takes (..., in_channels) and returns (..., out_channels): the matrix product that the
    convolution is, without moving the channels to the front.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.flatten(1), self.bias)


class FrameConv(nn.Conv1d):
    """Convolution over the frames of each pixel, zero-padded, on channels-last sequences.

    Takes (N, T, C) and returns (N, T, C'), with the weight layout (C', C, k) of a Conv1d: the
    matrix product that the convolution is, without moving the channels.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: frames k, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, input: Tensor) -> Tensor:
        size, frames = self.kernel_size[0], input.shape[1]
        padded = nn.functional.pad(input, (0, 0, size // 2, size // 2))
        shifted = [padded[:, k : k + frames] for k in range(size)]
        weight = self.weight.transpose(1, 2).flatten(1)  # (C', k C) for frames side by side
        return nn.functional.linear(torch.cat(shifted, dim=-1), weight, self.bias)
