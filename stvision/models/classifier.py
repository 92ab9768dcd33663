"""Video classifiers around any backbone by name: one folder with options, class names and weights.

:class:`VideoClassifier` takes clips as the trainings have them, in [-1, 1], brings them to the colours
that the backbone's weights were trained on, and gives scores of named classes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stvision.layers import TEMPORAL_HEADS
from stvision.layers.vision import DropPath, drop_path_rates
from stvision.models.backbones import BACKBONES, backbone_options, create_backbone
from stvision.models.halonet import HALONET_MODELS, HaloStage
from stvision.models.surface import check_options, option_names
from stvision.models.two_stream import TwoStream

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
KIND = "stvision video classifier"

#: what image weights of the backbones were trained on: mean and deviation of red, green and blue
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: a name beside those of :data:`BACKBONES`, for weights that a library of image backbones brings
TWO_STREAM = "two-stream"


def build_network(
    backbone: str,
    num_classes: int,
    frames: int,
    options: Mapping[str, Any] | None = None,
    pretrained: str | Path | None = None,
) -> nn.Module:
    """A network from clips (B, 3, T, H, W) to (B, classes).

    Args:
        backbone: a key of :data:`stvision.models.backbones.BACKBONES`, or ``"two-stream"`` for
            :class:`stvision.models.two_stream.TwoStream` with all its arguments as options.
        num_classes: outputs of its head.
        frames: T of the clips that it is made for.
        options: further arguments of the model's class, as plain data. HaloNet's ``stages`` may be
            lists such as ``["ccch", 512, 2, 8]``. Two streams read frames alone.
        pretrained: see :func:`stvision.models.backbones.create_backbone`; not for ``"two-stream"``,
            whose image backbones have ``pretrained`` among the options.

    Raises:
        ValueError: an unknown name, or options that the model does not take.
        FileNotFoundError: ``pretrained`` names nothing that exists.
    """
    given = dict(options or {})
    if backbone != TWO_STREAM and backbone not in BACKBONES:
        known = ", ".join([*sorted(BACKBONES), TWO_STREAM])
        raise ValueError(f"backbone must be one of {known}, got {backbone!r}")
    check_options(backbone, given, _allowed_options(backbone, given))
    if given.get("flow_backbone") is not None:
        raise ValueError(
            "options.flow_backbone must be none, for a classifier is given frames alone; got "
            f"{given['flow_backbone']!r}"
        )
    try:
        if backbone == TWO_STREAM:
            if pretrained is not None:
                raise ValueError(
                    "the weights of 'two-stream' are options.pretrained, those of its image "
                    f"backbone; got pretrained={str(pretrained)!r}"
                )
            return TwoStream(num_classes=num_classes, **given)
        if backbone in HALONET_MODELS and "stages" in given:
            given["stages"] = tuple(
                row if isinstance(row, HaloStage) else HaloStage(*row) for row in given["stages"]
            )
        return create_backbone(
            backbone, pretrained, num_classes=num_classes, frames=frames, **given
        )
    except TypeError as error:
        names = ", ".join(given) or "none"
        raise ValueError(f"options of {backbone!r} ({names}) do not fit: {error}") from error


def _allowed_options(backbone: str, given: Mapping[str, Any]) -> list[str]:
    if backbone != TWO_STREAM:
        return backbone_options(backbone)
    head = given.get("head", "ts-lstm")
    inner = [TEMPORAL_HEADS[head]] if head in TEMPORAL_HEADS else list(TEMPORAL_HEADS.values())
    return option_names(TwoStream, *inner, without=("num_classes", "in_chans"))


def set_drop_path(net: nn.Module, rate: float) -> None:
    """Let the chance to drop a branch grow linearly over the network's blocks from 0 to ``rate``.

    Args:
        net: with :class:`stvision.layers.vision.DropPath` in its blocks.
        rate: of the last block, at least 0 and below 1.

    Raises:
        ValueError: another rate, or a network that drops no branches.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop path rate must be at least 0 and below 1, got {rate}")
    found = [module for module in net.modules() if isinstance(module, DropPath)]
    if not found:
        raise ValueError(f"{type(net).__name__} has no branches to drop; leave drop_path out")
    for module, value in zip(found, drop_path_rates(rate, len(found)), strict=True):
        module.rate = value


class VideoClassifier(nn.Module):
    """A backbone, the colours it expects, and the names of its classes.

    Args:
        backbone: see :func:`build_network`.
        class_names: in the order of the scores; at least two, all different.
        frames: T of the clips.
        size: rows and columns of the clips; ``None`` where any will do.
        options: see :func:`build_network`.
        pretrained: see :func:`build_network`; not kept by :meth:`save`.
        mean: of each colour in [0, 1] where the backbone expects zero.
        std: of each colour in [0, 1] where the backbone expects one.
        reading: how clips were read in training: ``label`` (key of their class), ``kind`` of data
            set, ``options`` of its reader; kept with the model for whoever tests it.

    Raises:
        ValueError: names, colours or options that do not fit.
    """

    def __init__(
        self,
        backbone: str,
        class_names: Sequence[str],
        frames: int,
        size: Sequence[int] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        pretrained: str | Path | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        reading: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        names = tuple(class_names)
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(
                f"class_names must be at least two different names, got {len(names)}, "
                f"{len(set(names))} of them different: {', '.join(names[:5])}"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers, std above 0, got {tuple(mean)}, {tuple(std)}"
            )
        self.backbone, self.class_names, self.frames = backbone, names, frames
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.options, self.reading = dict(options or {}), dict(reading or {})
        self.net = build_network(backbone, len(names), frames, options, pretrained)
        # (x + 1) / 2, then less the mean and by the deviation, as one factor and one addition
        centre, spread = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        self.mean, self.std = tuple(mean), tuple(std)
        shape = (1, 3, 1, 1, 1)
        self.register_buffer("factor", (0.5 / spread).view(shape), persistent=False)
        self.register_buffer("shift", ((0.5 - centre) / spread).view(shape), persistent=False)

    def prepare(self, frames: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] to what the backbone reads.

        Raises:
            TypeError: they are not floating point.
            ValueError: another shape.
        """
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise ValueError(f"frames must be (B, 3, T, H, W), got {tuple(frames.shape)}")
        if not frames.is_floating_point():
            raise TypeError(f"frames must be floating point in [-1, 1], got {frames.dtype}")
        return frames * cast(Tensor, self.factor) + cast(Tensor, self.shift)

    def forward(self, frames: Tensor) -> Tensor:
        """Scores (B, classes) of clips (B, 3, T, H, W) in [-1, 1]."""
        return cast(Tensor, self.net(self.prepare(frames)))

    def settings(self) -> dict[str, Any]:
        """What :func:`load_classifier` needs beside the weights, as plain data."""
        options = dict(self.options)
        if self.backbone == TWO_STREAM:
            options.pop("pretrained", None)  # the weights are in the folder
        return {
            "kind": KIND,
            "backbone": self.backbone,
            "options": options,
            "frames": self.frames,
            "size": self.size,
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            "reading": self.reading,
        }

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; without the second a folder is none.

        Args:
            folder: made where it is not there; a classifier in it is replaced.

        Raises:
            ValueError: options that JSON cannot hold.
        """
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        try:
            text = json.dumps(self.settings(), indent=1) + "\n"
        except TypeError as error:
            raise ValueError(
                f"options of a saved classifier must be plain data: {error}"
            ) from error
        (target / CONFIG).unlink(missing_ok=True)
        state = {name: x.detach().contiguous().cpu() for name, x in self.net.state_dict().items()}
        weights, config = target / f".{WEIGHTS}.part", target / f".{CONFIG}.part"
        save_file(state, weights)
        os.replace(weights, target / WEIGHTS)
        config.write_text(text, encoding="utf-8")
        os.replace(config, target / CONFIG)


def load_classifier(folder: str | Path) -> VideoClassifier:
    """The classifier that :meth:`VideoClassifier.save` or a training wrote, in evaluation mode.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: they are of another kind of model, or do not fit each other.
    """
    from safetensors.torch import load_file

    source = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"no video classifier at {str(source)!r}: {name} is not there; train one with "
                "'stvision train classify'"
            )
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    if settings.pop("kind", None) != KIND:
        raise ValueError(f"{source / CONFIG} does not describe a video classifier")
    model = VideoClassifier(**settings)
    try:
        model.net.load_state_dict(load_file(source / WEIGHTS))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{source / WEIGHTS} does not fit its {CONFIG}: {first}") from error
    return model.eval()


@torch.no_grad()
def view_probabilities(
    model: nn.Module, views: Tensor, batch_size: int = 32, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean over the views of each clip of the classes' probabilities.

    Args:
        model: from clips (N, C, T, H, W) in [-1, 1] to scores (N, classes).
        views: (B, V, T, H, W, C) uint8, on any device.
        batch_size: views that go through the model at once.
        dtype: of autocast; ``None`` for none.

    Returns:
        (B, classes) float32 on the model's device, rows summing to one.

    Raises:
        ValueError: another shape, or no view.
    """
    if views.ndim != 6 or 0 in views.shape[:2]:
        raise ValueError(
            f"views must be (B, V, T, H, W, C) with at least one view, got {tuple(views.shape)}"
        )
    device = next(model.parameters()).device
    parts = []
    for part in views.flatten(0, 1).split(batch_size):
        frames = part.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            scores = model(frames)
        parts.append(scores.float().softmax(-1))
    return torch.cat(parts).unflatten(0, views.shape[:2]).mean(1)


def top_hits(probabilities: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether each clip's class is among its ``k`` likeliest (all classes where there are fewer).

    Args:
        probabilities: (N, classes), or scores.
        labels: (N,) int64.
        k: at least 1.

    Returns:
        (N,) bool.
    """
    best = probabilities.topk(min(k, probabilities.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)


def class_mean(hits: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of hits (N,) among the clips of each."""
    shares = [hits[labels == label].double().mean() for label in labels.unique()]
    return float(torch.stack(shares).mean())
