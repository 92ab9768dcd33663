"""Two-stream video classification: a frozen image backbone each for frames and flow, and a head over time.

Features of frames and of stacked optical flow are laid side by side and read by TS-LSTM or
Temporal-Inception (Ma et al. 2017). The published setting takes 25 frames equally spaced over the
video, ResNet-101 for both streams and stacks of 10 flow fields (20 channels); its heads were trained
by Adam: TS-LSTM at 0.0001, batches of 64, 100 epochs, gradients clipped at 5; Temporal-Inception at
0.00005, batches of 16, 30 epochs, L2 of 0.1, a tenth of the rate every 10 epochs.

Image weights start the backbones of both streams: the features of each frame are those of its image,
and the first convolution's weights are shared out over the channels of flow. The head is fresh.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stvision.layers import TEMPORAL_HEADS, TemporalInception
from stvision.models.surface import asked_stages
from stvision.models.weights import adapt_input_channels, load_backbone, read_weights
from stvision.optional import mend_torchvision, require

SOURCES = ("stvision", "timm", "torchvision")

#: classifiers in the middle of GoogLeNet and Inception v3, of use only beside the one at the end
_SIDE_CLASSIFIERS = ("aux1", "aux2", "AuxLogits")


def image_features(
    name: str, pretrained: bool | str | Path = False, in_chans: int = 3
) -> tuple[nn.Module, int]:
    """A network from images (N, in_chans, H, W) to pooled features (N, D), and D.

    Args:
        name: ``"timm:resnet101"``, ``"torchvision:resnet101"`` or ``"stvision:davit_tiny"``; of
            torchvision those that classify images, without the classifiers that some have in
            their middle.
        pretrained: weights in the layout of the source: a file, a folder or ``owner/name`` of a hub
            repository. ``True`` for those that timm or torchvision bring, which they download.
        in_chans: channels; the first convolution's weights are summed or shared out.

    Raises:
        ValueError: an unknown source or network, one for clips, boxes or masks, one whose last layer
            is not found, or weights that do not fit.
        FileNotFoundError: ``pretrained`` names nothing that exists.
        ImportError: the source is not installed; the sentence says how to install it.
    """
    weights = None if isinstance(pretrained, bool) else pretrained
    brought = pretrained is True
    source, _, model = name.partition(":")
    if source not in SOURCES or not model:
        raise ValueError(
            f"backbone must be one of {', '.join(f'{s}:NAME' for s in SOURCES)}, got {name!r}"
        )
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    if source == "stvision":
        from stvision.models.backbones import create_backbone

        if brought:
            raise ValueError("pretrained of a stvision backbone must name its weights, got True")
        net = create_backbone(model, weights, in_chans=in_chans, num_classes=0)
        return net, cast(int, net.num_features)
    mend_torchvision()
    if source == "timm":
        timm = require("timm", extra="vision", pinned=True)
        if not timm.is_model(model):
            raise ValueError(f"backbone {name!r} is no network that timm {timm.__version__} has")
        net = timm.create_model(model, pretrained=brought, in_chans=in_chans, num_classes=0)
        if weights is not None:
            _load(net, weights, net.pretrained_cfg.get("classifier") or ())
        # some narrow or widen what they pooled
        return net, int(getattr(net, "head_hidden_size", net.num_features))
    models = require("torchvision.models", extra="vision", distribution="torchvision", pinned=True)
    if model.lower() not in models.list_models():
        raise ValueError(f"backbone {name!r} is no network that torchvision has")
    # the others take clips or pairs, or give boxes and masks and fetch weights for a part of theirs
    rooms = (models, models.quantization)
    if not any(model.lower() in models.list_models(module=room) for room in rooms):
        raise ValueError(
            "a backbone of torchvision must be a network that classifies images, one of "
            f"torchvision.models.list_models(module=torchvision.models), got {name!r}"
        )
    net = models.get_model(model, weights="DEFAULT" if brought else None)
    for side in _SIDE_CLASSIFIERS:
        if hasattr(net, side):  # in training they would make the output a tuple
            setattr(net, side, None)
            net.aux_logits = False
    classifier, dim = _cut_classifier(net, name)
    _set_input_channels(net, in_chans)
    if weights is not None:
        _load(net, weights, (classifier, *_SIDE_CLASSIFIERS))
    return net, dim


def _load(net: nn.Module, source: str | Path, classifiers: str | Sequence[str]) -> None:
    """Load a library's own file into its network, whose classifiers are off."""
    names = [classifiers] if isinstance(classifiers, str) else classifiers
    ends = tuple(f"{name}." for name in names)
    state = {key: x for key, x in read_weights(source).items() if not key.startswith(ends)}
    # files older than the counter of batch norms lack it
    first, fresh = _first_conv(net), ("num_batches_tracked",)
    load_backbone(net, state, first_conv=first, head="", fresh=fresh)


def _first_conv(net: nn.Module) -> str:
    """Name of the first convolution; empty where there is none."""
    return next((key for key, x in net.named_modules() if isinstance(x, nn.Conv2d)), "")


def _cut_classifier(net: nn.Module, name: str) -> tuple[str, int]:
    """Take off the last linear layer of a torchvision model; its name and number of inputs."""
    path, last = "", None
    for key, module in net.named_modules():
        if isinstance(module, nn.Linear):
            path, last = key, module
    if last is None or path.split(".")[0] not in {"fc", "classifier", "head", "heads"}:
        raise ValueError(f"{name} ends in no linear classifier that could be taken off")
    net.set_submodule(path, nn.Identity())
    return path, last.in_features


def _set_input_channels(net: nn.Module, in_chans: int) -> None:
    key = _first_conv(net)
    conv = net.get_submodule(key) if key else None
    if not isinstance(conv, nn.Conv2d) or conv.in_channels == in_chans:
        return
    other = nn.Conv2d(
        in_chans,
        conv.out_channels,
        cast(Any, conv.kernel_size),
        cast(Any, conv.stride),
        cast(Any, conv.padding),
        cast(Any, conv.dilation),
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        other.weight.copy_(adapt_input_channels(conv.weight, in_chans))
        if conv.bias is not None:
            cast(Tensor, other.bias).copy_(conv.bias)
    net.set_submodule(key, other)


def stack_flow(flow: Tensor, length: int = 10) -> Tensor:
    """For each frame the ``length`` flow fields from it on, as channels.

    Args:
        flow: (B, 2, T, H, W), from each frame to the next, x before y.
        length: fields; past the last frame the last field is repeated.

    Returns:
        (B, 2 * length, T, H, W): x and y of the first field, x and y of the second, and so on.

    Raises:
        ValueError: the shape or the length.
    """
    if flow.ndim != 5 or flow.shape[1] != 2 or length < 1:
        raise ValueError(
            f"flow must be (B, 2, T, H, W) and length at least 1, "
            f"got {tuple(flow.shape)} and {length}"
        )
    frames = torch.arange(flow.shape[2], device=flow.device)
    index = (frames[:, None] + torch.arange(length, device=flow.device)).clamp(max=len(frames) - 1)
    stacked = flow[:, :, index]  # (B, 2, T, length, H, W)
    return stacked.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)


class TwoStream(nn.Module):
    """Image backbones for frames and, where wanted, flow; features side by side; a head over time.

    Args:
        backbone: a name for :func:`image_features`, or a module from images to (N, D).
        head: ``"ts-lstm"`` or ``"temporal-inception"``.
        num_classes: outputs; 0 for none.
        flow_backbone: like ``backbone``, of the flow; ``None`` for frames alone.
        pretrained: of the named backbones, one for both, see :func:`image_features`.
        in_chans: channels of frames.
        flow_chans: channels of flow.
        frozen: keep the backbones as they are, in evaluation mode and without gradients.
        dim: D of a module given as ``backbone``; of both together with flow.
        options: further arguments of the head.

    Raises:
        ValueError: unknown names, or a module without ``dim``.
        ImportError: a source of backbones is not installed.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "timm:resnet101",
        head: str = "ts-lstm",
        num_classes: int = 101,
        *,
        flow_backbone: str | nn.Module | None = None,
        pretrained: bool | str | Path = False,
        in_chans: int = 3,
        flow_chans: int = 20,
        frozen: bool = True,
        dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if head not in TEMPORAL_HEADS:
            raise ValueError(f"head must be one of {', '.join(TEMPORAL_HEADS)}, got {head!r}")
        given = any(isinstance(net, nn.Module) for net in (backbone, flow_backbone))
        if given and (dim is None or dim < 1):
            raise ValueError(f"dim must be the backbones' features, at least 1, got {dim}")
        self.in_chans, self.flow_chans, self.frozen = in_chans, flow_chans, frozen
        found = 0
        nets: list[nn.Module | None] = []
        for net, channels in ((backbone, in_chans), (flow_backbone, flow_chans)):
            if isinstance(net, str):
                net, size = image_features(net, pretrained, channels)
                found += size
            nets.append(net)
        self.backbone, self.flow_backbone = cast(nn.Module, nets[0]), nets[1]
        self.num_features = cast(int, dim) if given else found
        self.num_classes = num_classes
        self.head = TEMPORAL_HEADS[head](self.num_features, num_classes, **options)
        self.head_hidden_size = cast(int, self.head.num_features)
        self.feature_info = [{"num_chs": self.num_features, "reduction": 0, "module": "backbone"}]
        if frozen:
            for net in self._nets():
                for p in net.parameters():
                    p.requires_grad_(False)
        self.train(self.training)

    def _nets(self) -> list[nn.Module]:
        return [net for net in (self.backbone, self.flow_backbone) if net is not None]

    def train(self, mode: bool = True) -> "TwoStream":
        """Frozen backbones stay in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for net in self._nets():
                net.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Passed on to backbones that have it."""
        for net in self._nets():
            if hasattr(net, "set_grad_checkpointing"):
                cast(Any, net).set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return cast(nn.Module, self.head.fc)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer of ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: a negative number, or a pooling, in whose place the head over time stands.
        """
        if global_pool is not None:
            raise ValueError(f"global_pool must be None, got {global_pool!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        like = next(self.head.parameters())
        fresh = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head.fc = fresh.to(like)
        self.num_classes = num_classes

    def _stream(self, net: nn.Module, x: Tensor, channels: int, name: str) -> Tensor:
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"{name} must be (B, {channels}, T, H, W), got {tuple(x.shape)}")
        images = x.transpose(1, 2).flatten(0, 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = net(images)
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the backbone must give (N, D), got {got}")
        return cast(Tensor, features.unflatten(0, (x.shape[0], -1)))

    def forward_features(self, x: Tensor, flow: Tensor | None = None) -> Tensor:
        """Features of each frame, which a training of the head alone can keep.

        Args:
            x: (B, C, T, H, W).
            flow: (B, flow_chans, T, H, W), see :func:`stack_flow`; with a flow backbone only.

        Returns:
            (B, T, D).

        Raises:
            ValueError: shapes that do not fit, or flow where there is no backbone for it.
        """
        features = self._stream(self.backbone, x, self.in_chans, "x")
        if (flow is None) != (self.flow_backbone is None):
            word = "needs" if flow is None else "takes no"
            raise ValueError(f"this model {word} flow")
        if flow is not None and self.flow_backbone is not None:
            moving = self._stream(self.flow_backbone, flow, self.flow_chans, "flow")
            if moving.shape[:2] != features.shape[:2]:
                raise ValueError(
                    f"x and flow must have one batch and number of frames, got "
                    f"{tuple(features.shape[:2])} and {tuple(moving.shape[:2])}"
                )
            features = torch.cat([features, moving], dim=-1)
        return features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
        *,
        flow: Tensor | None = None,
    ) -> Any:
        """Features of the frames, the one stage that there is.

        Args:
            x: clips, see :meth:`forward_features`.
            indices: 0 or -1 in a list, 1, or ``None``; all mean the same.
            norm: no norm follows; without effect.
            stop_early: without effect.
            output_fmt: ``"NLC"`` (B, T, D) or ``"NCL"`` (B, D, T).
            intermediates_only: return only the list.
            flow: see :meth:`forward_features`.

        Returns:
            (features (B, T, D), list of features), or the list.

        Raises:
            ValueError: another stage or format, or what :meth:`forward_features` refuses.
        """
        if output_fmt not in {"NLC", "NCL"}:
            raise ValueError(f"output_fmt must be 'NLC' or 'NCL', got {output_fmt!r}")
        asked = asked_stages(indices, 1)
        features = self.forward_features(x, flow)
        found = [features if output_fmt == "NLC" else features.mT for _ in asked]
        return found if intermediates_only else (features, found)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, T, D) to scores (B, classes); ``pre_logits`` leaves the last layer out."""
        return cast(Tensor, self.head(features, pre_logits=pre_logits))

    def forward(self, x: Tensor, flow: Tensor | None = None) -> Tensor:
        """Clips (B, C, T, H, W), and flow of the same frames, to scores (B, classes)."""
        return self.forward_head(self.forward_features(x, flow))

    @torch.no_grad()
    def predict(self, clips: Sequence[Tensor], flows: Sequence[Tensor] | None = None) -> Tensor:
        """Mean over several clips or crops of a video of the classes' probabilities.

        Args:
            clips: each as in :meth:`forward`, of any sizes.
            flows: one for each clip, with a flow backbone.

        Returns:
            (B, classes), rows summing to one.

        Raises:
            ValueError: no clip, or another number of flows.
        """
        if not clips or (flows is not None and len(flows) != len(clips)):
            raise ValueError(
                f"clips must not be empty and flows as many, got {len(clips)} and "
                f"{None if flows is None else len(flows)}"
            )
        pairs = zip(clips, [None] * len(clips) if flows is None else flows, strict=True)
        scores = [self(clip, flow).softmax(-1) for clip, flow in pairs]
        return torch.stack(scores).mean(0)


#: name in configurations -> head
TWO_STREAM_HEADS = {f"two_stream_{head.replace('-', '_')}": head for head in TEMPORAL_HEADS}

_PARTS = ("backbone.", "flow_backbone.", "head.")


def _builder(name: str) -> Callable[..., TwoStream]:
    head = TWO_STREAM_HEADS[name]

    def build(
        pretrained: str | Path | None = None, frames: int | None = None, **options: Any
    ) -> TwoStream:
        least, most = options.get("segments", 3), math.inf  # of TS-LSTM
        if head == "temporal-inception":  # whose modules come down to one step
            least = math.prod(TemporalInception.pools)
            most = 2 * least - 1
        if frames is None or not least <= frames <= most:
            allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise ValueError(
                f"frames of {name}, which reads clips, must be {allowed}, got {frames}"
            )
        whole = None
        if pretrained is not None:
            state = read_weights(pretrained)
            if all(key.startswith(_PARTS) for key in state):
                whole = state
            elif isinstance(options.get("backbone"), nn.Module):
                raise ValueError(
                    f"pretrained must hold the whole model where backbone is a module, got "
                    f"{str(pretrained)!r}"
                )
        images = pretrained if pretrained is not None and whole is None else False
        model = TwoStream(head=head, pretrained=images, **options)
        if whole is not None:
            first = f"backbone.{_first_conv(model.backbone)}"
            load_backbone(model, whole, first_conv=first)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""A frozen ResNet-101 of timm, read over time by the head ``{head}``.

    Args:
        pretrained: weights of the image backbone in its own layout, which start that of flow too, or
            of the whole model in this project's keys: a file, a folder or ``owner/name`` of a hub
            repository.
        frames: of the clips, spread over the video; as published 25.
        options: arguments of :class:`TwoStream` and of its head that differ, such as ``backbone``
            and, for clips with flow, ``flow_backbone``.
    """
    return build


#: name -> function ``(pretrained=None, frames=None, **options)``
TWO_STREAM_MODELS: dict[str, Callable[..., TwoStream]] = {
    name: _builder(name) for name in TWO_STREAM_HEADS
}
