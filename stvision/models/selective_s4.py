"""Long videos by selected tokens and state spaces (Wang et al. 2023, Selective S4 with LSMCL).

All patches of all frames, or tokens of a frozen backbone, are one sequence. A momentum copy of the
first S4 layer reads it whole; from what it says a mask generator picks tokens, and only these go
through a pyramid of S4 layers (ViS4mer, Islam and Bertasius 2022) that halves tokens and channels at
each stage. Positions in space and time are added before anything is dropped, so order and place of
what stays are kept.

No weights of it were published. Of ViS4mer's, :func:`convert_vis4mer_state_dict` gives the keys.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stvision.layers.checks import check_whole
from stvision.layers.state_space import S4
from stvision.layers.token_selection import (
    SELECTIONS,
    MaskGenerator,
    Selection,
    gather_tokens,
    mask_tokens,
    ratio_loss,
    select_exact,
    select_ratio,
)
from stvision.layers.vision import PatchConv, per_frame
from stvision.models.surface import Head, asked_stages
from stvision.models.weights import load_backbone, read_weights, unwrap


def grid_positions(grid: Sequence[int], dim: int, like: Tensor) -> Tensor:
    """Fixed sines and cosines of frame, row and column, for any grid.

    Args:
        grid: frames T, rows H, columns W.
        dim: channels, at least 6.
        like: a tensor of the wanted device and dtype.

    Returns:
        (T, H, W, dim): a third of the channels for each axis, of wavelengths 2 pi to 20000 pi
        positions; channels left over are zero.

    Raises:
        ValueError: fewer than 6 channels.
    """
    pairs = dim // 6
    if pairs < 1:
        raise ValueError(f"dim must be at least 6, got {dim}")
    rates = 10000 ** (-torch.arange(pairs, device=like.device, dtype=torch.float32) / pairs)
    parts = []
    for axis, size in enumerate(grid):
        angles = torch.arange(size, device=like.device, dtype=torch.float32)[:, None] * rates
        shape = [1, 1, 1, 2 * pairs]
        shape[axis] = size
        parts.append(torch.cat([angles.sin(), angles.cos()], -1).view(shape).expand(*grid, -1))
    return F.pad(torch.cat(parts, -1), (0, dim - 6 * pairs)).to(like.dtype)


@torch.no_grad()
def momentum_update(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """``target = momentum * target + (1 - momentum) * source`` for each parameter.

    Args:
        target: the slow copy, whose tensors may be buffers.
        source: a module of the same parameters.
        momentum: 0 to 1.

    Raises:
        ValueError: a momentum outside of that.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be 0 to 1, got {momentum}")
    slow = target.state_dict(keep_vars=True)
    for name, fast in source.named_parameters():
        slow[name].mul_(momentum).add_(fast.to(slow[name]), alpha=1 - momentum)


class PyramidStage(nn.Module):
    """LayerNorm, S4 and dropout beside the identity; mean of two tokens, linear layer to half, GELU.

    Args:
        dim: channels C, even.
        l_max: tokens that the S4 layer is made for.
        d_state: states of a channel.
        dropout: of channels, inside the S4 layer and behind it.
    """

    def __init__(self, dim: int, l_max: int, d_state: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.s4 = S4(dim, l_max, d_state, dropout)
        self.linear = nn.Linear(dim, dim // 2)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L // 2, C // 2); a single token is not halved."""
        y = self.s4(self.norm(x))
        if self.training and self.dropout:
            kept = y.new_empty(y.shape[0], 1, y.shape[2]).bernoulli_(1 - self.dropout)
            y = y * (kept / (1 - self.dropout))
        x = x + y
        if x.shape[1] > 1:
            x = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)
        return F.gelu(self.linear(x))


class _Guide(nn.Module):
    """The momentum copy of the first stage's norm and S4 layer.

    Its tensors are buffers: they change in training, so a checkpoint has to hold them, but no
    optimizer moves them.
    """

    def __init__(self, stage: PyramidStage) -> None:
        super().__init__()
        self.norm, self.s4 = copy.deepcopy(stage.norm), copy.deepcopy(stage.s4)
        for module in list(self.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, p.detach().clone())

    def train(self, mode: bool = True) -> "_Guide":
        """It never drops a channel."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, self.s4(self.norm(x)))


class SelectiveS4(nn.Module):
    """Classifier of long clips: tokens, selection, pyramid of S4 layers, mean, linear layer.

    After each step of the optimizer :meth:`update_momentum` moves the copy that guides the
    selection. With ``selection="ratio"`` the loss gets :meth:`selection_loss` added. The learning
    rate of :meth:`no_weight_decay` is 0.001 in the published recipe, that of AdamW for the rest.

    Args:
        dim: channels of the tokens, divisible by ``2 ** depth``.
        depth: stages of the pyramid.
        patch_size: rows and columns of the patches of a frame.
        l_max: tokens before selection that the layers are made for; others run too.
        d_state: states of a channel.
        keep_ratio: share of tokens that is kept, above 0 and at most 1. At 1 nothing is selected.
        selection: ``"exact"`` keeps a fixed number, ``"ratio"`` lets each token decide in training
            and keeps that fixed number at test.
        gather: in training with ``"exact"``, take the kept tokens alone, as at test; otherwise the
            dropped stay as zeros. ``"ratio"`` always sets to zero in training.
        in_chans: channels of frames.
        num_classes: outputs of the head; 0 for none.
        frames: ``None`` for images (B, C, H, W), a number for clips (B, C, T, H, W) of any length.
        dropout: of channels in the stages.
        momentum: of the copy.
        drop_rate: dropout before the head.

    Raises:
        ValueError: arguments that do not fit.
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 3,
        patch_size: int = 16,
        l_max: int = 2048,
        d_state: int = 64,
        *,
        keep_ratio: float = 0.5,
        selection: str = "exact",
        gather: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        dropout: float = 0.2,
        momentum: float = 0.99,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1 or dim < 6 or dim % 2**depth:
            raise ValueError(
                f"dim must be at least 6 and a multiple of {2 ** max(1, depth)} for depth {depth} "
                f"(at least 1), got {dim}"
            )
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be 'exact' or 'ratio', got {selection!r}")
        check_whole(1, in_chans=in_chans, patch_size=patch_size, l_max=l_max)
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be None (images) or at least 1, got {frames}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be 0 to 1, got {momentum}")
        self.dim, self.in_chans, self.num_classes, self.frames = dim, in_chans, num_classes, frames
        self.keep_ratio, self.selection, self.gather = keep_ratio, selection, gather
        self.momentum, self.grad_checkpointing = momentum, False
        self.num_features = self.head_hidden_size = dim >> depth
        self.patch_embed = PatchConv(in_chans, dim, patch_size, stride=patch_size)
        self.stages = nn.ModuleList(
            PyramidStage(
                dim >> i,
                max(1, (l_max if keep_ratio == 1 else self.kept(l_max)) >> i),
                d_state,
                dropout,
            )
            for i in range(depth)
        )
        self.guide: _Guide | None = None
        self.mask_generator: MaskGenerator | None = None
        if keep_ratio < 1:
            self.guide = _Guide(cast(PyramidStage, self.stages[0]))
            self.mask_generator = MaskGenerator(dim)
        self.head = Head(dim >> depth, num_classes, drop_rate=drop_rate)
        self.feature_info = [
            {"num_chs": dim >> (i + 1), "reduction": 2 ** (i + 1), "module": f"stages.{i}"}
            for i in range(depth)
        ]

    def kept(self, tokens: int) -> int:
        """How many of ``tokens`` an exact selection keeps: at least 1."""
        return max(1, round(tokens * self.keep_ratio))

    def update_momentum(self) -> None:
        """Move the copy that guides the selection; call after each step of the optimizer."""
        if self.guide is not None:
            stage = cast(PyramidStage, self.stages[0])
            momentum_update(self.guide.norm, stage.norm, self.momentum)
            momentum_update(self.guide.s4, stage.s4, self.momentum)

    def load_pretrained_guide(self, contrast: "LongShortContrast") -> None:
        """Take the layers that :class:`LongShortContrast` trained, into stage 0 and into the copy."""
        stage = cast(PyramidStage, self.stages[0])
        stage.norm.load_state_dict(contrast.query.norm.state_dict())
        stage.s4.load_state_dict(contrast.query.s4.state_dict())
        if self.guide is not None:
            self.guide.norm.load_state_dict(contrast.key.norm.state_dict())
            self.guide.s4.load_state_dict(contrast.key.s4.state_dict())

    def no_weight_decay(self) -> set[str]:
        """Names of the state-space parameters."""
        ends = (".log_dt", ".w", ".B", ".C", ".D")
        return {
            name for name, _ in self.named_parameters() if ".s4" in name and name.endswith(ends)
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer of ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: a negative number, or a pooling other than the mean.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        self.head.reset(num_classes)
        self.head.to(self.patch_embed.weight)  # its own fresh layer knows no dtype
        self.num_classes = num_classes

    def tokenize(self, x: Tensor) -> Tensor:
        """Images or clips to tokens (B, L, C) with their positions added."""
        rank = 4 if self.frames is None else 5
        if x.ndim != rank or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            axes = "H, W" if self.frames is None else "T, H, W"
            raise ValueError(
                f"x must be (B, {self.in_chans}, {axes}), none of them 0, got {tuple(x.shape)}"
            )
        x = x.unsqueeze(2) if self.frames is None else x
        grid = per_frame(self.patch_embed, x.permute(0, 2, 3, 4, 1))
        return (grid + grid_positions(grid.shape[1:4], self.dim, grid)).flatten(1, 3)

    def select(self, tokens: Tensor) -> Selection:
        """Which of the tokens (B, L, C) are kept; random in training."""
        if self.guide is None or self.mask_generator is None:
            whole = torch.ones_like(tokens[..., 0])
            index = torch.arange(tokens.shape[1], device=tokens.device)
            return Selection(whole, index.expand(tokens.shape[0], -1))
        logits = self.mask_generator(self.guide(tokens))
        if self.training and self.selection == "ratio":
            return select_ratio(logits, noise=True)
        return select_exact(logits, self.kept(tokens.shape[1]), noise=self.training)

    def selection_loss(self, selection: Selection) -> Tensor:
        """:func:`~stvision.layers.token_selection.ratio_loss` at this model's ratio."""
        return ratio_loss(selection.gate, self.keep_ratio)

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(stage, x, use_reentrant=False))
        return cast(Tensor, stage(x))

    def _pyramid(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = self._stage(stage, x)
        return x

    def apply_selection(self, tokens: Tensor, selection: Selection) -> Tensor:
        """What goes into the pyramid: the kept tokens, or all with the dropped as zeros."""
        if self.guide is None:
            return tokens
        if selection.kept is None or (self.training and not self.gather):
            return mask_tokens(tokens, selection)
        return gather_tokens(tokens, selection)

    def forward_tokens(self, tokens: Tensor) -> tuple[Tensor, Selection]:
        """Classify tokens of any backbone.

        Args:
            tokens: (B, L, C), positions added.

        Returns:
            (B, classes), and which tokens were kept.

        Raises:
            ValueError: another shape.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.dim or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be (B, L, {self.dim}), got {tuple(tokens.shape)}")
        selection = self.select(tokens)
        x = self._pyramid(self.apply_selection(tokens, selection))
        return self.forward_head(x), selection

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
    ) -> Any:
        """Sequences that the stages give.

        Args:
            x: images or clips.
            indices: stages to return; a number n for the last n, ``None`` for all.
            norm: no stage is followed by a norm; without effect.
            stop_early: do not compute past the last asked stage.
            output_fmt: ``"NLC"`` or ``"NCL"``.
            intermediates_only: return only the list.

        Returns:
            (the last sequence (B, L', C'), list of sequences), or the list.

        Raises:
            ValueError: a stage that does not exist, or an unknown format.
        """
        count = len(self.stages)
        if output_fmt not in {"NLC", "NCL"}:
            raise ValueError(f"output_fmt must be 'NLC' or 'NCL', got {output_fmt!r}")
        asked = asked_stages(indices, count)
        last = max(asked, default=count - 1) if stop_early else count - 1
        tokens = self.tokenize(x)
        x = self.apply_selection(tokens, self.select(tokens))
        found: list[Tensor] = []
        for stage in self.stages[: last + 1]:
            x = self._stage(stage, x)
            found.append(x)
        features = [found[i] for i in asked]
        features = [y.mT if output_fmt == "NCL" else y for y in features]
        return features if intermediates_only else (x, features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or clips to the last sequence (B, L', C')."""
        tokens = self.tokenize(x)
        return self._pyramid(self.apply_selection(tokens, self.select(tokens)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the sequence, then the head; ``pre_logits`` leaves the last layer out."""
        return cast(Tensor, self.head(x.mean(1), pre_logits=pre_logits))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), or clips (B, C, T, H, W), to (B, classes)."""
        return self.forward_head(self.forward_features(x))


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of finding each query's key among all keys by cosine.

    Args:
        query: (B, D).
        key: (B, D), row i belongs to query i.
        temperature: what cosines are divided by, above 0.

    Returns:
        A number in at least float32, also under autocast.

    Raises:
        ValueError: shapes that differ, or a temperature that is not above 0.
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(
            f"query and key must both be (B, D), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    # at such temperatures half precision would tell cosines apart in steps of several percent
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        cosines = F.normalize(query.to(wide), dim=1) @ F.normalize(key.to(wide), dim=1).mT
        own = torch.arange(len(query), device=query.device)
        return F.cross_entropy(cosines / temperature, own)


class _Encoder(nn.Module):
    """Norm, S4 and projection of the mean, of what :class:`LongShortContrast` compares."""

    def __init__(self, stage: PyramidStage, dim: int, projection: int) -> None:
        super().__init__()
        self.norm, self.s4 = copy.deepcopy(stage.norm), copy.deepcopy(stage.s4)
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, projection)

    def forward(self, x: Tensor) -> Tensor:
        pooled = (x + self.s4(self.norm(x))).mean(1)
        return cast(Tensor, self.fc2(F.gelu(self.fc1(pooled))))


class LongShortContrast(nn.Module):
    """Pretraining before selection: a short masked clip must find the long one of its video (LSMCL).

    Args:
        model: whose first norm and S4 layer are trained; its own weights stay as they are until
            :meth:`SelectiveS4.load_pretrained_guide`.
        projection: channels in which clips are compared.
        mask_ratio: share of tokens dropped at random from either, at least 0 and below 1.
        momentum: of the encoder of long clips.
        temperature: of :func:`info_nce`.
        symmetric: also ask the short clip through the momentum encoder for the long one.

    Raises:
        ValueError: a ratio or momentum that does not fit.
    """

    def __init__(
        self,
        model: SelectiveS4,
        projection: int = 128,
        mask_ratio: float = 0.5,
        momentum: float = 0.99,
        temperature: float = 0.07,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be 0 to 1, got {momentum}")
        self.mask_ratio, self.momentum = mask_ratio, momentum
        self.temperature, self.symmetric = temperature, symmetric
        self.query = _Encoder(cast(PyramidStage, model.stages[0]), model.dim, projection)
        self.key = copy.deepcopy(self.query)
        for p in self.key.parameters():
            p.requires_grad_(False)

    def drop(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, C) less a random share of them, in their order."""
        count = max(1, round(tokens.shape[1] * (1 - self.mask_ratio)))
        scores = torch.rand(tokens.shape[:2], device=tokens.device)
        index = scores.topk(count, dim=1).indices.sort(1).values
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

    @contextmanager
    def _no_dropout(self) -> Iterator[None]:
        was = self.key.training
        self.key.eval()
        try:
            yield
        finally:
            self.key.train(was)

    def _loss(self, asking: Tensor, asked: Tensor) -> Tensor:
        with torch.no_grad(), self._no_dropout():
            key = self.key(self.drop(asked))
        return info_nce(self.query(self.drop(asking)), key, self.temperature)

    def forward(self, short: Tensor, long: Tensor) -> Tensor:
        """The loss.

        Args:
            short: (B, L, C) tokens of the clips with fewer frames.
            long: (B, L', C) tokens of longer clips of the same videos.

        Raises:
            ValueError: another number of videos in the two, or other channels than the model's.
        """
        dim = self.query.fc1.in_features
        fits = all(x.ndim == 3 and x.shape[2] == dim and x.shape[1] > 0 for x in (short, long))
        if not fits or len(short) != len(long):
            raise ValueError(
                f"short and long must be (B, L, {dim}) of one B with L at least 1, "
                f"got {tuple(short.shape)} and {tuple(long.shape)}"
            )
        loss = self._loss(short, long)
        return (loss + self._loss(long, short)) / 2 if self.symmetric else loss

    def update_momentum(self) -> None:
        """Move the encoder of long clips; call after each step of the optimizer."""
        momentum_update(self.key, self.query, self.momentum)


def convert_vis4mer_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`SelectiveS4` (with ``keep_ratio=1``) from a checkpoint of ViS4mer.

    Args:
        state: the checkpoint, with or without what a training wraps around it. A linear layer on
            its input tokens (``encoder``), which it has where their channels differ from the
            model's, is left out: apply it before :meth:`SelectiveS4.forward_tokens`.

    Returns:
        A state dict without the patch embedding, which ViS4mer has not. Its layers were made for
        the ``l_max`` of its construction, which the model must be given too.
    """
    found = {}
    for key, value in unwrap(state).items():
        if key.startswith("encoder.") or re.search(r"krylov\.(nodes|z)$", key):
            continue
        new = re.sub(r"^s4_layers\.(\d+)\.", r"stages.\1.s4.", key)
        new = new.replace(".kernel.krylov.", ".")
        new = re.sub(r"^norms\.(\d+)\.", r"stages.\1.norm.", new)
        new = re.sub(r"^linears\.(\d+)\.", r"stages.\1.linear.", new)
        new = new.replace("decoder.", "head.fc.")
        # the upstream layer adds its bias to (B, C, L)
        found[new] = (
            value[:, 0] if new.endswith("output_linear.bias") and value.ndim == 2 else value
        )
    return found


#: keys that weights of ViS4mer lack and that keep their fresh values
_FRESH = ("patch_embed.weight", "patch_embed.bias")

_SIZES: dict[str, dict[str, Any]] = {
    "selective_s4_small": {"dim": 384, "depth": 3},
    "selective_s4_large": {"dim": 1024, "depth": 3},
    "vis4mer_large": {"dim": 1024, "depth": 3, "keep_ratio": 1.0},
}


def _builder(name: str) -> Callable[..., SelectiveS4]:
    def build(pretrained: str | Path | None = None, **options: Any) -> SelectiveS4:
        model = SelectiveS4(**(_SIZES[name] | options))
        if pretrained is not None:
            state = convert_vis4mer_state_dict(read_weights(pretrained))
            load_backbone(model, state, first_conv="patch_embed", fresh=_FRESH)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name}: {_SIZES[name]["dim"]} channels on patches of 16 x 16.

    Args:
        pretrained: weights in this project's keys, or ViS4mer's for ``keep_ratio=1``: a file, a
            folder or ``owner/name`` of a hub repository. Nothing differs between images and clips.
        options: arguments of :class:`SelectiveS4` that differ.
    """
    return build


#: name -> function ``(pretrained=None, **options)``
SELECTIVE_S4_MODELS: dict[str, Callable[..., SelectiveS4]] = {
    name: _builder(name) for name in _SIZES
}
