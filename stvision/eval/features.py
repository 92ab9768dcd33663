"""Feature extractors for Fréchet distances, and the names that such distances carry.

"FVD" in print means one network, I3D trained on Kinetics-400. Here only that extractor uses the
name; every other distance says which network it comes from, over how many frames and at what size.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from stvision.models.action import ActionClassifier


@runtime_checkable
class FeatureExtractor(Protocol):
    """What a Fréchet distance needs to know of a network.

    Attributes:
        name: network and weights, such as ``"I3D i3d_torchscript.pt"``.
        metric: name of the distance, ``"FVD"`` for I3D alone.
        num_frames: frames the network sees, other lengths being resampled; ``None`` for all.
        size: height and width the network sees, clips being resized; ``None`` for their own.
    """

    name: str
    metric: str
    num_frames: int | None
    size: tuple[int, int] | None

    def __call__(self, clips: Tensor) -> Tensor:
        """Features ``(B, D)`` of clips ``(B, C, T, H, W)`` in [0, 1]."""
        ...


def distance_name(extractor: FeatureExtractor, num_frames: int, height: int, width: int) -> str:
    """Full name of the distance: metric, network, frames and resize of clips of the given size."""
    seen = extractor.num_frames or num_frames
    frames = f"{num_frames} frames"
    if seen != num_frames:
        frames += f" resampled to {seen}"
    resize = f"{height}x{width}"
    if extractor.size is None or extractor.size == (height, width):
        resize += " not resized"
    else:
        resize += f" resized to {extractor.size[0]}x{extractor.size[1]} bilinear"
    return f"{extractor.metric} ({extractor.name}, {frames}, {resize})"


def fit_clips(clips: Tensor, num_frames: int | None, size: tuple[int, int] | None) -> Tensor:
    """Clips ``(B, C, T, H, W)`` at the length and size a network wants.

    Frames are taken at evenly spread places, first and last included (repeated when there are too
    few); images are resized bilinearly, with antialiasing when they shrink.
    """
    if clips.ndim != 5 or not clips.is_floating_point():
        raise ValueError(
            f"clips must be floating point (B, C, T, H, W) in [0, 1], got {tuple(clips.shape)} "
            f"{clips.dtype}"
        )
    if num_frames is not None and clips.shape[2] != num_frames:
        places = torch.linspace(0, clips.shape[2] - 1, num_frames, dtype=torch.float64)
        clips = clips[:, :, places.round().long().to(clips.device)]
    if size is not None and clips.shape[-2:] != size:
        batch, frames = clips.shape[0], clips.shape[2]
        flat = clips.transpose(1, 2).flatten(0, 1)
        flat = F.interpolate(flat, size=size, mode="bilinear", antialias=True)
        clips = flat.unflatten(0, (batch, frames)).transpose(1, 2)
    return clips


class ClassifierFeatures:
    """Features of this project's own :class:`~stvision.models.action.ActionClassifier`.

    Args:
        model: the classifier; used as it stands (device, dtype), in evaluation mode.
        name: what the weights are called in reports.
    """

    metric = "Fréchet distance"
    num_frames: int | None = None
    size: tuple[int, int] | None = None

    def __init__(self, model: ActionClassifier, name: str = "ActionClassifier") -> None:
        self.model = model.eval()
        self.name = name

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        return self.model.features(fit_clips(clips, None, None).to(self.model.device) * 2 - 1)


class I3DFeatures:
    """Features of an I3D network in a TorchScript file, as used for FVD.

    The file that is passed around for FVD takes 8-bit values and has the arguments ``rescale``,
    ``resize`` and ``return_features``: those are used when the scripted ``forward`` has them. Any
    other scripted network gets (B, 3, T, 224, 224) in [-1, 1]. TorchScript runs what the file says,
    so load only a file that you trust. I3D needs at least 9 frames.

    Args:
        path: TorchScript file.
        device: where it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not TorchScript.
    """

    metric = "FVD"
    num_frames: int | None = None
    size: tuple[int, int] | None = (224, 224)

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no TorchScript file of I3D at {path}")
        try:
            self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file: {error}") from None
        self.name = f"I3D {path.name}"
        self.device = torch.device(device)
        schema = getattr(self.network.forward, "schema", None)
        known = {argument.name for argument in schema.arguments} if schema is not None else set()
        self._own_resize = {"rescale", "resize", "return_features"} <= known

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        clips = clips.to(self.device, torch.float32)
        if self._own_resize:
            features = self.network(clips * 255, rescale=True, resize=True, return_features=True)
        else:
            features = self.network(fit_clips(clips, None, self.size) * 2 - 1)
        return features.flatten(1)


class VideoMAEFeatures:
    """Mean token of the last layer of a VideoMAE encoder from transformers.

    Args:
        model: folder or hub name of a ``VideoMAEModel`` (also inside a classifier's weights).
        device: where it runs.
        local_files_only: never ask the hub.
    """

    metric = "Fréchet distance"

    def __init__(
        self, model: str, device: str | torch.device = "cpu", *, local_files_only: bool = False
    ) -> None:
        from stvision.optional import mend_torchvision

        mend_torchvision()  # before transformers is first imported

        from transformers import VideoMAEModel

        self.network: Any = VideoMAEModel.from_pretrained(model, local_files_only=local_files_only)
        self.network.eval().to(device)
        side = self.network.config.image_size
        self.name = f"VideoMAE {Path(model).name}"
        self.num_frames: int | None = self.network.config.num_frames
        height, width = (side, side) if isinstance(side, int) else side
        self.size: tuple[int, int] | None = (height, width)
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1, 1)
        self._std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1, 1)

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        clips = fit_clips(clips.to(self._mean.device, torch.float32), self.num_frames, self.size)
        pixels = ((clips - self._mean) / self._std).transpose(1, 2)
        return self.network(pixel_values=pixels).last_hidden_state.mean(1)
