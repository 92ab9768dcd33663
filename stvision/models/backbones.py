"""The catalogue of image and video backbones, and one function that builds each of them by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from stvision.layers import TEMPORAL_HEADS
from stvision.layers.conv_s5 import ConvS5, ConvSSM
from stvision.models.biformer import BIFORMER_MODELS, BiFormer
from stvision.models.convs5 import CONVS5_MODELS, ConvS5Backbone
from stvision.models.davit import DAVIT_MODELS, DaViT
from stvision.models.halonet import HALONET_MODELS, HaloNet
from stvision.models.mechanism_classifier import MECHANISM_MODELS, MechanismClassifier
from stvision.models.nat import NAT, NAT_MODELS
from stvision.models.selective_s4 import SELECTIVE_S4_MODELS, SelectiveS4
from stvision.models.surface import check_options, option_names
from stvision.models.tvts import TVTS, TVTS_MODELS
from stvision.models.two_stream import TWO_STREAM_HEADS, TWO_STREAM_MODELS, TwoStream
from stvision.models.weights import read_options


def _nat(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A builder of NAT that takes ``frames``: its windows get up to 5 of them, an odd number."""

    def with_frames(
        pretrained: str | Path | None = None, frames: int | None = None, **options: Any
    ) -> nn.Module:
        if frames is not None and "frame_kernel" not in options:
            # of two frames a window takes both
            options["frame_kernel"] = frames if frames < 3 else min(5, frames - 1 + frames % 2)
        return build(pretrained, **options)

    with_frames.__name__ = with_frames.__qualname__ = build.__name__
    with_frames.__doc__ = build.__doc__
    return with_frames


#: name -> function ``(pretrained=None, frames=None, **options)``
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    **{name: _nat(build) for name, build in NAT_MODELS.items()},
    **DAVIT_MODELS,
    **BIFORMER_MODELS,
    **HALONET_MODELS,
    **SELECTIVE_S4_MODELS,
    **CONVS5_MODELS,
    **TVTS_MODELS,
    **TWO_STREAM_MODELS,
    **MECHANISM_MODELS,
}

#: name -> classes whose arguments are its options
_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(NAT_MODELS, (NAT,)),
    **dict.fromkeys(DAVIT_MODELS, (DaViT,)),
    **dict.fromkeys(BIFORMER_MODELS, (BiFormer,)),
    **dict.fromkeys(HALONET_MODELS, (HaloNet,)),
    **dict.fromkeys(SELECTIVE_S4_MODELS, (SelectiveS4,)),
    **dict.fromkeys(CONVS5_MODELS, (ConvS5Backbone, ConvS5, ConvSSM)),
    **dict.fromkeys(TVTS_MODELS, (TVTS,)),
    **{name: (TwoStream, TEMPORAL_HEADS[head]) for name, head in TWO_STREAM_HEADS.items()},
    **dict.fromkeys(MECHANISM_MODELS, (MechanismClassifier,)),
}

#: what :func:`create_backbone` takes by itself, and the head that a name says
_NO_OPTIONS = ("pretrained", "in_chans", "num_classes", "frames", "head")


def backbone_options(name: str) -> list[str]:
    """Names of the ``options`` that :func:`create_backbone` takes for a backbone, sorted.

    Raises:
        ValueError: an unknown name.
    """
    _check_name(name)
    return option_names(*_CLASSES[name], without=_NO_OPTIONS)


def _check_name(name: str) -> None:
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(sorted(BACKBONES))}, got {name!r}")


def create_backbone(
    name: str,
    pretrained: str | Path | None = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
    frames: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a backbone with timm's surface.

    All have ``forward_features``, ``forward_head``, ``forward_intermediates``,
    ``get_classifier``, ``reset_classifier``, ``set_grad_checkpointing`` and ``feature_info``.

    Args:
        name: a key of :data:`BACKBONES`.
        pretrained: image weights in a published layout: a file, a folder, or ``owner/name`` of a
            hub repository. A folder that ``stvision convert`` wrote also says which arguments its
            weights were made for, and those hold where none are given here. A video model takes
            them by the rule in the module of its family; in NAT, DaViT, BiFormer and HaloNet a clip
            of equal frames then gives the logits of its image.
        in_chans: channels of images or frames, ``None`` for 3; the first convolution's weights are
            summed or shared out where it is not theirs.
        num_classes: outputs of the head, 0 for none; ``None`` for as many as the published model
            has. Where the weights have another number the head stays fresh.
        frames: ``None`` for a model of images (B, C, H, W), a number for one of clips
            (B, C, T, H, W).
        options: further arguments of the model's class, see :func:`backbone_options`.

    Raises:
        ValueError: an unknown name or option, arguments that do not fit together, or weights that do
            not fit.
        FileNotFoundError: ``pretrained`` names nothing that exists.
    """
    _check_name(name)
    if frames is not None and (
        isinstance(frames, bool) or not isinstance(frames, int) or frames < 1
    ):
        raise ValueError(f"frames must be None (images) or a number of at least 1, got {frames!r}")
    allowed = backbone_options(name)
    check_options(name, options, allowed)
    given = {"in_chans": in_chans, "num_classes": num_classes}
    options |= {key: value for key, value in given.items() if value is not None}
    if pretrained is not None:
        saved = read_options(pretrained)
        check_options(name, saved.keys() - given.keys() - {"frames"}, allowed)
        options = {key: value for key, value in saved.items() if key != "frames"} | options
    options.setdefault("in_chans", 3)
    return BACKBONES[name](pretrained, frames=frames, **options)
