"""ConvS5 networks (Smith et al. 2023): prediction of frames, and clips to classes.

A convolutional encoder takes each frame to a quarter of its rows and columns, layers of ConvS5 run
over time, and a decoder gives the next frame. In training all frames are computed at once; in
generation each takes the time and memory of one, however long the clip is.

:func:`convert_convs5_flax` takes the parameters of the authors' Flax models without codebooks
(Moving-MNIST). Their file of parameters has to be flattened to an ``.npz`` first, with one array for
each path and ``/`` between its parts.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stvision.layers.conv_s5 import ConvS5
from stvision.layers.frames import GroupNorm
from stvision.layers.vision import per_frame
from stvision.models.surface import Backbone, Head, Stage
from stvision.models.weights import load_backbone, read_weights


class FrameBlock(nn.Module):
    """Two times group norm, ELU and convolution, a tenth of which is added to the identity.

    Args:
        in_dim: channels of the input.
        dim: channels of the output.
        groups: of the group norms; must divide both.
    """

    def __init__(self, in_dim: int, dim: int, groups: int = 32) -> None:
        super().__init__()
        if groups < 1 or in_dim % groups or dim % groups:
            raise ValueError(f"groups must divide {in_dim} and {dim} channels, got {groups}")
        self.norm1 = GroupNorm(groups, in_dim, eps=1e-6)
        self.conv1 = nn.Conv2d(in_dim, dim, 3, padding=1)
        self.norm2 = GroupNorm(groups, dim, eps=1e-6)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.skip = nn.Conv2d(in_dim, dim, 1, bias=False) if in_dim != dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H, W)."""
        y = self.conv1(F.elu(self.norm1(x)))
        y = self.conv2(F.elu(self.norm2(y)))
        return cast(Tensor, self.skip(x) + 0.1 * y)


class FrameEncoder(nn.Module):
    """Convolution and block, then for each further width a mean over 2 x 2 and a block.

    Args:
        in_chans: channels of frames.
        widths: channels at each resolution.
        groups: of the group norms.
    """

    def __init__(self, in_chans: int, widths: Sequence[int], groups: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, widths[0], 3, padding=1)
        dims = pairwise([widths[0], *widths])
        self.blocks = nn.ModuleList(FrameBlock(a, b, groups) for a, b in dims)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H / r, W / r), r = 2 to the number of widths less one.

        Raises:
            ValueError: rows or columns that r does not divide.
        """
        ratio = 2 ** (len(self.blocks) - 1)
        if x.shape[2] % ratio or x.shape[3] % ratio:
            raise ValueError(
                f"rows and columns must be multiples of {ratio}, got {x.shape[2]} x {x.shape[3]}"
            )
        x = self.conv(x)
        for i, block in enumerate(self.blocks):
            x = block(F.avg_pool2d(x, 2) if i else x)
        return x


class FrameDecoder(nn.Module):
    """The encoder mirrored: blocks, doubled rows and columns, at last norm and linear layer.

    Args:
        dim: channels of the input.
        out_chans: channels of frames.
        widths: those of the encoder; the first also follows the first convolution.
        groups: of the group norms.
    """

    def __init__(self, dim: int, out_chans: int, widths: Sequence[int], groups: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, widths[0], 3, padding=1)
        dims = pairwise([widths[0], *reversed(widths)])
        self.blocks = nn.ModuleList(FrameBlock(a, b, groups) for a, b in dims)
        self.norm = nn.LayerNorm(widths[0], eps=1e-6)
        self.fc = nn.Linear(widths[0], out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H r, W r)."""
        x = self.conv(x)
        for i, block in enumerate(self.blocks):
            x = block(F.interpolate(x, scale_factor=2.0, mode="nearest") if i else x)
        return cast(Tensor, self.fc(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def frame_loss(predicted: Tensor, target: Tensor, weight: float = 0.5) -> Tensor:
    """Weighted squared and absolute error, each summed over a row's values, then averaged.

    Args:
        predicted: (B, C, T, H, W).
        target: the same shape.
        weight: of the squared error, 0 to 1; the absolute error has the rest.

    Raises:
        ValueError: shapes that differ, or a weight outside of that.
    """
    if predicted.shape != target.shape or predicted.ndim != 5:
        raise ValueError(
            "predicted and target must both be (B, C, T, H, W), "
            f"got {tuple(predicted.shape)} and {tuple(target.shape)}"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be 0 to 1, got {weight}")
    difference = predicted - target
    per_row = difference.shape[1] * difference.shape[4]
    return per_row * (weight * difference.square().mean() + (1 - weight) * difference.abs().mean())


class ConvS5Predictor(nn.Module):
    """Predict each next frame of a clip from all before it, and generate beyond its end.

    Frames are in [-1, 1]. The prediction of frame t + 1 sees frames up to t and the action that
    leads to frame t + 1.

    Args:
        in_chans: channels of frames.
        widths: of the encoder; each further one halves rows and columns.
        dim: channels of the layers.
        state_dim: states of a layer before halving; ``None`` for ``dim``.
        depth: layers.
        actions: number of actions; 1 for none. One more means an unknown action.
        action_dim: channels of an action.
        kernel_size: rows and columns of the layers' convolutions.
        groups: of all group norms.
        options: further arguments of :class:`stvision.layers.conv_s5.ConvS5`.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        in_chans: int = 1,
        widths: Sequence[int] = (64, 128, 256),
        dim: int = 256,
        state_dim: int | None = None,
        depth: int = 8,
        actions: int = 1,
        action_dim: int = 1,
        kernel_size: int = 3,
        groups: int = 32,
        **options: Any,
    ) -> None:
        super().__init__()
        if min(in_chans, len(widths), dim, depth, actions, action_dim) < 1:
            raise ValueError(
                "in_chans, dim, depth, actions and action_dim must be at least 1 and widths not "
                f"empty, got {in_chans}, {dim}, {depth}, {actions}, {action_dim} and {widths}"
            )
        self.in_chans, self.actions = in_chans, actions
        self.encoder = FrameEncoder(in_chans, widths, groups=groups)
        self.action = nn.Embedding(actions + 1, action_dim)
        self.proj = nn.Linear(widths[-1] + action_dim, dim)
        options = {"clip_eigs": True} | options
        self.layers = nn.ModuleList(
            ConvS5(dim, state_dim, kernel_size, groups=groups, **options) for _ in range(depth)
        )
        self.decoder = FrameDecoder(dim, in_chans, widths, groups=groups)

    def stream(
        self, x: Tensor, actions: Tensor | None = None, states: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Predict the frame after each of these, going on from states.

        Args:
            x: (B, C, T, H, W) in [-1, 1].
            actions: (B, T) integers, of each the action that follows it; ``None`` for action 0.
            states: what the call for the frames before returned.

        Returns:
            Predictions (B, C, T, H, W) in (-1, 1), frame t standing for t + 1, and the states.

        Raises:
            ValueError: shapes or actions that do not fit.
        """
        if x.ndim != 5 or x.shape[1] != self.in_chans or x.shape[2] < 1:
            raise ValueError(
                f"x must be (B, {self.in_chans}, T, H, W) with T at least 1, got {tuple(x.shape)}"
            )
        batch, frames = x.shape[0], x.shape[2]
        if actions is None:
            actions = torch.zeros(batch, frames, dtype=torch.long, device=x.device)
        elif actions.shape != (batch, frames):
            raise ValueError(f"actions must be ({batch}, {frames}), got {tuple(actions.shape)}")
        if states is not None and len(states) != len(self.layers):
            raise ValueError(f"states must be {len(self.layers)} tensors, got {len(states)}")
        h = per_frame(self.encoder, x.permute(0, 2, 3, 4, 1))
        action = self.action(actions)[:, :, None, None].expand(*h.shape[:-1], -1)
        h = self.proj(torch.cat([h, action.to(h.dtype)], dim=-1))
        last = []
        for i, layer in enumerate(self.layers):
            h, state = cast(ConvS5, layer).stream(h, None if states is None else states[i])
            last.append(state)
        return per_frame(self.decoder, h).tanh().permute(0, 4, 1, 2, 3), last

    def forward(self, x: Tensor, actions: Tensor | None = None) -> Tensor:
        """Predictions of frames 2 to T of a clip from those before each.

        Args:
            x: (B, C, T, H, W) in [-1, 1], T at least 2.
            actions: (B, T) integers, entry t leading to frame t, the first of no effect.

        Returns:
            (B, C, T - 1, H, W) in (-1, 1); compare it with ``x[:, :, 1:]``.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.ndim == 5 and x.shape[2] < 2:
            raise ValueError(f"x must have at least 2 frames to predict one, got {x.shape[2]}")
        if actions is not None and actions.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"actions must be ({x.shape[0]}, {x.shape[2]}), got {tuple(actions.shape)}"
            )
        return self.stream(x[:, :, :-1], None if actions is None else actions[:, 1:])[0]

    @torch.no_grad()
    def generate(self, context: Tensor, frames: int, actions: Tensor | None = None) -> Tensor:
        """Continue a clip: the context at once, then frame by frame in memory of one.

        Args:
            context: (B, C, T, H, W) in [-1, 1].
            frames: how many to add, at least 1.
            actions: (B, T + frames) integers, entry t leading to frame t.

        Returns:
            (B, C, frames, H, W).

        Raises:
            ValueError: shapes that do not fit.
        """
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        length = context.shape[2] if context.ndim == 5 else 0
        if actions is not None and actions.shape != (len(context), length + frames):
            raise ValueError(
                f"actions must be ({len(context)}, {length + frames}), got {tuple(actions.shape)}"
            )
        out: list[Tensor] = []
        states: list[Tensor] | None = None
        x, at = context, 1
        for _ in range(frames):
            follow = None if actions is None else actions[:, at : at + x.shape[2]]
            at += x.shape[2]
            predicted, states = self.stream(x, follow, states)
            x = predicted[:, :, -1:]
            out.append(x)
        return torch.cat(out, dim=2)


class ConvS5Backbone(Backbone):
    """Encoder and layers of :class:`ConvS5Predictor` as a backbone of images or clips.

    Args:
        widths: of the encoder.
        dim: channels of the layers.
        state_dim: states of a layer before halving; ``None`` for ``dim``.
        depth: layers.
        groups: of all group norms.
        in_chans: channels of images or frames.
        num_classes: outputs of the head; 0 for none.
        frames: ``None`` for images, a number for clips of any length.
        drop_rate: dropout before the head.
        options: further arguments of :class:`stvision.layers.conv_s5.ConvS5`.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        dim: int = 256,
        state_dim: int | None = None,
        depth: int = 8,
        *,
        groups: int = 32,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        if min(len(widths), dim, depth) < 1:
            raise ValueError(
                f"dim and depth must be at least 1 and widths not empty, got {dim}, {depth} and "
                f"{tuple(widths)}"
            )
        super().__init__(in_chans, num_classes, [dim], frames, [2 ** (len(widths) - 1)])
        self.encoder = FrameEncoder(in_chans, widths, groups=groups)
        self.proj = nn.Linear(widths[-1], dim)
        options = {"clip_eigs": True} | options
        layers = [ConvS5(dim, state_dim, groups=groups, **options) for _ in range(depth)]
        self.stages = nn.ModuleList([Stage(layers)])
        self.head = Head(dim, num_classes, nn.LayerNorm(dim), drop_rate)

    def no_weight_decay(self) -> set[str]:
        """Names of the eigenvalues and step sizes."""
        ends = (".lambda_re", ".lambda_im", ".log_step")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to (B, T, H / r, W / r, C), padded right and below."""
        ratio = 2 ** (len(self.encoder.blocks) - 1)
        x = F.pad(x, (0, 0, 0, -x.shape[3] % ratio, 0, -x.shape[2] % ratio))
        return cast(Tensor, self.proj(per_frame(self.encoder, x)))


def _flax_conv(found: dict[str, Tensor], name: str, arrays: Mapping[str, Tensor], at: str) -> None:
    for key in ("kernel", "bias"):
        if f"{at}/{key}" in arrays:
            value = arrays[f"{at}/{key}"]
            if key == "kernel":
                value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.mT
            found[f"{name}.{'weight' if key == 'kernel' else key}"] = value


def _flax_norm(found: dict[str, Tensor], name: str, arrays: Mapping[str, Tensor], at: str) -> None:
    found[f"{name}.weight"] = arrays[f"{at}/scale"]
    found[f"{name}.bias"] = arrays[f"{at}/bias"]


def _flax_block(found: dict[str, Tensor], name: str, arrays: Mapping[str, Tensor], at: str) -> None:
    for i in (1, 2):
        _flax_norm(found, f"{name}.norm{i}", arrays, f"{at}/GroupNorm_{i - 1}")
        _flax_conv(found, f"{name}.conv{i}", arrays, f"{at}/Conv_{i - 1}")
    if f"{at}/AddBias_0/bias" in arrays:
        found[f"{name}.conv2.bias"] = arrays[f"{at}/AddBias_0/bias"]
    _flax_conv(found, f"{name}.skip", arrays, f"{at}/skip")


def _flax_layer(found: dict[str, Tensor], name: str, arrays: Mapping[str, Tensor], at: str) -> None:
    seq = f"{at}/seq"
    _flax_norm(found, f"{name}.norm", arrays, f"{at}/norm")
    found[f"{name}.ssm.lambda_re"] = arrays[f"{seq}/Lambda_re"]
    found[f"{name}.ssm.lambda_im"] = arrays[f"{seq}/Lambda_im"]
    found[f"{name}.ssm.log_step"] = arrays[f"{seq}/log_step"].flatten()
    c = arrays[f"{seq}/C"]  # (k, k, P, U, 2)
    size = c.shape[0]
    found[f"{name}.ssm.C"] = c.permute(3, 2, 4, 0, 1)
    b = arrays[f"{seq}/B"]  # (P, U k k, 2)
    area = b.shape[1] // c.shape[3]
    side = round(area**0.5)
    if side != size:
        raise ValueError(
            f"{seq}: kernels of B and C must be of one size, got {side} and {size} rows"
        )
    found[f"{name}.ssm.B"] = b.unflatten(1, (-1, side, side)).permute(0, 4, 1, 2, 3)
    out = f"{seq}/C_D_conv"
    if f"{out}/Conv_1/kernel" in arrays:
        _flax_block(found, f"{name}.readout", arrays, out)
    elif f"{out}/Conv_0/kernel" in arrays:
        _flax_conv(found, f"{name}.readout.conv", arrays, f"{out}/Conv_0")
        _flax_norm(found, f"{name}.readout.norm", arrays, f"{out}/GroupNorm_0")
    else:
        _flax_norm(found, f"{name}.readout.norm", arrays, f"{out}/norm")
        _flax_conv(found, f"{name}.readout.fc", arrays, f"{out}/Dense_0")


def convert_convs5_flax(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`ConvS5Predictor` from the authors' Flax parameters.

    Args:
        arrays: path with ``/`` to array, with or without ``params/`` before it: all of a model
            without codebook, or only ``layers_0/...`` of its sequence model.

    Returns:
        A state dict; of layers alone only ``layers.*``.

    Raises:
        ValueError: no layer is there, or kernels of unequal sizes.
    """
    known: dict[str, Tensor] = {}
    for key, value in arrays.items():
        path = key.removeprefix("params/").removeprefix("sequence_model/")
        known[path] = torch.as_tensor(np.asarray(value))
    found: dict[str, Tensor] = {}
    count = 0
    while f"layers_{count}/seq/B" in known:
        _flax_layer(found, f"layers.{count}", known, f"layers_{count}")
        count += 1
    if not count:
        raise ValueError("the arrays hold no layers_0/seq/B: these are no parameters of ConvS5")
    if "encoder/Conv_0/kernel" not in known:
        return {key: value.contiguous() for key, value in found.items()}
    found["action.weight"] = known["action_embeds/embedding"]
    _flax_conv(found, "proj", known, "action_conv/Conv_0")
    found["proj.weight"] = found["proj.weight"].flatten(1)
    for part in ("encoder", "decoder"):
        _flax_conv(found, f"{part}.conv", known, f"{part}/Conv_0")
        blocks = 0
        while f"{part}/ResNetBlock_{blocks}/Conv_0/kernel" in known:
            at = f"{part}/ResNetBlock_{blocks}"
            _flax_block(found, f"{part}.blocks.{blocks}", known, at)
            blocks += 1
    _flax_norm(found, "decoder.norm", known, "decoder/LayerNorm_0")
    _flax_conv(found, "decoder.fc", known, "decoder/Dense_0")
    return {key: value.contiguous() for key, value in found.items()}


def read_flax_npz(path: str | Path) -> dict[str, Tensor]:
    """:func:`convert_convs5_flax` of an ``.npz`` file.

    Raises:
        ValueError: the file holds other parameters.
        FileNotFoundError: there is no such file.
    """
    with np.load(path, allow_pickle=False) as arrays:
        return convert_convs5_flax(dict(arrays))


def convert_convs5_predictor(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of :class:`ConvS5Backbone` from those of :class:`ConvS5Predictor`.

    The action becomes part of a bias: action 0 where there are no others, else the unknown one. The
    decoder is left out, and there is no head.

    Args:
        state: weights of a predictor; those of a backbone pass unchanged.

    Raises:
        ValueError: layers alone, without encoder.
    """
    if not any(key.startswith("layers.") for key in state):
        return dict(state)
    if "action.weight" not in state or "encoder.conv.weight" not in state:
        raise ValueError("the weights are of layers alone, without the encoder of frames")
    found = {key: x for key, x in state.items() if key.startswith("encoder.")}
    actions = state["action.weight"]
    action = actions[0] if len(actions) == 2 else actions[-1]
    weight = state["proj.weight"]
    image = weight.shape[1] - len(action)
    found["proj.weight"] = weight[:, :image]
    found["proj.bias"] = state["proj.bias"] + weight[:, image:] @ action
    for key, x in state.items():
        if key.startswith("layers."):
            found[f"stages.0.blocks.{key.removeprefix('layers.')}"] = x
    return found


def convs5_predictor(pretrained: str | Path, **options: Any) -> ConvS5Predictor:
    """A predictor of the size that its weights have.

    Args:
        pretrained: weights in this package's keys, as ``stvision convert convs5`` writes them: a file,
            a folder or ``owner/name`` of a hub repository; or the authors' as an ``.npz`` file.
        options: ``groups`` and what else of :class:`ConvS5Predictor` shapes do not tell.

    Raises:
        ValueError: weights of something else.
        FileNotFoundError: ``pretrained`` names nothing that exists.
    """
    npz = Path(pretrained).suffix == ".npz"
    state = read_flax_npz(pretrained) if npz else read_weights(pretrained)
    if "layers.0.ssm.C" not in state or "decoder.fc.weight" not in state:
        raise ValueError(f"{pretrained} holds no weights of a ConvS5Predictor")
    first = "layers.0.readout."
    readout = "half_glu" if f"{first}fc.weight" in state else "standard"
    blocks = len({key.split(".")[2] for key in state if key.startswith("encoder.blocks.")})
    sizes: dict[str, Any] = {
        "in_chans": state["encoder.conv.weight"].shape[1],
        "widths": [state[f"encoder.blocks.{i}.conv2.weight"].shape[0] for i in range(blocks)],
        "dim": state["proj.weight"].shape[0],
        "state_dim": 2 * state["layers.0.ssm.lambda_re"].shape[0],
        "depth": len({key.split(".")[1] for key in state if key.startswith("layers.")}),
        "actions": state["action.weight"].shape[0] - 1,
        "action_dim": state["action.weight"].shape[1],
        "kernel_size": state["layers.0.ssm.C"].shape[-1],
        "readout": "resnet" if f"{first}conv2.weight" in state else readout,
    }
    model = ConvS5Predictor(**(sizes | options))
    model.load_state_dict(state)
    return model


#: keys that weights of predictors lack and that keep their fresh values
_FRESH = ("head.norm.weight", "head.norm.bias")

_SIZES: dict[str, dict[str, Any]] = {
    "convs5_small": {"widths": (32, 64, 128), "dim": 128, "depth": 4},
    "convs5_base": {},
}


def _builder(name: str) -> Callable[..., ConvS5Backbone]:
    def build(pretrained: str | Path | None = None, **options: Any) -> ConvS5Backbone:
        model = ConvS5Backbone(**(_SIZES[name] | options))
        if pretrained is not None:
            state = convert_convs5_predictor(read_weights(pretrained))
            load_backbone(model, state, first_conv="encoder.conv", fresh=_FRESH)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name}: an encoder of frames and layers of ConvS5, in the predictor's sizes.

    Args:
        pretrained: weights in this project's keys, of a backbone or of a predictor: a file, a folder
            or ``owner/name`` of a hub repository. Nothing differs between images and clips.
        options: arguments of :class:`ConvS5Backbone` that differ.
    """
    return build


#: name -> function ``(pretrained=None, **options)``
CONVS5_MODELS: dict[str, Callable[..., ConvS5Backbone]] = {name: _builder(name) for name in _SIZES}
