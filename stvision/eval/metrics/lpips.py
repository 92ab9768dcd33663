"""Shift-tolerant LPIPS: perceptual distance that forgives a shift of a pixel.

Ghildyal and Liu, "Shift-tolerant Perceptual Similarity Metric" (2022): an AlexNet whose strides are
replaced by blurred pooling, compared as in Zhang et al., "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric" (2018), equation 1. The trained weights, trunk and heads, are a file
inside the distribution ``stlpips-pytorch`` (BSD-2-Clause); only that file is read, none of its code
is imported, and nothing is downloaded.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.eval.metrics.checks import check_images

DISTRIBUTION = "stlpips-pytorch"
WEIGHTS = "alex_shift_tolerant.pth"
#: each convolution: prefix in the weights, padding in pixels
_LAYERS = (
    ("net.slice1.0", 2),
    ("net.slice2.5", 2),
    ("net.slice3.9", 1),
    ("net.slice4.11", 1),
    ("net.slice5.13", 1),
)
_BLURS = ("net.slice1.1", "net.slice2.4", "net.slice3.8")
#: the trunk halves the image three times and the last reflection needs three pixels
MIN_SIDE = 21


def packaged_weights() -> Path:
    """The weights file inside the installed distribution.

    Raises:
        ImportError: the distribution is not installed, or it lacks the file.
    """
    install = f"install it with: pip install --no-deps {DISTRIBUTION}==0.0.2"
    try:
        listed = files(DISTRIBUTION) or ()
    except PackageNotFoundError:
        raise ImportError(
            f"shift-tolerant LPIPS needs the weights in the distribution {DISTRIBUTION}, "
            f"which is not installed; {install}"
        ) from None
    for file in listed:
        path = Path(str(file.locate()))
        if file.name == WEIGHTS and path.is_file():
            return path
    raise ImportError(f"the installed {DISTRIBUTION} holds no file {WEIGHTS}; re{install}")


class ShiftTolerantLPIPS(nn.Module):
    """Perceptual distance between images, 0 for equal ones; lower is better.

    Seen on a standard sequence (176 x 144): one pixel of shift 0.004, neighbouring frames 0.0045,
    frames two seconds apart 0.125. Distances depend on the size of the images, so compare only at
    one size. On a GPU the convolutions follow torch's TF32 setting, which moves the distance by
    about a part in a thousand.

    Args:
        weights: a state dict file laid out as the packaged one; ``None`` takes the packaged one.

    Raises:
        ImportError: ``weights`` is ``None`` and the distribution that holds them is missing.
        ValueError: the file lacks one of the network's tensors.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = packaged_weights() if weights is None else Path(weights)
        # a pickle from outside the project, saved on a GPU: tensors only, and to the CPU
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.register_buffer("shift", state["scaling_layer.shift"])
            self.register_buffer("scale", state["scaling_layer.scale"])
            for i, (name, _) in enumerate(_LAYERS):
                self.register_buffer(f"weight{i}", state[f"{name}.weight"])
                self.register_buffer(f"bias{i}", state[f"{name}.bias"])
                self.register_buffer(f"head{i}", state[f"lin{i}.model.1.weight"])
            for i, name in enumerate(_BLURS):
                self.register_buffer(f"blur{i}", state[f"{name}.filt"])
        except KeyError as error:
            raise ValueError(f"{path} lacks the tensor {error}") from None
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """The five feature maps of images ``(N, 3, H, W)`` in [-1, 1], not normalised."""
        x = (images - self.shift) / self.scale
        maps = []
        for i, (_, padding) in enumerate(_LAYERS):
            if i in (1, 2):
                x = self._blur_pool(F.max_pool2d(x, 3, stride=1), i)
            x = F.conv2d(x, getattr(self, f"weight{i}"), getattr(self, f"bias{i}"), padding=padding)
            if i == 0:
                # the first layer pools before its rectifier, the others after the previous one
                x = self._blur_pool(x, 0)
            x = F.relu(x)
            maps.append(x)
        return maps

    def _blur_pool(self, x: Tensor, i: int) -> Tensor:
        x = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(x, getattr(self, f"blur{i}"), stride=2, groups=x.shape[1])

    @torch.no_grad()
    def forward(self, prediction: Tensor, target: Tensor, *, batch_size: int = 64) -> Tensor:
        """Distance of each pair of images.

        Args:
            prediction: ``(..., 3, H, W)`` in [0, 1], floating point, sides of at least 21 pixels.
            target: shape and device of ``prediction``.
            batch_size: images put through the network at a time; bounds memory.

        Returns:
            ``(...)``, not negative, in the dtype of the weights (float32 unless moved).

        Raises:
            TypeError: an input is not floating point.
            ValueError: the shapes differ, are too small, or do not have three channels.
        """
        check_images(prediction, target, min_side=MIN_SIDE)
        if prediction.shape[-3] != 3:
            raise ValueError(f"LPIPS needs three channels (RGB), got {prediction.shape[-3]}")
        dtype = self.shift.dtype
        distances = []
        pairs = zip(
            prediction.flatten(0, -4).split(batch_size)
            if prediction.ndim > 3
            else [prediction[None]],
            target.flatten(0, -4).split(batch_size) if target.ndim > 3 else [target[None]],
            strict=True,
        )
        for x, y in pairs:
            maps = self.features(torch.cat([x, y]).to(dtype) * 2 - 1)
            total = torch.zeros(len(x), dtype=dtype, device=x.device)
            for i, features in enumerate(maps):
                unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
                a, b = unit.chunk(2)
                total += F.conv2d((a - b).square(), getattr(self, f"head{i}")).mean(dim=(1, 2, 3))
            distances.append(total)
        return torch.cat(distances).view(prediction.shape[:-3])
