"""The surface that backbones share with timm's models: features, intermediates, head.

Inside, a grid is (B, T, H, W, C); an image is a clip of one frame whose axis T is taken off again on
the way out.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stvision.layers.checks import check_whole


def asked_stages(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Places from 0 of the stages that :meth:`Backbone.forward_intermediates` is asked for.

    Args:
        indices: places, from the end where negative; a number n for the last n, ``None`` for all.
        count: stages of the model.

    Raises:
        ValueError: a stage that does not exist.
    """
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices={indices} must lie between 1 and {count}")
        indices = range(count - indices, count)
    asked = list(range(count) if indices is None else indices)
    if any(not -count <= i < count for i in asked):
        raise ValueError(f"indices={asked} must lie between {-count} and {count - 1}")
    return [i % count for i in asked]


def option_names(*classes: type[nn.Module], without: Iterable[str] = ()) -> list[str]:
    """Names of the arguments of classes of which the first hands what it does not take to the next.

    Args:
        classes: a model's class, then those that get what its ``**options`` hold.
        without: names that are no options, such as what a builder gives itself.

    Returns:
        The names, sorted.
    """
    found = {
        name
        for cls in classes
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return sorted(found.difference(without))


def check_options(backbone: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse options that a backbone does not have.

    Args:
        backbone: its name.
        given: names of options.
        allowed: see :func:`option_names`.

    Raises:
        ValueError: one of them is not allowed.
    """
    unknown = sorted(set(given).difference(allowed))
    if unknown:
        raise ValueError(
            f"options of backbone {backbone!r} must be among {', '.join(allowed)}, "
            f"got {', '.join(unknown)}"
        )


class Stage(nn.Module):
    """Blocks at one resolution, behind what brings the grid there.

    Args:
        blocks: modules from and to (B, T, H, W, C).
        downsample: from the last stage's grid to this one's; ``None`` for the first stage.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to (B, T, H', W', C')."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
            else:
                x = block(x)
        return x


class Head(nn.Module):
    """Norm, dropout and linear layer on pooled features (B, D).

    Args:
        dim: D.
        num_classes: outputs; 0 for none.
        norm: module on (B, D), ``None`` for none.
        drop_rate: dropout before the linear layer.
    """

    def __init__(
        self, dim: int, num_classes: int, norm: nn.Module | None = None, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm is None else norm
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.dim = dim
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """A fresh linear layer of ``num_classes`` outputs."""
        check_whole(0, num_classes=num_classes)
        self.fc = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.dim, num_classes)
            nn.init.trunc_normal_(self.fc.weight, std=0.02)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D) to (B, classes), or to (B, D) before the linear layer."""
        x = self.drop(self.norm(x))
        return x if pre_logits else cast(Tensor, self.fc(x))


class Backbone(nn.Module):
    """Stages between a stem and a head; a model gives :meth:`embed` and the modules.

    Args:
        in_chans: channels of images or frames.
        num_classes: outputs of the head; 0 for none.
        widths: channels of each stage.
        frames: ``None`` for a model of images (B, C, H, W); a number for a model of clips
            (B, C, T, H, W). Nothing but the defaults of a model depends on the number: clips of
            another length run too.
        reductions: rows of the input over rows of each stage.
    """

    stages: nn.ModuleList
    head: nn.Module

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        widths: Sequence[int],
        frames: int | None,
        reductions: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_whole(1, in_chans=in_chans)
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be None (images) or at least 1, got {frames}")
        self.in_chans, self.num_classes, self.frames = in_chans, num_classes, frames
        self.num_features = self.head_hidden_size = widths[-1]
        ratios = [4 * 2**i for i in range(len(widths))] if reductions is None else reductions
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": ratio, "module": f"stages.{i}"}
            for i, (width, ratio) in enumerate(zip(widths, ratios, strict=True))
        ]

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to the first grid (B, T, H', W', C)."""
        raise NotImplementedError

    def norm_features(self, x: Tensor) -> Tensor:
        """What follows the last stage and comes before pooling; here nothing."""
        return x

    def parts(self) -> nn.ModuleList:
        """What runs between stem and head, each with its entry in ``feature_info``; the stages."""
        return self.stages

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        for stage in self.parts():
            cast(Any, stage).grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return cast(nn.Module, self.head.fc)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer of ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: a negative number, or a pooling other than the mean.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        cast(Head, self.head).reset(num_classes)
        self.get_classifier().to(next(self.parameters()))  # device and dtype
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside those of one axis."""
        return set()

    def _grid(self, x: Tensor) -> Tensor:
        """Checked input to (B, T, H, W, in_chans)."""
        rank = 4 if self.frames is None else 5
        if x.ndim != rank or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            axes = "H, W" if self.frames is None else "T, H, W"
            raise ValueError(
                f"x must be (B, {self.in_chans}, {axes}), none of them 0, got {tuple(x.shape)}"
            )
        x = x if self.frames is not None else x.unsqueeze(2)
        return x.permute(0, 2, 3, 4, 1)

    def _outside(self, x: Tensor) -> Tensor:
        return x.squeeze(1) if self.frames is None else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of each stage.

        Args:
            x: images (B, C, H, W), or clips (B, C, T, H, W) for a model of clips.
            indices: stages to return; a number n for the last n, ``None`` for all.
            norm: apply what follows the last stage to the last stage's features.
            stop_early: do not compute past the last asked stage.
            output_fmt: ``"NCHW"`` (channels second) or ``"NHWC"`` (last).
            intermediates_only: return only the list.

        Returns:
            (result of :meth:`forward_features`, list of features), or the list. With
            ``stop_early`` the first is the features where the computation stopped.

        Raises:
            ValueError: a stage that does not exist, an unknown format, or another shape of ``x``.
        """
        count = len(self.parts())
        if output_fmt not in {"NCHW", "NHWC"}:
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        asked = asked_stages(indices, count)
        last = max(asked, default=count - 1) if stop_early else count - 1
        found: dict[int, Tensor] = {}
        x = self.embed(self._grid(x))
        for i, stage in enumerate(self.parts()):
            if i > last:
                break
            x = stage(x)
            if i in asked:
                y = self._outside(self.norm_features(x) if norm and i == count - 1 else x)
                found[i] = y.movedim(-1, 1) if output_fmt == "NCHW" else y
        features = [found[i] for i in asked]
        if intermediates_only:
            return features
        return self._outside(self.norm_features(x) if last == count - 1 else x), features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to (B, H', W', D), clips to (B, T, H', W', D)."""
        x = self.embed(self._grid(x))
        for stage in self.parts():
            x = stage(x)
        return self._outside(self.norm_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the grid, then the head; ``pre_logits`` leaves the last layer out."""
        return cast(Tensor, self.head(x.flatten(1, -2).mean(1), pre_logits=pre_logits))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), or clips (B, C, T, H, W) for a model of clips, to (B, classes)."""
        return self.forward_head(self.forward_features(x))
